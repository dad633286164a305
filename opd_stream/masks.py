"""Which tokens of a cached row train; needs no torch.

Shapes: T completion tokens.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.store.reader import ScoredRow


def trained_mask(
    row: ScoredRow, window_tokens: int, masked_ids: Collection[int] = ()
) -> NDArray[np.bool_]:
    """Which completion tokens of a row train: window, loss mask, first-occurrence mask [T'].

    A chunk of a teacher with another tokenizer trains whole or not at all.
    """
    length = min(len(row.completion_ids), window_tokens)
    mask = np.ones(length, np.bool_) if row.loss_mask is None else row.loss_mask[:length].copy()
    if masked_ids:
        mask &= ~first_occurrences(row.completion_ids[:length], masked_ids)
    if row.chunk_ids is not None:
        inside, outside = row.chunk_ids[:length], row.chunk_ids[length:]
        mask &= ~np.isin(inside, np.concatenate([inside[~mask], outside]))
    return mask


def first_occurrences(
    completion_ids: NDArray[np.integer[Any]], special_ids: Collection[int]
) -> NDArray[np.bool_]:
    """True at the first place of each special id in a completion [T].

    Markers of a thinking style sit at fixed places, differ between models and dominate the
    log-ratio there; later occurrences train (2603.25562).
    """
    first = np.zeros(len(completion_ids), np.bool_)
    for special in special_ids:
        places = np.flatnonzero(completion_ids == special)
        first[places[:1]] = True
    return first
