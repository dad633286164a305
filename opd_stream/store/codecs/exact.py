"""The `exact` codec: ids as uint32, log-probabilities as float16 or float32."""

from typing import Any

import numpy as np
import pyarrow as pa

from opd_stream.store.codecs.columns import (
    ScoreBlock,
    flat,
    flat_values,
    lengths_of,
    list_column,
    matrix_column,
    matrix_of,
    offsets_of,
    row_offsets,
)
from opd_stream.store.codecs.fidelity import Fidelity, measure
from opd_stream.types import ScoreBatch


def encode_exact(scores: ScoreBatch, *, dtype: str) -> tuple[dict[str, Any], Fidelity]:
    """Columns and what rounding to `dtype` lost."""
    offsets = offsets_of(lengths_of(scores.teacher_logprobs))
    ids_NK = flat(scores.teacher_top_ids, np.uint32)
    true_NK = flat(scores.teacher_top_logprobs, np.float32)
    tail_N = flat(scores.teacher_tail_logprobs, np.float32)
    forced_NF = flat(scores.teacher_forced_logprobs, dtype)
    stored_NK = true_NK.astype(dtype)
    columns = {
        "teacher_logprobs": list_column(flat(scores.teacher_logprobs, np.float32), offsets),
        "teacher_top_ids": matrix_column(ids_NK, offsets),
        "teacher_top_logprobs": matrix_column(stored_NK, offsets),
        "teacher_tail_logprobs": list_column(tail_N, offsets),
        "teacher_forced_logprobs": matrix_column(forced_NF, offsets),
    }
    lost_N = np.exp(tail_N.astype(np.float64))
    fidelity = measure(
        mass_N=1 - lost_N,
        lost_N=lost_N,
        true_E=true_NK.reshape(-1),
        stored_E=stored_NK.reshape(-1),
        bound=None,
    )
    return columns, fidelity


def decode_exact(batch: pa.RecordBatch) -> ScoreBlock:
    """The arrays of a record batch."""

    def values(name: str) -> np.ndarray:
        return flat_values(batch.column(name))

    def float32matrix_column(name: str) -> np.ndarray:
        return matrix_of(batch.column(name).flatten()).astype(np.float32, copy=False)

    return ScoreBlock(
        offsets=row_offsets(batch.column("teacher_logprobs")),
        refused=tuple(batch.column("refused").to_pylist()),
        teacher_logprobs=values("teacher_logprobs"),
        teacher_top_ids=matrix_of(batch.column("teacher_top_ids").flatten()),
        teacher_top_logprobs=float32matrix_column("teacher_top_logprobs"),
        teacher_tail_logprobs=values("teacher_tail_logprobs"),
        teacher_forced_logprobs=float32matrix_column("teacher_forced_logprobs"),
    )
