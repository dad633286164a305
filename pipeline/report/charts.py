"""Figures of a page: Vega-Lite charts, written with Altair and drawn by the reader's browser.

The page holds the library's JavaScript once (`library`) and each figure as JSON. A figure is a row
of panels, which `charts.js` sets side by side as far as they fit. Colours are CSS variables, whose
values for light and dark are in page.css. In every figure a series can be picked in the legend, a
point under the pointer tells its numbers, and x can be dragged, or scaled with Ctrl and the wheel.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

from pipeline.report.tables import Table

Row = Mapping[str, Any]
Drawing = alt.Chart | alt.LayerChart | alt.FacetChart
SERIES = "series"  # the column whose values have colours and a legend
COLORS = [f"var(--series-{place})" for place in range(8)]
DASHES = [[1, 0], [5, 2], [2, 2], [7, 2, 2, 2], [10, 3]]
FAINT = "var(--faint)"
MOST_MARKS = 120  # rows of a series with a visible mark each
WIDTH, HEIGHT = 300, 130  # of a panel, pixels; charts.js fits the width
DIGITS = 5  # of a number in a figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """A figure with caption and tables, or the sentence that says why there is none."""

    name: str
    title: str
    caption: str
    chart: dict[str, Any] | None = None  # Vega-Lite; its datasets are names of columns and rows
    tables: Sequence[Table] = ()

    @property
    def json(self) -> Markup:
        """The chart for a script element."""
        return Markup(json.dumps(self.chart, separators=(",", ":")).replace("<", "\\u003c"))


@cache
def library() -> str:
    """The JavaScript of Vega, Vega-Lite and Vega-Embed."""
    major, minor, *_ = alt.SCHEMA_VERSION.lstrip("v").split(".")
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", f"{major}.{minor}")


def data(rows: Sequence[Row]) -> alt.InlineData:
    """Rows for panels; what is not finite is nothing. As text, since Altair copies them often."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[_short(row.get(name)) for name in names] for row in rows]
    return alt.InlineData(values=json.dumps({"names": names, "rows": values}))


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def axis_x(x: str, title: str | None) -> alt.X:
    """Numbers along x; whole ones."""
    axis = alt.Axis(tickMinStep=1, tickCount=6, format="~s")
    return alt.X(
        f"{x}:Q", title=title, axis=axis, scale=alt.Scale(zero=False, nice=False, padding=6)
    )


def axis_y(
    y: str, *, form: str = "~g", log: bool = False, span: tuple[float, float] | None = None
) -> alt.Y:
    """Numbers along y; `span` None: as far as they go."""
    limits: dict[str, Any] = {"zero": False} if span is None else {"domain": [*span]}
    scale = alt.Scale(type="log", **limits) if log else alt.Scale(**limits)
    return alt.Y(f"{y}:Q", title=None, axis=alt.Axis(format=form, tickCount=4), scale=scale)


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole powers of ten, at least two, between which positive values lie."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def series(names: Sequence[str], *, colors: Sequence[str] | None = None) -> dict[str, Any]:
    """Colours by the column `SERIES`, with a legend where there are several."""
    shown = [*colors] if colors else [COLORS[place % len(COLORS)] for place in range(len(names))]
    if len(names) == 1:
        return {"color": alt.value(shown[0])}
    scale = alt.Scale(domain=[*names], range=shown)
    color = alt.Color(f"{SERIES}:N", scale=scale, legend=alt.Legend(title=None))
    return {
        "color": color,
        "opacity": alt.when(_PICK).then(alt.value(1)).otherwise(alt.value(0.08)),
    }


_PICK = alt.selection_point(name="pick", fields=[SERIES], bind="legend")
_ZOOM = alt.selection_interval(
    name="zoom", encodings=["x"], bind="scales", zoom="wheel![event.ctrlKey || event.metaKey]"
)


def lines(
    base: alt.Chart,
    names: Sequence[str],
    x: alt.X,
    y: alt.Y,
    *,
    tip: Sequence[str],
    marks: bool = True,
    step: bool = False,
) -> Drawing:
    """A curve a series; points tell the columns `tip`, and show where there are few."""
    colors, dash = series(names), dict[str, Any]()
    if len(names) > 1:
        dashes = [DASHES[place % len(DASHES)] for place in range(len(names))]
        scale = alt.Scale(domain=[*names], range=dashes)
        legend = alt.Legend(title=None)
        dash["strokeDash"] = alt.StrokeDash(f"{SERIES}:N", scale=scale, legend=legend)
    kind: dict[str, Any] = {"interpolate": "step"} if step else {}
    curve = base.mark_line(strokeWidth=1.6, clip=True, **kind).encode(x=x, y=y, **colors, **dash)
    shown = {} if marks else {"opacity": alt.value(0)}
    tips = [alt.Tooltip(each) for each in tip]
    points = base.mark_point(filled=True, size=36, clip=True).encode(
        x=x, y=y, tooltip=tips, **{**colors, **shown}
    )
    return curve + points


def bars(
    values: Mapping[int, Mapping[str, float]], *, unit: str, colors: Sequence[str]
) -> alt.Chart:
    """A bar a round, of series above each other."""
    rows: list[Row] = []
    for index, parts in values.items():
        top = 0.0
        for name, value in parts.items():
            span = {"low": top, "high": top + value, unit: value}
            rows.append({SERIES: name, "round": index, **span})
            top += value
    names = list(dict.fromkeys(name for parts in values.values() for name in parts))
    return (
        alt.Chart(data(rows))
        .transform_calculate(left="datum.round - 0.35", right="datum.round + 0.35")
        .mark_rect(clip=True)
        .encode(
            x=axis_x("left", "round"),
            x2="right:Q",
            y=axis_y("low", form="~s"),
            y2="high:Q",
            tooltip=[alt.Tooltip(each) for each in (f"{SERIES}:N", "round:Q", f"{unit}:Q")],
            **series(names, colors=colors),
        )
    )


def rule(*, y: float, text: str) -> alt.Chart:
    """A dashed level across a panel, with what it is under the pointer."""
    base = alt.Chart(data([{"level": y, "text": text}]))
    return base.mark_rule(strokeDash=[5, 3], color=FAINT, clip=True).encode(
        y="level:Q", tooltip=["text:N", "level:Q"]
    )


def exhibit(
    name: str,
    title: str,
    caption: str,
    panels: Sequence[tuple[str | alt.TitleParams, Drawing]],
    *,
    params: Sequence[alt.Parameter] = (),
    tables: Sequence[Table] = (),
    height: int = HEIGHT,
    zooms: bool = True,
) -> Exhibit:
    """A figure of named panels that share what is picked, and x where it is the same."""
    if not panels:
        return Exhibit(name=name, title=title, caption=caption, tables=tables)
    drawn = [panel.properties(title=head, width=WIDTH, height=height) for head, panel in panels]
    chosen = [*params, _PICK, *([_ZOOM] if zooms else [])]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Automatically deduplicated selection")  # meant
        chart = alt.concat(*drawn, columns=2, spacing=24).add_params(*chosen).to_dict()
    kept = {key: value for key, value in chart.items() if key not in ("$schema", "config")}
    kept["datasets"] = {name: json.loads(rows) for name, rows in chart["datasets"].items()}
    return Exhibit(name=name, title=title, caption=caption, chart=kept, tables=tables)
