"""The `compact` codec: error-bounded and as wide as the mass asks.

- Per position as many candidates as hold `mass` (never fewer than `min_k`, never more than were
  scored, none of probability 0), and the student's own; what is left out is added to the exact
  tail before anything is rounded.
- A log-probability is a number of steps of 1.998 * max_error below 0; 65,535 steps mean -inf. Down
  the ranks only the difference to the rank before is kept: small numbers, which compress.
- An id is its place in the shard's dictionary, which lists ids by how often the shard has them, so
  high bytes are mostly 0.
- All of it as byte planes, token after token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.store.codecs.columns import (
    ScoreBlock,
    flat,
    flat_values,
    is_among,
    joined,
    lengths_of,
    list_column,
    offsets_of,
    plane_columns,
    plane_values,
    row_offsets,
)
from opd_stream.store.codecs.fidelity import Fidelity, measure
from opd_stream.store.codecs.laws import (
    MOST_CANDIDATES,
    BrokenLaw,
    Column,
    check_expansion,
)
from opd_stream.types import ScoreBatch

INFINITE_STEPS = 65_535
STEP_PER_ERROR = 1.998  # a thousandth of the bound is left for float32
DICTIONARY_KEY = b"dictionary"
LARGEST_COUNTED_ID = 2**24  # ids above are sorted instead of counted in an array


COLUMNS = {
    "top_counts": Column(types=("uint16",), most=MOST_CANDIDATES),
    "top_codes": Column(types=("uint8",), entries="top_counts", is_planes=True),
    "top_steps": Column(types=("uint8",), entries="top_counts", is_planes=True),
    "sampled_steps": Column(types=("uint8",), is_planes=True),
    "tail_steps": Column(types=("uint8",), is_planes=True),
    "forced_steps": Column(types=("uint8",), entries="multiple", is_planes=True),
}


def encode_compact(
    scores: ScoreBatch,
    *,
    max_error: float,
    mass: float | None,
    min_k: int,
    student_top_ids: Sequence[NDArray[np.integer[Any]]] | None = None,
) -> tuple[dict[str, Any], dict[bytes, bytes], Fidelity]:
    """Columns, schema metadata and fidelity.

    Raises:
        ValueError: the error bound cannot be held, or the candidates are not in rank order.
    """
    step = STEP_PER_ERROR * max_error
    lengths = lengths_of(scores.teacher_logprobs)
    offsets = offsets_of(lengths)
    ids_NK = flat(scores.teacher_top_ids, np.uint32)
    true_NK = flat(scores.teacher_top_logprobs, np.float32)
    sampled_N = flat(scores.teacher_logprobs, np.float32)
    tail_N = flat(scores.teacher_tail_logprobs, np.float64)
    forced_NF = flat(scores.teacher_forced_logprobs, np.float32)
    _check_ranks(true_NK)
    own_NK = None if mass is None else _own(ids_NK, student_top_ids, lengths)
    kept_NK, mass_N, lost_N = _kept(true_NK, tail_N, mass=mass, min_k=min_k, own_NK=own_NK)
    counts_N = kept_NK.sum(1)
    entry_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_N)])[offsets]
    whole = bool((counts_N == kept_NK.shape[1]).all())
    if own_NK is not None:  # what stays of a row stands together: a step is to the one before
        order_NK = np.argsort(~kept_NK, axis=1, kind="stable")
        ids_NK, true_NK = _in_order(ids_NK, order_NK), _in_order(true_NK, order_NK)
        kept_NK = _in_order(kept_NK, order_NK)
    steps_NK = _steps(true_NK, step)
    differences_NK = np.diff(steps_NK, axis=1, prepend=np.int32(0))

    def stored(values_NK: NDArray[Any]) -> NDArray[Any]:
        return values_NK.reshape(-1) if whole else values_NK[kept_NK]

    ids, true, steps, differences = map(stored, (ids_NK, true_NK, steps_NK, differences_NK))
    dictionary, codes = _coded(ids)
    with np.errstate(divide="ignore"):
        tail_steps = _steps(np.log(lost_N), step)
    columns = {
        "top_counts": list_column(counts_N.astype(np.uint16), offsets),
        **plane_columns("top_codes", codes, entry_offsets),
        **plane_columns("top_steps", differences, entry_offsets),
        **plane_columns("sampled_steps", _steps(sampled_N, step), offsets),
        **plane_columns("tail_steps", tail_steps, offsets),
        **plane_columns(
            "forced_steps", _steps(forced_NF.reshape(-1), step), offsets * forced_NF.shape[1]
        ),
    }
    fidelity = measure(
        mass_N=mass_N,
        lost_N=lost_N,
        true_E=true,
        stored_E=_logprobs(steps, max_error),
        stored_tail_N=_logprobs(tail_steps, max_error),
        bound=max_error,
    )
    return columns, {DICTIONARY_KEY: packed_dictionary(dictionary)}, fidelity


def decode_compact(batch: pa.RecordBatch, *, max_error: float) -> ScoreBlock:
    """The arrays of a record batch."""
    counts_column = batch.column("top_counts")
    counts_N = flat_values(counts_column)
    tokens = len(counts_N)
    metadata: dict[bytes, bytes] = batch.schema.metadata or {}
    dictionary = unpacked_dictionary(metadata[DICTIONARY_KEY])
    codes = plane_values("top_codes", batch)
    if len(codes) and int(codes.max()) >= len(dictionary):
        raise BrokenLaw(None, f"top_codes is {codes.max()}; expected below {len(dictionary)}")
    ids = dictionary[codes]
    differences = plane_values("top_steps", batch).view(np.int32)
    most = int(counts_N.max()) if tokens else 0
    forced = len(flat_values(batch.column("forced_steps_0"))) // max(1, tokens)
    if len(ids) == tokens * most:
        ids_NK = ids.reshape(tokens, most)
        logprobs_NK = _logprobs(differences.reshape(tokens, most).cumsum(1, np.int32), max_error)
    else:
        kept_NK = np.arange(most) < counts_N[:, None]
        ids_NK, differences_NK = (
            np.zeros((tokens, most), np.uint32),
            np.zeros((tokens, most), np.int32),
        )
        ids_NK[kept_NK], differences_NK[kept_NK] = ids, differences
        logprobs_NK = _logprobs(differences_NK.cumsum(1, np.int32), max_error)
        logprobs_NK[~kept_NK] = -np.inf

    def single(name: str) -> NDArray[np.float32]:
        return _logprobs(plane_values(name, batch).view(np.int32), max_error)

    return ScoreBlock(
        offsets=row_offsets(counts_column),
        refused=tuple(batch.column("refused").to_pylist()),
        teacher_logprobs=single("sampled_steps"),
        teacher_top_ids=ids_NK,
        teacher_top_logprobs=logprobs_NK,
        teacher_tail_logprobs=single("tail_steps"),
        teacher_forced_logprobs=single("forced_steps").reshape(tokens, forced),
    )


def packed_dictionary(ids: NDArray[np.uint32]) -> bytes:
    """Number of ids (8 bytes, little endian), then their four byte planes, zstd."""
    planes = ids.astype("<u4").view(np.uint8).reshape(-1, 4).T.tobytes()
    return len(ids).to_bytes(8, "little") + pa.Codec("zstd", 3).compress(planes, asbytes=True)


def unpacked_dictionary(data: bytes) -> NDArray[np.uint32]:
    """The ids of a shard, most frequent first."""
    size = int.from_bytes(data[:8], "little")
    check_expansion(len(data), 4 * size, "a dictionary")
    planes = pa.Codec("zstd").decompress(data[8:], decompressed_size=4 * size, asbytes=True)
    return joined(list(np.frombuffer(planes, np.uint8).reshape(4, size)))


def _kept(
    true_NK: NDArray[np.float32],
    tail_N: NDArray[np.float64],
    *,
    mass: float | None,
    min_k: int,
    own_NK: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Which candidates are stored, their mass, and the exact mass outside them."""
    top_k = true_NK.shape[1]
    probabilities_NK = np.exp(true_NK, dtype=np.float64)
    tail_mass_N = np.exp(tail_N)
    possible_NK = true_NK > -np.inf
    if mass is None:
        return possible_NK, 1 - tail_mass_N, tail_mass_N
    needed_N: NDArray[np.int64] = (probabilities_NK.cumsum(1) < mass).sum(1) + 1
    needed_N = np.minimum(np.maximum(needed_N, min_k), top_k)
    kept_NK = np.less(np.arange(top_k, dtype=np.int64), needed_N.reshape(-1, 1))
    kept_NK = (kept_NK if own_NK is None else kept_NK | own_NK) & possible_NK
    lost_N = tail_mass_N + np.where(kept_NK, 0, probabilities_NK).sum(1)
    return kept_NK, 1 - lost_N, lost_N


def _in_order(values_NK: NDArray[Any], order_NK: NDArray[np.int64]) -> NDArray[Any]:
    return np.take_along_axis(values_NK, order_NK, axis=1)


def _own(
    ids_NK: NDArray[np.uint32],
    student_top_ids: Sequence[NDArray[np.integer[Any]]] | None,
    lengths: NDArray[np.int64],
) -> NDArray[np.bool_] | None:
    """Which candidates are the student's; None: it has none. A refused row has no tokens."""
    if student_top_ids is None:
        return None
    pairs = zip(student_top_ids, lengths.tolist(), strict=True)
    return is_among(ids_NK, flat([row[:length] for row, length in pairs], np.int64))


def _steps(logprobs: NDArray[np.floating[Any]], step: float) -> NDArray[np.int32]:
    """Number of steps below 0; INFINITE_STEPS for -inf."""
    finite = np.isfinite(logprobs)
    every = bool(finite.all())
    steps = np.rint((logprobs if every else np.where(finite, logprobs, 0)) * (-1 / step))
    if steps.size and steps.max() >= INFINITE_STEPS:
        lowest = float(logprobs[finite].min())
        raise ValueError(
            f"log-probability {lowest:g} is below {-INFINITE_STEPS * step:g}, the lowest that "
            "this max_error can store"
        )
    steps = np.maximum(steps, 0)  # a sum rounded to just above 1
    return (steps if every else np.where(finite, steps, INFINITE_STEPS)).astype(np.int32)


def _logprobs(steps: NDArray[np.int32], max_error: float) -> NDArray[np.float32]:
    """The log-probabilities of numbers of steps."""
    logprobs = steps.astype(np.float32) * np.float32(-STEP_PER_ERROR * max_error)
    if steps.size and steps.max() >= INFINITE_STEPS:
        logprobs[steps >= INFINITE_STEPS] = -np.inf
    return logprobs


def _coded(ids: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The dictionary, most frequent id first (ties: lower id first), and each id's place in it."""
    if len(ids) and int(ids.max()) > LARGEST_COUNTED_ID:
        known, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        places = np.empty(len(known), np.uint32)
        places[order] = np.arange(len(known), dtype=np.uint32)
        return known[order], places[inverse]
    counts = np.bincount(ids)
    known = np.flatnonzero(counts)
    dictionary = known[np.argsort(-counts[known], kind="stable")].astype(np.uint32)
    places = np.zeros(len(counts), np.uint32)
    places[dictionary] = np.arange(len(dictionary), dtype=np.uint32)
    return dictionary, places[ids]


def _check_ranks(true_NK: NDArray[np.float32]) -> None:
    if (true_NK[:, 1:] > true_NK[:, :-1]).any():
        raise ValueError("the teacher's candidates are not in rank order (most probable first)")
