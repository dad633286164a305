"""Arrow schemas of the shards, and the way between them and the batches of `types.py`.

One row is one rollout. The scores shard of a unit has the same rows in the same order as its
rollouts shard. Rows are ragged lists; a top-k entry is a fixed-size list of K.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("answer", pa.string()),
    ]
)

ROLLOUTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
    ]
)


def scores_schema(top_k: int, forced: int) -> pa.Schema:
    """The scores schema for K = `top_k` candidates and F = `forced` ids (no column for F = 0)."""
    columns = [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("teacher_logprobs", pa.list_(pa.float32())),
        ("teacher_top_ids", pa.list_(pa.list_(pa.int32(), top_k))),
        ("teacher_top_logprobs", pa.list_(pa.list_(pa.float16(), top_k))),
        ("teacher_tail_logprobs", pa.list_(pa.float32())),
        ("refused", pa.string()),
    ]
    if forced:
        columns.append(("teacher_forced_logprobs", pa.list_(pa.list_(pa.float16(), forced))))
    return pa.schema(columns)


def rollouts_table(batch: RolloutBatch) -> pa.Table:
    """A rollout batch as one table."""
    columns = [
        pa.array(batch.prompt_id, pa.string()),
        pa.array(batch.sample_index, pa.int32()),
        ragged(batch.prompt_ids, pa.int32()),
        ragged(batch.completion_ids, pa.int32()),
        ragged(batch.behavior_logprobs, pa.float32()),
        pa.array(batch.finish_reason, pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=ROLLOUTS)


def rollouts_batch(table: pa.Table) -> RolloutBatch:
    """The rollout batch of a table."""
    return RolloutBatch(
        prompt_id=tuple(table["prompt_id"].to_pylist()),
        sample_index=table["sample_index"].to_numpy(),
        prompt_ids=rows_of(table["prompt_ids"]),
        completion_ids=rows_of(table["completion_ids"]),
        behavior_logprobs=rows_of(table["behavior_logprobs"]),
        finish_reason=tuple(table["finish_reason"].to_pylist()),
    )


def scores_table(batch: ScoreBatch, rollouts: RolloutBatch, *, top_k: int, forced: int) -> pa.Table:
    """A score batch as one table; its rows are those of `rollouts`."""
    half = np.float16
    columns = [
        pa.array(rollouts.prompt_id, pa.string()),
        pa.array(rollouts.sample_index, pa.int32()),
        ragged(batch.teacher_logprobs, pa.float32()),
        ragged(batch.teacher_top_ids, pa.int32(), width=top_k),
        ragged(
            [rows.astype(half) for rows in batch.teacher_top_logprobs], pa.float16(), width=top_k
        ),
        ragged(batch.teacher_tail_logprobs, pa.float32()),
        pa.array([batch.refused.get(row) for row in range(len(batch))], pa.string()),
    ]
    if forced:
        rows = [row.astype(half) for row in batch.teacher_forced_logprobs]
        columns.append(ragged(rows, pa.float16(), width=forced))
    return pa.Table.from_arrays(columns, schema=scores_schema(top_k, forced))


def prompts_batch(table: pa.Table) -> PromptBatch:
    """The engine's view of a prompts table."""
    return PromptBatch(
        prompt_id=tuple(table["prompt_id"].to_pylist()), prompt_ids=rows_of(table["prompt_ids"])
    )


def ragged(
    rows: tuple[NDArray[Any], ...] | list[NDArray[Any]],
    value_type: pa.DataType,
    *,
    width: int | None = None,
) -> pa.Array:
    """Rows of shape [T] (or [T, width]) as one list array (or list of fixed-size lists)."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate([row.reshape(-1) for row in rows]) if rows else np.zeros(0)
    values = pa.array(flat.astype(value_type.to_pandas_dtype(), copy=False), value_type)
    if width is not None:
        values = pa.FixedSizeListArray.from_arrays(values, width)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def rows_of(column: pa.ChunkedArray) -> tuple[NDArray[Any], ...]:
    """The rows of a list column as numpy views of shape [T] or [T, width]."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    offsets = array.offsets.to_numpy()
    values, width = array.values, None
    if pa.types.is_fixed_size_list(values.type):
        width = values.type.list_size
        values = values.values
    flat = values.to_numpy(zero_copy_only=False)
    if width is not None:
        flat = flat.reshape(-1, width)
    return tuple(flat[start:end] for start, end in pairwise(offsets))
