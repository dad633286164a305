"""How far a codec may move a log-probability, so that what is further is a fault."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.store.reader import ScoredRow

HALF_UNIT = 2.0**-11  # of float16, relative


def of_drawn(codec: Mapping[str, Any]) -> float:
    """Largest error of a drawn token's stored log-probability, nats; only `compact` rounds it."""
    return codec["max_error"] if codec["kind"] == "compact" else 0.0


def of_candidates(
    codec: Mapping[str, Any], logprobs: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Largest error of each stored log-probability of a candidate, nats."""
    values = np.where(np.isfinite(logprobs), logprobs, 0.0).astype(np.float64)
    if codec["kind"] == "compact":
        return np.full_like(values, codec["max_error"])
    if codec["kind"] == "exact" and codec["dtype"] == "float16":
        return np.abs(values) * HALF_UNIT
    return np.zeros_like(values)


def of_divergence(codec: Mapping[str, Any], row: ScoredRow) -> NDArray[np.float64]:
    """Largest error of a divergence from the row's own distribution, by token [T], nats.

    It is the mean of the candidates' errors under that distribution, and twice that where both
    sides are normalised over the candidates.
    """
    logprobs_TK = row.teacher_top_logprobs
    probabilities_TK = np.exp(logprobs_TK, dtype=np.float64)
    return 2 * (probabilities_TK * of_candidates(codec, logprobs_TK)).sum(1)
