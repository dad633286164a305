"""How far policies are from the teacher: over steps, one table of all, and one by position."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import altair as alt

from opd_stream.tasks.distance import FIGURE_NAMES, TEXT_NAMES, Figures, TextDistance
from pipeline.report.accuracy import COSTS, STEPS, spent
from pipeline.report.charts import SERIES, Exhibit, axis_x, axis_y, data, exhibit, lines
from pipeline.report.read import Run
from pipeline.report.tables import Table, count, number, table_of

TITLE = "Distance to the teacher"


class Measured(NamedTuple):
    """A policy on one kind of text."""

    run: str
    version: int
    steps: float | None  # that it has; None: a report is missing
    prompts: str  # name of the held-out prompts
    text: str
    found: TextDistance


def distance_exhibit(runs: Sequence[Run]) -> Exhibit | None:
    """Every distance over steps and in tables; None where none was measured."""
    measured = list(_measured(runs))
    if not measured:
        return None
    tables, rows = _tables(measured), [_row(each, measured) for each in measured]
    names = list(dict.fromkeys(str(row[SERIES]) for row in rows))
    base = alt.Chart(data(rows)).transform_filter("isValid(datum.step)")
    panels = [
        (
            f"{said}{'' if name == 'agreement' else ' (nats a token)'}",
            lines(
                base,
                names,
                axis_x("step", STEPS),
                axis_y(name),
                tip=[f"{SERIES}:N", "version:Q", "step:Q", f"{name}:Q"],
            ),
        )
        for name, said in FIGURE_NAMES.items()
    ]
    caption = (
        "Means per token over the whole vocabulary on held-out prompts; intervals, in the table, "
        "are over prompts."
    )
    return exhibit("distances", TITLE, caption, panels, tables=tables)


def _row(each: Measured, measured: Sequence[Measured]) -> dict[str, object]:
    names = [each.run, each.prompts] if len({one.prompts for one in measured}) > 1 else [each.run]
    figures = {name: getattr(each.found, name) for name in FIGURE_NAMES}
    label = ", ".join([*names, TEXT_NAMES[each.text]])
    return {SERIES: label, "version": each.version, "step": each.steps, **figures}


def _tables(measured: Sequence[Measured]) -> list[Table]:
    head: dict[str, Callable[[Measured], str]] = {
        "run": lambda each: each.run,
        "policy version": lambda each: str(each.version),
        "prompts": lambda each: each.prompts,
        "on": lambda each: TEXT_NAMES[each.text],
    }
    whole: dict[str, Callable[[Measured], str]] = {
        said: lambda each, name=name: _with_interval(each.found, name)
        for name, said in FIGURE_NAMES.items()
    }
    sizes: dict[str, Callable[[Measured], str]] = {
        "rows": lambda each: count(each.found.rows),
        "tokens": lambda each: count(each.found.tokens),
    }
    positions = [
        [*(cell(each) for cell in head.values()), f"{part.first:,}", *_means(part)]
        for each in measured
        for part in each.found.positions
    ]
    return [
        table_of(TITLE, measured, head | whole | sizes),
        Table(
            caption="Distance by position",
            head=[*head, "from token", *FIGURE_NAMES.values(), "tokens"],
            rows=positions,
        ),
    ]


def _measured(runs: Sequence[Run]) -> Iterator[Measured]:
    cost = next(cost for cost in COSTS if cost.name == STEPS)
    for run in runs:
        steps = spent(run, cost) or []
        for each in () if run.summary is None else run.summary.evaluations:
            done = steps[each.round] if each.round < len(steps) else None
            for prompts, record in each.distances.items():
                for text, found in record.texts.items():
                    yield Measured(run.name, each.round, done, prompts, text, found)


def _with_interval(found: TextDistance, name: str) -> str:
    low, high = found.intervals[name]
    return f"{getattr(found, name):.3f} [{low:.3f}, {high:.3f}]"


def _means(found: Figures) -> list[str]:
    return [*(number(getattr(found, name), 3) for name in FIGURE_NAMES), count(found.tokens)]
