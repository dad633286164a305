"""Killed anywhere, by any means, a run continues to the same weights, bit for bit."""

import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import IO, Any

import pytest

from opd_stream.config import Config
from opd_stream.errors import UserError
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import SmallRuns, loaded_by, run, small_config

KILLS, KILLS_WITH_METHODS = 10, 6  # at least
STAGES = {"generate", "score", "train", "evaluate"}


class Telling(Silent):
    """Writes the name of the stage to a pipe at every sign of progress."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def start(self, stage: str, total: int, done: int = 0) -> None:
        if total:
            os.write(self._pipe, f"{stage}\n".encode())

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        if count:
            os.write(self._pipe, f"{stage}\n".encode())


def fingerprints(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how often it was killed."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    return {
        "policies": summary["policies"],
        "caches": summary["caches"],
        "tokens": {k: summary["tokens"][k] for k in ("generated", "teacher_scored")},
        "evaluations": summary["evaluations"],
        "decisions": summary["decisions"],
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in metrics],
    }


def attempt(config: Config, folder: Path, *, signs: int, delay: float) -> str | None:
    """Run in a process group of its own and kill it after some signs of progress.

    `folder` gets the run. Returns the stage it was killed in, or None if the run had ended by then.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reading)
        status = 1
        try:
            run(config, RunFolder(folder / "run"), Telling(writing))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as told:
        stage = stage_after(told, signs, delay)
    _kill_group(child)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the run itself failed"
        return None
    return stage


def stage_after(told: IO[str], signs: int, delay: float) -> str:
    """Wait for some signs of a `Telling` and a little longer; the stage of the last."""
    stage = "start"
    for _ in range(signs):
        line = told.readline()
        if not line:
            break
        stage = line.strip()
    time.sleep(delay)
    return stage


def _kill_group(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet, or it has ended
        os.kill(child, signal.SIGKILL)


# Candidates of both sides, windows by audit, gate, freshness, extrapolation, and units that outlive
# their policy, together.
EVERY_METHOD = (
    "rounds=3",
    "rollouts.student_top_k=5",
    "rollouts.window={kind: adaptive, candidates: [16, 32], max_window_tokens: 48, start: 16, "
    "audit_steps: 3}",
    "train.gate={blocks: spans}",
    "train.freshness={}",
    "train.extrapolation={rows: 4}",
    "train.learning_rate=3e-4",
    "staleness.max_policies=2",
    "staleness.gated_from=1e-5",
)


class Deadly(Silent):
    """Kills its own process at the given sign of a stage."""

    def __init__(self, stage: str, signs: int) -> None:
        self._stage, self._left = stage, signs

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        self._left -= bool(count and stage == self._stage)
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_run_killed_in_every_stage_ends_in_the_same_place(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    expected = fingerprints(small_runs(*EVERY_METHOD))
    config = small_config(tmp_path, *EVERY_METHOD)
    for stage, signs in (("evaluate", 1), ("generate", 2), ("score", 1), ("train", 5)):
        child = os.fork()
        if child == 0:
            try:
                run(config, RunFolder(tmp_path / "run"), Deadly(stage, signs))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), stage
    run(config, RunFolder(tmp_path / "run"), Silent())
    assert fingerprints(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("overrides", [(), EVERY_METHOD], ids=["plain", "every method"])
def test_a_run_killed_many_times_ends_in_the_same_place(
    overrides: tuple[str, ...], small_runs: SmallRuns, tmp_path: Path
) -> None:
    expected = fingerprints(small_runs(*overrides))
    if overrides:
        origins = {cache["origin"] for caches in expected["caches"] for cache in caches}
        assert len(origins) > 1, origins
    moments = random.Random(20)
    killed: Counter[str] = Counter()
    number = 0
    kills = KILLS_WITH_METHODS if overrides else KILLS
    while sum(killed.values()) < kills or not (overrides or set(killed) >= STAGES):
        folder = tmp_path / f"killed-{number}"
        signs, delay = moments.randint(1, 9), moments.uniform(0, 0.05)
        stage = attempt(small_config(folder, *overrides), folder, signs=signs, delay=delay)
        if stage is None:
            assert fingerprints(folder) == expected
            number += 1
        else:
            killed[stage] += 1
    folder = tmp_path / f"killed-{number}"
    run(small_config(folder, *overrides), RunFolder(folder / "run"), Silent())
    assert fingerprints(folder) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.guards.mask_first=['.']",),
        pytest.param(("rounds=3",), marks=pytest.mark.slow),
        pytest.param(("rounds=3", "rollouts.ahead=true"), marks=pytest.mark.slow),
    ],
    ids=["plain", "longer", "ahead"],
)
def test_a_finished_run_goes_on_with_more_rounds(
    overrides: tuple[str, ...], small_runs: SmallRuns, tmp_path: Path
) -> None:
    small_runs.copy(tmp_path / "grown", *overrides, "rounds=1")
    config = small_config(tmp_path / "grown", *overrides)
    run(config, RunFolder(tmp_path / "grown" / "run"), Silent())
    grown = fingerprints(tmp_path / "grown")
    whole = fingerprints(small_runs(*overrides))
    evaluated = grown.pop("evaluations")
    assert evaluated[1]["round"] == 1  # it was the last
    assert [evaluated[0], *evaluated[2:]] == whole.pop("evaluations")
    assert grown == whole


@pytest.mark.parametrize(
    "override",
    [
        "train.schedule=linear",
        "train.warmup=0.1",
        "staleness.max_policies=2",
        "rollouts.window={kind: adaptive, candidates: [16, 32], max_window_tokens: 48, start: 16}",
    ],
)
def test_rounds_that_know_their_number_are_not_added_to(override: str, tmp_path: Path) -> None:
    directory = RunFolder(tmp_path / "run")
    directory.open(small_config(tmp_path, "rounds=2", override))
    with pytest.raises(UserError, match=r"other settings \(rounds: 2 -> 3\)"):
        directory.check(small_config(tmp_path, "rounds=3", override))


def test_a_run_is_not_made_shorter(tmp_path: Path) -> None:
    directory = RunFolder(tmp_path / "run")
    directory.open(small_config(tmp_path, "rounds=2"))
    directory.check(small_config(tmp_path, "rounds=3"))
    with pytest.raises(UserError, match=r"other settings \(rounds: 2 -> 1\)"):
        directory.check(small_config(tmp_path, "rounds=1"))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_runs_on_one_store_at_the_same_time_both_finish(
    finished_run: Path, tmp_path: Path
) -> None:
    children: list[int] = []
    plain = ["evaluation=null"]
    runs = (("first", plain), ("second", plain), ("third", [*plain, "rounds=1"]))
    for name, overrides in runs:
        # Read here: the three share one config file, which each of these calls writes.
        config = small_config(tmp_path / "shared", *overrides)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(config, RunFolder(tmp_path / "shared" / name), Silent())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    alone = json.loads((finished_run / "run" / "summary.json").read_text())
    made = 0
    for name in ("first", "second"):
        summary = json.loads((tmp_path / "shared" / name / "summary.json").read_text())
        assert summary["policies"] == alone["policies"]
        made += summary["tokens"]["generated"]
    third = json.loads((tmp_path / "shared" / "third" / "summary.json").read_text())
    assert third["caches"][0] == alone["caches"][0]
    assert made + third["tokens"]["generated"] == alone["tokens"]["generated"]


@pytest.mark.parametrize(
    ("command", "line"),
    [(["run"], "nothing to do"), (["train", "--round", "1"], "is complete")],
    ids=["run", "train"],
)
def test_a_finished_run_says_so_without_a_model(
    command: list[str], line: str, copied_run: Path
) -> None:
    """No library of models is loaded before work is found."""
    config, folder = str(copied_run / "small.yaml"), str(copied_run / "run")
    said, loaded, _ = loaded_by(command[0], config, "--run-dir", folder, *command[1:])
    assert line in said
    assert not loaded & {"torch", "transformers", "ray", "lightning"}
