"""List columns: one list a rollout, any number of entries a token.

Shapes: R rows, N tokens, E entries (E = N for one value a token, N * K for K of them).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def lengths_of(rows: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Tokens of each row [R]."""
    return np.array([len(row) for row in rows], np.int64)


def flat(rows: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    """All rows behind one another, [N] or [N, K]; [0, 0] without rows."""
    if not rows:
        return np.zeros((0, 0), dtype)
    return np.concatenate(rows).astype(dtype, copy=False)


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each row starts, and the end [R + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def list_column(values: NDArray[Any], offsets: NDArray[np.int64]) -> pa.Array:
    """Flat values [E] as one list a row."""
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values.reshape(-1))
    )


def matrix_column(values_NK: NDArray[Any], offsets: NDArray[np.int64]) -> pa.Array:
    """Values as list<fixed_size_list<T, K>>, one outer list a row; K may be 0."""
    width, kind = (
        values_NK.shape[1] if values_NK.ndim == 2 else 0,
        pa.from_numpy_dtype(values_NK.dtype),
    )
    if width:
        items = pa.FixedSizeListArray.from_arrays(pa.array(values_NK.reshape(-1), kind), width)
    else:
        items = pa.array([[]] * len(values_NK), pa.list_(kind, 0))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), items)


def flat_values(column: pa.Array) -> NDArray[Any]:
    """The values of a list column [E]."""
    return column.flatten().to_numpy(zero_copy_only=False)


def matrix_of(items: pa.FixedSizeListArray) -> NDArray[Any]:
    """Lists of K values as [N, K]."""
    width = items.type.list_size
    if width == 0:
        return np.zeros((len(items), 0), items.type.value_type.to_pandas_dtype())
    return items.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def row_offsets(column: pa.Array) -> NDArray[np.int64]:
    """Where each row's values start in `flat_values`, and the end [R + 1]."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]
