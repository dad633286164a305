"""Figure of one run over its optimizer steps: drift, effective samples, gates, regenerations."""

import math
from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes

from opd_stream.outcome import StepMetrics
from pipeline.report.drawing import (
    FAINT,
    SERIES,
    Exhibit,
    Look,
    Series,
    count_axis,
    exhibit,
    look,
    number,
    panels,
    table_of,
)
from pipeline.report.read import Run

MOST_POINTS = 800
MOST_LINES = 60  # of rounds
TITLE = "Drift, effective samples, gates and regenerations"
BOUND = Look(color=FAINT, dashes=(5, 2))
REGENERATION = Look(color=FAINT)
KEPT = Look(color=FAINT, dashes=(1.5, 2.5))
JUMP = Look(color=SERIES[1], mark="D", glyph="◆")
GATED = Look(color=SERIES[3], mark="s", glyph="■", alpha=0.35)
MEASURES = (
    ("policy_drift", "policy_drift\n(nats a token)", look(0)),
    ("effective_sample_fraction", "effective\nsample fraction", look(2)),
    ("mean_drift_weight", "mean weight\nby drift", look(3)),
)


def drift_exhibit(run: Run, name: str) -> Exhibit:
    """Drift and its consequences, step by step."""
    epochs = [(report.round, epoch) for report in run.rounds for epoch in report.epochs]
    table = table_of(
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
    tables = [table] if epochs else []
    steps, together = thinned([step for step in run.steps if step.policy_drift is not None])
    if not steps:
        caption = "No optimizer step has recorded its drift."
        return Exhibit(name=name, title=TITLE, caption=caption, tables=tables)
    is_weighted = any(_is_gated(step) for step in steps)
    figure, axes = panels(3 if is_weighted else 2, height=1.5)
    for axis, (measure, label, drawn) in zip(axes, MEASURES, strict=False):
        values = [math.nan if (v := getattr(step, measure)) is None else v for step in steps]
        size = 2 if len(steps) < 200 else 0
        xs = [step.step for step in steps]
        axis.plot(xs, values, color=drawn.color, marker="o", markersize=size, linewidth=1.1)
        axis.set_ylabel(label)
        if measure != "policy_drift":
            axis.set_ylim(-0.02, 1.04)
    legend: list[Series] = []
    far = _draw_bounds(run, axes, steps, legend)
    has_lines = _draw_rounds(run, axes, steps, legend)
    _draw_gates(axes, steps, legend)
    _draw_extrapolations(run, axes[0], legend)
    count_axis(axes[-1], "optimizer step")
    caption = (
        "policy_drift estimates KL(behavior ‖ student) on the tokens of a step; decisions take "
        "its mean over an epoch, in the table, or over a quarter of one. The effective sample "
        "fraction is 1 on fresh rollouts."
    )
    caption += " A round begins at each vertical line." if has_lines else ""
    caption += f" The bound on policy_drift is {far:g}, above what is drawn." if far else ""
    caption += f" A point is the mean of up to {together} steps." if together > 1 else ""
    caption += "" if is_weighted else " No token was weighted by drift."
    return exhibit(figure, name, TITLE, caption, run=run.name, legend=legend, tables=tables)


def thinned(steps: Sequence[StepMetrics]) -> tuple[list[StepMetrics], int]:
    """At most about a thousand points, each the mean of steps of one epoch; and of how many."""
    together = -(-len(steps) // MOST_POINTS)
    epochs = [list(epoch) for _, epoch in groupby(steps, _epoch)]
    starts = [(epoch, start) for epoch in epochs for start in range(0, len(epoch), together)]
    return [_mean(epoch[start : start + together]) for epoch, start in starts], together


def _mean(group: Sequence[StepMetrics]) -> StepMetrics:
    means: dict[str, float | None] = {}
    for name, _, _ in MEASURES:
        values = [v for step in group if (v := getattr(step, name)) is not None]
        means[name] = sum(values) / len(values) if values else None
    return group[0].model_copy(update=means)


def _epoch(step: StepMetrics) -> tuple[int, int]:
    return step.round, step.epoch


def _is_gated(step: StepMetrics) -> bool:
    return step.mean_drift_weight is not None and step.mean_drift_weight < 1.0


def _draw_bounds(
    run: Run, axes: Sequence[Axes], steps: Sequence[StepMetrics], legend: list[Series]
) -> float | None:
    """Draw the limits; returns the one of drift if it is too far above to be drawn."""
    distance = max((report.start.distance for report in run.rounds if report.start), default=0.0)
    bounds = run.config.staleness.fitted(distance, run.config.train.objective)
    drift, samples = bounds.policy_drift, bounds.effective_sample_fraction or None
    highest = max(step.policy_drift or 0.0 for step in steps)
    is_near = drift <= 4 * highest
    for axis, bound in ((axes[0], drift if is_near else None), (axes[1], samples)):
        if bound is not None:
            axis.axhline(bound, color=FAINT, linewidth=1, linestyle=BOUND.line)
    if is_near or samples is not None:
        legend.append(Series(label="bound", look=BOUND))
    return None if is_near else drift


def _draw_rounds(
    run: Run, axes: Sequence[Axes], steps: Sequence[StepMetrics], legend: list[Series]
) -> bool:
    """Draw where rounds begin, with and without new rollouts; returns whether lines were drawn."""
    first: dict[int, int] = {}
    for step in steps:
        first.setdefault(step.round, step.step)
    begun = list(first.items())[1:]
    if not 0 < len(begun) <= MOST_LINES:
        return False
    caches = run.caches()
    fresh = {r for r in caches if any(c.origin in ("fresh", "ahead") for c in caches[r])}
    looks = (("new rollouts", REGENERATION, True), ("round without any", KEPT, False))
    for label, drawn, is_fresh in looks:
        starts = [start for round_index, start in begun if (round_index in fresh) == is_fresh]
        for axis in axes:
            for start in starts:
                axis.axvline(start - 0.5, color=FAINT, linewidth=0.8, linestyle=drawn.line)
        if starts:
            legend.append(Series(label=label, look=drawn))
    return True


def _draw_gates(axes: Sequence[Axes], steps: Sequence[StepMetrics], legend: list[Series]) -> None:
    """Draw the epochs in which weights by drift were in use."""
    epochs = [list(inside) for _, inside in groupby(steps, _epoch)]
    gated = [inside for inside in epochs if any(map(_is_gated, inside))]
    for axis in axes:
        for inside in gated:
            span = (inside[0].step - 0.5, inside[-1].step + 0.5)
            axis.axvspan(*span, color=GATED.color, alpha=0.16, linewidth=0)
    if gated:
        legend.append(Series(label="epoch with gates", look=GATED, is_mark=True))


def _draw_extrapolations(run: Run, axis: Axes, legend: list[Series]) -> None:
    jumps = [jump.step - 1 for report in run.rounds for jump in report.extrapolations if jump.kept]
    drift = {step.step: step.policy_drift for step in run.steps if step.policy_drift is not None}
    points = [(step, drift[step]) for step in jumps if step in drift]
    if points:
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, JUMP.mark, color=JUMP.color, markersize=5, zorder=3)
        legend.append(Series(label="step before a kept extrapolation", look=JUMP, is_mark=True))
