"""Arrow schemas of prompts and rollouts, and the way between them and the batches of `types.py`.

One row is one rollout; per-token fields are lists. The scores shard of a unit has the same rows in
the same order as its rollouts shard; its columns are the codecs' affair.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.store.codecs.columns import (
    flat,
    lengths_of,
    list_column,
    matrix_column,
    matrix_of,
    offsets_of,
)
from opd_stream.types import PromptBatch, RolloutBatch

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_ids", pa.list_(pa.uint32())),
        ("text", pa.string()),
        ("answer", pa.string()),
    ]
)

ROLLOUTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt_ids", pa.list_(pa.uint32())),
        ("completion_ids", pa.list_(pa.uint32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
    ]
)


def rollouts_table(batch: RolloutBatch) -> pa.Table:
    """A rollout batch as one table."""
    columns = {
        "prompt_id": pa.array(batch.prompt_id, pa.string()),
        "sample_index": pa.array(batch.sample_index, pa.int32()),
        "prompt_ids": id_lists(batch.prompt_ids),
        "completion_ids": id_lists(batch.completion_ids),
        "behavior_logprobs": _lists(batch.behavior_logprobs, np.float32),
        "finish_reason": pa.array(batch.finish_reason, pa.string()),
    }
    if batch.loss_mask is not None:
        columns["loss_mask"] = _lists(batch.loss_mask, np.bool_)
    if batch.candidate_ids is not None and batch.candidate_behavior_logprobs is not None:
        columns["candidate_ids"] = _matrices(batch.candidate_ids, np.uint32)
        columns["candidate_behavior_logprobs"] = _matrices(
            batch.candidate_behavior_logprobs, np.float32
        )
    return pa.table(columns)


def rollouts_batch(table: pa.Table) -> RolloutBatch:
    """The rollout batch of a table."""
    names = set(table.column_names)
    has_candidates = "candidate_ids" in names
    return RolloutBatch(
        prompt_id=tuple(table["prompt_id"].to_pylist()),
        sample_index=table["sample_index"].to_numpy(),
        prompt_ids=rows_of(table["prompt_ids"], np.int64),
        completion_ids=rows_of(table["completion_ids"], np.int64),
        behavior_logprobs=rows_of(table["behavior_logprobs"], np.float32),
        finish_reason=tuple(table["finish_reason"].to_pylist()),
        loss_mask=rows_of(table["loss_mask"], np.bool_) if "loss_mask" in names else None,
        candidate_ids=rows_of(table["candidate_ids"], np.int64) if has_candidates else None,
        candidate_behavior_logprobs=(
            rows_of(table["candidate_behavior_logprobs"], np.float32) if has_candidates else None
        ),
    )


def prompts_batch(table: pa.Table) -> PromptBatch:
    """The engine's view of a prompts table."""
    return PromptBatch(
        prompt_id=tuple(table["prompt_id"].to_pylist()),
        prompt_ids=rows_of(table["prompt_ids"], np.int64),
    )


def id_lists(rows: Sequence[NDArray[Any]]) -> pa.Array:
    """Token ids of each row as a list<uint32> column.

    Raises:
        ValueError: an id is negative or above 2^32 - 1.
    """
    ids = flat(rows, np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**32):
        raise ValueError(f"a token id is outside 0 to 2^32 - 1: {ids.min()} to {ids.max()}")
    return list_column(ids.astype(np.uint32), offsets_of(lengths_of(rows)))


def rows_of(column: pa.ChunkedArray, dtype: Any) -> tuple[NDArray[Any], ...]:
    """The rows of a list column as arrays of shape [T], or [T, M] for lists of lists."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    values = array.values
    if pa.types.is_fixed_size_list(values.type):
        values = matrix_of(values)
    else:
        values = values.to_numpy(zero_copy_only=False)
    values = values.astype(dtype, copy=False)
    return tuple(values[start:end] for start, end in pairwise(array.offsets.to_numpy()))


def _lists(rows: Sequence[NDArray[Any]], dtype: Any) -> pa.Array:
    return list_column(flat(rows, dtype), offsets_of(lengths_of(rows)))


def _matrices(rows: Sequence[NDArray[Any]], dtype: Any) -> pa.Array:
    return matrix_column(flat(rows, dtype), offsets_of(lengths_of(rows)))
