"""The table of `opd-stream status`: a row a stage, printed once or kept up to date."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pipeline.console import clock_text, facts_text, print_lines, rate_text
from pipeline.run_folder import RunFolder
from pipeline.setup import Setup
from pipeline.status import Pace, RoundStatus, RunStatus, StatusReader, status_lines
from pipeline.tables import PIPE_COLUMNS, result_table

COLUMNS = ("round", "window", "stage", "done", "per second\nunits", "\ntokens", "\nbusy", "\nETA")
DROPS = ("\nbusy", "\ntokens", "per second\nunits", "window", "")  # the first one first
LINES_AROUND = 8  # header, rules and the lines around, in a window that shows the table
LONGEST = 400  # lines of the table that is printed once; `--json` has all rounds


def table_of(status: RunStatus, *, height: int | None = None) -> RenderableType:
    """The table with a line about the whole run; `height` leaves out the oldest complete rounds."""
    shown = _fitting(status.rounds, height)
    table = result_table((*COLUMNS, ""), left=("stage", ""), drops=DROPS)
    for each in shown:
        name = "start" if each.round is None else str(each.round)
        window = "" if each.window_tokens is None else str(each.window_tokens)
        for stage, pace in each.stages.items():
            table.add_row(name, window, stage, *_cells(pace))
            name = window = ""
    lines = (status.verdict, table, _about(status, hidden=len(status.rounds) - len(shown)))
    return Group(*(Text(each) if isinstance(each, str) else each for each in lines if each))


def watch(read: Callable[[], RunStatus], console: Console, *, seconds: float) -> None:
    """Keep the table up to date until the run is finished or Ctrl-C."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = read()
            live.update(table_of(status, height=console.height), refresh=True)
            if status.is_finished:
                return
            time.sleep(seconds)


def print_status(
    setup: Setup, folder: RunFolder, *, as_json: bool, every: float | None, is_own: bool = True
) -> None:
    """Print table and lines, or one JSON object.

    Args:
        setup: of the run.
        folder: of the run.
        as_json: one object in place of lines.
        every: seconds after which the table is made again; in a pipe all is printed once.
        is_own: whether the settings are the run's; of others there is no verdict.
    """
    reader = StatusReader(setup, folder, is_own=is_own)
    if as_json:
        record = {**asdict(reader.read()), "lines": status_lines(setup)}
        sys.stdout.write(json.dumps(record) + "\n")
        return
    is_terminal = sys.stdout.isatty()
    console = Console() if is_terminal else Console(width=PIPE_COLUMNS, force_terminal=False)
    if every is not None and is_terminal:
        watch(reader.read, console, seconds=every)
        return
    console.print(table_of(reader.read(), height=LONGEST))
    lines = status_lines(setup)
    print_lines(console, (line for line in lines if not is_own or line.startswith(" ")))


def _fitting(rounds: tuple[RoundStatus, ...], height: int | None) -> tuple[RoundStatus, ...]:
    """The latest rounds whose rows fit into a window; the last one always."""
    if height is None:
        return rounds
    left, first = height - LINES_AROUND, len(rounds)
    while first > 0 and (left >= len(rounds[first - 1].stages) or first == len(rounds)):
        first -= 1
        left -= len(rounds[first].stages)
    return rounds[first:]


def _cells(pace: Pace) -> list[str]:
    done = "complete" if pace.is_complete and not pace.done else f"{pace.done} of {pace.total}"
    if pace.total is None:
        done = str(pace.done or "")
    rates = (pace.units_per_second, pace.tokens_per_second)
    times = (pace.busy_seconds, pace.eta_seconds)
    return [
        done,
        *("" if rate is None else rate_text(rate) for rate in rates),
        *("" if seconds is None else clock_text(seconds) for seconds in times),
        _note(pace),
    ]


def _note(pace: Pace) -> str:
    facts = facts_text(pace.facts, "  ")
    if not pace.is_quiet or pace.idle_seconds is None:
        return facts
    return f"{facts}{'  ' if facts else ''}nothing new for {clock_text(pace.idle_seconds)}"


def _about(status: RunStatus, *, hidden: int) -> str:
    """What stands below the table."""
    parts: list[str] = []
    if status.verdict is None:
        parts.append(f"{status.rounds_complete} of {status.rounds_planned} rounds complete")
    if hidden:
        parts.append(f"{hidden} rounds not shown")
    if status.eta_seconds:
        parts.append(f"about {clock_text(status.eta_seconds)} left without evaluations")
    return "; ".join(parts)
