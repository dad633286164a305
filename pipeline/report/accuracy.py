"""Accuracy against cost of all runs: which pass@k and which cost, the reader chooses."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import altair as alt

from pipeline.records import RoundReport, StageNumbers, SummaryEvaluation
from pipeline.report.charts import SERIES, Exhibit, axis_y, data, exhibit, series
from pipeline.report.read import Run
from pipeline.report.tables import Table, count, number, table_of


class Cost(NamedTuple):
    """Something that a run spends."""

    name: str
    of: Callable[[RoundReport], float]


def stage_sum(values: StageNumbers) -> float:
    """Of generate, score and train together."""
    return values.generate + values.score + values.train


def _all_tokens(report: RoundReport) -> float:
    tokens = report.tokens
    return tokens.generated + tokens.teacher_scored + tokens.trained


STEPS = "optimizer steps"
COSTS = (
    Cost("tokens of all stages", _all_tokens),
    Cost("teacher-scored tokens", lambda r: r.tokens.teacher_scored),
    Cost("FLOPs", lambda r: stage_sum(r.flops)),
    Cost("seconds", lambda r: stage_sum(r.seconds)),
    Cost(STEPS, lambda r: r.steps),
)
TITLE = "Accuracy against cost"


def spent(run: Run, cost: Cost) -> list[float] | None:
    """What it took to make each policy, by version; None where a report is missing."""
    if [report.round for report in run.rounds] != list(range(len(run.rounds))):
        return None
    return [0.0, *accumulate(cost.of(report) for report in run.rounds)]


def evaluated(run: Run) -> list[SummaryEvaluation]:
    """Judged evaluations of policies whose rounds are all reported."""
    found = () if run.summary is None else run.summary.evaluations
    return [each for each in found if each.passes and each.round <= len(run.rounds)]


def pass_names(runs: Sequence[Run]) -> list[str]:
    """Of all evaluations, pass@1 first."""
    names = {name for run in runs for each in evaluated(run) for name in each.passes}
    return sorted(names, key=lambda name: (not name.startswith("pass"), len(name), name))


def accuracy_exhibit(runs: Sequence[Run]) -> Exhibit:
    """Each evaluated policy of each run, against what it took to make it."""
    rows = [row for run in runs for row in _rows(run)]
    if not rows:
        judged = any(run.summary is not None and run.summary.evaluations for run in runs)
        why = "no policy has been judged" if judged else "no policy has been evaluated"
        return Exhibit(name="accuracy", title=TITLE, caption=f"No curve is drawn: {why}.")
    choices = [cost.name for cost in COSTS if any(row[cost.name] for row in rows)] or [STEPS]
    measure = _choice("measure", pass_names(runs))
    cost = _choice("cost", choices)
    base = (
        alt.Chart(data(rows))
        .transform_filter("datum.measure == measure && isValid(datum[cost])")
        .transform_calculate(x="datum[cost]")
    )
    names = list(dict.fromkeys(str(row[SERIES]) for row in rows))
    x = alt.X("x:Q", title=None, axis=alt.Axis(format="~s", tickCount=6))
    y, colors = axis_y("value", span=(0, 1)), series(names)
    tips = [alt.Tooltip(each) for each in (f"{SERIES}:N", "version:Q", "measure:N", "interval:N")]
    numbers = [alt.Tooltip("value:Q"), alt.Tooltip("x:Q", title="cost")]
    bar = base.mark_rule(clip=True).encode(x=x, y=axis_y("low", span=(0, 1)), y2="high:Q", **colors)
    curve = base.mark_line(strokeWidth=1.6, clip=True).encode(x=x, y=y, **colors)
    points = base.mark_point(filled=True, size=50, clip=True).encode(
        x=x,
        y=y,
        tooltip=[*tips, *numbers],
        **colors,
    )
    missing = [run.name for run in runs if run.name not in names]
    head = alt.TitleParams(text=alt.ExprRef("measure + ' against ' + cost"))
    return exhibit(
        "accuracy",
        TITLE,
        "Each mark is an evaluated policy; bars are 95 % intervals over problems. Cost is what the "
        "run itself did up to that policy, without evaluation: what it found in the store costs "
        "nothing." + (f" Left out, without evaluations: {', '.join(missing)}." if missing else ""),
        [(head, bar + curve + points)],
        params=[measure, cost],
        tables=[evaluation_table(runs)],
        height=260,
    )


def _choice(name: str, options: Sequence[str]) -> alt.Parameter:
    bind = alt.binding_select(options=[*options], name=f"{name} ")
    return alt.param(name=name, value=options[0], bind=bind)


def _rows(run: Run) -> list[dict[str, object]]:
    """A row a policy and measure; a cost that is not known is None."""
    costs = {cost.name: spent(run, cost) for cost in COSTS}
    rows: list[dict[str, object]] = []
    for each in evaluated(run):
        took = {name: None if v is None else v[each.round] for name, v in costs.items()}
        for name, value in each.passes.items():
            low, high = each.intervals.get(name, (value, value))
            interval = f"{low:.3f} to {high:.3f}"
            own = {"version": each.round, "measure": name, "value": value, "interval": interval}
            rows.append({SERIES: run.name, **own, "low": low, "high": high, **took})
    return rows


def evaluation_table(runs: Sequence[Run]) -> Table:
    """Every evaluation in numbers."""
    found = [(run.name, evaluation) for run in runs for evaluation in evaluated(run)]
    columns: dict[str, Callable[[tuple[str, SummaryEvaluation]], str]] = {
        "run": lambda each: each[0],
        "policy version": lambda each: str(each[1].round),
        **{n: lambda each, n=n: number(each[1].passes.get(n), 3) for n in pass_names(runs)},
        "standard error of pass@1": lambda each: number(each[1].standard_error, 3),
        "problems": lambda each: count(each[1].problems),
        "samples": lambda each: count(each[1].samples),
    }
    return table_of("Evaluations", found, columns)
