"""Units that outlive their policy: kept, weighed, continued, made again, and counted exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.drift import DriftSums, drift_sums, ratio_error
from opd_stream.engines.base import ScoringSettings
from opd_stream.errors import UserError
from opd_stream.objectives import Bucket, Hybrid
from opd_stream.staleness import (
    Decision,
    Staleness,
    UnitState,
    decide_epoch,
    decide_stop,
    decide_unit,
    divergence,
    is_look_due,
)
from opd_stream.store.codecs import scores_batch
from opd_stream.store.reader import ScoredRow, open_scores
from opd_stream.store.shards import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.types import ScoreBatch
from pipeline.accounting import untrained_line
from pipeline.records import RoundReport
from pipeline.run_folder import RunFolder
from stages import train
from stages.score import append_scores
from stages.step import Silent
from tests.conftest import SmallRuns, reports_of, run, small_config

BOUNDS = Staleness(
    max_epochs=3,
    policy_drift=0.1,
    effective_sample_fraction=0.5,
    gated_from=0.02,
    student_top_mass=0.9,
    max_policies=2,
    keep_share=1.0,
)
# Two units of four prompts a round; they may live for three rounds.
KEPT = (
    "rounds=3",
    "evaluation=null",
    "staleness.max_policies=2",
    "staleness.max_epochs=1",
    "train.learning_rate=1e-4",
)


def shifted(shift: float) -> DriftSums:
    """Drift of tokens that moved by `shift` up and down."""
    return drift_sums(torch.tensor([shift, -shift]), torch.zeros(2))


def unit(shift: float = 0.0, **changes: Any) -> UnitState:
    values = {"student_top_mass": 0.99, "policies": 1, "window_tokens": 64, "unfinished": 5}
    return UnitState(drift=shifted(shift), **{**values, **changes})


@pytest.mark.parametrize(
    ("state", "action", "reason"),
    [
        (unit(0.01), "train", "kept: policy_drift 0.0001"),
        (unit(0.3), "gated", "kept, weights by drift"),
        (unit(0.6), "regenerate", "drift passed its bound"),
        (unit(0.0, student_top_mass=0.8), "regenerate", "the student left"),
        (unit(0.0, policies=3), "retire", "too old"),
        (unit(0.6, policies=3), "retire", "too old"),
        (unit(0.01, window_tokens=32), "extend", "5 rows go on from 32 to 64 tokens"),
        (unit(0.3, window_tokens=32), "extend", "5 rows go on from 32 to 64 tokens, weights by"),
        (unit(0.01, window_tokens=32, unfinished=0), "train", "kept"),
        (unit(0.6, window_tokens=32), "regenerate", "drift passed its bound"),
        (
            UnitState(
                drift=DriftSums(), student_top_mass=0, policies=1, window_tokens=64, unfinished=0
            ),
            "regenerate",
            "no row of it",
        ),
    ],
)
def test_a_unit_is_kept_weighed_continued_or_made_again(
    state: UnitState, action: str, reason: str
) -> None:
    decision = decide_unit(state, window_tokens=64, bounds=BOUNDS)
    assert (decision.action, decision.reason[: len(reason)]) == (action, reason)
    assert decision.is_kept == (action in ("train", "gated", "extend"))
    assert decision.is_gated == ("weights by drift" in decision.reason)


def test_a_unit_is_kept_only_with_room_to_drift() -> None:
    drift = shifted(0.4).policy_drift
    for share, is_kept in ((1.0, True), (0.9, True), (0.7, False)):
        bounds = BOUNDS.model_copy(update={"keep_share": share})
        assert 0.8 < drift / BOUNDS.policy_drift < 0.9
        decision = decide_unit(unit(0.4), window_tokens=64, bounds=bounds)
        assert decision.is_kept == is_kept
        assert f"(bound {0.1 * share:g})" in decision.reason
        assert decide_stop(shifted(0.4), bounds=bounds) is None


def test_drift_below_its_floor_is_not_read() -> None:
    state, floor = unit(0.5), shifted(0.4).policy_drift
    assert decide_unit(state, window_tokens=64, bounds=BOUNDS).action == "regenerate"
    decision = decide_unit(state, window_tokens=64, bounds=BOUNDS, floor=floor)
    assert decision.action == "gated"
    assert "above a floor of 0.0811" in decision.reason
    assert decide_unit(state, window_tokens=64, bounds=BOUNDS, floor=0.2).action == "train"


def test_an_epoch_goes_on_with_weights_and_stops_inside_when_too_far() -> None:
    assert decide_epoch(shifted(0.1), epochs_done=1, bounds=BOUNDS).action == "train"
    assert decide_epoch(shifted(0.3), epochs_done=1, bounds=BOUNDS).action == "gated"
    assert decide_stop(shifted(0.3), bounds=BOUNDS) is None
    stop = decide_stop(shifted(0.6), bounds=BOUNDS)
    assert stop is not None
    assert stop.action == "stop"
    assert "inside the epoch: policy_drift 0.1855 (bound 0.1)" in stop.reason


def finished_run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The reports of a run."""
    run(small_config(folder, *overrides), RunFolder(folder / "run"), Silent())
    return reports_of(RunFolder(folder / "run"))


def shared_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of a finished run that tests share, or of its copy."""
    return reports_of(RunFolder(folder / "run"))


def test_units_live_as_long_as_they_may_and_tokens_are_counted_once(small_runs: SmallRuns) -> None:
    reports = shared_reports(small_runs(*KEPT))
    assert [[c["origin"] for c in report["caches"]] for report in reports] == [
        ["fresh"],
        ["kept"],
        ["kept"],
    ]
    assert [report["tokens"]["generated"] > 0 for report in reports] == [True, False, False]
    assert reports[0]["caches"][0]["scores"] == reports[2]["caches"][0]["scores"]
    assert [d["action"] for d in reports[2]["unit_decisions"]] == ["train", "train"]
    assert [d["policies"] for d in reports[2]["unit_decisions"]] == [2, 2]
    assert all(report["rows"] == 8 for report in reports)
    assert reports[1]["start_drift"] > 0
    assert reports[1]["sampler_gap"] is None  # nothing fresh to measure it on
    recipe = json.loads((Path(reports[2]["policy"]["folder"]) / "../manifest.json").read_text())
    (name,) = [n for n in recipe["inputs"] if n.startswith("scores.")]
    assert name == "scores.0.version_0"
    assert recipe["settings"]["units"] == [[0, 1]]


@pytest.mark.slow
def test_a_unit_that_is_too_old_is_retired_for_new_prompts(tmp_path: Path) -> None:
    reports = finished_run(tmp_path, *KEPT, "staleness.max_policies=1")
    assert [[c["origin"] for c in report["caches"]] for report in reports] == [
        ["fresh"],
        ["kept"],
        ["fresh"],
    ]
    assert {d["action"] for d in reports[2]["unit_decisions"]} == {"retire"}


def test_only_the_units_that_drifted_are_made_again(small_runs: SmallRuns, tmp_path: Path) -> None:
    """A bound between the two units' drift takes one of them."""
    reports = shared_reports(small_runs(*KEPT))
    drifts = sorted(
        float(d["reason"].split("policy_drift ")[1].split()[0])
        for d in reports[1]["unit_decisions"]
    )
    outcome = outcome_of(reports[0])
    exact = sorted(DriftSums.from_dict(u["drift"]).policy_drift for u in outcome["units"])
    assert drifts == pytest.approx(exact, abs=1e-4)
    bound = sum(exact)  # half of it, `staleness.keep_share`, is the mean
    reports = finished_run(
        tmp_path, *KEPT, f"staleness.policy_drift={bound}", "staleness.distance_share=0"
    )
    assert sorted(d["action"] for d in reports[1]["unit_decisions"]) == ["regenerate", "train"]
    kept, fresh = reports[1]["caches"]
    assert (kept["origin"], fresh["origin"]) == ("kept", "fresh")
    assert (kept["policy_version"], fresh["policy_version"]) == (0, 1)
    assert len(kept["units"]) == len(fresh["units"]) == 1
    assert reports[1]["rows"] == 8
    assert reports[1]["sampler_gap"] < 1e-5
    store = Store(tmp_path / "store")
    selection = store.by_fingerprint("rollouts", fresh["rollouts"]).recipe.settings["selection"]
    (lost,) = [d for d in reports[1]["unit_decisions"] if d["action"] == "regenerate"]
    assert selection["ranges"] == [[lost["first"], lost["last"]]]
    assert reports[1]["tokens"]["generated"] < reports[0]["tokens"]["generated"]


def test_a_unit_kept_to_be_weighed_turns_the_gate_on(small_runs: SmallRuns, tmp_path: Path) -> None:
    """Between the units' mean drift and the larger one: only the decision about a unit can."""
    plain = outcome_of(shared_reports(small_runs(*KEPT, "rounds=2"))[0])
    units = [DriftSums.from_dict(unit["drift"]) for unit in plain["units"]]
    highest = max(unit.policy_drift for unit in units)
    mean = sum(units, DriftSums()).policy_drift
    assert mean < 0.95 * highest
    settings = (*KEPT, "rounds=2", "train.gate={blocks: 16}")
    for gated_from, is_weighed in ((0.98 * highest, True), (1.02 * highest, False)):
        folder = tmp_path / str(is_weighed)
        report = finished_run(folder, *settings, f"staleness.gated_from={gated_from}")[1]
        actions = {decided["action"] for decided in report["unit_decisions"]}
        assert ("gated" in actions) == is_weighed
        weights = [line["mean_drift_weight"] for line in metrics_of(folder) if line["round"] == 1]
        assert any(abs(weight - 1) > 1e-6 for weight in weights) == is_weighed


def test_units_kept_to_be_weighed_are_weighed_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the drift of an epoch would not ask for it."""

    def decided(drift: DriftSums, *, epochs_done: int, **rest: Any) -> Decision:
        return Decision(action="train" if epochs_done == 1 else "regenerate", reason="told")

    monkeypatch.setattr(train, "decide_epoch", decided)
    settings = ("rounds=2", "staleness.max_epochs=2", "staleness.gated_from=1e-12")
    report = finished_run(tmp_path, *KEPT, *settings, "train.gate={blocks: 16}")[1]
    assert {decided["action"] for decided in report["unit_decisions"]} == {"gated"}
    epochs = [line["epoch"] for line in metrics_of(tmp_path) if line["round"] == 1]
    weights = [line["mean_drift_weight"] for line in metrics_of(tmp_path) if line["round"] == 1]
    assert epochs == [0, 0, 1, 1]
    assert all(abs(weight - 1) > 1e-6 for weight in weights)


def test_bounds_fit_the_pair() -> None:
    bounds = Staleness(policy_drift=0.1, distance_share=0.5, effective_sample_fraction=0.4)
    near, far = bounds.fitted(0.02, (Bucket(),)), bounds.fitted(2.6, (Bucket(),))
    assert (near.policy_drift, far.policy_drift) == (0.1, 1.3)
    assert near.effective_sample_fraction == 0  # nothing weighs by importance
    assert bounds.fitted(0.02, (Bucket(), Hybrid())).effective_sample_fraction == 0.4
    learned = shifted(1.0)  # k3 0.54, far above 0.1
    assert decide_epoch(learned, epochs_done=1, bounds=near).action == "regenerate"
    assert decide_epoch(learned, epochs_done=1, bounds=far).action == "regenerate"  # all done
    further = far.model_copy(update={"max_epochs": 2})
    assert decide_epoch(learned, epochs_done=1, bounds=further).action == "train"


def test_only_a_student_that_leaves_both_models_behind_diverges() -> None:
    bounds = Staleness()

    def moved(fall: float, *, distance: float, at_start: float = 0.0) -> str | None:
        drift = drift_sums(torch.full((4,), at_start - fall), torch.zeros(4))
        return divergence(drift, at_start=at_start, distance=distance, bounds=bounds)

    assert moved(0.9, distance=0.1) is None  # two times the least distance
    assert moved(2.6, distance=2.6) is None  # it became the teacher
    assert moved(6.0, distance=2.6, at_start=-3.0) is not None
    said = moved(1.5, distance=0.1)
    assert said is not None
    assert "fell by 1.50 nats, where the teacher is 0.10 nats away (bound 1.00)" in said


def test_the_error_of_a_mean_over_tokens_counts_rows() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=(400, 30)).astype(float)
    values = counts * rng.normal(0.3, 0.1, size=(400, 30))  # tokens of a row are alike
    means = values.sum(1) / counts.sum(1)
    stated = [ratio_error(v, c) for v, c in zip(values.tolist(), counts.tolist(), strict=True)]
    assert np.mean(stated) == pytest.approx(means.std(), rel=0.1)
    assert ratio_error([1.0], [2.0]) == 0


def test_the_first_pass_over_a_cache_is_finished_and_its_drift_ends_the_round(
    tmp_path: Path,
) -> None:
    tight = ("staleness.policy_drift=1e-9", "staleness.distance_share=0", "evaluation=null")
    reports = finished_run(tmp_path, *tight, "rounds=1", "staleness.max_epochs=3")
    (report,) = reports
    (epoch,) = report["epochs"]
    assert report["steps"] == 2  # 8 rows, 4 a step
    assert epoch["action"] == "regenerate"
    assert "drift passed its bound" in epoch["reason"]
    assert report["trained_share"] == 1
    start = report["start"]
    assert start["distance"] > start["distance_error"] > 0
    assert 0 <= start["floor_error"] < 1e-5


def test_a_run_that_diverges_ends_in_one_line_and_keeps_what_it_had(tmp_path: Path) -> None:
    wild = ("train.learning_rate=3", "train.warmup_steps=0", "staleness.max_epochs=9")
    with pytest.raises(UserError, match=r"the student diverges.*lower train\.learning_rate"):
        finished_run(tmp_path, *wild, "evaluation=null", "rounds=1")
    assert not list((tmp_path / "store" / "policies").glob("*/manifest.json"))


def test_scores_that_trained_nothing_are_said(tmp_path: Path) -> None:
    some, config = {"round": 3, "alignment": None}, small_config(tmp_path)
    report = RoundReport.model_construct(**some, trained_share=0.41, cut_share=0.5)
    (line,) = untrained_line(report, config)
    assert line.startswith("round 3: 41% of its scored tokens were trained; the rest lies behind")
    whole = RoundReport.model_construct(**some, trained_share=0.95, cut_share=0.0)
    assert list(untrained_line(whole, config)) == []
    outside = RoundReport.model_construct(**some, trained_share=0.02, cut_share=0.0)
    (line,) = untrained_line(outside, small_config(tmp_path, "train.segment.end=1"))
    assert line.endswith("the rest lies outside train.segment")


def test_drift_is_looked_at_four_times_an_epoch_at_most_and_evenly() -> None:
    for steps in range(1, 200):
        looks = [step for step in range(1, steps) if is_look_due(step, steps)]
        assert len(looks) == min(3, steps - 1)  # the end of the epoch is the fourth
        gaps = np.diff([0, *looks, steps])
        assert gaps.max() - gaps.min() <= 1
    assert [step for step in range(1, 8) if is_look_due(step, 8)] == [2, 4, 6]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def outcome_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the train stage recorded."""
    return json.loads((Path(report["policy"]["folder"]) / "../manifest.json").read_text())[
        "outcome"
    ]


GROWING = (
    "rollouts.window={kind: linear, h0: 16, delta: 16, every: 2, max_window_tokens: 48}",
    "scores.top_k=3",
)


@pytest.mark.parametrize(
    "codec",
    [
        "{kind: compact, mass: 0.9}",
        pytest.param("{kind: exact, dtype: float32}", marks=pytest.mark.slow),
    ],
)
def test_a_longer_window_continues_rows_and_scores_only_what_is_new(
    codec: str, tmp_path: Path
) -> None:
    reports = finished_run(tmp_path, *KEPT, *GROWING, f"scores.codec={codec}", "rounds=2")
    before, after = (report["caches"][0] for report in reports)
    assert (after["origin"], after["policy_version"]) == ("extended", 0)
    assert (before["window_tokens"], after["window_tokens"]) == (16, 32)
    old, new = (open_scores(tmp_path / "store" / "scores" / c["scores"]) for c in (before, after))
    assert len(old) == len(new) == 8
    for place in range(8):
        assert_begins_with(new[place], old[place])
        assert len(new[place].completion_ids) == 32
    grown = 8 * 16
    assert reports[1]["tokens"]["generated"] == reports[1]["tokens"]["teacher_scored"] == grown
    assert reports[1]["tokens"]["trained"] == 8 * 32
    assert "8 rows go on" not in reports[1]["unit_decisions"][0]["reason"]  # four in each unit
    assert "4 rows go on from 16 to 32 tokens" in reports[1]["unit_decisions"][0]["reason"]
    assert_is_what_one_pass_scores(tmp_path, after, codec)


def assert_begins_with(longer: ScoredRow, row: ScoredRow) -> None:
    """Ids, log-probabilities and scores of the old part are bit for bit what they were."""
    tokens = len(row.completion_ids)
    assert longer.prompt_id == row.prompt_id
    for name in ("completion_ids", "behavior_logprobs", "teacher_logprobs"):
        np.testing.assert_array_equal(getattr(longer, name)[:tokens], getattr(row, name))
    np.testing.assert_array_equal(longer.teacher_tail_logprobs[:tokens], row.teacher_tail_logprobs)
    width = row.teacher_top_ids.shape[1]
    np.testing.assert_array_equal(longer.teacher_top_ids[:tokens, :width], row.teacher_top_ids)


def assert_is_what_one_pass_scores(folder: Path, cache: dict[str, Any], codec: str) -> None:
    """Scoring the whole row at once gives the same numbers, to rounding."""
    from opd_stream.engines import open_engine

    store = Store(folder / "store")
    rollouts = store.by_fingerprint("rollouts", cache["rollouts"])
    scores = store.by_fingerprint("scores", cache["scores"])
    config = small_config(folder)
    assert config.teacher is not None
    engine = open_engine(
        engine="transformers", folder=config.teacher.path, dtype="float32", batch_rows=8
    )
    batch = rollouts_batch(rollouts.read_unit(0))
    settings = scores.recipe.settings
    whole = engine.score(batch, ScoringSettings(top_k=3, forced_ids=tuple(settings["forced_ids"])))
    stored = scores_batch(scores.read_unit(0))
    for row in range(len(batch)):
        np.testing.assert_allclose(
            stored.teacher_logprobs[row],
            whole.teacher_logprobs[row],
            atol=1e-4 if "exact" in codec else 1 / 32,
        )


def test_a_refused_row_stays_refused() -> None:
    old, new = scores_of(2, tokens=3, refused={0: "not finite"}), scores_of(1, tokens=2)
    both = append_scores(old, new, rows=[1])
    assert both.refused == {0: "not finite"}
    assert [len(row) for row in both.teacher_logprobs] == [0, 5]
    later = append_scores(
        scores_of(2, tokens=3), scores_of(1, tokens=2, refused={0: "nan"}), rows=[1]
    )
    assert later.refused == {1: "nan"}
    assert [len(row) for row in later.teacher_logprobs] == [3, 0]


def scores_of(rows: int, *, tokens: int, refused: dict[int, str] | None = None) -> ScoreBatch:
    refused = refused or {}
    lengths = [0 if row in refused else tokens for row in range(rows)]
    return ScoreBatch(
        teacher_logprobs=tuple(np.full(n, -1, np.float32) for n in lengths),
        teacher_top_ids=tuple(np.tile(np.arange(2, dtype=np.int32), (n, 1)) for n in lengths),
        teacher_top_logprobs=tuple(np.full((n, 2), -1, np.float32) for n in lengths),
        teacher_tail_logprobs=tuple(np.full(n, -1, np.float32) for n in lengths),
        teacher_forced_logprobs=tuple(np.zeros((n, 0), np.float32) for n in lengths),
        refused=refused,
    )


def test_decisions_follow_from_the_report_alone(small_runs: SmallRuns) -> None:
    reports = shared_reports(small_runs(*KEPT, *GROWING))
    bounds = Staleness(
        max_epochs=1,
        policy_drift=0.1,
        effective_sample_fraction=0.5,
        max_policies=2,
        keep_share=0.5,
    )
    for report in reports[1:]:
        for decided in report["unit_decisions"]:
            known = {name: decided[name] for name in ("policies", "window_tokens", "unfinished")}
            state = UnitState(
                drift=DriftSums.from_dict(decided["drift"]),
                student_top_mass=decided["student_top_mass"],
                **known,
            )
            fitted = bounds.fitted(decided["distance"], (Bucket(),))
            again = decide_unit(
                state, window_tokens=report["window_tokens"], bounds=fitted, floor=decided["floor"]
            )
            assert (again.action, again.reason) == (decided["action"], decided["reason"])
    assert {d["action"] for report in reports[1:] for d in report["unit_decisions"]} == {"extend"}


def test_a_damaged_unit_of_an_earlier_round_is_made_again_by_the_policy_that_wrote_it(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    reports = shared_reports(small_runs.copy(tmp_path, *KEPT, "rounds=2"))
    cache, policy = reports[1]["caches"][0], reports[1]["policy"]
    store = Store(tmp_path / "store")
    rollouts = store.by_fingerprint("rollouts", cache["rollouts"])
    commit = rollouts.commit_record(1)
    assert commit is not None
    shard = rollouts.folder / commit.file
    good = shard.read_bytes()
    middle = len(good) // 2
    shard.write_bytes(good[:middle] + bytes(9) + good[middle + 9 :])
    for name in ("rounds/0001/report.json", "summary.json"):
        (tmp_path / "run" / name).unlink()
    store.policy_by_fingerprint(policy["fingerprint"]).invalidate()
    again = finished_run(tmp_path, *KEPT, "rounds=2")
    assert again[1]["policy"]["weights_sha256"] == policy["weights_sha256"]
    assert shard.read_bytes() == good


def test_a_replay_of_mixed_rounds_trains_on_the_same_rows(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    small_runs.copy(tmp_path, *KEPT, *GROWING)
    config = small_config(
        tmp_path,
        f"replay.run={tmp_path / 'run'}",
        "rounds=3",
        "evaluation=null",
        *GROWING,
        "staleness.max_epochs=1",
    )
    summary = run(config, RunFolder(tmp_path / "again"), Silent())
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens"]["trained"] == first["tokens"]["trained"]
    assert summary["tokens"]["generated"] == 0


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("staleness.gated_from=0.2", "train.gate={}"), "above staleness.policy_drift"),
        (("staleness.gated_from=0.05",), "nothing weighs tokens"),
        (("staleness.max_policies=2", "rollouts.extra_draws=2"), "candidates are lost"),
        (("staleness.max_policies=2", "replay.run=run"), "in a replay"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(
    overrides: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line):
        small_config(tmp_path, *overrides)


def test_freshness_reads_the_age_of_each_cache(tmp_path: Path) -> None:
    """1 / (age + 1), less the floor of 0.05; drift takes a little more."""
    finished_run(tmp_path, *KEPT, "train.freshness={}", "train.learning_rate=1e-6")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for round_index, expected in enumerate((0.95, 0.45, 1 / 3 - 0.05)):
        found = [x["mean_drift_weight"] for x in lines if x["round"] == round_index]
        assert found == pytest.approx([expected] * len(found), rel=0.02)
