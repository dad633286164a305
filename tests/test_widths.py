"""Tables and bars fit terminals of 40, 80, 120 and 200 columns, and keep what matters most."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from opd_stream.config_file import load_config
from opd_stream.store.inventory import entries
from opd_stream.store.store import Store
from opd_stream.tasks.distance import Bootstrap
from pipeline import console as console_module
from pipeline.cli.cache_commands import _table_of
from pipeline.cli.run_commands import print_run
from pipeline.comparison import compare_many
from pipeline.console import TerminalProgress
from pipeline.estimate import estimate
from pipeline.estimate.result import print_plan
from pipeline.inspect.command import inspect_worst
from pipeline.inspect.terminal import print_worst
from pipeline.run_folder import RunFolder
from pipeline.runs import list_runs, runs_table
from pipeline.setup import open_to_look
from pipeline.status import StatusReader
from pipeline.status_table import table_of
from pipeline.tables import result_table

WIDTHS = (40, 80, 120, 200)
Print = Callable[[Path, Console], None]


def rendered(width: int, show: Callable[[Console], None]) -> list[str]:
    """The lines that a terminal of a width shows; a longer one would be broken by the terminal."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def print_it(table: RenderableType) -> Callable[[Console], None]:
    return lambda console: console.print(table)


def of_run(folder: Path, console: Console) -> None:
    run = RunFolder(folder / "run")
    summary = run.summary()
    assert summary is not None
    print_run(run.reports(), summary, "runs/small", console=console)


def of_status(folder: Path, console: Console) -> None:
    run = RunFolder(folder / "run")
    console.print(table_of(StatusReader(open_to_look(run.config()), run).read()))


def of_plan(folder: Path, console: Console) -> None:
    config = load_config(folder / "small.yaml", [])
    print_plan(estimate(config, RunFolder(folder / "run")), console=console)


def of_worst(folder: Path, console: Console) -> None:
    run = RunFolder(folder / "run")
    found = inspect_worst(run, run.config(), round_index=0, count=2, by="reverse_kl")
    print_worst(found, console=console)


def of_runs(folder: Path, console: Console) -> None:
    console.print(runs_table(list_runs(folder / "run", (), "age")))


def of_store(folder: Path, console: Console) -> None:
    console.print(_table_of(list(entries(Store(str(folder / "store"))))))


def of_many(folder: Path, console: Console) -> None:
    run = folder / "run"
    console.print(compare_many(f"{run}@0", [str(run), str(run)], Bootstrap())[0])


KEPT: dict[Print, tuple[str, ...]] = {  # in the narrowest terminal
    of_run: ("round", "pass@1"),
    of_status: ("round", "stage", "done"),
    of_plan: ("round", "stage", "tokens"),
    of_worst: ("prompt", "mean reverse_kl"),
    of_runs: ("run", "figure"),
    of_store: ("artifact",),
    of_many: ("policy", "value"),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("show", KEPT, ids=lambda show: show.__name__)
def test_a_table_fits_and_keeps_its_first_columns(
    show: Print, width: int, finished_run: Path
) -> None:
    lines = rendered(width, lambda console: show(finished_run, console))
    table = [line for line in lines if line.startswith(" ")]
    assert max(map(cell_len, table)) <= width
    head = "\n".join(lines)
    for name in KEPT[show]:
        assert name in head, head
    assert ("left out at this width" in head) <= (width < 160)
    assert "…" not in "\n".join(table) or width == 40


def test_columns_go_in_their_order_and_are_named() -> None:
    table = result_table(
        ("round", "loss", "much\ndetail", "empty"), drops=("empty", "much\ndetail")
    )
    table.add_row("0", "0.25", "x" * 30, "")
    wide, narrow = (rendered(width, print_it(table)) for width in (60, 30))
    assert "left out" not in "".join(wide)
    assert " ".join(" ".join(narrow).split()).endswith("left out at this width: much detail")
    assert "0.25" in "\n".join(narrow)
    assert "0.25" in "\n".join(rendered(60, print_it(table)))  # the table itself lost nothing


def test_a_long_name_takes_several_lines_before_a_number_is_cut() -> None:
    table = result_table(("run", "value"), left=("run",), folds=("run",))
    table.add_row("runs/" + "long" * 20, "0.924")
    lines = rendered(40, print_it(table))
    assert sum("long" in line for line in lines) > 1
    assert "0.924" in "\n".join(lines)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_a_line_of_progress_keeps_its_name_and_its_count(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "shows_bars", lambda: True)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    progress = TerminalProgress(iter(range(100)).__next__, console)
    progress.start("evaluate", 12_345)
    progress.advance("evaluate", 1_234, 99_999, window=208, loss=0.1234, policy_drift=0.0001)
    lines = rendered(width, print_it(progress._bars.get_renderable()))
    (line,) = [each for each in lines if each.strip()]
    assert cell_len(line.rstrip()) <= width
    assert "evaluate" in line
    assert "1234/12345" in line
    assert bool(re.search("[━╸]", line)) is (width >= 60)
    assert ("window 208" in line) is (width >= 120)


def test_a_terminal_shows_as_many_columns_as_it_has(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cli.options import console

    assert console().width == 140
    monkeypatch.setenv("COLUMNS", "72")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert console().width == 72
    assert shutil.get_terminal_size().columns == 72
