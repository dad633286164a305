"""A teacher's distributions, rebuilt from cached hidden states while the student trains.

With `top_k` a batch gets the columns that a cache of so many candidates would have. Without, every
id of the vocabulary is a candidate, and the columns exist for a chunk of tokens at a time.

Shapes: N tokens, n of a chunk, G hidden of the teacher, V ids that are candidates, T terminators,
M further draws.
"""

from dataclasses import dataclass, replace

import torch

from opd_stream.batches import Batch
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.logprobs import head_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHead:
    """What makes distributions of hidden states.

    Example:
        >>> TeacherHead(head=exact_head(read_head(artifact)), top_k=None, vocabulary=49_152)
    """

    head: OutputHead  # exact: float32, or wider
    top_k: int | None  # candidates, the teacher's most probable; None: the whole vocabulary
    vocabulary: int  # ids from here on are no candidates; their mass is in the tail


def with_candidates(batch: Batch, teacher: TeacherHead) -> Batch:
    """The batch with the teacher's `top_k` candidates, tail, sampled and forced ids.

    Raises:
        UserError: the rows hold no hidden states.
    """
    assert teacher.top_k is not None
    asked = [batch.completion_ids_N[:, None]]
    if batch.draws is not None:
        asked.append(batch.draws.ids_NM)
    states_NG = _states(batch).to(teacher.head.weight_VH.dtype)
    with torch.autocast(states_NG.device.type, enabled=False):  # its logits are not to be rounded
        found = head_scores(
            states_NG,
            teacher.head,
            asked_ids_NJ=torch.cat(asked, dim=1),
            forced_ids_F=batch.terminator_ids_T,
            top_k=teacher.top_k,
            chunk_rows=teacher.head.chunk_rows,
            vocabulary=teacher.vocabulary,
        )
    draws = batch.draws
    if draws is not None:
        draws = replace(draws, teacher_logprobs_NM=found.asked_NJ[:, 1:].clone())
    return replace(
        batch,
        teacher_logprobs_N=found.asked_NJ[:, 0].clone(),
        teacher_top_ids_NK=found.top_ids_NK.clone(),
        teacher_top_logprobs_NK=found.top_NK.clone(),
        teacher_tail_logprobs_N=found.tail_N.clone(),
        teacher_terminator_logprobs_NT=found.forced_NF.clone(),
        draws=draws,
    )


def whole_rows(batch: Batch, teacher: TeacherHead, rows: slice) -> Batch:
    """Some tokens of a batch, with every id of the vocabulary as a candidate.

    Only the columns that objectives read are those of the tokens; the rows of the text are not.
    """
    states_nG = _states(batch)[rows].to(teacher.head.weight_VH.dtype)
    logprobs_nV = teacher.head(states_nG).log_softmax(1)
    ids_n = batch.completion_ids_N[rows]
    draws = batch.draws
    if draws is not None:
        ids_nM = draws.ids_NM[rows]
        draws = replace(
            draws,
            ids_NM=ids_nM,
            behavior_logprobs_NM=draws.behavior_logprobs_NM[rows],
            teacher_logprobs_NM=logprobs_nV.gather(1, ids_nM),
        )
    every_V = torch.arange(teacher.vocabulary, device=ids_n.device)
    return replace(
        batch,
        completion_ids_N=ids_n,
        behavior_logprobs_N=batch.behavior_logprobs_N[rows],
        teacher_logprobs_N=logprobs_nV.gather(1, ids_n[:, None])[:, 0],
        teacher_top_ids_NK=every_V.expand(len(ids_n), -1),
        teacher_top_logprobs_NK=logprobs_nV[:, : teacher.vocabulary],
        teacher_tail_logprobs_N=logprobs_nV[:, teacher.vocabulary :].logsumexp(1),
        teacher_terminator_logprobs_NT=logprobs_nV[:, batch.terminator_ids_T],
        draws=draws,
    )


def _states(batch: Batch) -> torch.Tensor:
    if batch.teacher_states_NG is None:
        raise UserError(
            "a row of the batch holds no hidden states of the teacher, and others do; train on "
            "caches of codec hidden and of other codecs apart"
        )
    return batch.teacher_states_NG
