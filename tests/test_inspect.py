"""A rollout seen with its scores: the numbers are those of the cache, the page is safe to open."""

import io
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from opd_stream.config import Config
from opd_stream.config_file import override_config
from opd_stream.errors import UserError
from opd_stream.store.reader import ScoredRow, ScoredRows, open_scores
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.tokens import FIGURES, TokenText
from pipeline.inspect.command import inspect_rollout, inspect_worst
from pipeline.inspect.terminal import print_rollout
from pipeline.inspect.view import RolloutView
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import MODELS, Command, SmallRuns, loaded_by, rewrite, run, small_config


def run_small(folder: Path, *overrides: str) -> tuple[RunFolder, Config]:
    config, directory = small_config(folder, *overrides), RunFolder(folder / "run")
    run(config, directory, Silent())
    return directory, config


@pytest.fixture(scope="module")
def finished(small_runs: SmallRuns) -> tuple[RunFolder, Config]:
    folder = small_runs("rounds=1")
    return RunFolder(folder / "run"), small_config(folder, "rounds=1")


@pytest.fixture
def copied(finished: tuple[RunFolder, Config], tmp_path: Path) -> tuple[RunFolder, Config]:
    """The same run to damage."""
    shutil.copytree(finished[0].path.parent, tmp_path / "copy")
    config = override_config(finished[1], [f"store={tmp_path / 'copy' / 'store'}"])
    return RunFolder(tmp_path / "copy" / "run"), config


def rows_of(directory: RunFolder, config: Config, round_index: int = 0) -> ScoredRows:
    (cache,) = directory.plan(round_index).as_json()["caches"]
    return open_scores(f"{config.store}/scores/{cache['scores'][:16]}")


def printed(view: RolloutView, *, width: int = 140) -> str:
    output = io.StringIO()
    print_rollout(view, console=Console(file=output, width=width))
    return output.getvalue()


def by_hand(row: ScoredRow, place: int) -> dict[str, float]:
    """Every figure of one token, written out."""
    token, teacher = int(row.completion_ids[place]), float(row.teacher_logprobs[place])
    ids, logprobs = row.teacher_top_ids[place].tolist(), row.teacher_top_logprobs[place].tolist()
    tail = float(row.teacher_tail_logprobs[place])
    outcomes = [math.exp(value) * -value for value in [*logprobs, tail] if value > -math.inf]
    rank = ids.index(token) + 1 if token in ids else len(ids) + 1
    return {
        "reverse_kl": float(row.behavior_logprobs[place]) - teacher,
        "teacher_nll": -teacher,
        "entropy": sum(outcomes),
        "logprob_gap": 0.0 if rank == 1 else logprobs[0] - teacher,
        "rank": rank,
        "tail_mass": math.exp(tail),
    }


def test_the_figures_are_those_of_the_cache(finished: tuple[RunFolder, Config]) -> None:
    directory, config = finished
    rows = rows_of(directory, config)
    ranks: set[int] = set()
    for row in (rows[n] for n in range(len(rows))):
        view = inspect_rollout(
            directory, config, round_index=0, prompt_id=row.prompt_id, by="entropy"
        )
        assert set(view.figures) == set(FIGURES)
        for place in range(len(row.completion_ids)):
            expected = by_hand(row, place)
            found = {name: values[place] for name, values in view.figures.items()}
            assert found == pytest.approx(expected, abs=1e-6)
            shown = view.candidates(place, 3)
            assert [c.token_id for c in shown] == row.teacher_top_ids[place][:3].tolist()
            assert [c.probability for c in shown] == pytest.approx(
                np.exp(row.teacher_top_logprobs[place][:3]).tolist()
            )
            rank = int(expected["rank"])
            assert view.ranks[place] == (">4" if rank == 5 else str(rank))
            ranks.add(rank)
        assert view.mean == pytest.approx(view.figures["entropy"].mean())
    assert {1, 5} <= ranks, "the rows hold a first candidate and a token outside of all"


@pytest.mark.parametrize("by", ["reverse_kl", "teacher_nll", "rank"])
def test_the_worst_are_the_worst(finished: tuple[RunFolder, Config], by: str) -> None:
    directory, config = finished
    rows = rows_of(directory, config)
    means = {
        row.prompt_id: np.mean(
            [by_hand(row, place)[by] for place in range(len(row.completion_ids))]
        )
        for row in (rows[n] for n in range(len(rows)))
    }
    worst = sorted(means, key=lambda prompt_id: -means[prompt_id])[:3]
    found = inspect_worst(directory, config, round_index=0, count=3, by=by)
    assert [entry.view.row.prompt_id for entry in found] == worst
    assert [entry.view.mean for entry in found] == pytest.approx([means[name] for name in worst])
    place = found[0].view.worst(1)[0]
    assert found[0].view.values[place] == found[0].view.values.max()
    assert len(inspect_worst(directory, config, round_index=0, count=99, by=by)) == len(rows)


def test_without_a_round_it_is_the_last_finished_one(
    finished: tuple[RunFolder, Config], tmp_path: Path, opd_stream: Command
) -> None:
    code, output, _ = opd_stream("inspect", str(finished[0].path), "--worst", "1")
    assert code == 0
    assert "--round 0 --prompt" in output
    for folder in ("0002", "0010", "0011"):
        (tmp_path / "rounds" / folder).mkdir(parents=True)
        if folder != "0011":  # at work
            (tmp_path / "rounds" / folder / "report.json").write_text("{}")
    assert RunFolder(tmp_path).last_round() == 10
    with pytest.raises(UserError, match="has no finished round; continue the run"):
        RunFolder(tmp_path / "empty").last_round()


def test_the_command_of_the_list_opens_the_rollout(
    finished: tuple[RunFolder, Config], opd_stream: Command
) -> None:
    directory, config = finished
    (worst,) = inspect_worst(directory, config, round_index=0, count=1)
    program, *words = worst.command.split()
    assert program == "opd-stream"
    code, output, _ = opd_stream(*words)
    assert code == 0
    view = worst.view
    assert f"{view.row.prompt_id}, sample 0" in output
    assert f"reverse_kl {view.mean:.4f} over {len(view.pieces)} tokens" in output
    assert f"window: cut after {len(view.pieces)} tokens" in output
    text = TokenText(open_tokenizer(MODELS / "ledger-student"))
    completion = text.whole(view.row.completion_ids.tolist())
    assert completion.replace("\n", "⏎\n") in output


def test_the_verdict_is_that_of_the_runs_judge(
    finished: tuple[RunFolder, Config], tmp_path: Path
) -> None:
    directory, config = finished
    prompt_id = rows_of(directory, config)[0].prompt_id
    view = inspect_rollout(directory, config, round_index=0, prompt_id=prompt_id)
    prompts = {
        row["prompt_id"]: row["answer"]
        for recipe in Store(config.store).recipes("prompts")
        for row in Store(config.store).artifact(recipe).read_unit(0).to_pylist()
    }
    assert view.verdict is not None
    assert view.verdict.answer == prompts[prompt_id]
    assert not view.verdict.is_right, "cut by the window, it has no answer"
    answer = prompts[prompt_id]
    text = view.reader.text
    right = open_tokenizer(MODELS / "ledger-student").encode(f"Answer: {answer}")
    row = replace(view.row, completion_ids=np.array(right))
    assert text.whole(right) == f"Answer: {answer}"
    assert str(view.reader.verdict(view.located.cache, row)) == "right"
    without = override_config(config, ["evaluation=null"])
    view = inspect_rollout(directory, without, round_index=0, prompt_id=prompt_id)
    assert view.verdict is None


def test_a_look_needs_no_torch(finished: tuple[RunFolder, Config]) -> None:
    folder = str(finished[0].path)
    said, loaded, _ = loaded_by("inspect", folder, "--round", "0", "--worst", "1")
    assert "mean reverse_kl" in said
    assert not loaded & {"torch", "ray", "lightning"}


def test_nothing_is_written(finished: tuple[RunFolder, Config]) -> None:
    directory, config = finished

    def files() -> dict[Path, int]:
        whole = directory.path.parent.rglob("*")
        return {path: path.stat().st_mtime_ns for path in whole}

    before = files()
    inspect_worst(directory, config, round_index=0, count=2)
    assert files() == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--round", "5", "--worst", "3"], "has no round 5; it has rounds 0 to 0"),
        (["--round", "0", "--prompt", "nobody"], "has no rollout of prompt 'nobody'"),
        (["--round", "0", "--prompt", "{known}", "--sample", "4"], "it has samples 0"),
        (["--round", "0", "--prompt", "{known}", "--cache", "1"], "trains on caches 0 to 0"),
        (["--round", "0", "--prompt", "{known}", "--by", "size"], "expected one of reverse_kl"),
        (["--round", "0"], "neither of --prompt and --worst"),
        (["--round", "0", "--worst", "0"], "--worst is 0"),
        (["--round", "0", "--worst", "2", "--sample", "0"], "belong to --prompt"),
        (["--round", "0", "--worst", "2", "--html", "no/a"], "expected a folder to write"),
        (["--round", "0", "--prompt", "{known}", "--html", "."], "expected a file to write"),
        (["--round", "0", "--prompt", "{known}", "--html", "no/a.html"], "in a folder that exists"),
        (
            ["--round", "0", "--worst", "1", "--set", "store=nowhere"],
            "store nowhere is not there",
        ),
    ],
)
def test_a_mistake_is_one_line(
    finished: tuple[RunFolder, Config],
    arguments: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    opd_stream: Command,
    tmp_path: Path,
) -> None:
    directory, config = finished
    known = rows_of(directory, config)[0].prompt_id
    words = [word.replace("{known}", known) for word in arguments]
    monkeypatch.chdir(tmp_path)
    code, output, errors = opd_stream("inspect", str(directory.path), *words)
    assert code == 2
    assert line in errors
    assert len(errors.splitlines()) == 1
    assert output == ""
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_shard_is_one_line(copied: tuple[RunFolder, Config]) -> None:
    directory, config = copied
    row = rows_of(directory, config)[0]
    (shard,) = (Path(config.store) / "scores").glob("*/units/00000-*.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    for ask in (
        lambda: inspect_rollout(directory, config, round_index=0, prompt_id=row.prompt_id),
        lambda: inspect_worst(directory, config, round_index=0, count=1),
    ):
        with pytest.raises(UserError, match=r"unit 0 of scores/.* is damaged"):
            ask()


def test_a_refused_rollout_says_why(copied: tuple[RunFolder, Config]) -> None:
    directory, config = copied
    rows = rows_of(directory, config)
    left_out, kept = rows[0], rows[1]
    (record,) = (Path(config.store) / "scores").glob("*/units/00000.json")
    rewrite(record, skipped_rows=[0])
    with pytest.raises(UserError, match="is left out of training"):
        inspect_rollout(directory, config, round_index=0, prompt_id=left_out.prompt_id)
    view = inspect_rollout(directory, config, round_index=0, prompt_id=kept.prompt_id)
    assert view.row.completion_ids.tolist() == kept.completion_ids.tolist()


def test_the_tokenizer_comes_from_the_store_where_the_student_is_gone(
    finished: tuple[RunFolder, Config], tmp_path: Path
) -> None:
    directory, config = finished
    prompt_id = rows_of(directory, config)[0].prompt_id
    here = inspect_rollout(directory, config, round_index=0, prompt_id=prompt_id)
    moved = override_config(config, [f"student.path={tmp_path / 'gone'}"])
    there = inspect_rollout(directory, moved, round_index=0, prompt_id=prompt_id)
    assert there.pieces == here.pieces
    empty = tmp_path / "store"
    shutil.copytree(config.store, empty)
    shutil.rmtree(empty / "policies")
    moved = override_config(moved, [f"store={empty}"])
    with pytest.raises(UserError, match="gone does not exist, and no policy"):
        inspect_rollout(directory, moved, round_index=0, prompt_id=prompt_id)


def test_the_end_of_a_rollout_is_told_apart(finished: tuple[RunFolder, Config]) -> None:
    directory, config = finished
    row = rows_of(directory, config)[0]
    view = inspect_rollout(directory, config, round_index=0, prompt_id=row.prompt_id)
    stop = open_tokenizer(MODELS / "ledger-student").convert_tokens_to_ids("<eos>")

    def end(**changes: Any) -> str:
        located = replace(view.located, row=replace(row, **changes))
        ids = located.row.completion_ids.tolist()
        pieces = tuple(view.reader.text.pieces(ids))
        return replace(view, located=located, pieces=pieces).finish

    assert end() == "window: cut after 48 tokens"
    stopped = np.array([*row.completion_ids[:5], stop])
    assert end(finish_reason="stop", completion_ids=stopped) == (
        "stop: the student ended it with <eos> after 6 tokens"
    )
    assert end(completion_ids=row.completion_ids[:30]) == (
        "context: cut after 30 tokens, before its window of 48"
    )
