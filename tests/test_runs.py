"""`runs` lists runs with what sets them apart; `status` gives a verdict; names may be short."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_stream.errors import UserError
from opd_stream.store import open_scores
from opd_stream.store.store import Store
from pipeline.console import age_text
from pipeline.lease import lease
from pipeline.runs import (
    RunOverview,
    differing_settings,
    list_runs,
    overview,
    runs_lines,
    settings_text,
    short_names,
)
from pipeline.status import Pace, RoundStatus, RunStatus
from pipeline.verdict import age_of, verdict
from tests.conftest import Command, SmallRuns, loaded_by, rewrite


@pytest.fixture
def folder(small_runs: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two finished runs that differ in one setting, and one that is damaged."""
    for name, settings in (("first", ()), ("second", ("train.learning_rate=0.002",))):
        shutil.copytree(small_runs(*settings) / "run", tmp_path / "runs" / name)
    shutil.copytree(small_runs() / "run", tmp_path / "runs" / "group" / "broken")
    (tmp_path / "runs" / "group" / "broken" / "summary.json").write_text("{")
    old = time.time() - 7200
    for path in (tmp_path / "runs" / "first").iterdir():
        os.utime(path, (old, old))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_listed_with_what_sets_them_apart(folder: Path, opd_stream: Command) -> None:
    code, said, _ = opd_stream("runs")
    assert code == 0
    assert "runs/second: train.learning_rate=0.002" in said
    assert "2 h" in said
    assert said.count("finished") == 2
    (problem,) = [line for line in said.splitlines() if line.startswith("damaged: ")]
    assert "summary.json" in problem


def test_runs_for_programs_have_every_number(folder: Path, opd_stream: Command) -> None:
    found = json.loads(opd_stream("runs", "--json")[1])
    assert found["differ"] == ["train.learning_rate"]
    runs = {each["run"]: each for each in found["runs"]}
    summary = json.loads((folder / "runs" / "first" / "summary.json").read_text())
    first = runs["runs/first"]
    assert first["teacher_scored_tokens"] == summary["tokens"]["teacher_scored"]
    assert (first["figure"], first["value"]) == ("pass@1", summary["evaluations"][-1]["pass@1"])
    assert (first["rounds"], first["rounds_planned"], first["state"]) == (2, 2, "finished")
    assert first["settings"]["train.objective.kind"] == "bucket"
    assert runs["runs/group/broken"]["state"] == "damaged"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--sort", "run", "state=finished"), ["first", "second"]),
        (("train.learning_rate=0.002",), ["second"]),
        (("--where", "train.objective.kind=bucket", "--sort", "age"), ["second", "first"]),
        (("runs/first",), ["first"]),
    ],
)
def test_runs_are_filtered_and_sorted(
    words: tuple[str, ...], names: list[str], folder: Path, opd_stream: Command
) -> None:
    found = json.loads(opd_stream("runs", "--json", *words)[1])
    assert [Path(each["run"]).name for each in found["runs"]] == names


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("none",), "none is no folder"),
        (("train.learning_rat=1",), "no run here has the setting"),
        (("--where", "bucket"), "has no '='"),
        (("--where", "state=done"), "expected one of finished, running"),
    ],
)
def test_what_lists_no_run_is_one_line(
    words: tuple[str, ...], reason: str, folder: Path, opd_stream: Command
) -> None:
    code, _, error = opd_stream("runs", *words)
    assert (code, error.count("\n"), reason in error) == (2, 1, True)


def test_runs_and_the_store_are_listed_without_heavy_libraries(
    folder: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    assert loaded_by("runs")[1] == set()
    assert loaded_by("cache", "ls", str(finished_run / "store"))[1] == set()


def test_a_run_in_whose_folder_a_process_works_is_running(copied_run: Path) -> None:
    summary = copied_run / "run" / "summary.json"
    rewrite(summary, finished=False)
    assert overview(copied_run / "run", time.time()).state == "stopped"
    with lease(copied_run / "run"):
        assert overview(copied_run / "run", time.time()).state == "running"
    summary.unlink()
    assert overview(copied_run / "run", time.time()).rounds == 2


def test_the_best_and_the_cheapest_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "good": {"figure": "pass@1", "value": 0.9, "teacher_scored_tokens": 9},
        "near": {"figure": "reverse_kl", "value": 0.2, "teacher_scored_tokens": 1},
        "none": {},
    }
    monkeypatch.setattr("pipeline.runs.run_folders", lambda root: list(made))
    monkeypatch.setattr(
        "pipeline.runs.overview",
        lambda run, now: RunOverview(run=run, state="finished", age_seconds=0, **made[run]),
    )
    assert [each.run for each in list_runs(Path(), (), "figure")] == ["good", "near", "none"]
    assert [each.run for each in list_runs(Path(), (), "tokens")] == ["near", "good", "none"]


def test_names_of_settings_are_as_short_as_they_can_be() -> None:
    names = ["train.objective.kind", "given.objective.kind", "seed", "train.lr"]
    assert short_names(names) == {each: each for each in names}
    assert short_names(["a.train.lr", "seed"]) == {"a.train.lr": "train.lr", "seed": "seed"}
    run = RunOverview(
        run="r", state="finished", age_seconds=0, settings={"seed": 1, "p": "x/" * 30, "n": None}
    )
    assert settings_text(run, ["seed", "p", "n"]) == f"seed=1 p=…{'x/' * 12}"
    assert list(runs_lines([run])) == []


# A verdict


def status(**changed: Any) -> RunStatus:
    """A run of two rounds in the middle of the second."""
    done = Pace(done=2, total=2, is_complete=True)
    half = Pace(done=1, total=2, is_complete=False, idle_seconds=300.0)
    rounds = (
        RoundStatus(round=0, policy_version=1, stages={"generate": done}),
        RoundStatus(round=1, policy_version=2, stages={"generate": done, "score": half}),
    )
    known = RunStatus(
        run="runs/my",
        time=0.0,
        is_finished=False,
        rounds_complete=1,
        rounds_planned=2,
        eta_seconds=None,
        rounds=rounds,
        age_seconds=300.0,
    )
    return replace(known, **changed)


@pytest.mark.parametrize(
    ("holder", "changed", "said"),
    [
        (None, {}, "stopped, last news 5 min ago: 1 of 2 rounds complete; round 1: score 1 of 2;"),
        (None, {"age_seconds": 5.0}, "no process of it here, last news 5 s ago"),
        (None, {"age_seconds": None, "rounds": ()}, "not begun"),
        ("process 7 on h", {}, "running (process 7 on h), last news 5 min ago"),
        (None, {"is_finished": True, "rounds_complete": 2}, "finished 5 min ago: 2 of 2"),
    ],
)
def test_a_verdict_says_where_a_run_is(
    holder: str | None, changed: dict[str, Any], said: str
) -> None:
    assert verdict(status(**changed), holder).startswith(said)


def test_a_quiet_run_may_be_stuck() -> None:
    quiet = Pace(done=1, total=2, is_complete=False, idle_seconds=300.0, is_quiet=True)
    rounds = (RoundStatus(round=0, policy_version=1, stages={"score": quiet}),)
    assert verdict(status(rounds=rounds), "process 7 on h").startswith("stuck?")


def test_the_age_is_that_of_the_latest_work() -> None:
    assert age_of(status().rounds, 1000.0) == 300.0
    assert age_of(status().rounds, 10.0) == 10.0
    assert age_of((), None) is None
    assert [age_text(s) for s in (0, 119, 120, 7199, 7200, 172_800)] == [
        *("0 s", "119 s", "2 min", "120 min", "2 h", "2 days")
    ]


# Short names, many policies, the store


def test_the_beginning_of_a_fingerprint_names_scores(finished_run: Path, tmp_path: Path) -> None:
    store = finished_run / "store"
    whole = next((store / "scores").iterdir()).name
    short, full = (open_scores(f"{store}/scores/{name}") for name in (whole[:6], whole))
    assert len(short) == len(full)
    for name in (whole, f"{whole[:4]}{'0' * 12}"):
        (tmp_path / "scores" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"scores/{whole[:4]} is the beginning of {whole[:4]}"):
        Store(tmp_path).by_fingerprint("scores", whole[:4])
    with pytest.raises(UserError, match="has no scores/ffff"):
        Store(tmp_path).by_fingerprint("scores", "ffffff")


def test_the_listing_of_a_store_is_for_programs_too(
    finished_run: Path, opd_stream: Command
) -> None:
    store = str(finished_run / "store")
    found = json.loads(opd_stream("cache", "ls", store, "--json", "--kind", "scores")[1])
    assert {each["kind"] for each in found["artifacts"]} == {"scores"}
    assert found["bytes"] == sum(each["bytes"] for each in found["artifacts"])
    first = found["artifacts"][0]
    assert first["state"] == "complete"
    assert first["runs"] == [str((finished_run / "run").resolve())]
    assert 0 <= time.time() - first["changed_at"] < 86_400
    said = opd_stream("cache", "ls", store)[1]
    row = next(line for line in said.splitlines() if first["name"] in line)
    assert row.split()[1] == "complete"
    assert row.split()[-1] == "run"
    code, _, error = opd_stream("cache", "ls", store, "--kind", "score")
    assert (code, error.count("\n")) == (2, 1)


def test_many_policies_are_compared_with_the_first(folder: Path, opd_stream: Command) -> None:
    code, said, _ = opd_stream("compare", "runs/first@0", "runs/first", "runs/second")
    assert code == 0
    pair = opd_stream("compare", "runs/first@0", "runs/second")[1]
    (numbers,) = [line.split()[3:] for line in pair.splitlines() if "pass@1" in line]
    row = next(line for line in said.splitlines() if "runs/second " in line)
    assert row.split()[1:] == numbers[1:]
    assert "runs/first@0" in said


def test_one_folder_written_in_two_ways_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def of(path: str) -> RunOverview:
        settings = {"student.path": path, "seed": 1}
        return RunOverview(run="r", state="finished", age_seconds=0.0, settings=settings)

    assert differing_settings([of("models/own"), of(f"{tmp_path}/models/own")]) == []
    assert differing_settings([of("models/own"), of("models/none")]) == ["student.path"]
    assert differing_settings([of("org/a"), of("org/b")]) == ["student.path"]
