"""How far policies are from the teacher: one table of all, and one by position."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from opd_stream.tasks.distance import FIGURE_NAMES, TEXT_NAMES, Figures, TextDistance
from pipeline.report.drawing import Table, count, number, table_of
from pipeline.report.read import Run


class Measured(NamedTuple):
    """A policy on one kind of text."""

    run: str
    version: int
    prompts: str  # name of the held-out prompts
    text: str
    found: TextDistance


def distance_tables(runs: Sequence[Run]) -> list[Table]:
    """Every distance with its interval, and the same by position; none where none was measured."""
    measured = list(_measured(runs))
    if not measured:
        return []
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
        table_of("Distance to the teacher", measured, head | whole | sizes),
        Table(
            caption="Distance by position",
            head=[*head, "from token", *FIGURE_NAMES.values(), "tokens"],
            rows=positions,
        ),
    ]


def _measured(runs: Sequence[Run]) -> Iterator[Measured]:
    for run in runs:
        for each in () if run.summary is None else run.summary.evaluations:
            for prompts, record in each.distances.items():
                for text, found in record.texts.items():
                    yield Measured(run.name, each.round, prompts, text, found)


def _with_interval(found: TextDistance, name: str) -> str:
    low, high = found.intervals[name]
    return f"{getattr(found, name):.3f} [{low:.3f}, {high:.3f}]"


def _means(found: Figures) -> list[str]:
    return [*(number(getattr(found, name), 3) for name in FIGURE_NAMES), count(found.tokens)]
