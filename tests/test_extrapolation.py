"""Laws of the extrapolation, on toy weights and in small runs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from opd_stream.config.sections import Extrapolation
from opd_stream.drift import DriftSums, drift_sums
from opd_stream.extrapolation import (
    Score,
    is_better,
    is_due,
    moved_parameters,
    search,
)
from pipeline.run_folder import RunFolder
from stages import extrapolate
from stages.extrapolate import Extrapolator
from stages.step import Silent
from tests.conftest import reports_of, run, small_config


def test_searches_follow_powers_of_two() -> None:
    assert [step for step in range(70) if is_due(step)] == [1, 2, 4, 8, 16, 32, 64]


def quadratic(weight: torch.Tensor, target: torch.Tensor) -> Score:
    return Score(kl=-((weight - target) ** 2).sum().item())


@pytest.mark.parametrize(("best", "kept"), [(1.0, 0), (2.9, 1), (5.2, 2), (40.0, 5)])
def test_only_descent_is_accepted_on_a_quadratic(best: float, kept: int) -> None:
    """From base 0 at 1 the candidates are 3, 5, 7, 9, 11; the nearest to the best one wins."""
    weight = torch.nn.Parameter(torch.ones(3))
    target = torch.full((3,), best)
    outcome = search(
        [weight],
        [torch.zeros(3)],
        lambda: quadratic(weight, target),
        step=4,
        settings=Extrapolation(),
    )
    assert outcome.kept == kept
    assert weight.tolist() == pytest.approx([1 + 2 * kept] * 3)
    assert len(outcome.scores) == min(kept + 2, 6)


def test_the_factor_recursion_of_the_official_code_is_a_constant_step() -> None:
    """Its factor f becomes f / (1 + f) on the grown difference: 3, 5, 7, 9, 11 times the start."""
    point, factor = 1.0, 2.0
    for k in range(1, 6):
        point, factor = point + factor * point, factor / (1 + factor)
        assert point == pytest.approx(1 + 2 * k)


def test_a_rejected_search_leaves_every_bit() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, 50) * 1e-3)
    before = weight.detach().clone()
    outcome = search(
        [weight], [torch.randn(50, 50)], lambda: Score(reward=0.5), step=2, settings=Extrapolation()
    )
    assert outcome.kept == 0
    assert torch.equal(weight, before)


def test_acceptance_is_strict_or_may_stay_equal_and_two_signals_must_agree() -> None:
    same = Score(reward=0.5)
    assert not is_better(same, same, "strict")
    assert is_better(same, same, "equal")
    best = Score(reward=0.5, kl=-1.0)
    assert is_better(Score(reward=0.5, kl=-0.9), best, "strict")
    assert not is_better(Score(reward=0.6, kl=-1.1), best, "strict")
    assert not is_better(Score(reward=0.4, kl=-0.1), best, "equal")


@pytest.mark.parametrize("acceptance", ["strict", "equal"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_worse_than_any_other(
    acceptance: Literal["strict", "equal"], value: float
) -> None:
    fine, lost = Score(reward=0.5, kl=-9.0), Score(reward=0.6, kl=value)
    assert not is_better(lost, fine, acceptance)
    assert not is_better(lost, lost, acceptance)
    assert is_better(fine, replace(lost, reward=0.5), acceptance)
    weight = torch.nn.Parameter(torch.ones(3))
    points = iter([fine, lost, fine])
    settings = Extrapolation(acceptance=acceptance)
    outcome = search([weight], [torch.zeros(3)], lambda: next(points), step=1, settings=settings)
    assert (outcome.kept, weight.tolist()) == (0, [1.0] * 3)


@pytest.mark.parametrize("acceptance", ["strict", pytest.param("equal", marks=pytest.mark.slow)])
def test_a_round_with_a_score_that_is_not_finite_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acceptance: str
) -> None:
    """The cached objective of every point but the first is NaN."""
    found = Extrapolator._score
    calls: list[int] = []

    def score(self: Extrapolator, step: int) -> Score:
        calls.append(step)
        kept = found(self, step)
        return kept if calls.count(step) == 1 else replace(kept, kl=math.nan)

    monkeypatch.setattr(Extrapolator, "_score", score)
    (report,) = jumped(tmp_path, f"acceptance: {acceptance}")
    assert [entry["kept"] for entry in report["extrapolations"]] == [0, 0]
    for entry in report["extrapolations"]:
        first, second = (each["kl"] for each in entry["scores"])
        assert first < 0
        assert second is None


def test_a_jump_to_where_nothing_is_finite_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward cannot see it: all answers may be as wrong as before."""
    alike, better = iter(range(99)), Score(reward=0.0)
    monkeypatch.setattr(Extrapolator, "_score", lambda *_: replace(better, reward=next(alike) / 99))
    lost = replace(shifted(0.1), k3=math.nan)
    monkeypatch.setattr(extrapolate, "drift_of", lambda _: lost)
    (report,) = jumped(tmp_path, "candidates: 2")
    entries = report["extrapolations"]
    assert [(entry["kept"], entry["policy_drift"]) for entry in entries] == [(0, None)] * 2


def test_a_jump_ends_no_first_pass_whatever_its_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = iter(range(99))
    monkeypatch.setattr(Extrapolator, "_score", lambda *_: Score(kl=float(next(better))))
    monkeypatch.setattr(Extrapolator, "_drift", lambda *_: shifted(0.3))
    tight = ("staleness.policy_drift=0.001", "staleness.distance_share=0")
    (report,) = jumped(tmp_path, "candidates: 1", *tight, "train.learning_rate=1e-6")
    assert report["steps"] == 2
    assert report["extrapolations"][0]["policy_drift"] == pytest.approx(0.0453, abs=1e-4)


def test_drift_after_a_jump_is_computed_as_the_floor_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the trainer's precision: the drift of a jump is that of the same weights and rows."""
    seen: list[bool] = []
    drift = extrapolate.drift_of
    sums = Extrapolator._sums

    def looked(self: Extrapolator, *asked: Any) -> dict[str, float]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return sums(self, *asked)

    def drift_of(found: dict[str, float]) -> DriftSums:
        assert seen[-1]
        return drift(found)

    monkeypatch.setattr(Extrapolator, "_sums", looked)
    monkeypatch.setattr(extrapolate, "drift_of", drift_of)
    (report,) = jumped(tmp_path, "candidates: 2", "train.precision=bf16-mixed")
    assert any(entry["kept"] for entry in report["extrapolations"])


def shifted(shift: float) -> DriftSums:
    """Drift of tokens that moved by `shift` up and down."""
    return drift_sums(torch.tensor([shift, -shift]), torch.zeros(2))


def jumped(folder: Path, settings: str, *overrides: str) -> list[dict[str, Any]]:
    """The reports of a run of one round with two searches."""
    own = ("rounds=1", "evaluation=null", "staleness.policy_drift=10", "staleness.max_epochs=1")
    config = small_config(folder, *own, f"train.extrapolation={{rows: 4, {settings}}}", *overrides)
    run(config, RunFolder(folder / "run"), Silent())
    return reports_of(RunFolder(folder / "run"))


def test_norms_embeddings_and_heads_never_move_and_of_lora_one_factor() -> None:
    names = {
        "model.embed_tokens.weight": (4, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.self_attn.q_norm.weight": (4,),
        "model.layers.0.mlp.down_proj.weight": (4, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "lm_head.weight": (4, 4),
    }
    plain = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    assert list(moved_parameters(iter(plain.items()))) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    for parameter in plain.values():
        parameter.requires_grad_(False)
    for factor in ("lora_A", "lora_B"):
        name = f"model.layers.0.self_attn.q_proj.{factor}.default.weight"
        plain[name] = torch.nn.Parameter(torch.zeros(2, 2))
    assert list(moved_parameters(iter(plain.items()))) == [
        "model.layers.0.self_attn.q_proj.lora_B.default.weight"
    ]
