"""Figure of one run over its optimizer steps: drift, effective samples, gates, regenerations."""

from itertools import groupby

import altair as alt

from opd_stream.outcome import StepMetrics
from pipeline.report.charts import (
    FAINT,
    MOST_MARKS,
    SERIES,
    Drawing,
    Exhibit,
    axis_x,
    axis_y,
    data,
    exhibit,
    lines,
    rule,
)
from pipeline.report.read import Run
from pipeline.report.steps import Measure, mean_of, step_rows, thinned
from pipeline.report.tables import Table, number, table_of

MOST_LINES = 60  # of rounds
TITLE = "Drift, effective samples, gates and regenerations"
DRIFT = Measure("policy_drift", "policy_drift (nats a token)", mean_of("policy_drift"))
FRACTION = Measure(
    "effective_sample_fraction",
    "effective sample fraction",
    mean_of("effective_sample_fraction"),
)
WEIGHT = Measure("mean_drift_weight", "mean weight of tokens", mean_of("mean_drift_weight"))
GATED, JUMP = "var(--series-3)", "var(--series-1)"


def drift_exhibit(run: Run, name: str) -> Exhibit:
    """Drift and its consequences, step by step."""
    tables = [_epochs(run)] if run.rounds else []
    measures = [DRIFT, FRACTION]
    if any(map(_is_gated, run.steps)):
        measures.append(WEIGHT)
    rows = [row for row in step_rows(run, measures) if row[DRIFT.name] is not None]
    if not rows:
        caption = "No optimizer step has recorded its drift."
        return Exhibit(name=name, title=TITLE, caption=caption, tables=tables)
    base = alt.Chart(data([{**row, SERIES: run.name} for row in rows]))
    marks, said = _rounds(run)
    marks, gates = [*marks, *_gates(run)], " Shaded: epochs with gates." if _gates(run) else ""
    levels, far = _bounds(run, max(float(str(row[DRIFT.name])) for row in rows))
    jumps = _jumps(run)
    panels: list[tuple[str | alt.TitleParams, Drawing]] = []
    for each in measures:
        curve = lines(
            base,
            [run.name],
            axis_x("step", "optimizer step"),
            axis_y(each.name, span=None if each is DRIFT else (0, 1)),
            tip=["round:Q", "step:Q", f"{each.name}:Q"],
            marks=len(rows) <= MOST_MARKS,
        )
        under, over = levels.get(each.name, []), jumps if each is DRIFT else []
        panels.append((each.title, alt.layer(curve, *marks, *under, *over)))
    caption = (
        "policy_drift estimates KL(behavior ‖ student) on the tokens of a step; decisions take "
        "its mean over an epoch, in the table, or over a quarter of one. The effective sample "
        "fraction is 1 on fresh rollouts."
    )
    together = thinned(run.steps)[1]
    caption += said + gates + (" A diamond: the step before a kept extrapolation." if jumps else "")
    caption += f" The bound on policy_drift is {far:g}, above what is drawn." if far else ""
    caption += f" A point is the mean of up to {together} steps." if together > 1 else ""
    caption += "" if WEIGHT in measures else " No token was weighted by drift."
    return exhibit(name, TITLE, caption, panels, tables=tables)


def _epochs(run: Run) -> Table:
    epochs = [(report.round, epoch) for report in run.rounds for epoch in report.epochs]
    return table_of(
        "Epochs",
        epochs,
        {
            "round": lambda each: str(each[0]),
            "epoch": lambda each: str(each[1].epoch),
            "then": lambda each: each[1].action,
            "policy_drift": lambda each: number(each[1].policy_drift),
            "effective sample fraction": lambda e: number(e[1].effective_sample_fraction, 3),
            "reverse KL, nats": lambda each: number(each[1].reverse_kl),
            "teacher entropy, nats": lambda each: number(each[1].teacher_entropy),
        },
    )


def _is_gated(step: StepMetrics) -> bool:
    return step.mean_drift_weight is not None and step.mean_drift_weight < 1.0


def _bounds(run: Run, highest: float) -> tuple[dict[str, list[alt.Chart]], float | None]:
    """The limits by measure; and the one of drift if it is too far above to be drawn."""
    distance = max((report.start.distance for report in run.rounds if report.start), default=0.0)
    bounds = run.config.staleness.fitted(distance, run.config.train.objective)
    drift, samples = bounds.policy_drift, bounds.effective_sample_fraction or None
    is_near = drift <= 4 * highest
    found: dict[str, list[alt.Chart]] = {}
    if is_near:
        found[DRIFT.name] = [rule(y=drift, text="bound")]
    if samples is not None:
        found[FRACTION.name] = [rule(y=samples, text="bound")]
    return found, None if is_near else drift


def _rounds(run: Run) -> tuple[list[alt.Chart], str]:
    """Where rounds begin, with and without new rollouts; and what the caption says of it."""
    first: dict[int, int] = {}
    for step in run.steps:
        first.setdefault(step.round, step.step)
    begun = list(first.items())[1:]
    if not 0 < len(begun) <= MOST_LINES:
        return [], ""
    caches = run.caches()
    fresh = {r for r in caches if any(c.origin in ("fresh", "ahead") for c in caches[r])}
    rows = [
        {"at": start - 0.5, "round": index, "rollouts": "new" if index in fresh else "none new"}
        for index, start in begun
    ]
    dashes = alt.Scale(domain=["new", "none new"], range=[[1, 0], [2, 3]])
    drawn = (
        alt.Chart(data(rows))
        .mark_rule(color=FAINT, strokeWidth=0.8, clip=True)
        .encode(
            x="at:Q",
            strokeDash=alt.StrokeDash("rollouts:N", scale=dashes, legend=None),
            tooltip=["round:Q", "rollouts:N"],
        )
    )
    return [drawn], " A round begins at each vertical line; a dotted one had no new rollouts."


def _gates(run: Run) -> list[alt.Chart]:
    """The epochs in which weights by drift were in use."""
    epochs = [list(each) for _, each in groupby(run.steps, lambda step: (step.round, step.epoch))]
    rows = [
        {"from": steps[0].step - 0.5, "to": steps[-1].step + 0.5}
        for steps in epochs
        if any(map(_is_gated, steps))
    ]
    if not rows:
        return []
    shade = alt.Chart(data(rows)).mark_rect(color=GATED, opacity=0.14, clip=True)
    return [shade.encode(x="from:Q", x2="to:Q")]


def _jumps(run: Run) -> list[alt.Chart]:
    """The steps before kept extrapolations, on the curve of drift."""
    steps = [jump.step - 1 for report in run.rounds for jump in report.extrapolations if jump.kept]
    drift = {step.step: step.policy_drift for step in run.steps if step.policy_drift is not None}
    rows = [{"step": step, DRIFT.name: drift[step]} for step in steps if step in drift]
    if not rows:
        return []
    points = alt.Chart(data(rows)).mark_point(shape="diamond", size=60, filled=True, color=JUMP)
    return [points.encode(x="step:Q", y=f"{DRIFT.name}:Q", tooltip=["step:Q"])]
