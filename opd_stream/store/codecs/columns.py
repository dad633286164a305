"""What all codecs share: the decoded block, list columns, and integers as byte planes.

Shapes: R rows, N tokens, E entries (E = N for one value a token, N * K for K of them). Byte planes
are all lowest bytes, then all second bytes, ...: a general compressor finds in a plane of high
bytes what it cannot see between the noise of low ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.types import ScoreBatch

if TYPE_CHECKING:
    from opd_stream.store.codecs.hidden import StoredStates


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBlock:
    """R rollouts, N completion tokens in all, K the most candidates of a position, F forced ids,
    M ids of the student.

    Tokens of row r stand at `offsets[r] : offsets[r + 1]`. A position with fewer than K candidates
    is filled with id 0 and log-probability -inf.
    """

    offsets: NDArray[np.int64]  # [R + 1]
    refused: tuple[str | None, ...]  # R
    teacher_logprobs: NDArray[np.float32]  # [N]
    teacher_top_ids: NDArray[np.uint32]  # [N, K]
    teacher_top_logprobs: NDArray[np.float32]  # [N, K]
    teacher_tail_logprobs: NDArray[np.float32]  # [N]
    teacher_forced_logprobs: NDArray[np.float32]  # [N, F]
    candidate_teacher_logprobs: NDArray[np.float32] | None = None  # [N, M], the student's ids
    teacher_states: "tuple[StoredStates, ...] | None" = None  # R, of codec hidden
    chunk_ids: NDArray[np.int32] | None = None  # [N], of scores with alignment
    same_tokens: NDArray[np.bool_] | None = None  # [N], the same


def block_of(scores: ScoreBatch) -> ScoreBlock:
    """Rows of scores behind one another, without hidden states."""

    def values(name: str, dtype: Any) -> NDArray[Any]:
        return flat(getattr(scores, name), dtype)

    own, chunks = scores.candidate_teacher_logprobs, scores.chunk_ids
    return ScoreBlock(
        offsets=offsets_of(lengths_of(scores.teacher_logprobs)),
        refused=tuple(scores.refused.get(row) for row in range(len(scores))),
        teacher_logprobs=values("teacher_logprobs", np.float32),
        teacher_top_ids=values("teacher_top_ids", np.uint32),
        teacher_top_logprobs=values("teacher_top_logprobs", np.float32),
        teacher_tail_logprobs=values("teacher_tail_logprobs", np.float32),
        teacher_forced_logprobs=values("teacher_forced_logprobs", np.float32),
        candidate_teacher_logprobs=None if own is None else flat(own, np.float32),
        chunk_ids=None if chunks is None else flat(chunks, np.int32),
    )


def is_among(ids_NK: NDArray[np.integer[Any]], of_NS: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Whether each id is one of those of its token, bool [N, K]."""
    token_N1 = np.arange(len(ids_NK), dtype=np.int64)[:, None] << 32
    return np.isin(ids_NK.astype(np.int64) + token_N1, of_NS.astype(np.int64) + token_N1)


def lengths_of(rows: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Tokens of each row [R]."""
    return np.array([len(row) for row in rows], np.int64)


def flat(rows: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    """All rows behind one another, [N] or [N, K]; [0, 0] without rows."""
    if not rows:
        return np.zeros((0, 0), dtype)
    with np.errstate(over="ignore"):  # what lies below a float16 is -inf: of no probability
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


def list_rows(rows: Sequence[NDArray[Any]], dtype: Any) -> pa.Array:
    """Rows of values as a list column."""
    return list_column(flat(rows, dtype), offsets_of(lengths_of(rows)))


def matrix_rows(rows: Sequence[NDArray[Any]], dtype: Any) -> pa.Array:
    """Rows of matrices as a list<fixed_size_list> column."""
    return matrix_column(flat(rows, dtype), offsets_of(lengths_of(rows)))


def matrix_values(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    """The values of a list<fixed_size_list> column [N, K]."""
    return matrix_of(batch.column(name).flatten())


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


def plane_columns(
    name: str, values: NDArray[np.integer[Any]], offsets: NDArray[np.int64]
) -> dict[str, pa.Array]:
    """Non-negative integers below 2^32 [E] as list<uint8> columns NAME_0, NAME_1, ..."""
    largest = int(values.max()) if len(values) else 0
    planes = max(1, -(-largest.bit_length() // 8))
    bytes_E4 = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return {
        f"{name}_{plane}": list_column(np.ascontiguousarray(bytes_E4[:, plane]), offsets)
        for plane in range(planes)
    }


def plane_values(name: str, batch: pa.RecordBatch) -> NDArray[np.uint32]:
    """The integers of the planes [E]."""
    return joined(_planes(name, batch))


def joined(planes: list[NDArray[np.uint8]]) -> NDArray[np.uint32]:
    """Planes, lowest first, as integers."""
    if len(planes) == 1:
        return planes[0].astype(np.uint32)
    whole = np.zeros((len(planes[0]), 2 if len(planes) == 2 else 4), np.uint8)
    for number, plane in enumerate(planes):
        whole[:, number] = plane
    return (
        whole.view("<u2" if len(planes) == 2 else "<u4").reshape(-1).astype(np.uint32, copy=False)
    )


def _planes(name: str, batch: pa.RecordBatch) -> list[NDArray[np.uint8]]:
    columns: Mapping[str, int] = {field: place for place, field in enumerate(batch.schema.names)}
    found: list[NDArray[np.uint8]] = []
    while (field := f"{name}_{len(found)}") in columns:
        found.append(flat_values(batch.column(columns[field])))
    return found


def unrounded(values: NDArray[np.float32]) -> NDArray[np.generic]:
    """The same numbers, in two bytes where all have room: bfloat16 bits (uint16), or float16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if not (bits & 0xFFFF).any():
        return (bits >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else values


def widened(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """The numbers that `unrounded` stored."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
