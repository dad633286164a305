"""The window that grows where the teacher was sure."""

from pathlib import Path

import pytest

from opd_stream.errors import UserError
from opd_stream.windows import EntropyGatedWindow
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import reports_of, run, small_config

WINDOW = "rollouts.window={kind: entropy_gated, h0: 8, delta: 6, max_window_tokens: 18"


def test_it_grows_up_to_its_bound_where_the_teacher_is_sure_and_never_falls() -> None:
    window = EntropyGatedWindow(h0=64, delta=48, threshold=0.5, max_window_tokens=208)
    assert [window.after(64, entropy) for entropy in (0.0, 0.5, 0.5001, 9.0)] == [112, 112, 64, 64]
    assert window.after(200, 0.1) == window.after(208, 0.1) == window.after(208, 2.0) == 208
    assert EntropyGatedWindow(h0=64, delta=1, max_window_tokens=32).tokens_at(9) == 32


def test_rounds_have_the_windows_that_the_entropies_before_them_decide(tmp_path: Path) -> None:
    short = ("evaluation=null", "staleness.max_epochs=1")
    config = small_config(tmp_path, WINDOW + ", threshold: 100}", "rounds=3", *short)
    run(config, RunFolder(tmp_path / "run"), Silent())
    reports = reports_of(RunFolder(tmp_path / "run"))
    assert [report["window_tokens"] for report in reports] == [8, 14, 18]
    entropies = [report["epochs"][0]["teacher_entropy"] for report in reports]
    assert all(entropy > 0 for entropy in entropies)
    stays = small_config(
        tmp_path,
        f"{WINDOW}, threshold: {entropies[0] * 0.99}}}",
        *("rounds=2", *short),
    )
    run(stays, RunFolder(tmp_path / "stays"), Silent())
    found = reports_of(RunFolder(tmp_path / "stays"))
    assert [report["window_tokens"] for report in found] == [8, 8]
    assert found[0]["epochs"][0]["teacher_entropy"] == entropies[0]  # the same first round


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ("scores.codec={kind: sampled, draws: 8}", "train.objective={kind: sampled_pg}"),
            "entropy_gated with scores.codec sampled",
        ),
        (("rollouts.ahead=true",), "rollouts.ahead is set with rollouts.window.kind=entropy_gated"),
        (
            ("rollouts.given_share=1", "prompts.solutions=true"),
            "given_share is 1 with window entropy_gated",
        ),
    ],
)
def test_what_it_cannot_be_together_with(
    settings: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line):
        small_config(tmp_path, WINDOW + "}", *settings)
