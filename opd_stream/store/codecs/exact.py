"""The `exact` codec: ids as uint32, log-probabilities as float16 or float32."""

from typing import Any

import numpy as np
import pyarrow as pa

from opd_stream.store.codecs.columns import (
    ScoreBlock,
    flat,
    flat_values,
    lengths_of,
    list_rows,
    matrix_column,
    matrix_rows,
    matrix_values,
    offsets_of,
    row_offsets,
)
from opd_stream.store.codecs.fidelity import Fidelity, measure
from opd_stream.store.codecs.laws import Column
from opd_stream.types import ScoreBatch

COLUMNS = {
    "teacher_logprobs": Column(types=("float",)),
    "teacher_top_ids": Column(types=("uint32",), is_matrix=True),
    "teacher_top_logprobs": Column(types=("halffloat", "float"), is_matrix=True),
    "teacher_tail_logprobs": Column(types=("float",)),
    "teacher_forced_logprobs": Column(types=("halffloat", "float"), is_matrix=True),
}


def encode_exact(scores: ScoreBatch, *, dtype: str) -> tuple[dict[str, Any], Fidelity]:
    """Columns and what rounding to `dtype` lost."""
    true_NK = flat(scores.teacher_top_logprobs, np.float32)
    stored_NK = true_NK.astype(dtype)
    tail_N = flat(scores.teacher_tail_logprobs, np.float32)
    columns = {
        "teacher_logprobs": list_rows(scores.teacher_logprobs, np.float32),
        "teacher_top_ids": matrix_rows(scores.teacher_top_ids, np.uint32),
        "teacher_top_logprobs": matrix_column(
            stored_NK, offsets_of(lengths_of(scores.teacher_logprobs))
        ),
        "teacher_tail_logprobs": list_rows(scores.teacher_tail_logprobs, np.float32),
        "teacher_forced_logprobs": matrix_rows(scores.teacher_forced_logprobs, dtype),
    }
    lost_N = np.exp(tail_N.astype(np.float64))
    fidelity = measure(
        mass_N=1 - lost_N,
        lost_N=lost_N,
        true_E=true_NK.reshape(-1),
        stored_E=stored_NK.reshape(-1),
        stored_tail_N=tail_N,
        bound=None,
    )
    return columns, fidelity


def decode_exact(batch: pa.RecordBatch) -> ScoreBlock:
    """The arrays of a record batch."""
    top = matrix_values(batch, "teacher_top_logprobs")
    forced = matrix_values(batch, "teacher_forced_logprobs")
    return ScoreBlock(
        offsets=row_offsets(batch.column("teacher_logprobs")),
        refused=tuple(batch.column("refused").to_pylist()),
        teacher_logprobs=flat_values(batch.column("teacher_logprobs")),
        teacher_top_ids=matrix_values(batch, "teacher_top_ids"),
        teacher_top_logprobs=top.astype(np.float32, copy=False),
        teacher_tail_logprobs=flat_values(batch.column("teacher_tail_logprobs")),
        teacher_forced_logprobs=forced.astype(np.float32, copy=False),
    )
