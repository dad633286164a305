"""The loss of a batch of cached rows: hidden states in, loss and statistics out.

This is where cached columns meet the student: which ids it is asked for, which of them count as one
outcome, what each objective reads. One pass over the head serves all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from opd_stream.batches import Batch, StudentDraws
from opd_stream.drift import MeasuredTokens, group_means, step_sums
from opd_stream.errors import UserError
from opd_stream.fused import FusedLoss, OutputHead, fused_loss
from opd_stream.logprobs import sampled_logprobs
from opd_stream.objectives import (
    SMALLEST_LOGPROB,
    Draws,
    Objective,
    ObjectiveInputs,
    seen_reverse_kl,
    teacher_entropy,
    token_losses,
)
from opd_stream.rebuilt import TeacherHead, whole_rows, with_candidates
from opd_stream.weighting import TokenSelection, Weighting, largest_of_rows

SMALLEST_TAIL = 1e-7  # of a difference of stored probabilities


class BatchLoss(NamedTuple):
    """The loss of a batch and what was measured on the way; a tuple, as wrappers of modules ask."""

    loss: torch.Tensor  # scalar: weighted sum over the batch's tokens, with a gradient
    losses_N: torch.Tensor  # of each token before weights and clamp, nats
    sums: torch.Tensor  # in the order of `opd_stream.drift.NAMES`


def batch_loss(
    hidden_BLH: torch.Tensor,
    head: OutputHead,
    batch: Batch,
    objectives: Sequence[Objective],
    *,
    merge_terminators: bool = True,
    limit: float | None = None,
    weighting: Weighting | None = None,
    teacher: TeacherHead | None = None,
) -> BatchLoss:
    """Loss of the batch's completion tokens, by `fused_loss`.

    Args:
        hidden_BLH: last hidden states of the student for `batch.input_ids_BL`.
        head: its output head.
        batch: rows from the cache; `batch.weights_N` sums to 1 over an optimizer step, before the
            weights of several teachers.
        objectives: what to minimise; their weighted sum.
        merge_terminators: all terminators are one outcome.
        limit: of a token's loss, for `soft_clamp`; None: no clamp.
        weighting: of tokens by measured drift; the caller divides the gradient of the step by the
            mean weight, which is in the sums.
        teacher: rebuilds its distributions from the hidden states of the rows; None: the batch has
            the teacher's candidates.

    Raises:
        UserError: an objective needs a column the cache lacks, or an id is none of the student's.
    """
    if batch.is_given:  # no drift, no losses of the step before, perhaps no scores
        weighting, limit = None, None
        teacher = None if batch.teacher_states_NG is None else teacher
    _check(batch, objectives, weighting, vocabulary=len(head.weight_VH))
    hidden_NH = hidden_BLH.flatten(0, 1)[batch.hidden_rows_N]
    drift_weights_N, shares_N = _before_loss(hidden_NH, head, batch, weighting)
    options = _Options(
        merge=merge_terminators,
        is_drawn=any(part.reads == "drawn" for part in objectives),
        shares_N=shares_N,
        limit=limit,
    )

    if teacher is not None and teacher.top_k is not None:
        batch = with_candidates(batch, teacher)
    if teacher is not None and teacher.top_k is None:
        loss_of = partial(_whole_loss, batch, objectives, options, teacher)
    else:
        loss_of = partial(_candidate_loss, batch, objectives, options)
    if weighting is not None and weighting.select is not None:
        first = loss_of(hidden_NH.detach(), head.detached(), torch.zeros_like(batch.weights_N))
        drift_weights_N = drift_weights_N * _selected(weighting.select, *first, batch)
    fused, seen = loss_of(hidden_NH, head, batch.weights_N * drift_weights_N)
    with torch.no_grad():
        measured = _measured(batch, seen, fused, drift_weights_N)
    return BatchLoss(loss=fused.loss, losses_N=seen.losses_N, sums=step_sums(measured))


class _Seen(NamedTuple):
    """What is measured of the inputs of objectives [N], without gradient."""

    losses_N: torch.Tensor  # before weights and clamp, nats
    student_logprobs_N: torch.Tensor
    reverse_kl_N: torch.Tensor
    student_top_mass_N: torch.Tensor
    teacher_top_mass_N: torch.Tensor
    teacher_entropy_N: torch.Tensor
    seen_kl_N: torch.Tensor
    unseen_kl_N: torch.Tensor


def _selected(select: TokenSelection, fused: FusedLoss, seen: _Seen, batch: Batch) -> torch.Tensor:
    """1 for tokens that are chosen, 0 for others [N]."""
    match select.by:
        case "kl":
            values_N = seen.seen_kl_N
        case "student_entropy":
            values_N = fused.entropy_N
        case "teacher_entropy":
            values_N = seen.teacher_entropy_N
    return largest_of_rows(values_N, batch.row_N, share=select.share).to(batch.weights_N.dtype)


def _candidate_loss(
    batch: Batch,
    objectives: Sequence[Objective],
    options: "_Options",
    hidden_NH: torch.Tensor,
    head: OutputHead,
    weights_N: torch.Tensor,
) -> tuple[FusedLoss, _Seen]:
    """Over the candidates of the batch."""

    def token_loss(logprobs_nJ: torch.Tensor, rows: slice) -> torch.Tensor:
        return options.clamped(token_losses(objectives, _inputs(logprobs_nJ, batch, rows, options)))

    fused = fused_loss(
        hidden_NH,
        head,
        ids_NJ=_asked_ids(batch),
        weights_N=weights_N,
        token_loss=token_loss,
        top_NK=None if options.is_drawn else batch.teacher_top_logprobs_NK,
    )
    with torch.no_grad():
        inputs = _inputs(fused.logprobs_NJ, batch, slice(None), options)
        losses_N = fused.losses_N
        if options.limit is not None:
            losses_N = token_losses(objectives, inputs)
        return fused, _seen(losses_N, inputs, options)


def _whole_loss(
    batch: Batch,
    objectives: Sequence[Objective],
    options: "_Options",
    teacher: TeacherHead,
    hidden_NH: torch.Tensor,
    head: OutputHead,
    weights_N: torch.Tensor,
) -> tuple[FusedLoss, _Seen]:
    """Over the whole vocabulary: both sides exist for a chunk of tokens, and what is measured."""
    seen: list[_Seen] = []

    def token_loss(logprobs_nV: torch.Tensor, rows: slice) -> torch.Tensor:
        chunk = whole_rows(batch, teacher, rows)
        places = [
            chunk.completion_ids_N[:, None],
            chunk.terminator_ids_T.expand(len(logprobs_nV), -1),
        ]
        if chunk.draws is not None:
            places.append(chunk.draws.ids_NM)
        sampled, stops, *draws = (logprobs_nV.gather(1, ids) for ids in places)
        top = logprobs_nV[:, : teacher.vocabulary]
        asked = torch.cat([sampled, top, stops, *draws], dim=1)
        inputs = _inputs(asked, chunk, slice(None), options)
        losses = token_losses(objectives, inputs)
        with torch.no_grad():
            seen.append(_seen(losses.detach(), inputs, options))
        return options.clamped(losses)

    fused = fused_loss(hidden_NH, head, ids_NJ=None, weights_N=weights_N, token_loss=token_loss)
    return fused, _Seen(*(torch.cat(column) for column in zip(*seen, strict=True)))


def _seen(losses_N: torch.Tensor, inputs: ObjectiveInputs, options: "_Options") -> _Seen:
    seen_N, unseen_N = seen_reverse_kl(inputs)
    if options.is_drawn or options.shares_N is not None:  # no support, or not of tokens
        seen_N, unseen_N = torch.zeros_like(seen_N), torch.zeros_like(seen_N)
    return _Seen(
        losses_N=losses_N,
        student_logprobs_N=inputs.student_logprobs_N.detach(),
        reverse_kl_N=inputs.reverse_kl_N,
        student_top_mass_N=inputs.student_top_logprobs_NK.detach().exp().sum(1),
        teacher_top_mass_N=inputs.teacher_top_logprobs_NK.exp().sum(1),
        teacher_entropy_N=teacher_entropy(inputs),
        seen_kl_N=seen_N.detach(),
        unseen_kl_N=unseen_N.detach(),
    )


def _before_loss(
    hidden_NH: torch.Tensor, head: OutputHead, batch: Batch, weighting: Weighting | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Drift weights, and the student's share of each token in its chunk if there are chunks [N].

    A share is log p of the chunk, given out equally to its tokens, as the teacher's in the cache.
    """
    drift_weights_N = torch.ones_like(batch.weights_N)
    is_weighed = weighting is not None and weighting.reads_drift
    if not is_weighed and batch.chunk_N is None:
        return drift_weights_N, None
    sampled_N = sampled_logprobs(
        hidden_NH, head, batch.completion_ids_N, chunk_rows=head.chunk_rows
    )
    if weighting is not None and is_weighed:
        drift_weights_N = weighting.token_weights(
            sampled_N - batch.behavior_logprobs_N,
            block_N=batch.block_N,
            row_N=batch.row_N,
            staleness_N=batch.staleness_N,
        )
    shares_N = None if batch.chunk_N is None else group_means(sampled_N, batch.chunk_N)
    return drift_weights_N, shares_N


def _measured(
    batch: Batch, seen: _Seen, fused: FusedLoss, drift_weights_N: torch.Tensor
) -> MeasuredTokens:
    return MeasuredTokens(
        **seen._asdict(),
        is_given=batch.is_given,
        row_tokens_B=batch.attention_mask_BL.sum(1).double(),
        counted_N=batch.weights_N > 0,
        drift_weights_N=drift_weights_N,
        behavior_logprobs_N=(
            seen.student_logprobs_N if batch.is_given else batch.behavior_logprobs_N
        ),
        student_entropy_N=fused.entropy_N,
        overlap_M=fused.overlap_M,
        positions_N=batch.positions_N,
        block_N=batch.block_N,
    )


def _check(
    batch: Batch,
    objectives: Sequence[Objective],
    weighting: Weighting | None,
    *,
    vocabulary: int,
) -> None:
    if weighting is not None and weighting.select is not None and batch.chunk_N is not None:
        raise UserError(
            "train.select is set, and a chunk of a teacher with another tokenizer trains whole or "
            "not at all; leave train.select out"
        )
    if batch.draws is None and any(part.reads == "draws" for part in objectives):
        raise UserError(
            "objective mc reads the column candidate_ids, which these rollouts do not have; set "
            "rollouts.extra_draws, and run generate and score again"
        )
    check_vocabulary(batch, vocabulary)


def check_vocabulary(batch: Batch, vocabulary: int) -> None:
    """Refuse ids that a model with so many does not have.

    Raises:
        UserError: names one.
    """
    if batch.largest_id >= vocabulary:
        raise UserError(
            f"the cache holds token id {batch.largest_id}; the student has {vocabulary} tokens; "
            "train a student with the vocabulary of the rollouts"
        )


def _asked_ids(batch: Batch) -> torch.Tensor:
    """sampled token | teacher's K | T terminators | M further draws [N, J]."""
    sampled_N1 = batch.completion_ids_N[:, None]
    stops_NT = batch.terminator_ids_T.expand(len(sampled_N1), -1)
    parts = [sampled_N1, batch.teacher_top_ids_NK, stops_NT]
    return torch.cat(parts if batch.draws is None else [*parts, batch.draws.ids_NM], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What counts as one outcome."""

    merge: bool  # all terminators
    is_drawn: bool  # candidates were drawn from the teacher
    shares_N: torch.Tensor | None  # the student's share of each token in its chunk, if in chunks
    limit: float | None = None  # of a token's loss

    def clamped(self, losses_N: torch.Tensor) -> torch.Tensor:
        """Losses that train."""
        return losses_N if self.limit is None else soft_clamp(losses_N, self.limit)


def _inputs(
    logprobs_nJ: torch.Tensor, batch: Batch, rows: slice, options: _Options
) -> ObjectiveInputs:
    """What the objectives read, for some of the batch's tokens."""
    top_ids, sampled_ids = batch.teacher_top_ids_NK[rows], batch.completion_ids_N[rows]
    draws = 0 if batch.draws is None else batch.draws.ids_NM.shape[1]
    widths = [1, top_ids.shape[1], len(batch.terminator_ids_T), draws]
    student, student_top, student_stops, student_draws = torch.split(logprobs_nJ, widths, dim=1)
    stop = None
    if options.merge and len(batch.terminator_ids_T):
        stop = known_terminators(
            batch.terminator_ids_T, student_stops, batch.teacher_terminator_logprobs_NT[rows]
        )
    teacher_top = batch.teacher_top_logprobs_NK[rows]
    is_there = teacher_top > -torch.inf  # where candidates are fewer than K, id 0 fills up
    student_top = student_top.masked_fill(~is_there, SMALLEST_LOGPROB)
    teacher_top = teacher_top.clamp(min=SMALLEST_LOGPROB)
    tail = batch.teacher_tail_logprobs_N[rows]
    in_top = ((top_ids == sampled_ids[:, None]) & is_there).any(1)
    outcome = student[:, 0].detach()
    if options.shares_N is not None:
        outcome = options.shares_N[rows].to(outcome.dtype)
    teacher = batch.teacher_logprobs_N[rows].clamp(min=SMALLEST_LOGPROB)
    reverse_kl = _reverse_kl(outcome, teacher, sampled_ids, stop)
    if stop is not None:
        in_top = in_top | torch.isin(sampled_ids, stop.ids_T)
        if options.is_drawn:
            is_stop = torch.isin(top_ids, stop.ids_T) & (teacher_top > SMALLEST_LOGPROB)
            student_top = torch.where(is_stop, stop.student_N[:, None], student_top)
        else:
            student_top, teacher_top, tail = merge_into_candidates(
                stop,
                top_ids_NK=top_ids,
                student_top_NK=student_top,
                teacher_top_NK=teacher_top,
                teacher_tail_N=tail,
            )
    behavior = batch.behavior_logprobs_N[rows]
    return ObjectiveInputs(
        student_logprobs_N=student[:, 0],
        student_top_logprobs_NK=student_top,
        teacher_top_logprobs_NK=teacher_top,
        teacher_tail_logprobs_N=tail,
        behavior_logprobs_N=behavior,
        reverse_kl_N=reverse_kl,
        sampled_in_top_N=in_top,
        draws=_draws(batch.draws, rows, student, student_draws, behavior, reverse_kl, stop),
    )


def _draws(
    cached: StudentDraws | None,
    rows: slice,
    student_N1: torch.Tensor,
    student_draws_NM: torch.Tensor,
    behavior_N: torch.Tensor,
    reverse_kl_N: torch.Tensor,
    stop: "Terminators | None",
) -> Draws | None:
    """The sampled token and the further draws, if the cache has any."""
    if cached is None:
        return None
    teacher_NM = cached.teacher_logprobs_NM[rows].clamp(min=SMALLEST_LOGPROB)
    further_NM = _reverse_kl(student_draws_NM.detach(), teacher_NM, cached.ids_NM[rows], stop)
    behavior_NM = cached.behavior_logprobs_NM[rows]
    return Draws(
        student_logprobs_NM=torch.cat([student_N1, student_draws_NM], dim=1),
        behavior_logprobs_NM=torch.cat([behavior_N[:, None], behavior_NM], dim=1),
        reverse_kl_NM=torch.cat([reverse_kl_N[:, None], further_NM], dim=1),
    )


def _reverse_kl(
    student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, stop: "Terminators | None"
) -> torch.Tensor:
    """log p - log q of the outcomes that ids [N] or [N, M] stand for; terminators are one."""
    if stop is not None:
        shape = (-1, *[1] * (ids.ndim - 1))
        ended = torch.isin(ids, stop.ids_T)
        student = torch.where(ended, stop.student_N.detach().view(shape), student)
        teacher = torch.where(ended, stop.teacher_N.view(shape), teacher)
    return student - teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminators:
    """The T ids that end a text for student or teacher, with what both sides give them."""

    ids_T: torch.Tensor
    student_logprobs_NT: torch.Tensor
    teacher_logprobs_NT: torch.Tensor

    @property
    def student_N(self) -> torch.Tensor:
        """log of the student's probability to stop."""
        return self.student_logprobs_NT.logsumexp(1)

    @property
    def teacher_N(self) -> torch.Tensor:
        """log of the teacher's probability to stop."""
        return self.teacher_logprobs_NT.logsumexp(1)


def known_terminators(
    ids_T: torch.Tensor, student_NT: torch.Tensor, teacher_NT: torch.Tensor
) -> Terminators:
    """The terminators that are one outcome, each where the teacher's log-probability is known.

    Where it is not (NaN), the terminator is in the tail of both sides: merging fewer outcomes keeps
    every law of the divergences. A position that knows none has an outcome of probability 0.
    """
    is_unknown = teacher_NT.isnan()
    return Terminators(
        ids_T=ids_T,
        student_logprobs_NT=student_NT.masked_fill(is_unknown, SMALLEST_LOGPROB),
        teacher_logprobs_NT=teacher_NT.masked_fill(is_unknown, SMALLEST_LOGPROB),
    )


def merge_into_candidates(
    stop: Terminators,
    *,
    top_ids_NK: torch.Tensor,
    student_top_NK: torch.Tensor,
    teacher_top_NK: torch.Tensor,
    teacher_tail_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates in which all terminators are one: student, teacher [N, K + 1] and the tail [N].

    A base student ends with one id and its teacher with another, to which each gives the other's
    almost nothing; compared as tokens, stopping costs 25 nats and the student unlearns it. Merging
    outcomes keeps every law of the divergences (SimOPD's audit of terminators).

    Where a cached tail holds little but terminators, the rest is a difference of rounded numbers:
    below `SMALLEST_TAIL` it is noise, and counts as that much.
    """
    is_stop_NK = torch.isin(top_ids_NK, stop.ids_T)
    student = student_top_NK.masked_fill(is_stop_NK, SMALLEST_LOGPROB)
    teacher = teacher_top_NK.masked_fill(is_stop_NK, SMALLEST_LOGPROB)
    is_there_NK = teacher_top_NK > SMALLEST_LOGPROB  # padding has an id as well
    in_top_NT = ((top_ids_NK[:, :, None] == stop.ids_T) & is_there_NK[:, :, None]).any(1)
    outside_N = (stop.teacher_logprobs_NT.exp() * ~in_top_NT).sum(1)
    whole_N = teacher_tail_N.exp()
    rest_N = torch.maximum(whole_N - outside_N, whole_N.clamp(max=SMALLEST_TAIL))
    tail_N = rest_N.log().clamp(min=SMALLEST_LOGPROB)
    return (
        torch.cat([student, stop.student_N[:, None]], dim=1),
        torch.cat([teacher, stop.teacher_N[:, None].to(teacher.dtype)], dim=1),
        torch.where(outside_N > 0, tail_N, teacher_tail_N),
    )


def soft_clamp(losses_N: torch.Tensor, limit: float) -> torch.Tensor:
    """Losses above the limit count as the limit, their gradient scaled by limit / loss [N].

    The limit is a multiple of the mean loss of the optimizer step before, so that it depends
    neither on micro-batches nor on ranks. For non-negative losses (SimOPD's audit: k = 3).
    """
    return torch.where(losses_N <= limit, losses_N, losses_N * (limit / losses_N.detach()))
