"""Accuracy against cost: one curve a run, one figure for each kind of cost."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from pipeline.records import RoundReport, StageNumbers, SummaryEvaluation
from pipeline.report.drawing import (
    Exhibit,
    Series,
    Table,
    count,
    exhibit,
    look,
    number,
    panels,
    prefixed,
    table_of,
)
from pipeline.report.read import Run


class Cost(NamedTuple):
    """Something that a run spends."""

    name: str
    choice: str  # in the switch
    label: str  # along the axis
    of: Callable[[RoundReport], float]


def stage_sum(values: StageNumbers) -> float:
    """Of generate, score and train together."""
    return values.generate + values.score + values.train


def _all_tokens(report: RoundReport) -> float:
    tokens = report.tokens
    return tokens.generated + tokens.teacher_scored + tokens.trained


COSTS = (
    Cost("tokens", "tokens", "tokens generated, scored and trained on", _all_tokens),
    Cost(
        *("teacher", "teacher-scored tokens", "tokens that the teacher scored"),
        lambda r: r.tokens.teacher_scored,
    ),
    Cost("flops", "FLOPs", "FLOPs of generate, score and train", lambda r: stage_sum(r.flops)),
    Cost(
        *("seconds", "seconds", "seconds of generate, score and train"),
        lambda r: stage_sum(r.seconds),
    ),
)


def spent(run: Run, cost: Cost) -> list[float] | None:
    """What it took to make each policy, by version; None where a report is missing."""
    if [report.round for report in run.rounds] != list(range(len(run.rounds))):
        return None
    return [0.0, *accumulate(cost.of(report) for report in run.rounds)]


def evaluated(run: Run) -> list[SummaryEvaluation]:
    """Judged evaluations of policies whose rounds are all reported."""
    found = () if run.summary is None else run.summary.evaluations
    return [each for each in found if each.passes and each.round <= len(run.rounds)]


def accuracy_exhibits(runs: Sequence[Run]) -> list[tuple[Cost, Exhibit]]:
    """One figure for each cost that any run has."""
    if not any(map(evaluated, runs)):
        return []
    views = [(cost, [spent(run, cost) for run in runs]) for cost in COSTS]
    return [
        (cost, _exhibit(runs, cost, costs))
        for cost, costs in views
        if any(values and values[-1] for values in costs)
    ]


def evaluation_table(runs: Sequence[Run]) -> Table:
    """Every evaluation in numbers."""
    found = [(run.name, evaluation) for run in runs for evaluation in evaluated(run)]
    names = sorted({name for _, e in found for name in e.passes}, key=lambda n: (len(n), n))
    columns: dict[str, Callable[[tuple[str, SummaryEvaluation]], str]] = {
        "run": lambda each: each[0],
        "policy version": lambda each: str(each[1].round),
        **{n: lambda each, n=n: number(each[1].passes.get(n), 3) for n in names},
        "standard error of pass@1": lambda each: number(each[1].standard_error, 3),
        "problems": lambda each: count(each[1].problems),
        "samples": lambda each: count(each[1].samples),
    }
    return table_of("Evaluations", found, columns)


def _exhibit(runs: Sequence[Run], cost: Cost, costs: Sequence[list[float] | None]) -> Exhibit:
    title = f"pass@1 against {cost.choice}"
    figure, (axis,) = panels(1, height=2.9)
    legend: list[Series] = []
    missing: list[str] = []
    for place, (run, values) in enumerate(zip(runs, costs, strict=True)):
        points = evaluated(run)
        if values is None or not points:
            missing.append(run.name)
            continue
        drawn = look(place)
        xs, ys = [values[point.round] for point in points], [p.passes["pass@1"] for p in points]
        errors = [point.standard_error or 0.0 for point in points]
        axis.errorbar(xs, ys, yerr=errors, elinewidth=1, capsize=2.5, **drawn.style)
        legend.append(Series(label=run.name, look=drawn))
    if not legend:
        caption = f"No run has evaluations and {cost.label}."
        return Exhibit(name=cost.name, title=title, caption=caption)
    axis.set_xlabel(cost.label)
    axis.set_ylabel("pass@1")
    axis.set_ylim(-0.02, 1.02)
    prefixed(axis.xaxis)
    caption = (
        "Each mark is an evaluated policy; bars are one standard error of pass@1 over problems. "
        "Cost is what the run itself did up to that policy, without evaluation: what it found in "
        "the store costs nothing."
    )
    if missing:
        caption += f" Left out, without evaluations or this cost: {', '.join(missing)}."
    return exhibit(figure, f"accuracy-{cost.name}", title, caption, legend=legend)
