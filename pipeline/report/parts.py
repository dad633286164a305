"""What a page is made of: figures with their legends, captions and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.report.style import Look


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A series and its name."""

    label: str
    look: Look
    is_mark: bool = False  # drawn as marks without a line


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Names of columns and rows of text; the first cell of a row names it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False  # cells are words, not numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """A figure, or the sentence that says why there is none.

    Example:
        >>> left_out("window", "Window over rounds", "No round is finished.")
    """

    name: str
    title: str
    caption: str
    svg: Markup | None = None
    legend: Sequence[Entry] = ()
    tables: Sequence[Table] = ()


def left_out(name: str, title: str, reason: str, tables: Sequence[Table] = ()) -> Exhibit:
    """Nothing to draw, and why."""
    return Exhibit(name=name, title=title, caption=reason, tables=tables)


def shown(value: float | None, digits: int = 4) -> str:
    """A number for a table; nothing where there is none."""
    if value is None:
        return "–"
    if value and abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def whole(value: float | None) -> str:
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
