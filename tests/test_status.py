"""How far a run is, from the store; what the commands say on the way."""

import io
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from opd_stream.store import Store
from opd_stream.store.artifact import Commit
from opd_stream.store.tokenizer_folder import open_tokenizer, open_vocabulary
from pipeline.cli import app
from pipeline.console import LOG, Level, TerminalProgress, set_up
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from pipeline.status import (
    Pace,
    RunStatus,
    StatusReader,
    after,
    pace_of_steps,
    pace_of_units,
)
from pipeline.status_table import table_of, watch
from tests.conftest import MODELS, SmallRuns, loaded_by, reports_of, rewrite, small_config

NOW = 1_760_000_000.0


@pytest.fixture
def half(small_runs: SmallRuns, tmp_path: Path) -> Path:
    """A small run before the second unit of round 1 was scored, and without its policy."""
    folder = small_runs.copy(tmp_path / "half")
    report = json.loads((folder / "run" / "rounds" / "0001" / "report.json").read_text())
    scores = folder / "store" / "scores" / report["caches"][0]["scores"][:16]
    (scores / "manifest.json").unlink()
    (scores / "units" / "00001.json").unlink()
    policy = folder / "store" / "policies" / report["policy"]["fingerprint"][:16]
    (policy / "manifest.json").unlink()
    shutil.copy(scores / "units" / "00000.json", folder / "record.json")
    return folder


def planted(folder: Path, **fields: float) -> None:
    """Other times in the one record of the half-done scores."""
    record = (folder / "record.json").read_bytes()
    for path in (folder / "store" / "scores").glob("*/units/00000.json"):
        if json.loads(path.read_text())["sha256"] == json.loads(record)["sha256"]:
            path.write_bytes(record)
            rewrite(path, **fields)


def status_of(folder: Path, run_folder: str = "run") -> RunStatus:
    config = small_config(folder)
    return StatusReader(open_setup(config), RunFolder(folder / run_folder)).read()


def printed(status: RunStatus, height: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(table_of(status, height=height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def commit(made_at: float, seconds: float, tokens: int) -> Commit:
    return Commit(
        unit=0,
        file="",
        sha256="",
        bytes=0,
        counts={"completion_tokens": tokens},
        made_at=made_at,
        seconds=seconds,
    )


def test_a_finished_run_is_complete_in_every_stage_with_the_tokens_of_its_reports(
    finished_run: Path,
) -> None:
    status = status_of(finished_run)
    assert status.is_finished
    assert (status.rounds_complete, status.rounds_planned, status.eta_seconds) == (2, 2, 0.0)
    assert [each.round for each in status.rounds] == [None, 0, 1]
    assert [each.policy_version for each in status.rounds] == [0, 1, 2]
    reports = reports_of(RunFolder(finished_run / "run"))
    for each, report in zip(status.rounds[1:], reports, strict=True):
        assert each.window_tokens == report["window_tokens"]
        stages = each.stages
        assert stages["generate"].tokens == report["tokens"]["generated"]
        assert stages["score"].tokens == report["tokens"]["teacher_scored"]
        assert stages["train"].tokens == report["tokens"]["trained"]
        assert stages["train"].done == report["steps"]
        assert stages["train"].facts["policy_drift"] == report["policy_drift"]
        assert stages["generate"].busy_seconds == pytest.approx(
            report["seconds"]["generate"], abs=0.01
        )  # one worker: nothing overlaps
        for pace in stages.values():
            assert pace.is_complete
            assert pace.done == pace.total
            assert pace.busy_seconds is not None
            assert pace.tokens_per_second == pytest.approx(pace.tokens / pace.busy_seconds)
    evaluation = status.rounds[2].stages["evaluate"]
    assert evaluation.facts["pass@1"] == reports[1]["evaluation"]["pass@1"]
    text = printed(status)
    assert text.count("2 of 2") == 5  # four stages of units, and the rounds, once
    assert text.count("4 of 4") == 2


def test_a_half_done_stage_counts_its_units_and_says_when_it_ends(half: Path) -> None:
    made_at = time.time() - 5
    planted(half, made_at=made_at, seconds=4.0)
    status = status_of(half)
    assert not status.is_finished
    assert status.rounds_complete == 1
    stages = status.rounds[-1].stages
    assert stages["generate"].is_complete
    score = stages["score"]
    assert (score.done, score.total, score.is_complete, score.is_quiet) == (1, 2, False, False)
    assert score.units_per_second == pytest.approx(0.25)
    assert score.tokens_per_second == pytest.approx(score.tokens / 4)
    assert score.eta_seconds == pytest.approx(4.0)
    assert score.idle_seconds is not None
    assert 5 <= score.idle_seconds <= time.time() - made_at
    assert not stages["train"].is_complete
    assert not stages["evaluate"].is_complete
    row = next(line for line in printed(status).splitlines()[1:] if "1 of 2" in line)
    assert row.split()[:5] == ["score", "1", "of", "2", "0.25"]
    planted(half, made_at=time.time() - 500, seconds=4.0)
    assert status_of(half).rounds[-1].stages["score"].is_quiet
    assert "nothing new for 0:08:" in printed(status_of(half))


def test_the_store_alone_is_enough(half: Path) -> None:
    """A machine that has nothing of the run but its config sees the same units and rounds."""
    (half / "other").mkdir()
    shutil.copy(half / "run" / "config.json", half / "other")
    here, there = status_of(half), status_of(half, "other")
    for mine, other in zip(here.rounds, there.rounds, strict=True):
        for stage in ("generate", "score", "evaluate"):
            found = [each.stages.get(stage) for each in (mine, other)]
            assert [pace and (pace.done, pace.total, pace.tokens) for pace in found[:1]] == [
                pace and (pace.done, pace.total, pace.tokens) for pace in found[1:]
            ]
    trained = there.rounds[1].stages["train"]
    assert (trained.done, trained.tokens) == (4, here.rounds[1].stages["train"].tokens)
    assert there.rounds[2].stages["train"].done == 0  # steps of an unfinished round stay here
    assert here.rounds[2].stages["train"].done == 4


def test_metrics_of_other_settings_are_not_taken_for_the_rounds(half: Path) -> None:
    config = small_config(half, "train.learning_rate=0.5")
    status = StatusReader(open_setup(config), RunFolder(half / "run")).read()
    assert status.rounds[-1].stages["generate"].is_complete  # the store has these
    assert status.rounds[-1].stages["train"].done == 0


def test_a_reader_sees_what_is_made_after_its_first_look(half: Path, finished_run: Path) -> None:
    reader = StatusReader(open_setup(small_config(half)), RunFolder(half / "run"))
    before = reader.read().rounds[-1].stages["score"]
    for path in (finished_run / "store" / "scores").rglob("*.json"):
        shutil.copy(path, half / "store" / path.relative_to(finished_run / "store"))
    after_ = reader.read().rounds[-1].stages["score"]
    assert [(pace.done, pace.is_complete) for pace in (before, after_)] == [(1, False), (2, True)]


def test_rates_are_per_second_in_which_somebody_worked() -> None:
    records = [
        commit(NOW - 90, 10, 1000),
        commit(NOW - 90, 10, 1000),  # at the same time, by another worker
        commit(NOW - 10, 10, 4000),  # after a pause
    ]
    pace = pace_of_units(records, total=9, is_complete=False, now=NOW)
    assert pace.busy_seconds == pytest.approx(20)
    assert pace.units_per_second == pytest.approx(3 / 20)
    assert pace.tokens_per_second == pytest.approx(6000 / 20)
    assert pace.eta_seconds == pytest.approx(6 * 20 / 3)
    assert pace.idle_seconds == pytest.approx(10)
    assert pace_of_units(records[::-1], total=9, is_complete=False, now=NOW) == pace


def test_what_is_not_known_is_not_made_up() -> None:
    nothing = pace_of_units([], total=4, is_complete=False, now=NOW)
    assert (nothing.done, nothing.units_per_second, nothing.eta_seconds) == (0, None, None)
    old = commit(0.0, 10, 1000)  # written before records had times
    pace = pace_of_units([old], total=4, is_complete=False, now=NOW)
    assert (pace.done, pace.tokens, pace.busy_seconds, pace.eta_seconds) == (1, 1000, None, None)
    mixed = pace_of_units([old, commit(NOW, 10, 500)], total=4, is_complete=False, now=NOW)
    assert mixed.done == 2
    assert mixed.tokens_per_second == pytest.approx(50)
    unknown = pace_of_units([commit(NOW, 10, 500)], total=None, is_complete=False, now=NOW)
    assert unknown.eta_seconds is None


def test_a_quiet_stage_has_no_time_of_arrival() -> None:
    records = [commit(NOW, 10, 1000)]
    for idle, is_quiet in ((89, False), (91, True)):  # 60 s and three of its longest units
        pace = pace_of_units(records, total=2, is_complete=False, now=NOW + idle)
        assert (pace.is_quiet, pace.eta_seconds is None) == (is_quiet, is_quiet)
    assert not pace_of_units(records, total=1, is_complete=True, now=NOW + 9999).is_quiet


def test_steps_of_training_have_a_pace_as_well() -> None:
    line = {"seconds": 0.5, "trained_tokens": 100, "loss": 0.25, "policy_drift": 0.01}
    lines = [line, {**line, "seconds": 1.5, "loss": 0.125}]
    pace = pace_of_steps(lines, total=10, is_complete=False, now=NOW, latest=NOW)
    assert (pace.done, pace.total, pace.tokens) == (2, 10, 200)
    assert (pace.units_per_second, pace.tokens_per_second, pace.eta_seconds) == (1.0, 100.0, 8.0)
    assert pace.facts == {"loss": 0.125, "policy_drift": 0.01}
    early = pace_of_steps(lines, total=10, is_complete=True, now=NOW, latest=NOW)
    assert (early.total, early.eta_seconds) == (2, None)  # drift stopped it


def test_scores_arrive_after_their_rollouts() -> None:
    score = Pace(done=1, total=8, is_complete=False, eta_seconds=7.0)
    assert after(score, replace(score, eta_seconds=30.0)).eta_seconds == 30.0
    assert after(score, replace(score, eta_seconds=3.0)).eta_seconds == 7.0
    assert after(score, replace(score, eta_seconds=None)).eta_seconds is None
    assert after(score, replace(score, is_complete=True, eta_seconds=None)).eta_seconds == 7.0


def test_the_run_is_expected_to_need_what_complete_rounds_needed(half: Path) -> None:
    status = status_of(half)
    first, second = status.rounds[1:]
    assert first.window_tokens == second.window_tokens
    expected = max(0.0, first.busy_seconds - second.busy_seconds)
    assert status.eta_seconds == pytest.approx(expected)
    (half / "run" / "metrics.jsonl").unlink()
    planted(half, made_at=0.0)
    later = status_of(half)
    assert later.eta_seconds is not None
    assert later.eta_seconds > expected


def test_a_commit_says_when_it_was_made_and_may_have_further_fields(finished_run: Path) -> None:
    store = Store(finished_run / "store")
    for recipe in store.recipes("scores"):
        records = list(store.artifact(recipe).commits().values())
        assert all(time.time() - 86400 < record.made_at <= time.time() for record in records)
        listed = store.artifact(recipe).listed_commits().values()
        assert [each.as_json() for each in listed] == [each.as_json() for each in records]


def test_a_field_of_a_later_version_is_left_out(half: Path) -> None:
    planted(half, colour=3.0)
    assert status_of(half).rounds[-1].stages["score"].done == 1


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, quiet: None) -> CliRunner:
    monkeypatch.setenv("FORCE_COLOR", "1")  # asks for colours where nobody can see them
    return CliRunner()


def test_json_parses_and_has_the_numbers_of_the_table(half: Path, command: CliRunner) -> None:
    found = command.invoke(app, ["status", str(half / "run"), "--json"])
    value = json.loads(found.stdout)
    assert value["rounds_complete"] == 1
    score = value["rounds"][-1]["stages"]["score"]
    assert (score["done"], score["total"]) == (1, 2)
    assert any("differs in" in line or "no other" in line for line in value["lines"])


def test_a_pipe_gets_the_table_once_without_control_characters(
    half: Path, command: CliRunner
) -> None:
    run_folder = str(half / "run")
    once = command.invoke(app, ["status", run_folder])
    watched = command.invoke(app, ["status", run_folder, "--watch"])
    for found in (once, watched):
        assert found.exit_code == 0
        assert "1 of 2 rounds complete" in found.stdout
        assert found.stdout.startswith("no process of it here, last news")
        assert found.stdout.count("1 of 2") == 2  # the verdict, and the units of a stage
        assert not set(found.stdout) & {"\x1b", "\r", "\b"}
    other = command.invoke(app, ["status", run_folder, "--set", "rollouts.temperature=0.9"])
    assert "settings.temperature: 1.0 there, 0.9 here" in other.stdout
    assert "0 of 2 rounds complete" in other.stdout
    assert "last news" not in other.stdout  # of settings that are not the run's


def test_watching_ends_with_the_run(finished_run: Path) -> None:
    status = status_of(finished_run)
    looks = [replace(status, is_finished=False), status]
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=40)
    watch(lambda: looks.pop(0), console, seconds=0.01)
    assert looks == []


def test_a_small_window_shows_the_latest_rounds(finished_run: Path) -> None:
    status = status_of(finished_run)
    assert "not shown" not in printed(status, height=40)
    text = printed(status, height=12)
    assert "2 rounds not shown" in text
    assert "pass@1" in text
    assert " start " not in text
    assert len(text.splitlines()) <= 12


@pytest.fixture
def quiet() -> Iterator[None]:
    """Loggers and stderr as they were."""
    root, before, stderr = logging.getLogger(), logging.getLogger().handlers[:], sys.stderr
    yield
    root.handlers, sys.stderr = before, stderr
    LOG.setLevel(logging.NOTSET)
    logging.captureWarnings(False)


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def tell(progress: TerminalProgress, clock: Clock) -> None:
    """A stage of eight units of 600 tokens, one in ten seconds, as far as the fifth."""
    progress.start("generate", 8)
    progress.advance("generate", 0, window=64)
    for _ in range(5):
        clock.now += 10
        progress.advance("generate", 1, 600)
    progress.warn("unit 3 is damaged")


def lines_at(level: Level, capsys: pytest.CaptureFixture[str], *, as_json: bool) -> list[str]:
    set_up(level, as_json=as_json)
    clock = Clock()
    with TerminalProgress(clock) as progress:
        tell(progress, clock)
    return capsys.readouterr().err.splitlines()


def test_a_pipe_gets_plain_lines_now_and_then(
    quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_at(Level.INFO, capsys, as_json=False)
    assert lines == [
        "generate: 3 of 8 units, 0.10 units/s, 60.00 tokens/s, ETA 0:00:50, window 64",
        "warning: unit 3 is damaged",
        "generate: 5 of 8 units, 0.10 units/s, 60.00 tokens/s, ETA 0:00:30, window 64",
    ]
    assert len(lines_at(Level.DEBUG, capsys, as_json=False)) == 7
    assert lines_at(Level.WARNING, capsys, as_json=False) == ["warning: unit 3 is damaged"]


def test_log_json_is_one_object_a_line_whoever_speaks(
    quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [json.loads(line) for line in lines_at(Level.INFO, capsys, as_json=True)]
    assert [set(value) for value in values] == [{"time", "level", "message", "fields"}] * 3
    assert [value["level"] for value in values] == ["info", "warning", "info"]
    assert values[0]["fields"] == {
        "stage": "generate",
        "done": 3,
        "total": 8,
        "units_per_second": 0.1,
        "tokens_per_second": 60.0,
        "eta_seconds": pytest.approx(50),
        "window": 64,
    }
    assert values[1]["message"] == "unit 3 is damaged"
    sys.stderr.write("a library\nsays ")
    sys.stderr.write("something\n")
    logging.getLogger("somebody").warning("else %d", 7)
    try:
        raise RuntimeError("a defect")
    except RuntimeError:
        LOG.exception("it failed")
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [v["message"] for v in found] == ["a library", "says something", "else 7", "it failed"]
    assert "RuntimeError: a defect" in found[3]["fields"]["traceback"]


def test_rates_are_those_of_the_latest_minute(
    quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(Level.DEBUG, as_json=True)
    clock = Clock()
    progress = TerminalProgress(clock)
    progress.start("train", 100, 40)  # 40 steps before a kill: they say nothing about the rate
    for seconds in [10.0] * 6 + [1.0] * 54:
        clock.now += seconds
        progress.advance("train", 1, 50, loss=0.5)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(line["message"].endswith("latest step: loss 0.5000") for line in lines)
    fields = [line["fields"] for line in lines]
    assert fields[0]["units_per_second"] == pytest.approx(0.1)
    assert fields[0]["done"] == 41
    assert fields[-2]["units_per_second"] > 0.8
    assert fields[-1]["loss"] == 0.5
    assert "eta_seconds" not in fields[-1]


@pytest.mark.parametrize("options", [[], ["--log-json"]])
def test_a_mistake_is_one_line_in_the_form_that_was_asked_for(
    tmp_path: Path, options: list[str]
) -> None:
    tail: list[Any] = ["status", tmp_path / "nowhere"]
    found = subprocess.run(
        [sys.executable, "-m", "pipeline", *options, *tail],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    if options:
        value = json.loads(line)
        assert value["level"] == "error"
        assert "expected the folder of a run; name one" in value["message"]
    else:
        assert line.startswith("opd-stream: ")


def test_a_long_cache_command_tells_its_progress(finished_run: Path, command: CliRunner) -> None:
    found = command.invoke(app, ["--log-json", "cache", "verify", str(finished_run / "store")])
    assert found.exit_code == 0
    assert found.stdout.splitlines()[-1].endswith("is what was written")
    (line,) = found.stderr.splitlines()
    fields = json.loads(line)["fields"]
    assert fields["stage"] == "verify"
    assert fields["done"] == fields["total"] > 5


def test_status_answers_at_once_and_without_torch(finished_run: Path) -> None:
    said, loaded, seconds = loaded_by("status", str(finished_run / "run"))
    assert "2 of 2 rounds complete" in said
    assert loaded == set()
    assert seconds < 2  # of this process: a busy machine takes longer


def test_a_question_about_forced_tokens_needs_no_torch(finished_run: Path) -> None:
    setting = 'scores.forced_tokens=["<eos>"]'
    said, loaded, _ = loaded_by("status", str(finished_run / "run"), "--set", setting)
    assert "round 0: window 48; generate complete; score complete" in said  # it is forced already
    assert "torch" not in loaded


@pytest.mark.parametrize(
    "text", ["On Monday Anna has 12 coins.\n", "Answer: 07", "naïve café 漢字"]
)
def test_ids_are_read_back_as_with_the_class_of_their_family(text: str) -> None:
    folder = MODELS / "ledger-student"
    family, plain = open_tokenizer(folder), open_vocabulary(folder)
    ids = family.encode(text)
    for skips in (False, True):
        assert plain.decode(ids, skip_special_tokens=skips) == family.decode(
            ids, skip_special_tokens=skips
        )
    assert plain.get_vocab() == family.get_vocab()
