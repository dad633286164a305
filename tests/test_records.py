"""A run made by commands of single stages leaves what `run` leaves, on one machine or several."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_stream.errors import UserError
from opd_stream.store.garbage import garbage
from opd_stream.store.store import Store
from opd_stream.tasks.distance import Bootstrap
from pipeline.comparison import compare
from pipeline.report.read import read_run
from pipeline.report.text import state
from pipeline.run_folder import RunFolder
from pipeline.single_stage import run_evaluation, run_stage
from stages.step import Silent
from tests.conftest import reports_of, run, small_config, summary_of

MACHINES = {"generate": "a", "score": "b", "train": "c"}
TIMES = ("seconds", "cpu_seconds", "audit_cpu_seconds", "wall", "other")


def stage(folder: Path, name: str, round_index: int) -> None:
    config, directory = small_config(folder), RunFolder(folder / MACHINES[name])
    run_stage(name, config, directory, round_index=round_index, progress=Silent())


def evaluate(folder: Path, policy_version: int) -> None:
    directory = RunFolder(folder / "d")
    run_evaluation(
        small_config(folder), directory, policy_version=policy_version, progress=Silent()
    )


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run by stages, each on a machine of its own; its last evaluation is to come."""
    folder = tmp_path_factory.mktemp("apart")
    evaluate(folder, 0)
    for round_index in range(2):
        for name in ("generate", "score", "train"):
            stage(folder, name, round_index)
    return folder


@pytest.fixture(scope="module")
def evaluated(apart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "copy"
    shutil.copytree(apart, folder)
    evaluate(folder, 2)
    return folder


def plain(value: Any) -> Any:
    """Without times, nor the folder that a policy was written to."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {k: plain(v) for k, v in value.items() if k not in (*TIMES, "folder", "final_policy")}


def test_reports_of_stages_are_those_of_the_run_but_for_times(
    finished_run: Path, evaluated: Path
) -> None:
    alone, together = RunFolder(finished_run / "run"), RunFolder(evaluated / "d")
    assert plain(reports_of(together)) == plain(reports_of(alone))
    assert len(reports_of(together)) == 2
    assert plain(summary_of(together)) == plain(summary_of(alone))
    assert summary_of(together)["finished"]
    assert (
        summary_of(together)["tokens"]["teacher_scored"] == 768
    )  # on another machine, for this run
    assert all(summary_of(together)["seconds"][name] > 0 for name in ("generate", "score", "train"))
    assert together.calls() == {}  # there was no call of `run`
    for number in range(2):
        assert plain(together.plan(number).as_json()) == plain(alone.plan(number).as_json())


def test_a_report_draws_the_stages_as_the_run(finished_run: Path, evaluated: Path) -> None:
    alone, together = read_run(finished_run / "run"), read_run(evaluated / "d")
    assert len(together.steps) == len(alone.steps) == 8
    assert together.summary is not None
    assert alone.summary is not None
    assert [e.round for e in together.summary.evaluations] == [0, 2]
    assert together.summary.evaluations == alone.summary.evaluations
    assert [r.tokens for r in together.rounds] == [r.tokens for r in alone.rounds]


def test_the_drift_of_an_epoch_is_the_token_mean_of_its_steps(finished_run: Path) -> None:
    directory = RunFolder(finished_run / "run")
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    for report in reports_of(directory):
        for epoch in report["epochs"]:
            place = (report["round"], epoch["epoch"])
            own = [line for line in lines if (line["round"], line["epoch"]) == place]
            drift = [line["policy_drift"] for line in own]
            assert min(drift) < max(drift)
            mean = np.average(drift, weights=[line["trained_tokens"] for line in own])
            assert epoch["policy_drift"] == pytest.approx(mean, rel=1e-9)
        assert report["policy_drift"] == report["epochs"][-1]["policy_drift"]


def test_a_round_without_its_evaluation_is_not_a_finished_run(apart: Path) -> None:
    trained = RunFolder(apart / "c")
    assert [entry["round"] for entry in summary_of(trained)["evaluations"]] == [0]
    assert not summary_of(trained)["finished"]
    assert reports_of(trained)[1]["evaluation"] is None
    assert state(read_run(apart / "c")).startswith("unfinished, 2 of 2 rounds; not all evaluations")
    with pytest.raises(UserError, match=r"2 of 2 rounds, not all evaluated"):
        list(compare(str(apart / "c"), str(apart / "c"), Bootstrap()))


def test_the_machines_of_another_run_are_not_of_this_one(apart: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(apart, folder)
    config = small_config(folder, f"store={folder / 'store'}", "train.learning_rate=0.002")
    for name in ("generate", "score", "train"):
        directory = RunFolder(folder / "other")
        run_stage(name, config, directory, round_index=0, progress=Silent())
    (report,) = reports_of(RunFolder(folder / "other"))
    assert report["tokens"]["generated"] == report["tokens"]["teacher_scored"] == 0
    assert report["reused"] == {"rollout_units": 2, "score_units": 2, "policy": False}


def test_a_run_in_the_folder_of_a_stage_goes_on_with_it(evaluated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    before = summary_of(RunFolder(folder / "c"))
    config = small_config(folder, f"store={folder / 'store'}")
    after = run(config, RunFolder(folder / "c"), Silent())
    assert plain(after["tokens"]) == before["tokens"]
    assert after["finished"]
    elsewhere = run(config, RunFolder(folder / "new"), Silent())
    assert elsewhere["tokens"]["generated"] == 0
    assert elsewhere["reused"] == {"rollout_units": 4, "score_units": 4}


def test_another_evaluation_leaves_the_folder_as_it_is(evaluated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(evaluated, folder)
    directory = RunFolder(folder / "d")
    before = {path: path.read_bytes() for path in sorted((folder / "d").rglob("*.json"))}
    config = small_config(folder, "evaluation.samples_per_prompt=1")
    run_evaluation(config, directory, policy_version=1, progress=Silent())
    assert {path: path.read_bytes() for path in sorted((folder / "d").rglob("*.json"))} == before
    evaluate(folder, 1)
    versions = [entry["policy_version"] for entry in summary_of(directory)["evaluations"]]
    assert versions == [0, 1, 2]  # one that was not due, asked for by name


def test_garbage_collection_leaves_what_stages_made(apart: Path) -> None:
    assert garbage(Store(apart / "store"), grace_seconds=0.0) == []
    records = [json.loads(path.read_text()) for path in (apart / "store" / "runs").iterdir()]
    names = {name.partition("/")[0] for record in records for name in record["artifacts"]}
    assert names == {"prompts", "rollouts", "scores", "policies"}


def test_a_stage_writes_the_report_of_its_own_round_and_keeps_the_others(
    apart: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(apart, folder)
    stage(folder, "train", 1)  # reports name the folders of policies where they are now
    first = folder / "c" / "rounds" / "0000" / "report.json"
    marked = first.read_bytes() + b"\n"
    first.write_bytes(marked)
    (folder / "c" / "rounds" / "0001" / "report.json").unlink()
    stage(folder, "train", 1)
    assert first.read_bytes() == marked
    assert len(reports_of(RunFolder(folder / "c"))) == 2


def test_training_that_is_done_reads_few_records(
    apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round's policy and report, and the names of its artifacts; no unit's record."""
    folder = tmp_path / "copy"
    shutil.copytree(apart, folder)
    stage(folder, "train", 1)  # reports name the folders of policies where they are now
    read: list[Path] = []
    read_text, read_bytes = Path.read_text, Path.read_bytes

    def text(self: Path, *rest: Any, **named: Any) -> str:
        read.append(self)
        return read_text(self, *rest, **named)

    def data(self: Path) -> bytes:
        read.append(self)
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_text", text)
    monkeypatch.setattr(Path, "read_bytes", data)
    stage(folder, "train", 1)
    records = [path for path in read if path.parent.name == "units" and path.suffix == ".json"]
    assert {path.parts[-4] for path in records} == {"prompts"}


def test_a_report_that_cannot_be_made_costs_no_round(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = small_config(copied_run), RunFolder(copied_run / "run")
    run(config, folder, Silent())  # its policies lie elsewhere than before
    expected, lines = reports_of(folder), list[str]()
    report = min(copied_run.glob("run/**/report.json"))
    report.unlink()
    progress = Silent()
    monkeypatch.setattr(progress, "warn", lines.append, raising=False)

    def broken(*given: Any) -> Any:
        raise KeyError("num_experts")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.accounting.round_report", broken)
        run(config, folder, progress)
    (line,) = lines
    assert line.startswith(f"round {expected[0]['round']} has no report (KeyError: 'num_experts')")
    run(config, folder, Silent())
    assert reports_of(folder) == expected
