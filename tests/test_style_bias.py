"""The style-bias residual: its tables on made-up data, and the artifact it writes."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from opd_stream.errors import UserError
from opd_stream.store import open_scores
from opd_stream.store.store import Store
from opd_stream.style_bias import StyleSettings, style_bias
from pipeline.cli import app
from pipeline.run_folder import RunFolder
from stages.residual import make_residual
from stages.step import Silent
from tests.conftest import run, small_config


def made_up(rows: int, bias_of_id: np.ndarray, noise: float = 0.3, seed: int = 0) -> tuple:
    random = np.random.default_rng(seed)
    lengths = random.integers(20, 60, rows)
    ids = [random.integers(0, len(bias_of_id), n) for n in lengths]
    reference = [-random.exponential(1, n) for n in lengths]
    teacher = [
        r + bias_of_id[i] + noise * random.normal(size=len(i))
        for r, i in zip(reference, ids, strict=True)
    ]
    return [f"p{n}" for n in range(rows)], ids, reference, teacher


def test_a_bias_of_token_ids_is_found_by_about_half_as_published() -> None:
    true = np.random.default_rng(1).normal(0, 1, 40)
    prompts, ids, reference, teacher = made_up(400, true)
    found = np.concatenate(style_bias(prompts, ids, reference, teacher, StyleSettings()).rows)
    expected = true[np.concatenate(ids)]
    slope = np.polyfit(expected, found, 1)[0]
    assert np.corrcoef(expected, found)[0, 1] > 0.97
    assert 0.4 < slope < 0.55


def test_a_row_never_sees_itself() -> None:
    """One prompt says something absurd of an id nobody else uses: it keeps it."""
    prompts, ids, reference, teacher = made_up(50, np.zeros(10), noise=0.0)
    ids[0] = np.full(len(ids[0]), 999)
    teacher[0] = reference[0] + 100.0
    found = style_bias(prompts, ids, reference, teacher, StyleSettings())
    assert np.abs(found.rows[0]).max() < 1.0


def test_small_groups_shrink_to_the_common_mean() -> None:
    prompts, ids, reference, teacher = made_up(200, np.full(10, 0.7), noise=0.0)
    found = style_bias(prompts, ids, reference, teacher, StyleSettings(prior_tokens=1e9))
    np.testing.assert_allclose(np.concatenate(found.rows), 0.7, atol=1e-6)


@pytest.mark.parametrize(
    "codec",
    [
        "{kind: compact, mass: 0.999}",
        pytest.param("{kind: exact, dtype: float32}", marks=pytest.mark.slow),
    ],
)
def test_the_residual_is_scores_that_a_run_trains_on(tmp_path: Path, codec: str) -> None:
    settings = ("rounds=1", "evaluation=null", f"scores.codec={codec}")
    run(small_config(tmp_path, *settings), RunFolder(tmp_path / "source"), Silent())
    (folder,) = (tmp_path / "store" / "scores").iterdir()
    words = ["cache", "residual", str(tmp_path / "store"), f"scores/{folder.name}"]
    line = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    name = line.split(":")[0]
    before, after = open_scores(folder), open_scores(tmp_path / "store" / name)
    assert len(before) == len(after)
    stops_in_top, error = 0, 1 / 16 if "mass" in codec else 1e-4
    for plain, corrected in ((before[n], after[n]) for n in range(len(before))):
        top = np.exp(corrected.teacher_top_logprobs)
        assert (np.diff(top, axis=1) <= 1 / 16).all()
        mass = top.sum(1) + np.exp(corrected.teacher_tail_logprobs)
        np.testing.assert_allclose(mass, 1, atol=0.05)
        for stop, column in zip(*corrected.terminators, strict=True):
            forced, place = corrected.teacher_forced_logprobs[:, column], corrected.teacher_top_ids
            in_top = (place == stop).any(1)
            found = corrected.teacher_top_logprobs[place == stop]
            np.testing.assert_allclose(forced[in_top], found, atol=error)
            assert (forced[~in_top] <= corrected.teacher_tail_logprobs[~in_top] + error).all()
            stops_in_top += int(in_top.sum())
        assert plain.prompt_id == corrected.prompt_id
    assert stops_in_top or "mass" in codec
    moved = [
        np.abs(after[n].teacher_logprobs - before[n].teacher_logprobs).max()
        for n in range(len(before))
    ]
    assert max(moved) > 0.01
    store = Store(str(tmp_path / "store"))
    again = make_residual(store, store.by_fingerprint("scores", folder.name), StyleSettings())
    assert again.name == name  # found, not made
    replay = (f"replay.scores=[{name}]", "train.objective={kind: sampled_pg}")
    summary = run(
        small_config(tmp_path, "rounds=1", "evaluation=null", *replay),
        RunFolder(tmp_path / "trained"),
        Silent(),
    )
    assert summary["tokens"]["teacher_scored"] == 0
    assert summary["steps"] > 0


def test_what_has_no_residual_is_one_line(tmp_path: Path) -> None:
    settings = ("scores.codec={kind: sampled, draws: 4}", "train.objective={kind: drawn_forward}")
    config = small_config(tmp_path, "rounds=1", "evaluation=null", *settings)
    run(config, RunFolder(tmp_path / "source"), Silent())
    (folder,) = (tmp_path / "store" / "scores").iterdir()
    words = ["cache", "residual", str(tmp_path / "store"), f"scores/{folder.name}"]
    with pytest.raises(UserError, match="drawn from the teacher"):
        CliRunner().invoke(app, words, catch_exceptions=False)
