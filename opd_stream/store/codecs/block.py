"""What a codec decodes to: the scores of a few rollouts, flat over their tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    chunk_ids: NDArray[np.int32] | None = None  # [N], of scores with alignment
    same_tokens: NDArray[np.bool_] | None = None  # [N], the same
