"""The page: everything that was read and drawn, in one template that escapes all text."""

from collections.abc import Sequence
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
    assert environment.loader is not None
    style, _, _ = environment.loader.get_source(environment, "page.css")
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        runs=runs,
        accuracy=accuracy_exhibits(runs),
        evaluations=evaluation_table(runs),
        exhibits=[_exhibits(run, f"run-{place}") for place, run in enumerate(runs)],
        text=text,
    )


def _exhibits(run: Run, anchor: str) -> list[Exhibit]:
    return [
        window_exhibit(run, f"{anchor}-window"),
        drift_exhibit(run, f"{anchor}-drift"),
        position_exhibit(run, f"{anchor}-position"),
        cache_exhibit(run, f"{anchor}-cache"),
        stage_exhibit(run, f"{anchor}-stages"),
        lineage_exhibit(run, f"{anchor}-lineage"),
    ]
