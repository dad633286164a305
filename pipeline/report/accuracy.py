"""Accuracy against cost: one curve a run, one view a cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pipeline.report.parts import Entry, Exhibit, Table, left_out, shown, whole
from pipeline.report.read import Evaluation, RoundRecord, Run
from pipeline.report.style import STAGES, look
from pipeline.report.svg import inline, panels, prefixed

TOKENS = ("generated", "teacher_scored", "trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Something a run spends."""

    name: str
    choice: str  # in the switch
    label: str  # along the axis
    of: Callable[[RoundRecord], float | None]  # None: the report does not have it


def _total(values: dict[str, float], names: Sequence[str]) -> float | None:
    return sum(values[name] for name in names) if set(names) <= set(values) else None


COSTS = (
    Cost(
        name="tokens",
        choice="tokens",
        label="tokens generated, scored and trained on",
        of=lambda report: _total(report.tokens, TOKENS),
    ),
    Cost(
        name="teacher",
        choice="teacher-scored tokens",
        label="tokens that the teacher scored",
        of=lambda report: _total(report.tokens, ("teacher_scored",)),
    ),
    Cost(
        name="flops",
        choice="FLOPs",
        label="FLOPs of generate, score and train",
        of=lambda report: _total(report.flops, STAGES),
    ),
    Cost(
        name="seconds",
        choice="seconds",
        label="seconds of generate, score and train",
        of=lambda report: _total(report.seconds, STAGES),
    ),
)


def spent(run: Run, cost: Cost) -> list[float] | None:
    """What each policy had cost when it was there, from policy 0.

    None where a report is missing or lacks it.
    """
    costs = [cost.of(report) for report in run.rounds]
    known = [value for value in costs if value is not None]
    is_whole = [report.round for report in run.rounds] == list(range(len(known)))
    return [0.0, *accumulate(known)] if is_whole else None


def evaluated(run: Run) -> list[Evaluation]:
    """Evaluations of policies whose rounds are all reported."""
    found = [] if run.summary is None else run.summary.evaluations
    return [evaluation for evaluation in found if evaluation.round <= len(run.rounds)]


def accuracy_exhibits(runs: Sequence[Run]) -> list[tuple[Cost, Exhibit]]:
    """One figure a cost that any run has."""
    if not any(evaluated(run) for run in runs):
        return []
    views: list[tuple[Cost, Exhibit]] = []
    for cost in COSTS:
        costs = [spent(run, cost) for run in runs]
        if any(values and values[-1] for values in costs):
            views.append((cost, _exhibit(runs, cost, costs)))
    return views


def evaluation_table(runs: Sequence[Run]) -> Table:
    """Every evaluation in numbers."""
    found = [(run, evaluation) for run in runs for evaluation in evaluated(run)]
    names = sorted({name for _, e in found for name in e.passes()}, key=lambda n: (len(n), n))
    rows = [
        [
            run.name,
            str(evaluation.round),
            *(shown(evaluation.passes().get(name), 3) for name in names),
            shown(evaluation.standard_error, 3),
            whole(evaluation.problems),
            whole(evaluation.samples),
        ]
        for run, evaluation in found
    ]
    head = ["run", "policy", *names, "standard error of pass@1", "problems", "samples"]
    return Table(caption="Evaluations", head=head, rows=rows)


def _exhibit(runs: Sequence[Run], cost: Cost, costs: Sequence[list[float] | None]) -> Exhibit:
    title = f"pass@1 against {cost.choice}"
    figure, (axis,) = panels(1, height=2.9)
    legend: list[Entry] = []
    missing: list[str] = []
    for place, (run, values) in enumerate(zip(runs, costs, strict=True)):
        points = evaluated(run)
        if values is None or not points:
            missing.append(run.name)
            continue
        drawn = look(place)
        axis.errorbar(
            [values[point.round] for point in points],
            [point.pass_at_1 for point in points],
            yerr=[point.standard_error or 0.0 for point in points],
            color=drawn.color,
            marker=drawn.mark,
            linestyle=drawn.line,
            elinewidth=1,
            capsize=2.5,
        )
        legend.append(Entry(label=run.name, look=drawn))
    if not legend:
        return left_out(cost.name, title, f"No run has evaluations and {cost.label}.")
    axis.set_xlabel(cost.label)
    axis.set_ylabel("pass@1")
    axis.set_ylim(-0.02, 1.02)
    prefixed(axis)
    caption = (
        "Each mark is an evaluated policy; bars are one standard error of pass@1 over problems. "
        "Cost is what the run did itself up to that policy, without evaluation: what it found in "
        "the store costs nothing."
    )
    if missing:
        caption += f" Left out, for want of evaluations or of this cost: {', '.join(missing)}."
    return Exhibit(
        name=cost.name,
        title=title,
        caption=caption,
        svg=inline(figure, f"accuracy-{cost.name}", title=title, description=caption),
        legend=legend,
    )
