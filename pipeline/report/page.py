"""The page: everything that was read and drawn, in one template that escapes all text."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opd_stream.errors import UserError
from opd_stream.store.files import publish
from pipeline.report import text
from pipeline.report.accuracy import accuracy_exhibits, evaluation_table
from pipeline.report.distance import distance_tables
from pipeline.report.drift import drift_exhibit
from pipeline.report.read import Run, read_runs
from pipeline.report.rounds import (
    cache_exhibit,
    lineage_exhibit,
    position_exhibit,
    stage_exhibit,
    window_exhibit,
)
from pipeline.report.teachers import teachers_exhibit

EXHIBITS = {
    "window": window_exhibit,
    "drift": drift_exhibit,
    "position": position_exhibit,
    "teachers": teachers_exhibit,
    "cache": cache_exhibit,
    "stages": stage_exhibit,
    "lineage": lineage_exhibit,
}


def write_report(folders: list[Path], out: Path) -> str:
    """Write the page of some runs; returns the line to print."""
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
    assert environment.loader is not None
    style, _, _ = environment.loader.get_source(environment, "page.css")
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        runs=runs,
        accuracy=accuracy_exhibits(runs),
        evaluations=evaluation_table(runs),
        distances=distance_tables(runs),
        exhibits=[
            [
                make(run, f"run-{place}-{name}")
                for name, make in EXHIBITS.items()
                if name != "teachers" or run.config.teachers
            ]
            for place, run in enumerate(runs)
        ],
        text=text,
    )
