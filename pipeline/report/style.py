"""Colours, dashes and marks of a figure: names here, values in page.css for light and for dark.

matplotlib knows colours by number only, so each name has a number of its own, which `svg.inline`
turns into the name's CSS variable.
"""

from dataclasses import dataclass

INK, FAINT, GRID = "#000101", "#000102", "#000103"  # text and axes, labels, lines of the grid
SERIES = tuple(f"#0002{place:02x}" for place in range(8))
STAGES = ("generate", "score", "train")
STAGE_COLORS = dict(zip(STAGES, ("#000301", "#000302", "#000303"), strict=True))

VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--grid",
    **{color: f"--series-{place}" for place, color in enumerate(SERIES)},
    **{color: f"--{stage}" for stage, color in STAGE_COLORS.items()},
}

_MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a series is drawn, and how its legend shows that.

    Example:
        >>> look(0).mark
        'o'
    """

    color: str
    mark: str  # matplotlib's
    glyph: str  # the same as a character
    dashes: tuple[float, ...]  # on and off, points; none: a whole line
    alpha: float = 1.0

    @property
    def variable(self) -> str:
        """The CSS variable of the colour."""
        return VARIABLES[self.color]

    @property
    def line(self) -> tuple[int, tuple[float, ...] | None]:
        """matplotlib's line style."""
        return (0, self.dashes or None)


def look(place: int) -> Look:
    """Of a series by its place; marks and dashes tell apart what colours do not."""
    mark, glyph = _MARKS[place % len(_MARKS)]
    color, dashes = SERIES[place % len(SERIES)], _DASHES[place % len(_DASHES)]
    return Look(color=color, mark=mark, glyph=glyph, dashes=dashes)


def graded(place: int, count: int) -> Look:
    """Of series that have an order: one colour, from faint to full, with marks by place."""
    mark, glyph = _MARKS[place % len(_MARKS)]
    alpha = 1.0 if count < 2 else round(0.4 + 0.6 * place / (count - 1), 3)
    return Look(color=SERIES[0], mark=mark, glyph=glyph, dashes=(), alpha=alpha)
