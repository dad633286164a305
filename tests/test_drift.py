"""Drift is measured right, adds up, and decides."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_stream.drift import DriftSums, drift_sums
from opd_stream.outcome import EpochRecord, StartDrift
from opd_stream.staleness import Staleness, decide_epoch
from pipeline.records import RoundReport

P = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05], dtype=torch.float64)
B = torch.tensor([0.30, 0.30, 0.20, 0.10, 0.10], dtype=torch.float64)
BOUNDS = Staleness(max_epochs=3, policy_drift=0.1, effective_sample_fraction=0.5)


def test_the_expected_drift_is_the_kl_of_behavior_to_student() -> None:
    expected = sum(
        B[y].item() * drift_sums(P[y].log()[None], B[y].log()[None]).policy_drift for y in range(5)
    )
    assert expected == pytest.approx(0.040547, abs=1e-6)
    assert expected == pytest.approx((B * (B / P).log()).sum().item(), abs=1e-12)


def test_the_page_names_drift_as_the_files_do() -> None:
    page = (Path(__file__).parent.parent / "docs" / "staleness.md").read_text()
    table = page[page.index("| name | formula") :].partition("\n\n")[0]
    names = {row.split("`")[1] for row in table.splitlines()[2:]}
    names |= {"start_drift", "drift_floor"}
    assert all(f"`{name}`" in page for name in names)
    files = (EpochRecord, StartDrift, RoundReport)
    assert names - {field for file in files for field in file.model_fields} == set()


def test_the_sign_inside_k3_matters() -> None:
    difference = (P / B).log()
    wrong = (B * ((-difference).exp() - 1 + difference)).sum().item()
    assert wrong == pytest.approx(0.0511, abs=1e-4)


def test_equal_policies_have_no_drift_and_every_sample_counts() -> None:
    sums = drift_sums(P.log(), P.log())
    assert sums.policy_drift == 0
    assert sums.effective_sample_fraction == 1


def test_one_token_that_carries_everything_leaves_one_effective_sample() -> None:
    sums = drift_sums(torch.tensor([15.0, -15.0, -15.0, -15.0]), torch.zeros(4))
    assert sums.effective_sample_fraction == pytest.approx(1 / 4, abs=1e-6)


def test_no_tokens_are_no_drift() -> None:
    assert DriftSums().policy_drift == 0
    assert DriftSums().effective_sample_fraction == 1


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=40), st.integers(1, 39))
@settings(max_examples=60)
def test_sums_of_any_split_are_the_sums_of_the_whole(values: list[float], cut: int) -> None:
    now, then = torch.tensor(values, dtype=torch.float64), torch.zeros(len(values))
    cut = min(cut, len(values) - 1)
    whole = drift_sums(now, then)
    parts = drift_sums(now[:cut], then[:cut]) + drift_sums(now[cut:], then[cut:])
    for name, value in whole.as_dict().items():
        assert parts.as_dict()[name] == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert DriftSums.from_dict(whole.as_dict()) == whole
    assert whole.policy_drift >= 0
    assert whole.k3 == pytest.approx((now.exp() - 1 - now).sum().item(), abs=1e-9)
    assert whole.absolute_mean <= whole.root_mean_square + 1e-12


def test_opposite_shifts_cancel_in_the_signed_mean_only() -> None:
    sums = drift_sums(torch.tensor([0.5, -0.5]), torch.zeros(2))
    assert sums.signed_mean == 0
    assert sums.absolute_mean == pytest.approx(0.5)
    assert sums.policy_drift > 0.1


@pytest.mark.parametrize(
    ("shift", "epochs_done", "action", "reason"),
    [
        (0.01, 1, "train", "the cache is still fresh"),
        (0.01, 3, "regenerate", "all epochs done"),
        (0.60, 1, "regenerate", "drift passed its bound"),
    ],
)
def test_an_epoch_is_followed_by_another_until_drift_or_the_end(
    shift: float, epochs_done: int, action: str, reason: str
) -> None:
    drift = drift_sums(torch.tensor([shift, -shift]), torch.zeros(2))
    decision = decide_epoch(drift, epochs_done=epochs_done, bounds=BOUNDS)
    assert decision.action == action
    assert decision.reason.startswith(reason)
    assert f"policy_drift {drift.policy_drift:.4f} (bound 0.1)" in decision.reason
    assert f"epoch {epochs_done} of at most 3" in decision.reason


def test_too_few_effective_samples_stop_the_epochs_too() -> None:
    drift = DriftSums(tokens=10, k3=0.1, weight=10, weight_squared=40)
    decision = decide_epoch(drift, epochs_done=1, bounds=BOUNDS)
    assert decision.action == "regenerate"
    assert decision.reason.startswith("too few effective samples")
