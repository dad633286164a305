"""Sentences and facts of a run: what it was, what it reused, why it decided as it did."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opd_stream.store.recipe import differing_fields
from pipeline.records import RoundReport, SummaryEvaluation
from pipeline.report.accuracy import evaluated, stage_sum
from pipeline.report.read import Run
from pipeline.report.tables import STAGES, Table, count, number, scaled, table_of

_FACTS = (
    *("student.path", "teacher.path", "prompts.kind", "rollouts.prompts_per_round"),
    *("rollouts.samples_per_prompt", "rollouts.window", "scores.top_k", "scores.codec.kind"),
    *("train.objective", "train.gate", "train.freshness", "train.extrapolation"),
    *("train.learning_rate", "train.rows_per_step", "staleness.max_epochs"),
    *("staleness.max_policies", "replay", "executor", "seed"),
)
MOST_UNITS = 32  # of a round, whose decisions are told one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundDecisions:
    """The decisions of one round, a sentence each."""

    round_index: int
    sentences: Sequence[str]
    units: Sequence[str]  # decisions about units, which may be many
    units_note: str


def state(run: Run) -> str:
    """How far the run is."""
    done, planned = len(run.rounds), run.config.rounds
    if run.summary is not None:
        planned = run.summary.rounds_planned
        if run.summary.finished:
            return f"finished, {done} rounds"
    running = [plan.round_index for plan in run.plans if plan.round_index >= done]
    later = f"; round {running[0]} is planned and not finished" if running else ""
    if done == planned:
        later = "; not all evaluations that are due are done"
    return f"unfinished, {done} of {planned} rounds{later}"


def verdict(runs: Sequence[Run]) -> list[str]:
    """What came out, in a sentence a run, and of several which was best."""
    found = [f"{run.name}: {', '.join(_outcome(run))}." for run in runs]
    last = {run.name: each[-1] for run in runs if len(each := evaluated(run)) > 1}
    scored = {name: each for name, each in last.items() if each.pass_at_1 is not None}
    if len(scored) < 2:
        return found
    ranked = sorted(scored, key=lambda name: -(scored[name].pass_at_1 or 0.0))
    best, near = ranked[0], [n for n in ranked[1:] if not _differs(scored[n], scored[ranked[0]])]
    close = f"; {', '.join(near)} not measurably less" if near else ", measurably"
    return [f"The highest pass@1 at the end has {best}{close}.", *found]


def _outcome(run: Run) -> Iterator[str]:
    yield state(run)
    judged = [each for each in evaluated(run) if each.pass_at_1 is not None]
    if len(judged) > 1:
        first, last = judged[0], judged[-1]
        yield f"pass@1 {_went(first, last)} {first.pass_at_1:.3f} to {last.pass_at_1:.3f}"
    elif judged:
        yield f"pass@1 of policy {judged[0].round} is {judged[0].pass_at_1:.3f}"
    if run.rounds:
        kl = [report.epochs[0].reverse_kl for report in (run.rounds[0], run.rounds[-1])]
        if kl[0] is not None and kl[1] is not None and len(run.rounds) > 1:
            yield f"reverse KL of the first and the last round's rollouts {kl[0]:.3f}, {kl[1]:.3f}"
        scored = sum(report.tokens.teacher_scored for report in run.rounds)
        yield f"{scored:,} teacher-scored tokens"


def _went(first: SummaryEvaluation, last: SummaryEvaluation) -> str:
    if not _differs(first, last):
        return "did not change measurably, from"
    return "rose from" if (last.pass_at_1 or 0) > (first.pass_at_1 or 0) else "fell from"


def _differs(one: SummaryEvaluation, other: SummaryEvaluation) -> bool:
    """Whether two accuracies are more than two standard errors of their difference apart."""
    gap = abs((one.pass_at_1 or 0.0) - (other.pass_at_1 or 0.0))
    return gap > 2 * math.hypot(one.standard_error or 0.0, other.standard_error or 0.0)


def differences(runs: Sequence[Run]) -> Table | None:
    """The settings in which runs differ, a column a run; None: in none."""
    dumps = [run.config.model_dump(mode="json") for run in runs]
    first, *others = dumps
    fields = {field for other in others for field in differing_fields(first, other)}
    rows = [[f, *(_plain(_setting(dump, f)) for dump in dumps)] for f in sorted(fields)]
    if not rows:
        return None
    head = ["setting", *(run.name for run in runs)]
    return Table(caption="Settings that differ", head=head, rows=rows, is_text=True)


def reuse(run: Run) -> str:
    """What the run found in the store instead of making it."""
    if not run.rounds:
        return "No round is finished yet."
    reused = [report.reused for report in run.rounds]
    counts = {
        "rollout units": sum(each.rollout_units for each in reused),
        "score units": sum(each.score_units for each in reused),
        "policies": sum(each.policy for each in reused),
    }
    found = ", ".join(f"{each} {name}" for name, each in counts.items() if each)
    if found:
        return f"It found {found} that another run had made, and did not make them again."
    if any(cache.origin == "replayed" for report in run.rounds for cache in report.caches):
        return "It replayed scores of another run."
    return "It made all its rollouts, scores and policies itself."


def facts(run: Run) -> list[tuple[str, str]]:
    """The settings that a reader asks for first, and where they come from."""
    settings = run.config.model_dump(mode="json")
    named = [(field, _setting(settings, field)) for field in _FACTS]
    found = [(field, _plain(value)) for field, value in named if value not in (None, [], {})]
    return [*found, *_origin(run)]


def _origin(run: Run) -> Iterator[tuple[str, str]]:
    """When and where it began, and with what."""
    made = run.made_by
    if made is None:
        return
    named = {"started": made.started, "host": made.host, "commit": made.commit}
    yield from ((name, value) for name, value in named.items() if value)
    versions = {**({"python": made.python} if made.python else {}), **made.versions}
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def overview(runs: Sequence[Run]) -> Table:
    """A row a run."""

    def all_of(name: str) -> Callable[[Run], str]:
        return lambda run: count(sum(getattr(report.tokens, name) for report in run.rounds))

    return table_of(
        "Runs",
        runs,
        {
            "run": lambda run: run.name,
            "state": state,
            "pass@1 before": lambda run: _accuracy(e for e in evaluated(run) if e.round == 0),
            "pass@1 last": lambda r: _accuracy(e for e in reversed(evaluated(r)) if e.round > 0),
            "tokens generated": all_of("generated"),
            "teacher-scored": all_of("teacher_scored"),
            "trained": all_of("trained"),
            "operations": lambda run: scaled(sum(stage_sum(r.flops) for r in run.rounds), "FLOP"),
            "seconds": lambda run: number(sum(stage_sum(r.seconds) for r in run.rounds), 1),
        },
    )


def _accuracy(found: Iterator[SummaryEvaluation]) -> str:
    point = next(found, None)
    return f"{point.pass_at_1:.3f} ± {point.standard_error or 0:.3f}" if point else "–"


def totals(run: Run) -> Table:
    """Tokens, seconds, CPU seconds and operations of each stage."""

    def all_of(kind: str, name: str) -> float:
        return sum(getattr(getattr(report, kind), name) for report in run.rounds)

    tokens = {"generate": "generated", "score": "teacher_scored", "train": "trained"}
    rows = [
        [
            stage,
            count(all_of("tokens", tokens[stage])),
            number(all_of("seconds", stage), 1),
            number(all_of("cpu_seconds", stage), 1),
            scaled(all_of("flops", stage), "FLOP"),
        ]
        for stage in STAGES
    ]
    if run.summary is not None:
        seconds = run.summary.seconds
        named = {"evaluate": seconds.evaluate, "none of these": seconds.other}
        for name, value in {**named, "wall clock": seconds.wall}.items():
            if value is not None:
                rows.append([name, "–", number(value, 1), "–", "–"])
    head = ["stage", "tokens", "seconds", "CPU seconds", "operations"]
    return Table(caption="Stages", head=head, rows=rows)


def decisions(run: Run) -> Iterator[RoundDecisions]:
    """The decisions of every round."""
    plans = {plan.round_index: plan for plan in run.plans}
    reports = {report.round: report for report in run.rounds}
    for place in sorted({*plans, *reports}):
        report = reports.get(place)
        units = plans[place].unit_decisions if report is None else report.unit_decisions
        counted = Counter(unit.action for unit in units)
        shown = units if len(units) <= MOST_UNITS else ()
        yield RoundDecisions(
            round_index=place,
            sentences=["Planned, not finished."] if report is None else list(_sentences(report)),
            units=[
                f"prompts {unit.first} to {unit.last - 1}: {unit.action}, {unit.reason}"
                for unit in shown
            ],
            units_note=", ".join(f"{action} {n}" for action, n in counted.items()),
        )


def _sentences(report: RoundReport) -> Iterator[str]:
    for epoch in report.epochs:
        yield f"After epoch {epoch.epoch}: {epoch.reason}."
    for jump in report.extrapolations:
        drift = jump.policy_drift
        measured = "" if drift is None else f", policy_drift {drift:.4f} after it"
        kept = f"{jump.kept} kept{measured}" if jump.kept else "none kept"
        if jump.undone and jump.length_shares is not None:
            before, after = jump.length_shares
            kept = f"{jump.undone} undone, which cut {after:.0%} of answers instead of {before:.0%}"
        yield f"Extrapolation after step {jump.step}: {kept}."
    if report.held_out_rows:
        yield f"{report.held_out_rows} of {report.rows} rows scored them and did not train."
    if report.window_decision is not None:
        yield f"Next round: {report.window_decision.reason}."


def _setting(settings: dict[str, Any], field: str) -> Any:
    """A setting by its dotted name; None where a section is not used."""
    value: Any = settings
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _plain(value: object) -> str:
    """A setting as one line of text."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {_plain(item)}" for name, item in value.items() if item is not None
        )
    if isinstance(value, list):
        return "; ".join(_plain(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
