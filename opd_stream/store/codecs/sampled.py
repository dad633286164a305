"""The `sampled` codec: ids drawn from the teacher, and how often (Sparse Logit Sampling, RS-KD).

With N draws and counts c_v the estimate q~_v = c_v / N is unbiased for q_v, which a renormalised
top-K is not. It comes back as log q~ with an empty tail: right under an expectation over the
teacher (forward KL), of no use under one over the student.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from opd_stream.store.codecs.columns import (
    ScoreBlock,
    flat,
    flat_values,
    lengths_of,
    list_column,
    list_rows,
    matrix_rows,
    matrix_values,
    offsets_of,
    plane_columns,
    plane_values,
    row_offsets,
)
from opd_stream.store.codecs.fidelity import Fidelity, measure
from opd_stream.store.codecs.laws import MOST_CANDIDATES, Column
from opd_stream.types import ScoreBatch

COLUMNS = {
    "teacher_logprobs": Column(types=("float",)),
    "draw_unique": Column(types=("uint16",), most=MOST_CANDIDATES),
    "draw_ids": Column(types=("uint8",), entries="draw_unique", is_planes=True),
    "draw_counts": Column(types=("uint8",), entries="draw_unique", is_planes=True),
    "teacher_forced_logprobs": Column(types=("halffloat",), is_matrix=True),
}


def encode_sampled(scores: ScoreBatch, *, draws: int) -> tuple[dict[str, Any], Fidelity]:
    """Columns of (id, count) pairs; `teacher_top_logprobs` holds log(count / draws), -inf = none.

    Raises:
        ValueError: the counts of a position do not sum to `draws`.
    """
    offsets = offsets_of(lengths_of(scores.teacher_logprobs))
    tokens = int(offsets[-1])
    ids_NK = flat(scores.teacher_top_ids, np.uint32)
    logprobs_NK = flat(scores.teacher_top_logprobs, np.float64)
    counts_NK = np.rint(np.exp(logprobs_NK) * draws).astype(np.uint32)
    if tokens and not (counts_NK.sum(1) == draws).all():
        raise ValueError(f"the counts of a position do not sum to its {draws} draws")
    kept_NK = counts_NK > 0
    unique_N = kept_NK.sum(1)
    entry_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(unique_N)])[offsets]
    columns = {
        "teacher_logprobs": list_rows(scores.teacher_logprobs, np.float32),
        "draw_unique": list_column(unique_N.astype(np.uint16), offsets),
        **plane_columns("draw_ids", ids_NK[kept_NK], entry_offsets),
        **plane_columns("draw_counts", counts_NK[kept_NK], entry_offsets),
        "teacher_forced_logprobs": matrix_rows(scores.teacher_forced_logprobs, np.float16),
    }
    ones_N = np.ones(tokens)
    nothing = np.zeros(int(entry_offsets[-1]), np.float32)
    return columns, measure(
        mass_N=ones_N,
        lost_N=ones_N * 0,
        true_E=nothing,
        stored_E=nothing,
        stored_tail_N=ones_N * 0,
        bound=None,
    )


def decode_sampled(batch: pa.RecordBatch, *, draws: int) -> ScoreBlock:
    """The arrays of a record batch; K is the most distinct ids of a position."""
    unique_N = flat_values(batch.column("draw_unique"))
    tokens, most = len(unique_N), int(unique_N.max()) if len(unique_N) else 0
    kept_NK = np.arange(most) < unique_N[:, None]
    ids_NK = np.zeros((tokens, most), np.uint32)
    logprobs_NK = np.full((tokens, most), -np.inf, np.float32)
    ids_NK[kept_NK] = plane_values("draw_ids", batch)
    logprobs_NK[kept_NK] = np.log(plane_values("draw_counts", batch) / draws)
    return ScoreBlock(
        offsets=row_offsets(batch.column("teacher_logprobs")),
        refused=tuple(batch.column("refused").to_pylist()),
        teacher_logprobs=flat_values(batch.column("teacher_logprobs")),
        teacher_top_ids=ids_NK,
        teacher_top_logprobs=logprobs_NK,
        teacher_tail_logprobs=np.full(tokens, -np.inf, np.float32),
        teacher_forced_logprobs=matrix_values(batch, "teacher_forced_logprobs").astype(np.float32),
    )
