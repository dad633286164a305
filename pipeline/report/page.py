"""The page: everything that was read and drawn, in one template that escapes all text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opd_stream.errors import UserError
from opd_stream.store.files import publish
from pipeline.report import text
from pipeline.report.accuracy import accuracy_exhibits, evaluation_table
from pipeline.report.drawing import Exhibit
from pipeline.report.drift import drift_exhibit
from pipeline.report.lineage import lineage_exhibit
from pipeline.report.read import Run, read_runs
from pipeline.report.rounds import cache_exhibit, position_exhibit, stage_exhibit, window_exhibit
from pipeline.report.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What the page says of one run."""

    anchor: str
    name: str
    state: str
    reuse: str
    facts: Sequence[tuple[str, str]]
    config: str
    totals: Table
    exhibits: Sequence[Exhibit]
    decisions: Sequence[text.RoundDecisions]


def write_report(folders: list[Path], out: Path) -> str:
    """Write the page of some runs; returns the line to print.

    Raises:
        UserError: a folder is no run, or the file cannot be written.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(
            f"--out is {out}, which cannot be written; expected a file name in a folder that "
            "exists; name another file"
        )
    data = page(read_runs(folders)).encode()
    publish(out, data)
    return f"{out}: {len(folders)} run{'s' if len(folders) > 1 else ''}, {len(data) / 1e3:,.0f} kB"


def page(runs: Sequence[Run]) -> str:
    """The HTML of some runs."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, _, _ = environment.loader.get_source(environment, "page.css")  # type: ignore[union-attr]
    return environment.get_template("page.html.j2").render(
        title=f"Runs: {', '.join(run.name for run in runs)}",
        style=Markup(style),
        overview=text.overview(runs),
        accuracy=accuracy_exhibits(runs),
        evaluations=evaluation_table(runs),
        sections=[_section(place, run) for place, run in enumerate(runs)],
    )


def _section(place: int, run: Run) -> Section:
    anchor = f"run-{place}"
    return Section(
        anchor=anchor,
        name=run.name,
        state=text.state(run),
        reuse=text.reuse(run),
        facts=text.facts(run),
        config=run.config.model_dump_json(indent=2),
        totals=text.totals(run),
        exhibits=[
            window_exhibit(run, f"{anchor}-window"),
            drift_exhibit(run, f"{anchor}-drift"),
            position_exhibit(run, f"{anchor}-position"),
            cache_exhibit(run, f"{anchor}-cache"),
            stage_exhibit(run, f"{anchor}-stages"),
            lineage_exhibit(run, f"{anchor}-lineage"),
        ],
        decisions=list(text.decisions(run)),
    )
