"""Rollouts made while the round before trains: by an older policy, and otherwise as ever."""

import queue
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.staleness import Staleness, may_run_ahead
from opd_stream.types import RolloutBatch
from pipeline import run as pipeline_run
from pipeline.run_folder import RunFolder
from pipeline.setup import open_to_look
from pipeline.single_stage import run_stage
from pipeline.status import status_lines
from stages import collect
from stages.ray_stream import RayExecutor
from stages.step import Silent
from stages.workers import Task, TaskResult
from tests.conftest import reports_of, run, small_config

AHEAD = ("rounds=3", "evaluation=null", "rollouts.ahead=true", "staleness.policy_drift=5")


def reports(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    directory = RunFolder(folder / "run")
    run(small_config(folder, *AHEAD, *overrides), directory, Silent())
    return reports_of(directory)


def test_from_the_third_round_on_rollouts_are_of_the_policy_before(tmp_path: Path) -> None:
    found = reports(tmp_path)
    assert [cache["origin"] for report in found for cache in report["caches"]] == [
        "fresh",
        "fresh",
        "ahead",
    ]
    assert [cache["policy_version"] for report in found for cache in report["caches"]] == [0, 1, 1]
    assert found[1]["sampler_gap"] is not None
    assert found[2]["sampler_gap"] is None  # no row of that round is fresh
    assert found[2]["start_drift"] > 10 * found[1]["start_drift"]


GAP = 0.2  # nats of every token: policy_drift 0.0214 before anything trains


@pytest.fixture
def rough_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose log-probabilities are all wrong by `GAP`, as rounding makes some of them."""
    sample = TransformersEngine.sample

    def sampled(self: TransformersEngine, *asked: Any, **named: Any) -> RolloutBatch:
        rows = sample(self, *asked, **named)
        return replace(rows, behavior_logprobs=tuple(p - GAP for p in rows.behavior_logprobs))

    monkeypatch.setattr(TransformersEngine, "sample", sampled)


BARELY_MOVED = ("rounds=5", "staleness.policy_drift=0.02", "train.learning_rate=1e-6")


@pytest.mark.usefixtures("rough_engine")
@pytest.mark.parametrize(
    "how",
    ["staleness.max_policies=9", pytest.param("rollouts.ahead=true", marks=pytest.mark.slow)],
)
def test_a_round_without_fresh_rows_reads_drift_above_the_last_floor(
    how: str, tmp_path: Path
) -> None:
    """The engine's gap alone is past the bound; it neither stops a round nor costs a unit."""
    ahead = f"rollouts.ahead={'yes' if 'ahead' in how else 'no'}"
    found = reports(tmp_path, *BARELY_MOVED, ahead, how)
    origins = [cache["origin"] for report in found for cache in report["caches"]]
    late = "ahead" if "ahead" in how else "kept"
    first = origins.index(late)
    assert origins == ["fresh"] * first + [late] * (5 - first)
    measured = found[first - 1]["drift_floor"]
    assert measured == pytest.approx(0.0214, abs=2e-4)
    assert [report["drift_floor"] for report in found[first:]] == [measured] * (5 - first)
    assert [report["sampler_gap"] for report in found[first:]] == [None] * (5 - first)
    assert [report["steps"] for report in found] == [4] * 5
    assert all("above a floor of 0.021" in report["decision"] for report in found)
    decided = [unit for report in found for unit in report["unit_decisions"]]
    assert {unit["floor"] for unit in decided} <= {measured}
    assert bool(decided) == (late == "kept")


@pytest.mark.slow
def test_the_sampler_never_waits_for_the_scores_of_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round's rollouts are ordered before the scores of those before are waited for."""
    told: list[tuple[str, str]] = []

    def submit_missing(executor: Any, rollouts: Any, *rest: Any, **named: Any) -> Any:
        told.append(("submitted", rollouts.name))
        return collect.submit_missing(executor, rollouts, *rest, **named)

    def wait_for(executor: Any, work: Any, *rest: Any, **named: Any) -> Any:
        told.append(("waited for", work.rollouts.name))
        return collect.wait_for(executor, work, *rest, **named)

    monkeypatch.setattr(pipeline_run, "submit_missing", submit_missing)
    monkeypatch.setattr(pipeline_run, "wait_for", wait_for)
    found = reports(tmp_path, "rounds=5")
    names = [report["caches"][0]["rollouts"][:16] for report in found]
    for before, after in pairwise(names[2:]):
        assert told.index(("submitted", f"rollouts/{after}")) < told.index(
            ("waited for", f"rollouts/{before}")
        )


def test_a_round_that_drifted_too_far_makes_the_next_wait(tmp_path: Path) -> None:
    found = reports(tmp_path, "staleness.policy_drift=1e-6", "staleness.distance_share=0")
    assert {cache["origin"] for report in found for cache in report["caches"]} == {"fresh"}


def test_the_bound_is_on_drift_above_the_floor() -> None:
    bounds = Staleness(max_epochs=1, policy_drift=0.1, effective_sample_fraction=0.5)
    assert may_run_ahead(0.1, bounds=bounds)
    assert not may_run_ahead(0.11, bounds=bounds)
    assert may_run_ahead(0.11, bounds=bounds, floor=0.02)


@pytest.mark.slow
def test_a_window_schedule_is_read_as_if_every_planned_step_were_taken(tmp_path: Path) -> None:
    window = "rollouts.window={kind: linear, h0: 16, delta: 2, every: 1, max_window_tokens: 64}"
    found = reports(tmp_path, window)
    assert [report["steps"] for report in found] == [4, 4, 4]
    assert [report["window_tokens"] for report in found] == [22, 30, 38]


@pytest.mark.slow
def test_the_next_round_can_be_made_on_another_machine_before_this_one_trains(
    tmp_path: Path,
) -> None:
    whole = reports(tmp_path / "whole")
    config, directory = small_config(tmp_path, *AHEAD), RunFolder(tmp_path / "run")

    def stage(name: str, round_index: int) -> None:
        run_stage(name, config, directory, round_index=round_index, progress=Silent())

    for name in ("generate", "score", "train"):
        stage(name, 0)
    stage("generate", 1)
    stage("score", 1)
    with pytest.raises(UserError, match="which is not trained yet; run train --round 1 first"):
        stage("train", 2)
    stage("generate", 2)
    stage("score", 2)
    stage("train", 1)
    lines = status_lines(open_to_look(config))
    assert lines[2].startswith("round 2: window 48; generate complete; score comp")
    stage("train", 2)
    again = run(config, directory, Silent())
    assert again["policies"][1:] == [
        {name: report["policy"][name] for name in ("version", "fingerprint", "weights_sha256")}
        for report in whole
    ]


@pytest.mark.parametrize(
    "setting",
    [
        "staleness.max_policies=2",
        "rollouts.window={kind: adaptive, candidates: [8], max_window_tokens: 48, start: 8}",
    ],
)
def test_what_needs_the_policy_first_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollouts\.ahead is set with"):
        small_config(tmp_path, "rollouts.ahead=true", setting)


def test_results_wait_for_whoever_submitted_the_tasks(tmp_path: Path) -> None:
    """Results of two submissions come back mixed; each gets its own."""
    executor = RayExecutor(small_config(tmp_path), ("student", "teacher"))
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    executor._results = done
    first, second = (
        [
            Task(unit=unit, rollouts=name, scores=None, student="s", teacher=None, made_by="r")
            for unit in range(2)
        ]
        for name in ("a", "b")
    )
    for task in (second[1], first[0], second[0], first[1]):
        done.put(TaskResult(task=task).as_table())
    assert sorted(result.task.unit for result in executor.results(first)) == [0, 1]
    assert {result.task for result in executor.results(second)} == set(second)
