"""The page: everything that was read and drawn, in one template that escapes all text."""

import hashlib
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opd_stream.errors import UserError
from opd_stream.store.files import make_folder, publish
from pipeline.report import text
from pipeline.report.accuracy import accuracy_exhibit
from pipeline.report.charts import library
from pipeline.report.distance import distance_exhibit
from pipeline.report.drift import drift_exhibit
from pipeline.report.read import Run, read_runs
from pipeline.report.rounds import (
    cache_exhibit,
    lineage_exhibit,
    position_exhibit,
    stage_exhibit,
    window_exhibit,
)
from pipeline.report.samples import sample_rounds, samples
from pipeline.report.steps import steps_exhibit
from pipeline.report.teachers import teachers_exhibit
from pipeline.run_folder import RunFolder

EXHIBITS = {
    "window": window_exhibit,
    "drift": drift_exhibit,
    "position": position_exhibit,
    "teachers": teachers_exhibit,
    "cache": cache_exhibit,
    "stages": stage_exhibit,
    "lineage": lineage_exhibit,
}
WATCH_SECONDS = 20  # between two pages of runs that are watched
MOST_OPEN = 6  # rounds whose decisions are open at first


def write_report(
    folders: list[Path], out: Path, *, rollouts: int = 0, reload_seconds: int = 0
) -> str:
    """Write the page of some runs; returns the line to print.

    Args:
        folders: of the runs.
        out: the HTML file.
        rollouts: of each round with a sample text, how many become pages beside it.
        reload_seconds: after which the page in a browser reads the file again; 0: never.

    Raises:
        UserError: a run or, of `rollouts`, its store cannot be read, or a file cannot be written.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(
            f"--out is {out}, which cannot be written; expected a file name in a folder that "
            "exists; name another file"
        )
    runs = read_runs(folders)
    beside = out.with_name(f"{out.stem}-rollouts") if rollouts else None
    if beside is not None and beside.exists() and not beside.is_dir():
        raise UserError(
            f"{beside} is a file; expected a folder, for pages beside {out}; name another --out"
        )
    if beside is not None:
        _write_rollouts(runs, beside, rollouts)
    folder = "" if beside is None else beside.name
    data = page(runs, folder, reload_seconds=reload_seconds).encode()
    publish(out, data)
    return f"{out}: {len(folders)} run{'s' if len(folders) > 1 else ''}, {len(data) / 1e3:,.0f} kB"


def watch_report(
    folders: list[Path],
    out: Path,
    *,
    rollouts: int = 0,
    say: Callable[[str], None],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Write the page again and again, until the runs are finished; raises as `write_report`.

    Args:
        folders: of the runs.
        out: the HTML file, which a browser reads again by itself meanwhile.
        rollouts: as in `write_report`.
        say: told the first line and the last.
        wait: for so many seconds.
    """
    is_first = True
    while not all(each.summary and each.summary.finished for each in read_runs(folders)):
        line = write_report(folders, out, rollouts=rollouts, reload_seconds=WATCH_SECONDS)
        if is_first:
            say(f"{line}; written again every {WATCH_SECONDS} s until the runs are finished")
        is_first = False
        wait(WATCH_SECONDS)
    say(write_report(folders, out, rollouts=rollouts))


def _write_rollouts(runs: Sequence[Run], folder: Path, count: int) -> None:
    """The worst rollouts of the rounds with sample texts, a folder a round."""
    from pipeline.inspect.command import inspect_worst, left_out
    from pipeline.inspect.page import write_pages

    for place, run in enumerate(runs):
        for index in sample_rounds(run):
            own, config = RunFolder(run.folder), run.config
            found = inspect_worst(own, config, round_index=index, count=count)
            lines = left_out(own, config, round_index=index, count=count)
            make_folder(folder / f"{place}")
            write_pages([each.view for each in found], lines, folder / f"{place}" / f"{index}")


def page(runs: Sequence[Run], rollouts: str = "", *, reload_seconds: int = 0) -> str:
    """The HTML of some runs; `rollouts`: the folder beside it with pages of them, if any."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    style, drawing = (
        environment.loader.get_source(environment, name)[0] for name in ("page.css", "charts.js")
    )
    scripts = [library(), drawing]
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        allowed=" ".join(map(_allowed, scripts)),
        runs=runs,
        overall=[accuracy_exhibit(runs), steps_exhibit(runs), distance_exhibit(runs)],
        exhibits=[
            [
                make(run, f"run-{place}-{name}")
                for name, make in EXHIBITS.items()
                if name != "teachers" or run.config.teachers
            ]
            for place, run in enumerate(runs)
        ],
        samples=[samples(run) for run in runs],
        rollouts=rollouts,
        reload_seconds=reload_seconds,
        most_open=MOST_OPEN,
        text=text,
    )


def _allowed(script: str) -> str:
    """How a content security policy names a script that may run."""
    return f"'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
