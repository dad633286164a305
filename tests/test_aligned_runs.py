"""Runs with a teacher that has another tokenizer, and what they refuse."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.reader import open_scores
from opd_stream.store.sealed import read_json
from opd_stream.store.store import Store
from pipeline.cli import app
from pipeline.rounds import rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from stages.step import Silent
from tests.conftest import MODELS, reports_of, run, small_config
from tests.tiny_tokenizers import byte_level, metaspace, permuted, random_teacher


def other_teacher(folder: Path, name: str) -> Path:
    made = {"byte_level": (lambda: byte_level(400), "<eos>"), "metaspace": (metaspace, "</s>")}
    make, stop = made[name]
    return random_teacher(folder, make(), stop=stop)


def made_run(config: Config, folder: Path) -> dict[str, Any]:
    return run(config, RunFolder(folder), Silent())


ALIGNED = "scores.alignment={kind: bytes}"


@pytest.mark.parametrize(
    ("tokenizer", "objective"),
    [
        ("byte_level", "bucket"),
        pytest.param("metaspace", "sampled_pg", marks=pytest.mark.slow),
    ],
)
def test_a_round_with_another_tokenizers_teacher(
    tmp_path: Path, tokenizer: str, objective: str
) -> None:
    folder = other_teacher(tmp_path / "teacher", tokenizer)
    config = small_config(
        tmp_path,
        f"teacher.path={folder}",
        ALIGNED,
        "rounds=1",
        f"train.objective={{kind: {objective}}}",
        "evaluation=null",
    )
    made_run(config, tmp_path / "run")
    report = read_json(tmp_path / "run" / "rounds" / "0000" / "report.json")
    shares = report["alignment"]
    assert 0 < shares["aligned_share"] <= shares["chunk_share"] <= 1
    assert report["tokens"]["teacher_scored"] != report["tokens"]["generated"]
    name = f"scores/{report['caches'][0]['scores'][:16]}"
    rows = open_scores(f"{config.store}/{name}")
    tokens = sum(len(row.completion_ids) for row in rows)
    same = sum(int(row.same_tokens.sum()) for row in rows if row.same_tokens is not None)
    assert same / tokens == pytest.approx(shares["aligned_share"])
    trained = report["tokens"]["trained"] // len(report["epochs"])
    if objective == "bucket":
        assert trained == same
    else:
        assert trained > same
    recipe = Store(config.store).by_fingerprint("scores", name.removeprefix("scores/")).recipe
    assert recipe.settings["alignment"]["max_chunk_tokens"] == 6
    assert recipe.inputs["student_tokenizer"] != recipe.inputs["teacher_tokenizer"]
    for words in (("residual", str(config.store), name), ("export", str(config.store), name, "o")):
        with pytest.raises(UserError, match="another tokenizer") as caught:
            CliRunner().invoke(app, ["cache", *words], catch_exceptions=False)
        assert "\n" not in str(caught.value)
    replayed = small_config(
        tmp_path,
        f"replay={{scores: [{name}]}}",
        "rounds=1",
        "train.objective=[{kind: bucket}, {kind: sampled_pg}]",
        "evaluation=null",
        "teacher=null",
    )
    with pytest.raises(UserError, match="train at different tokens"):
        made_run(replayed, tmp_path / "replay")


def test_an_extension_is_scored_whole_again(tmp_path: Path) -> None:
    folder = permuted(MODELS / "ledger-teacher", tmp_path / "teacher")
    config = small_config(
        tmp_path,
        f"teacher.path={folder}",
        ALIGNED,
        "evaluation=null",
        "rounds=2",
        "rollouts.window={kind: linear, h0: 8, delta: 8, every: 2, max_window_tokens: 32}",
        "staleness={max_policies: 2, max_epochs: 1, policy_drift: 100}",
        "train.learning_rate=1e-5",
    )
    summary = made_run(config, tmp_path / "run")
    (first,), (second,) = summary["caches"]
    assert second["origin"] == "extended"
    recipe = Store(config.store).by_fingerprint("scores", second["scores"]).recipe
    assert "scores" not in recipe.inputs
    before, after = (
        {row.prompt_id: row for row in open_scores(f"{config.store}/scores/{each['scores'][:16]}")}
        for each in (first, second)
    )
    longer = [
        name
        for name in before
        if len(after[name].completion_ids) > len(before[name].completion_ids)
    ]
    assert longer
    reports = reports_of(RunFolder(tmp_path / "run"))
    whole = sum(len(row.completion_ids) for row in after.values())
    assert reports[1]["tokens"]["teacher_scored"] == pytest.approx(whole, rel=0.05)


def test_without_alignment_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = other_teacher(tmp_path / "teacher", "byte_level")
    with pytest.raises(UserError, match=r"different tokenizers.*scores\.alignment") as caught:
        made_run(small_config(tmp_path, f"teacher.path={folder}"), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_with_one_tokenizer_alignment_names_the_ordinary_scores(tmp_path: Path) -> None:
    folder = other_teacher(tmp_path / "teacher", "byte_level")
    names: list[str] = []
    for extra in ((), (ALIGNED,), (ALIGNED, f"teacher.path={folder}")):
        here = next(rounds(open_setup(small_config(tmp_path, *extra))))
        names.append(here.caches[0].scores.artifact.fingerprint)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.objective={kind: mc}", "rollouts.extra_draws=2"], "objective mc"),
        (["train.objective={kind: sampled_pg, baseline: bucket}"], "baseline bucket"),
        (["train.objective=[{kind: bucket}, {kind: sampled_pg}]"], "different tokens"),
        (["train.guards.merge_terminators=false"], "merge_terminators"),
        (["rollouts.extra_draws=2"], "rollouts.extra_draws"),
        (
            ["scores.codec={kind: sampled}", "train.objective={kind: drawn_forward}"],
            "objective drawn_forward",
        ),
        (["scores.codec={kind: sampled}", "train.objective={kind: sampled_pg}"], "codec sampled"),
        (
            ["staleness.student_top_mass=0.5", "train.objective={kind: sampled_pg}"],
            "student_top_mass",
        ),
    ],
)
def test_what_chunks_cannot_serve_is_refused(
    tmp_path: Path, settings: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        small_config(tmp_path, ALIGNED, *settings)
    assert len([line for line in str(caught.value).splitlines() if words in line]) == 1
    small_config(tmp_path, *settings)
