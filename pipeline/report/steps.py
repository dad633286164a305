"""Training over optimizer steps: one figure of all runs, and what the figures of steps share."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import altair as alt

from opd_stream.outcome import StepMetrics
from pipeline.report.charts import (
    MOST_MARKS,
    SERIES,
    Drawing,
    Exhibit,
    axis_x,
    axis_y,
    data,
    exhibit,
    lines,
)
from pipeline.report.read import Run

MOST_POINTS = 400  # of a run
SMOOTHED = 5  # points to each side of a smoothed one
TITLE = "Training over optimizer steps"


class Measure(NamedTuple):
    """A figure of some steps together."""

    name: str
    title: str
    of: Callable[[Sequence[StepMetrics]], float | None]
    form: str = "~g"


def mean_of(name: str) -> Callable[[Sequence[StepMetrics]], float | None]:
    """The mean of a number of metrics.jsonl over the steps that have it."""

    def mean(steps: Sequence[StepMetrics]) -> float | None:
        values = [v for step in steps if isinstance(v := getattr(step, name, None), int | float)]
        return sum(values) / len(values) if values else None

    return mean


def tokens_per_second(steps: Sequence[StepMetrics]) -> float | None:
    """Trained tokens in a second of the trainer."""
    tokens = [getattr(step, "trained_tokens", None) for step in steps]
    seconds = sum(getattr(step, "seconds", 0.0) for step in steps)
    return None if None in tokens or not seconds else sum(t for t in tokens if t) / seconds


MEASURES = (
    Measure("loss", "loss", mean_of("loss")),
    Measure("reverse_kl", "reverse KL (nats a token)", mean_of("reverse_kl")),
    Measure("grad_norm", "gradient norm", mean_of("grad_norm")),
    Measure("learning_rate", "learning rate", mean_of("learning_rate")),
    Measure("tokens_per_second", "trained tokens a second", tokens_per_second, "~s"),
    Measure("mean_tokens", "tokens of a rollout", mean_of("mean_tokens"), "~s"),
    Measure("overlap", "overlap of the candidates", mean_of("overlap")),
    Measure("student_entropy", "entropy of the student (nats)", mean_of("student_entropy")),
)


def thinned(steps: Sequence[StepMetrics]) -> tuple[list[list[StepMetrics]], int]:
    """Steps of one epoch together, in at most about `MOST_POINTS` groups; and at most how many."""
    together = -(-len(steps) // MOST_POINTS)
    epochs = [list(epoch) for _, epoch in groupby(steps, lambda step: (step.round, step.epoch))]
    starts = [(epoch, start) for epoch in epochs for start in range(0, len(epoch), together)]
    return [epoch[start : start + together] for epoch, start in starts], together


def step_rows(run: Run, measures: Sequence[Measure]) -> Iterator[dict[str, object]]:
    """A row a point of the run's curves."""
    for group in thinned(run.steps)[0]:
        figures = {measure.name: measure.of(group) for measure in measures}
        yield {SERIES: run.name, "step": group[0].step, "round": group[0].round, **figures}


def steps_exhibit(runs: Sequence[Run]) -> Exhibit:
    """Loss, gradient norm, learning rate, speed, length and overlap of every run."""
    rows = [row for run in runs for row in step_rows(run, MEASURES)]
    if not rows:
        return Exhibit(name="steps", title=TITLE, caption="No optimizer step is done yet.")
    names = [run.name for run in runs if run.steps]
    together = max(thinned(run.steps)[1] for run in runs)
    found = [each for each in MEASURES if any(row[each.name] is not None for row in rows)]
    smooth = alt.param(name="smooth", value=False, bind=alt.binding_checkbox(name="smoothed "))
    base = alt.Chart(data(rows))
    panels = [(each.title, _panel(base, names, each, len(rows))) for each in found]
    caption = "The reverse KL is estimated on the rollouts that a step trains on."
    if together > 1:
        caption += f" A point is the mean of up to {together} steps."
    return exhibit("steps", TITLE, caption, panels, params=[smooth])


def _panel(base: alt.Chart, names: Sequence[str], measure: Measure, rows: int) -> Drawing:
    """A measure; smoothed it is the mean of the points around."""
    name = measure.name
    around = alt.WindowFieldDef.from_dict({"op": "mean", "field": name, "as": "around"})
    chosen = (
        base.transform_window([around], frame=[-SMOOTHED, SMOOTHED], groupby=[SERIES])
        .transform_calculate(shown=f"smooth ? datum.around : datum.{name}")
        .transform_filter("isValid(datum.shown)")
    )
    return lines(
        chosen,
        names,
        axis_x("step", "optimizer step"),
        axis_y("shown", form=measure.form),
        tip=[f"{SERIES}:N", "round:Q", "step:Q", f"{name}:Q"],
        marks=rows <= MOST_MARKS,
    )
