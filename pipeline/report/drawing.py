"""Figures and tables of a page: matplotlib draws, the page has the figures as inline SVG.

Text stays text, and a colour becomes a CSS variable, whose values for light and dark are in
page.css. matplotlib knows colours by number only, so each variable has a number of its own. Ids of
elements get the figure's name in front, since a page holds many figures.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

T = TypeVar("T")
STAGES = ("generate", "score", "train")
INK, FAINT, GRID = "#000101", "#000102", "#000103"  # text and axes, labels, lines of the grid
SERIES = tuple(f"#0002{place:02x}" for place in range(8))
STAGE_COLORS = {"generate": "#000301", "score": "#000302", "train": "#000303"}
VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--grid",
    **{color: f"--series-{place}" for place, color in enumerate(SERIES)},
    **{color: f"--{stage}" for stage, color in STAGE_COLORS.items()},
}
_MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3))
_COLOR = re.compile("|".join(VARIABLES))
_WIDTH_INCHES = 5.8  # of every figure; the page scales it
_OPTIONS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "opd-stream",  # the same file from the same numbers
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a series is drawn, and how its legend shows that.

    Example:
        >>> look(0).mark
        'o'
    """

    color: str
    mark: str = ""  # matplotlib's
    glyph: str = ""  # the same as a character
    dashes: tuple[float, ...] = ()  # on and off, points; none: a whole line
    alpha: float = 1.0

    @property
    def variable(self) -> str:
        """The CSS variable of the colour."""
        return VARIABLES[self.color]

    @property
    def line(self) -> tuple[int, tuple[float, ...] | None]:
        """matplotlib's line style."""
        return (0, self.dashes or None)

    @property
    def style(self) -> dict[str, Any]:
        """matplotlib's options of a curve."""
        line = self.line
        return {"color": self.color, "marker": self.mark, "alpha": self.alpha, "linestyle": line}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """An entry of a legend."""

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


def table_of(caption: str, items: Iterable[T], columns: Mapping[str, Callable[[T], str]]) -> Table:
    """A row an item, whose cells are what each column makes of it."""
    rows = [[cell(item) for cell in columns.values()] for item in items]
    return Table(caption=caption, head=list(columns), rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """A figure with legend, caption and tables, or the sentence that says why there is none."""

    name: str
    title: str
    caption: str
    svg: Markup | None = None
    legend: Sequence[Series] = ()
    tables: Sequence[Table] = ()


def look(place: int) -> Look:
    """The look of a series by its place; marks and dashes tell apart what colours do not."""
    mark, glyph = _MARKS[place % len(_MARKS)]
    color, dashes = SERIES[place % len(SERIES)], _DASHES[place % len(_DASHES)]
    return Look(color=color, mark=mark, glyph=glyph, dashes=dashes)


def graded(place: int, count: int) -> Look:
    """The look of one of an ordered set of series: one colour, from faint to full."""
    mark, glyph = _MARKS[place % len(_MARKS)]
    alpha = 1.0 if count < 2 else round(0.4 + 0.6 * place / (count - 1), 3)
    return Look(color=SERIES[0], mark=mark, glyph=glyph, alpha=alpha)


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


def panels(count: int, *, height: float = 1.7) -> tuple[Figure, list[Axes]]:
    """A figure with panels above each other that share x; `height` is of each, inches."""
    with mpl.rc_context(_OPTIONS):
        figure = Figure(figsize=(_WIDTH_INCHES, height * count + 0.5), layout="constrained")
        grid = figure.subplots(count, 1, sharex=True, squeeze=False)
    return figure, [axis for (axis,) in grid]


def count_axis(axis: Axes, label: str) -> None:
    """A few whole numbers along x."""
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))


def prefixed(axis: Axis) -> None:
    """Numbers with k, M, G."""
    axis.set_major_formatter(EngFormatter(sep=""))


def decades(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis over whole decades, at least one, that holds positive values."""
    exponents = [math.log10(value) for value in values]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    axis.set_yscale("log")
    axis.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    axis.yaxis.set_major_locator(LogLocator(numticks=5))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:.0e}")


def exhibit(
    figure: Figure,
    name: str,
    title: str,
    caption: str,
    *,
    run: str = "",
    legend: Sequence[Series] = (),
    tables: Sequence[Table] = (),
) -> Exhibit:
    """A drawn figure for the page; title, run and caption are also read to those who hear it."""
    root = _svg(figure, name)
    for tag, text in (("desc", caption), ("title", f"{title}: {run}" if run else title)):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(0, element)
    svg = Markup(ElementTree.tostring(root, encoding="unicode"))
    return Exhibit(name=name, title=title, caption=caption, svg=svg, legend=legend, tables=tables)


def _svg(figure: Figure, name: str) -> ElementTree.Element:
    buffer = io.StringIO()
    with mpl.rc_context(_OPTIONS):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # its rules would hold for the page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        attributes = [(key.split("}")[-1], value) for key, value in element.attrib.items()]
        element.attrib = {key: _attribute(key, value, name) for key, value in attributes}
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "style": "stroke-linejoin: round; stroke-linecap: butt",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    return root


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key == "style":
        value = re.sub(r"(\d[\d.]*)px 'DejaVu Sans'(, [^;]*)?", r"\1px var(--figure-font)", value)
    return _COLOR.sub(lambda found: f"var({VARIABLES[found.group()]})", value)
