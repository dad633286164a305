"""Progress on the terminal: bars where there is one, plain lines in pipes and CI."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class TerminalProgress:
    """One bar for each stage of the round at hand; starting a stage again resets its bar."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = sys.stderr.isatty()
        self._bars = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=36),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._plain: dict[str, tuple[int, int]] = {}  # stage -> done, total

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._bars.stop()

    def start(self, stage: str, total: int) -> None:
        """A stage begins."""
        self._plain[stage] = (0, total)
        if not self._live:
            return
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))
        if total:
            self._tasks[stage] = self._bars.add_task(stage, total=total, note="")

    def advance(self, stage: str, count: int, note: str = "") -> None:
        """More is done; in a pipe, one line when the stage is complete."""
        done, total = self._plain.get(stage, (0, 0))
        self._plain[stage] = (done + count, total)
        if self._live and stage in self._tasks:
            self._bars.update(self._tasks[stage], advance=count, note=note)
        elif not self._live and count and done + count == total:
            self._console.print(f"{stage}: {total} done {note}".rstrip(), highlight=False)

    def say(self, line: str) -> None:
        """A line above the bars."""
        self._console.print(line, highlight=False)
