"""What moves on stderr while that is a terminal, and lines of results beside it."""

import sys
from collections.abc import Iterable
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from pipeline.log import shows_bars


class Live:
    """Bars or clocks, shown between entering and leaving where somebody can see them."""

    def __init__(self, *columns: str | ProgressColumn) -> None:
        self._live = shows_bars()
        self._bars = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # results stay apart from what is said about them
        )

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live:
            self._bars.stop()

    def write(self, lines: Iterable[str]) -> None:
        """Lines of the command's result, on stdout, above what moves."""
        if self._live:
            self._bars.stop()
        for line in lines:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if self._live:
            self._bars.start()
