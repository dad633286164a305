"""A matplotlib figure as inline SVG: text stays text, colours become CSS variables.

Names of elements get the figure's name before them, since a page holds many figures.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.report.style import FAINT, GRID, INK, VARIABLES

WIDTH_INCHES = 5.8  # of every figure; the page scales it
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


def panels(count: int, *, height: float = 1.7, share_x: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with panels above each other.

    Args:
        count: of panels.
        height: of each, inches.
        share_x: only the lowest names its places.
    """
    with mpl.rc_context(_OPTIONS):
        figure = Figure(figsize=(WIDTH_INCHES, height * count + 0.5), layout="constrained")
        grid = figure.subplots(count, 1, sharex=share_x, squeeze=False)
    return figure, [axis for (axis,) in grid]


def count_axis(axis: Axes) -> None:
    """A few whole numbers along x."""
    axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))


def prefixed(axis: Axes, *, on: str = "x") -> None:
    """Numbers with k, M, G along an axis."""
    ticks = axis.xaxis if on == "x" else axis.yaxis
    ticks.set_major_formatter(EngFormatter(sep=""))


def decades(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis over whole decades, at least one, so that its ends are named.

    Args:
        axis: to scale.
        values: that it must hold; those not above 0 are passed over.
    """
    exponents = [math.log10(value) for value in values if value > 0]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    axis.set_yscale("log")
    axis.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    axis.yaxis.set_major_locator(LogLocator(numticks=5))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:.0e}")


def inline(figure: Figure, name: str, *, title: str, description: str) -> Markup:
    """The figure as an `svg` element for the page.

    Args:
        figure: drawn.
        name: distinct on the page.
        title: what it is called by those who hear the page.
        description: what it shows, likewise.
    """
    buffer = io.StringIO()
    with mpl.rc_context(_OPTIONS):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(_METADATA))
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # its rules would hold for the page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        element.attrib = {
            key.split("}")[-1]: _value(key.split("}")[-1], value, name)
            for key, value in element.attrib.items()
        }
    view = root.attrib["viewBox"]
    root.attrib = {
        "viewBox": view,
        "role": "img",
        "style": "stroke-linejoin: round; stroke-linecap: butt",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    for place, (tag, text) in enumerate([("title", title), ("desc", description)]):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(place, element)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


_METADATA = ("Date", "Creator", "Format", "Type")
_COLOR = re.compile("|".join(VARIABLES))


def _value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key == "style":
        value = re.sub(r"(\d[\d.]*)px 'DejaVu Sans'(, [^;]*)?", r"\1px var(--figure-font)", value)
    return _COLOR.sub(lambda found: f"var({VARIABLES[found.group()]})", value)
