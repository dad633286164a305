"""Reports: what a round and a run did, read off the artifacts and never remembered.

A unit's commit record says which run made it and how long that took, so the same run resumed after
a kill counts its own work once, and a run that finds a unit made by another counts it as reused.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from opd_stream.config import Config
from opd_stream.costs import ModelShape, TokenCounts, forward_flops, shape_of, train_flops
from opd_stream.outcome import TrainOutcome
from opd_stream.store.artifact import Artifact, Commit, summed_counts
from opd_stream.store.files import read_json
from pipeline.caches import Cache
from pipeline.plan import is_due
from pipeline.walk import Round
from stages.checkpoints import Checkpoint

Span = tuple[float, float]


def round_report(
    here: Round,
    run_ids: Collection[str],
    evaluation: dict[str, Any] | None,
    probe: Sequence[Artifact] = (),
    teacher: Checkpoint | None = None,
) -> dict[str, Any]:
    """The report of a finished round.

    Args:
        here: the round.
        run_ids: of the run, one for each machine's folder; what others made counts as reused.
        evaluation: of its policy, if there is one.
        probe: the audit's rollouts and scores, if any.
        teacher: None where no teacher ran.
    """
    manifest = here.policy.manifest()
    outcome = manifest.outcome
    rollouts = [c for cache in here.caches for c in _used(cache, cache.rollouts)]
    scores = [c for cache in here.caches for c in _used(cache, cache.scores)]
    new = [cache for cache in here.caches if cache.made_in == here.index]
    new_rollouts = [c for cache in new for c in _used(cache, cache.rollouts)]
    new_scores = [c for cache in new for c in _used(cache, cache.scores)]
    probed = [list(artifact.commits().values()) for artifact in probe] or [[], []]
    generated, scored = [*new_rollouts, *probed[0]], [*new_scores, *probed[1]]
    trained, audit = outcome.trained, outcome.window_decision
    trained_here = outcome.made_by in run_ids
    last = outcome.epochs[-1]
    return {
        "round": here.index,
        "window_tokens": here.window_tokens,
        "first_step": here.plan.first_step,
        "steps": outcome.steps,
        "rows": outcome.rows,
        "tokens": {
            "generated": _tokens(made_by(generated, run_ids)),
            "teacher_scored": _tokens(made_by(scored, run_ids)),
            "probed": _tokens(made_by(probed[1], run_ids)),
            "trained": int(trained.tokens) if trained_here else 0,
        },
        "refused_rows": int(summed_counts(scores).get("refused_rows", 0)),
        **_endings(summed_counts(rollouts)),
        "alignment": _alignment(summed_counts(scores)),
        "cache_bytes": sum(commit.bytes for commit in (*new_rollouts, *new_scores)),
        "flops": {
            "generate": _flops(forward_flops, here.student, made_by(generated, run_ids)),
            "score": _flops(forward_flops, teacher, made_by(scored, run_ids)),
            "train": _train_flops(here.student, outcome) if trained_here else 0.0,
        },
        "seconds": {
            "generate": _seconds(made_by(generated, run_ids)),
            "score": _seconds(made_by(scored, run_ids)),
            "train": outcome.seconds if trained_here else 0.0,
        },
        "cpu_seconds": {
            "generate": _cpu_seconds(made_by(generated, run_ids)),
            "score": _cpu_seconds(made_by(scored, run_ids)),
            "train": outcome.cpu_seconds if trained_here else 0.0,
        },
        "audit_cpu_seconds": _cpu_seconds(made_by([*probed[0], *probed[1]], run_ids))
        + (0.0 if audit is None else audit.cpu_seconds),
        "reused": {
            "rollout_units": len(new_rollouts) - len(made_by(new_rollouts, run_ids)),
            "score_units": len(new_scores) - len(made_by(new_scores, run_ids)),
            "policy": not trained_here,
        },
        "processes": outcome.processes,
        "extrapolations": [each.as_json() for each in outcome.extrapolations],
        "window_decision": None if audit is None else audit.as_json(),
        "sampler_gap": outcome.start.sampler_gap,
        "drift_floor": outcome.start.floor,
        "start_drift": outcome.start.policy_drift,
        "unit_decisions": here.unit_decisions,
        "policy_drift": last.policy_drift,
        "effective_sample_fraction": last.effective_sample_fraction,
        "epochs": [each.as_json() for each in outcome.epochs],
        "decision": last.reason,
        "policy": {
            "version": here.index + 1,
            "fingerprint": here.policy.fingerprint,
            "weights_sha256": manifest.weights_sha256,
            "folder": str(here.policy.folder("name")),
        },
        "caches": [cache.as_json() for cache in here.caches],
        "evaluation": evaluation,
    }


def summary(
    *,
    config: Config,
    policy_0: dict[str, Any],
    evaluation_0: dict[str, Any] | None,
    reports: list[dict[str, Any]],
    calls: dict[str, float],
) -> dict[str, Any]:
    """The whole run in one value, for other programs.

    Args:
        config: of the run.
        policy_0: version, fingerprint and weights digest of the initial student.
        evaluation_0: its evaluation, if there is one.
        reports: of the finished rounds.
        calls: seconds of all calls of `run` together (`wall`), and of these when nothing was
            sampled, scored, trained or evaluated (`other`); empty where there was none.
    """
    evaluations = [
        {"round": version, "policy_version": version, **evaluation}
        for version, evaluation in enumerate(
            [evaluation_0, *(report["evaluation"] for report in reports)]
        )
        if evaluation is not None
    ]
    seconds = {
        stage: round(sum(report["seconds"][stage] for report in reports), 3)
        for stage in ("generate", "score", "train")
    }
    return {
        "finished": len(reports) == config.rounds
        and all(
            report["evaluation"] is not None
            for report in reports
            if is_due(config, report["round"])
        ),
        "rounds": len(reports),
        "rounds_planned": config.rounds,
        "evaluations": [_without(evaluation, "seconds") for evaluation in evaluations],
        "tokens": {
            name: sum(report["tokens"][name] for report in reports)
            for name in ("generated", "teacher_scored", "trained")
        },
        "flops": {
            stage: sum(report["flops"][stage] for report in reports)
            for stage in ("generate", "score", "train")
        },
        "seconds": {
            **seconds,
            "evaluate": round(sum(evaluation["seconds"] for evaluation in evaluations), 3),
            **{name: round(value, 3) for name, value in calls.items()},
        },
        "cpu_seconds": {
            stage: round(sum(report["cpu_seconds"][stage] for report in reports), 3)
            for stage in ("generate", "score", "train")
        },
        "reused": {
            name: sum(report["reused"][name] for report in reports)
            for name in ("rollout_units", "score_units")
        },
        "policies": [policy_0, *(_without(report["policy"], "folder") for report in reports)],
        "final_policy": reports[-1]["policy"]["folder"] if reports else None,
        "caches": [report["caches"] for report in reports],
        "steps": sum(report["steps"] for report in reports),
        "refused_rows": sum(report["refused_rows"] for report in reports),
        "cache_bytes": sum(report["cache_bytes"] for report in reports),
        "decisions": [report["decision"] for report in reports],
    }


def made_by(commits: Iterable[Commit], run_ids: Collection[str]) -> list[Commit]:
    """The units a run made itself."""
    return [commit for commit in commits if commit.made_by in run_ids]


def busy_seconds(spans: list[Span]) -> float:
    """Length of the union of spans: time in which at least one of them was going on."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _used(cache: Cache, artifact: Artifact) -> list[Commit]:
    """The commits of the units that a round uses."""
    commits = artifact.commits()
    return [commits[unit] for unit in cache.units or commits]


def _train_flops(student: Checkpoint, outcome: TrainOutcome) -> float:
    trained = outcome.trained
    counts = TokenCounts(
        tokens=trained.row_tokens,
        completion_tokens=trained.tokens,
        pairs=trained.row_pairs,
    )
    shape = shape_of(read_json(student.folder / "config.json"))
    return train_flops(shape, counts, recomputed=outcome.gradient_checkpointing)


def _flops(
    cost: Callable[[ModelShape, TokenCounts], float],
    model: Checkpoint | None,
    commits: Iterable[Commit],
) -> float:
    """Operations of a model over the rows of units, by the cost model of `opd_stream/costs.py`."""
    counts = summed_counts(commits)
    if model is None or "pairs" not in counts:
        return 0.0
    shape = shape_of(read_json(model.folder / "config.json"))
    names = ("tokens", "completion_tokens", "pairs")
    return cost(shape, TokenCounts(**{name: counts[name] for name in names}))


def _endings(counts: dict[str, float]) -> dict[str, float]:
    """How rollouts ended, and how much of them said the same again."""
    rows, tokens = max(counts.get("rows", 0), 1), max(counts.get("completion_tokens", 0), 1)
    length_share = counts.get("length_rows", 0) / rows
    return {
        "length_share": length_share,
        "terminator_rate": 1 - length_share,
        "repeat_ratio": counts.get("repeated_tokens", 0) / tokens,
    }


def _alignment(counts: dict[str, float]) -> dict[str, float] | None:
    """Of a teacher with another tokenizer: shares of the student's tokens."""
    if "student_tokens" not in counts:
        return None
    tokens = max(counts["student_tokens"], 1)
    return {
        "aligned_share": counts["aligned_tokens"] / tokens,  # one token on both sides
        "chunk_share": counts["chunk_tokens"] / tokens,  # in a chunk that trains
    }


def _tokens(commits: list[Commit]) -> int:
    return int(summed_counts(commits).get("completion_tokens", 0))


def _seconds(commits: list[Commit]) -> float:
    return round(sum(commit.seconds for commit in commits), 3)


def _cpu_seconds(commits: list[Commit]) -> float:
    """Of the processes that did the work, all threads; of the first process in training."""
    return round(summed_counts(commits).get("cpu_seconds", 0.0), 3)


def _without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != key}
