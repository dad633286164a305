"""Rows of Parquet files as people have them, expanded only as far as their own sizes allow."""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_stream.errors import UserError, shortened
from opd_stream.store.codecs.laws import BrokenLaw, check_expansion
from opd_stream.store.lines import opened

ROWS_AT_ONCE = 256
_UNREADABLE = (  # what Arrow and the making of Python's values raise
    *(pa.ArrowException, OSError, BrokenLaw),
    *(OverflowError, KeyError, UnicodeDecodeError),
)


def parquet_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file; `columns` are those that are wanted, if there (None: all).

    Raises:
        UserError: it cannot be read, claims to hold far more than its bytes, has two columns of one
            name, or holds a value that Python has not.
    """
    with opened(path) as source:
        try:
            file: Any = pq.ParquetFile(source)  # not typed as a whole
            names: list[str] = file.schema_arrow.names
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            if twice is not None:
                raise UserError(
                    f"{path} has two columns {shortened(twice)}; expected each once; rename one of "
                    "them"
                )
            _check_sizes(file.metadata)
            wanted = None if columns is None else [name for name in names if name in columns]
            batches = file.iter_batches(ROWS_AT_ONCE, columns=wanted)
            while (batch := next(batches, None)) is not None:
                rows = batch.to_pylist()
                yield from rows
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error


def parquet_length(path: Path) -> int:
    """How many rows a Parquet file says that it has.

    Raises:
        UserError: it cannot be read.
    """
    with opened(path) as source:
        try:
            return pq.ParquetFile(source).metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path} is not a whole Parquet file ({reason}); copy or write it again")


def _check_sizes(metadata: Any) -> None:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            claimed = max(column.total_uncompressed_size, 4 * column.num_values)
            check_expansion(column.total_compressed_size, claimed, column.path_in_schema)
