"""The data that travels between engines, shards and objectives.

Alignment rule: every per-token field has the length of `completion_ids`, and index `t` speaks of
`completion_ids[t]`. Only `logprobs.py` and the engines shift by one. Tokens travel as ids from
sampling to loss; nothing is decoded and tokenised again, but for a teacher with another tokenizer.

Shapes: R rows (rollouts), P prompt tokens, T completion tokens (both ragged, one array per row),
K teacher top-k, F forced ids, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Prompts ready for an engine.

    Example:
        >>> PromptBatch(prompt_id=("gsm8k-0",), prompt_ids=(np.array([2, 17, 9], np.int32),))
    """

    prompt_id: tuple[str, ...]  # R, unique
    prompt_ids: tuple[NDArray[np.integer[Any]], ...]  # R x [P], P >= 1, template already applied


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Continuations sampled by the student, with the probabilities they were sampled with.

    Rows are ordered by prompt, then by `sample_index`.

    Example:
        >>> RolloutBatch(
        ...     prompt_id=("gsm8k-0",), sample_index=np.array([0], np.int32),
        ...     prompt_ids=(np.array([2, 17, 9], np.int32),),
        ...     completion_ids=(np.array([40, 41, 1], np.int32),),
        ...     behavior_logprobs=(np.array([-0.1, -2.3, -0.01], np.float32),),
        ...     finish_reason=("stop",),
        ... )
    """

    prompt_id: tuple[str, ...]  # R
    sample_index: NDArray[np.int32]  # [R], 0 .. samples_per_prompt - 1
    prompt_ids: tuple[NDArray[np.integer[Any]], ...]  # R x [P]
    completion_ids: tuple[
        NDArray[np.integer[Any]], ...
    ]  # R x [T], with the terminator if one was drawn
    behavior_logprobs: tuple[NDArray[np.float32], ...]  # R x [T], nats, raw (before temperature)
    finish_reason: tuple[FinishReason, ...]  # R, "length" = the window ended it, no terminator
    loss_mask: tuple[NDArray[np.bool_], ...] | None = None  # R x [T], tokens that may train; all
    candidate_ids: tuple[NDArray[np.integer[Any]], ...] | None = (
        None  # R x [T, M], to be scored too
    )
    candidate_behavior_logprobs: tuple[NDArray[np.float32], ...] | None = None  # R x [T, M]
    student_top_ids: tuple[NDArray[np.integer[Any]], ...] | None = (
        None  # R x [T, S], the student's own most probable ids, in any order: candidates, too
    )

    def __len__(self) -> int:
        return len(self.prompt_id)

    @property
    def completion_tokens(self) -> int:
        """Completion tokens in all rows, also of trajectories' turns of others."""
        return sum(len(ids) for ids in self.completion_ids)

    def own_tokens(self, row: int) -> NDArray[np.bool_]:
        """Which completion tokens of a row may train: the author's own [T]."""
        if self.loss_mask is None:
            return np.ones(len(self.completion_ids[row]), np.bool_)
        return self.loss_mask[row]

    def own_ids(self, row: int) -> NDArray[np.integer[Any]]:
        """The completion of a row without the turns of others."""
        return self.completion_ids[row][self.own_tokens(row)]

    def answer_ids(self, row: int) -> NDArray[np.integer[Any]]:
        """The author's last turn: of a row of one turn the completion."""
        return self.completion_ids[row][last_turn(self.own_tokens(row))]


def last_turn(own_T: NDArray[np.bool_]) -> slice:
    """The last stretch of tokens that the author of a trajectory wrote.

    Example:
        >>> last_turn(np.array([True, False, True, True, False]))
        slice(2, 4, None)
    """
    places = np.flatnonzero(own_T)
    if not len(places):
        return slice(0, 0)
    others = np.flatnonzero(~own_T[: places[-1]])
    return slice(int(others[-1]) + 1 if len(others) else 0, int(places[-1]) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBatch:
    """The teacher's view of a `RolloutBatch`, row by row.

    All log-probabilities are in nats, normalised over the full vocabulary, at temperature 1. The K
    ids of a position stand in rank order (most probable first), so a smaller K is a prefix. Where
    the rollouts have `student_top_ids`, they are the union of these and the teacher's own, filled
    up with id 0 and -inf. Where ids were drawn instead (`draws`), they are the distinct ones with
    log(count / draws), and -inf after the last. A row whose logits were not finite holds arrays of
    length 0 and its reason stands in `refused`.
    """

    teacher_logprobs: tuple[NDArray[np.float32], ...]  # R x [T], of the sampled token
    teacher_top_ids: tuple[NDArray[np.integer[Any]], ...]  # R x [T, K]
    teacher_top_logprobs: tuple[NDArray[np.float32], ...]  # R x [T, K]
    teacher_tail_logprobs: tuple[NDArray[np.float32], ...]  # R x [T], log(1 - sum of the K)
    teacher_forced_logprobs: tuple[NDArray[np.float32], ...]  # R x [T, F]
    refused: dict[int, str]  # row number -> reason
    candidate_teacher_logprobs: tuple[NDArray[np.float32], ...] | None = None  # R x [T, M]
    # R x [T, H] float32, hidden states; rounded: [T, 1 + H] int32, the code of the step first
    teacher_states: tuple[NDArray[Any], ...] | None = None
    # Of a teacher with another tokenizer (`cross_tokenizer`):
    chunk_ids: tuple[NDArray[np.int32], ...] | None = None  # R x [T], from 0; -1: does not train
    same_tokens: tuple[NDArray[np.bool_], ...] | None = None  # R x [T], one of the teacher's too

    def __len__(self) -> int:
        return len(self.teacher_logprobs)
