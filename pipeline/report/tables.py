"""Tables of a page, and numbers as their text."""

from collections.abc import Sequence
from dataclasses import dataclass

STAGES = ("generate", "score", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Names of columns and rows of text; the first cell of a row names it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False  # cells are words, not numbers


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    if value is None:
        return "–"
    if value and abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def count(value: float | None) -> str:
    """A count with separators."""
    return "–" if value is None else f"{value:,.0f}"


def scaled(value: float | None, unit: str) -> str:
    """A size with a prefix of the SI.

    Example:
        >>> scaled(767344, "B")
        '767 kB'
    """
    if value is None:
        return "–"
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
