"""Tables of a page, and numbers as text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
STAGES = ("generate", "score", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Names of columns and rows of text; the first cell of a row names it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False  # cells are words, not numbers


def table_of(caption: str, items: Iterable[T], columns: Mapping[str, Callable[[T], str]]) -> Table:
    """A row an item, whose cells are what each column makes of it."""
    rows = [[cell(item) for cell in columns.values()] for item in items]
    return Table(caption=caption, head=list(columns), rows=rows)


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.1e}" if value and abs(value) < 10.0**-digits else f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A count with separators."""
    return "–" if value is None else f"{value:,.0f}"


def scaled(value: float, unit: str) -> str:
    """A size with a prefix of the SI.

    Example:
        >>> scaled(767344, "B")
        '767 kB'
    """
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
