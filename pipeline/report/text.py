"""Sentences and facts of a run: what it was, what it reused, why it decided as it did."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.accuracy import TOKENS, evaluated
from pipeline.report.parts import Table, scaled, shown, whole
from pipeline.report.read import RoundRecord, Run
from pipeline.report.style import STAGES

_FACTS = (
    ("student", "student.path"),
    ("teacher", "teacher.path"),
    ("prompts", "prompts.kind"),
    ("prompts a round", "rollouts.prompts_per_round"),
    ("samples a prompt", "rollouts.samples_per_prompt"),
    ("window", "rollouts.window"),
    ("candidates of the teacher", "scores.top_k"),
    ("codec", "scores.codec.kind"),
    ("objective", "train.objective"),
    ("gate", "train.gate"),
    ("freshness", "train.freshness"),
    ("extrapolation", "train.extrapolation"),
    ("learning rate", "train.learning_rate"),
    ("rows a step", "train.rows_per_step"),
    ("epochs at most", "staleness.max_epochs"),
    ("policies a unit may outlive", "staleness.max_policies"),
    ("replay of", "replay"),
    ("executor", "executor"),
    ("seed", "seed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The decisions of one round, a sentence each."""

    round_index: int
    sentences: Sequence[str]
    units: Sequence[str]  # decisions about units, which may be many
    units_note: str = ""


def state(run: Run) -> str:
    """How far the run is."""
    planned = None if run.summary is None else run.summary.rounds_planned
    planned = planned if planned is not None else run.setting("rounds")
    done = len(run.rounds)
    if run.summary is not None and run.summary.finished:
        return f"finished, {done} rounds"
    running = [plan.round_index for plan in run.plans if plan.round_index >= done]
    later = f"; round {running[0]} is planned and not finished" if running else ""
    if done == planned:
        later = "; not all that are due are evaluated"
    return f"unfinished, {done} of {planned or 'unknown'} rounds{later}"


def reuse(run: Run) -> str:
    """What the run found in the store instead of making it."""
    known = [report for report in run.rounds if report.reused is not None]
    if not known:
        return "No finished round says what it reused."
    rollouts = sum(report.reused.rollout_units for report in known if report.reused)
    scores = sum(report.reused.score_units for report in known if report.reused)
    policies = sum(report.reused.policy for report in known if report.reused)
    replayed = sum(cache.origin == "replayed" for report in known for cache in report.caches)
    if not (rollouts or scores or policies or replayed):
        return "It made all its rollouts, scores and policies itself."
    found = [
        f"{count} {name}"
        for count, name in (
            (rollouts, "rollout units"),
            (scores, "score units"),
            (policies, "policies"),
        )
        if count
    ]
    return (
        f"It found {', '.join(found)} that another run had made, and did not make them again."
        if found
        else "It replayed scores of another run."
    )


def facts(run: Run) -> list[tuple[str, str]]:
    """The settings that a reader asks for first, and the versions."""
    found = [
        (name, _plain(value))
        for name, field in _FACTS
        if (value := run.setting(field)) not in (None, [], {})
    ]
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return [*found, ("versions", versions)] if versions else found


def config_text(run: Run) -> str:
    """The whole config."""
    return json.dumps(run.config, indent=2, ensure_ascii=False)


def overview(runs: Sequence[Run]) -> Table:
    """A row a run."""
    rows = [
        [
            run.name,
            state(run),
            *_accuracies(run),
            *(whole(_sum(run, "tokens", name)) for name in TOKENS),
            scaled(_sum(run, "flops", *STAGES), "FLOP"),
            shown(_sum(run, "seconds", *STAGES), 1),
        ]
        for run in runs
    ]
    head = ["run", "state", "pass@1 before", "pass@1 last", "tokens generated", "teacher-scored"]
    head += ["trained", "operations", "seconds"]
    return Table(caption="Runs", head=head, rows=rows)


def totals(run: Run) -> Table:
    """Tokens, seconds, CPU seconds and operations of each stage."""
    names = dict(zip(STAGES, TOKENS, strict=True))
    rows = [
        [
            stage,
            whole(_sum(run, "tokens", names[stage])),
            shown(_sum(run, "seconds", stage), 1),
            shown(_sum(run, "cpu_seconds", stage), 1),
            scaled(_sum(run, "flops", stage), "FLOP"),
        ]
        for stage in STAGES
    ]
    seconds = {} if run.summary is None else run.summary.seconds
    for name, label in (
        ("evaluate", "evaluate"),
        ("other", "none of these"),
        ("wall", "wall clock"),
    ):
        if name in seconds:
            rows.append([label, "–", shown(seconds[name], 1), "–", "–"])
    head = ["stage", "tokens", "seconds", "CPU seconds", "operations"]
    return Table(caption="Stages", head=head, rows=rows)


def decisions(run: Run) -> list[Decided]:
    """Every decision of every round that has any."""
    plans = {plan.round_index: plan for plan in run.plans}
    reports = {report.round: report for report in run.rounds}
    found: list[Decided] = []
    for place in sorted({*plans, *reports}):
        report = reports.get(place)
        chosen = report.unit_decisions if report else plans[place].unit_decisions
        counted = Counter(unit.action for unit in chosen)
        found.append(
            Decided(
                round_index=place,
                sentences=["Planned, not finished."] if report is None else _sentences(report),
                units=[
                    f"prompts {unit.first} to {unit.last - 1}: {unit.action}, {unit.reason}"
                    for unit in chosen
                ],
                units_note=", ".join(f"{action} {n}" for action, n in counted.items()),
            )
        )
    return found


def _sentences(report: RoundRecord) -> list[str]:
    found = [f"After epoch {epoch.epoch}: {epoch.reason}." for epoch in report.epochs]
    found = found or ([f"{report.decision}."] if report.decision else [])
    found += [_jump(jump.step, jump.kept, jump.policy_drift) for jump in report.extrapolations]
    if report.window_decision is not None:
        found.append(f"Next round: {report.window_decision.reason}.")
    return found or ["The report has no decision."]


def _jump(step: int, kept: int, drift: float | None) -> str:
    if not kept:
        return f"Extrapolation after step {step}: none kept."
    measured = "" if drift is None else f", policy_drift {drift:.4f} after it"
    return f"Extrapolation after step {step}: {kept} kept{measured}."


def _accuracies(run: Run) -> tuple[str, str]:
    points = evaluated(run)
    first = next((point for point in points if point.round == 0), None)
    last = next((point for point in reversed(points) if point.round > 0), None)
    texts = [
        "–" if p is None else f"{p.pass_at_1:.3f} ± {p.standard_error or 0:.3f}"
        for p in (first, last)
    ]
    return texts[0], texts[1]


def _sum(run: Run, what: str, *names: str) -> float | None:
    """Over the finished rounds; None where no report says."""
    found = [getattr(report, what) for report in run.rounds]
    values = [value[name] for value in found for name in names if name in value]
    return sum(values) if values else None


def _plain(value: object) -> str:
    """A setting as one line of text."""
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {_plain(item)}" for name, item in value.items() if item is not None
        )
    if isinstance(value, list):
        return "; ".join(_plain(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
