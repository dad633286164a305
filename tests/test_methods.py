"""One tiny run of every method's config."""

import json
from pathlib import Path

import pytest

from opd_stream.config_file import load_config
from pipeline.rounds import run
from pipeline.run_directory import RunDirectory
from stages.progress import Silent

ROOT = Path(__file__).parent.parent
METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
TINY = (
    "executor=local",
    "evaluation=null",
    "prompts.count=16",
    "rollouts.prompts_per_round=8",
    "scores.top_k=4",
    "train.rows_per_step=4",
)
SHORT = {  # windows of a few tokens for methods whose window is the point
    "rollouts.window.tokens": 24,
    "rollouts.window.max_window_tokens": 24,
    "rollouts.window.h0": 8,
    "rollouts.window.delta": 4,
    "rollouts.window.candidates": [8, 16],
    "rollouts.window.start": 8,
}


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_runs_two_rounds(path: Path, tmp_path: Path) -> None:
    plain = load_config(path, [])
    names = set(type(plain.rollouts.window).model_fields)
    short = [f"{field}={value}" for field, value in SHORT.items() if field.split(".")[-1] in names]
    rounds = min(2, plain.rounds)
    settings = [*TINY, *short, f"rounds={rounds}", f"store={tmp_path / 'store'}"]
    config = load_config(path, settings)
    summary = run(config, RunDirectory(tmp_path / "run"), Silent())
    assert summary["finished"]
    assert summary["steps"] >= 2 * rounds
    weights = [policy["weights_sha256"] for policy in summary["policies"]]
    assert len(set(weights)) == rounds + 1
    report = json.loads((tmp_path / "run" / "rounds" / "0000" / "report.json").read_text())
    assert report["decision"]


def test_every_method_is_on_its_page() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    assert len(METHODS) >= 10
    for path in METHODS:
        assert f"`{path.name}`" in page
