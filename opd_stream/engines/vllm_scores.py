"""What vLLM is asked for, and what it or a server returns for a prompt, as the scores of a row.

Needs no vLLM.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.engines.base import RowScores, ranked_union, with_own
from opd_stream.errors import UserError
from opd_stream.types import RolloutBatch

SPARE = 16  # candidates asked for beyond the top K where some ids of the head do not count
MAX_LEFT_OUT = 1024  # ids that model runner V2 takes a bias for, or an allowance
MIN_TAIL = 1e-7  # of float32 sums; a smaller tail cannot be told from none


def asked_ids(rollouts: RolloutBatch, row: int, forced_ids: tuple[int, ...]) -> NDArray[np.int32]:
    """sampled token | forced ids | drawn candidates | the student's most probable ids [T, J]."""
    sampled_T1 = rollouts.completion_ids[row][:, None]
    parts = [sampled_T1, np.tile(np.array(forced_ids, np.int32), (len(sampled_T1), 1))]
    if rollouts.candidate_ids is not None:
        parts.append(rollouts.candidate_ids[row])
    if rollouts.student_top_ids is not None:
        parts.append(rollouts.student_top_ids[row])
    return np.concatenate([part.astype(np.int32) for part in parts], axis=1)


def left_out(limit: int | None, vocabulary: int, *, by_bias_only: bool) -> dict[str, Any]:
    """Sampling parameters that keep ids from `limit` on from being drawn.

    A bias for these few costs nothing to speak of; to allow all others costs 160 ms a request (of
    151,936 ids, on a CPU), and model runner V2 takes no such list.

    Args:
        limit: the first id that is not drawn; None: all are.
        vocabulary: ids that the head has logits for.
        by_bias_only: whether longer lists are refused, as by model runner V2.

    Raises:
        UserError: there are more than it takes.
    """
    if limit is None:
        return {}
    if vocabulary - limit <= MAX_LEFT_OUT:
        return {"logit_bias": dict.fromkeys(range(limit, vocabulary), -float("inf"))}
    if by_bias_only:
        raise UserError(
            f"the student has logits for {vocabulary} ids, of which {limit} may be drawn; engine "
            f"vllm leaves out at most {MAX_LEFT_OUT}; use student.engine=transformers"
        )
    return {"allowed_token_ids": list(range(limit))}


def asked_top_k(top_k: int, limit: int | None, vocabulary: int) -> int:
    """Candidates that vLLM is asked for, so that `top_k` below the id `limit` are among them."""
    return top_k if limit is None else min(top_k + SPARE, vocabulary)


def whole_distribution(flat: Any, tokens: int, vocab: int) -> NDArray[np.float32]:
    """Log-probabilities [T, V] of the last positions from vLLM's flat list.

    Its first position is empty; every other one has the token itself, then all ids by rank.
    """
    dense_TV = np.full((tokens, vocab), np.nan, np.float32)
    if not tokens:
        return dense_TV
    ids = np.asarray(flat.token_ids, np.int64)
    logprobs = np.asarray(flat.logprobs, np.float32)
    starts = np.asarray(flat.start_indices)[-tokens:]
    ends = np.asarray(flat.end_indices)[-tokens:]
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        dense_TV[place, ids[start:end]] = logprobs[start:end]
    return dense_TV


def scores_of_whole(
    dense_TV: NDArray[np.float32],
    asked_TJ: NDArray[np.int32],
    *,
    top_k: int,
    forced: int,
    limit: int | None = None,
    student_top_k: int = 0,
) -> RowScores:
    """The scores of one row from the whole distribution; ids from `limit` on are no candidates."""
    order_TK = np.argsort(-dense_TV[:, :limit], axis=1, kind="stable")[:, :top_k]
    asked_TJ, own_TS = np.split(asked_TJ, [asked_TJ.shape[1] - student_top_k], axis=1)
    asked = np.take_along_axis(dense_TV, asked_TJ, axis=1)
    return _row_scores(*ranked_union(dense_TV, order_TK, own_TS), asked, forced)


def scores_of_asked(
    output: Any,
    tokens: int,
    *,
    top_k: int,
    forced: int,
    limit: int | None,
    vocabulary: int,
    own_TS: NDArray[np.int32] | None = None,
) -> RowScores:
    """The scores of one row where vLLM was asked for some ids (model runner V2).

    Each of the last T positions of the flat list has the token itself, then as many candidates as
    `asked_top_k` says; the rest is `scores_of_candidates`.

    Raises:
        UserError: too few of them are below `limit`.
    """
    shape, last = (-1, asked_top_k(top_k, limit, vocabulary) + 1), slice(-tokens or None, None)
    ids_TK, top_TK = np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float32)
    asked = np.zeros((0, 1 + forced + (0 if own_TS is None else own_TS.shape[1])), np.float32)
    if tokens:
        ids_TK = np.asarray(output.prompt_logprobs.token_ids, np.int32).reshape(shape)[last, 1:]
        top_TK = np.asarray(output.prompt_logprobs.logprobs, np.float32).reshape(shape)[last, 1:]
        asked = np.asarray(output.prompt_token_id_logprobs, np.float32)[last]
    return scores_of_candidates(
        ids_TK, top_TK, asked, top_k=top_k, forced=forced, limit=limit, own_TS=own_TS
    )


def scores_of_candidates(
    ids_TK: NDArray[np.int32],
    top_TK: NDArray[np.float32],
    asked_TJ: NDArray[np.float32],
    *,
    top_k: int,
    forced: int,
    limit: int | None,
    own_TS: NDArray[np.int32] | None = None,
) -> RowScores:
    """The scores of one row from its candidates by rank and the ids of `asked_ids`.

    Of the candidates the first `top_k` below `limit` stay. `own_TS` are the student's most probable
    ids, which were asked for last.

    Raises:
        UserError: too few candidates are below `limit`.
    """
    if limit is not None and len(ids_TK):
        order_TK = _known_first(ids_TK, top_k, limit, "teacher")
        ids_TK = np.take_along_axis(ids_TK, order_TK, axis=1)
        top_TK = np.take_along_axis(top_TK, order_TK, axis=1)
    if own_TS is not None:
        asked_TJ, more_TS = np.split(asked_TJ, [asked_TJ.shape[1] - own_TS.shape[1]], axis=1)
        ids_TK, top_TK = with_own(ids_TK, top_TK, own_TS, more_TS)
    rest_T = 1 - np.exp(top_TK, dtype=np.float64).sum(1)
    return _row_scores(ids_TK, top_TK, np.log(rest_T.clip(MIN_TAIL)), asked_TJ, forced)


def first_known(ids_TK: NDArray[np.int32], count: int, limit: int | None) -> NDArray[np.int32]:
    """The first `count` ids of each position that are below `limit`.

    Raises:
        UserError: there are fewer.
    """
    if limit is None:
        return ids_TK[:, :count]
    return np.take_along_axis(ids_TK, _known_first(ids_TK, count, limit, "student"), axis=1)


def _known_first(ids_TK: NDArray[np.int32], count: int, limit: int, role: str) -> NDArray[np.int64]:
    """Places of the first `count` ids below `limit` [T, count]."""
    order_TK = np.argsort(ids_TK >= limit, axis=1, kind="stable")[:, :count]
    if (np.take_along_axis(ids_TK, order_TK, axis=1) >= limit).any():
        raise UserError(
            f"the {role} prefers more than {SPARE} ids that the tokenizer does not have; "
            f"engine vllm cannot leave so many out; use {role}.engine=transformers"
        )
    return order_TK


def _row_scores(
    top_ids_TK: NDArray[np.int32],
    top_TK: NDArray[np.float32],
    tail_T: NDArray[np.floating[Any]],
    asked_TJ: NDArray[np.float32],
    forced: int,
) -> RowScores:
    return RowScores(
        asked=np.delete(asked_TJ, slice(1, 1 + forced), axis=1),
        top_ids=top_ids_TK,
        top_logprobs=top_TK,
        tail=tail_T.astype(np.float32),
        forced=asked_TJ[:, 1 : 1 + forced],
    )
