"""Tables of results, which fit: where the terminal is narrow, they leave out what matters least."""

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Self

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pipeline.console import one_line

PIPE_COLUMNS = 140  # of a table that goes to no terminal
_FOLDED = 24  # columns that a name has at least, if it has as many characters
_ENOUGH = 10_000  # columns in which every table fits


class ResultTable(Table):
    """A table whose cells are what they say: nothing of data is marked up or moves the cursor.

    `drops` are the headers of the columns that may be left out, the first one first.
    """

    drops: Sequence[str] = ()

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """A row; text is shown as it is, in one line."""
        shown = (Text(one_line(each)) if isinstance(each, str) else each for each in cells)
        super().add_row(*shown, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, and a line on the columns that it leaves out."""
        left_out = list[str]()
        fitting = self
        for name in self.drops:
            wide = options.update(width=_ENOUGH, max_width=_ENOUGH)
            if fitting._least(console, wide) <= options.max_width:
                break
            fitting = fitting._without(name)
            cells = [cell for each in self.columns if each.header == name for cell in each.cells]
            left_out += [" ".join(name.split())] * any(map(str, cells))
        yield from Table.__rich_console__(fitting, console, options)
        if left_out:
            yield Text(f"left out at this width: {', '.join(left_out)}", style="dim")

    def _least(self, console: Console, wide: ConsoleOptions) -> int:
        """Columns of the terminal that it takes with its long names folded."""
        names = [each for each in self.columns if not each.no_wrap]
        widths = (max((cell_len(str(cell)) for cell in each.cells), default=0) for each in names)
        folded = sum(max(0, width - _FOLDED) for width in widths)
        return Measurement.get(console, wide, self).maximum - folded

    def _without(self, header: str) -> Self:
        fewer = copy.copy(self)
        fewer.columns = [copy.copy(each) for each in self.columns if each.header != header]
        for index, column in enumerate(fewer.columns):
            column._index = index
        return fewer


def result_table(
    columns: Iterable[str],
    *,
    left: Collection[str] = (),
    drops: Sequence[str] = (),
    folds: Collection[str] = (),
) -> ResultTable:
    """An empty table of numbers.

    Args:
        columns: their headers.
        left: those that hold words.
        drops: those that may be left out where it is narrow, the first one first.
        folds: those whose cells may take several lines.
    """
    table = ResultTable(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.drops = drops
    for name in columns:
        justify = "left" if name in left else "right"
        is_one_line = name not in folds
        table.add_column(
            name, justify=justify, no_wrap=is_one_line, overflow="fold", vertical="bottom"
        )
    return table
