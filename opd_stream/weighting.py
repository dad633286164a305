"""Which tokens train, and how much: masks, the drift gate, freshness, the choice of tokens.

Gate and freshness read d = student_logprobs - behavior_logprobs of the sampled tokens under the
current student. Weights are returned before their normalisation: the step divides its gradient once
by their mean over the whole global batch, so that a weighting is no hidden change of the learning
rate.

Shapes: N tokens of a batch, T tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from opd_stream.drift import LARGEST_DIFFERENCE, group_means
from opd_stream.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from opd_stream.store.reader import ScoredRow

SHORTEST_SPAN, LONGEST_SPAN, FALLBACK_BLOCK = 16, 128, 64  # tokens, for newline spans

Statistic = Literal["signed", "abs", "rms"]


class DriftGate(Section):
    """Tokens of blocks that have drifted count less (PDG)."""

    blocks: Annotated[int, Field(ge=1)] | Literal["spans"] = Field(
        default=64, description="tokens of a block, or spans: lines of the text"
    )
    tau: float = Field(default=1.0, gt=0, description="weight exp(-tau |drift|), then normalised")
    statistic: Statistic = Field(
        default="signed", description="of the drift in a block; in signed, opposite shifts cancel"
    )


class Freshness(Section):
    """Rows that are old or have drifted count less (f-OPD)."""

    alpha: float = Field(default=1.0, ge=0, description="exp(-alpha sqrt(policy_drift)) of the row")
    floor: float = Field(
        default=0.05, ge=0, lt=1, description="subtracted; rows below it have no weight"
    )


class TokenSelection(Section):
    """Of each rollout only the tokens with the largest figure train."""

    by: Literal["kl", "student_entropy", "teacher_entropy"] = Field(
        default="kl",
        description="kl: reverse KL over candidates and tail; entropies of the whole student, and "
        "of the teacher's candidates and tail; all under the weights in training",
    )
    share: float = Field(default=0.2, gt=0, le=1, description="of a rollout's tokens, rounded up")


class Segment(Section):
    """A stretch of the completion, the same in every rollout, that trains alone."""

    first: int = Field(default=0, ge=0, description="place of its first token, from 0")
    end: int = Field(ge=1, description="place behind its last token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """What weighs the tokens of a step."""

    gate: DriftGate | None = None
    freshness: Freshness | None = None
    select: TokenSelection | None = None

    @property
    def reads_drift(self) -> bool:
        """Whether it needs d."""
        return self.gate is not None or self.freshness is not None

    def without_drift(self) -> Weighting | None:
        """What is left of it where drift weighs nothing."""
        return None if self.select is None else Weighting(select=self.select)

    def token_weights(
        self, d_N: Tensor, *, block_N: Tensor, row_N: Tensor, staleness_N: Tensor
    ) -> Tensor:
        """Weights before normalisation [N]; without gradient."""
        d_N = d_N.detach().clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
        weights_N = d_N.new_ones(len(d_N))
        if self.gate is not None:
            weights_N = drift_gate(d_N, block_N, tau=self.gate.tau, statistic=self.gate.statistic)
        if self.freshness is not None:
            drift_N = group_means(d_N.expm1() - d_N, row_N)
            fresh_N = freshness(staleness_N, drift_N, alpha=self.freshness.alpha)
            weights_N = weights_N * (fresh_N - self.freshness.floor).clamp(min=0)
        return weights_N


def drift_gate(
    d_N: Tensor, block_N: Tensor, *, tau: float, statistic: Statistic = "signed"
) -> Tensor:
    """exp(-tau |s|) with s the drift of the block [N], before normalisation.

    Args:
        d_N: student_logprobs - behavior_logprobs.
        block_N: block of each token.
        tau: strength; 1 for `signed`, 0.3 to 1 to start with for the others.
        statistic: signed: mean of d, in which opposite shifts cancel (published); abs: mean |d|;
            rms: root of the mean of d^2.

    No drift gives 1 everywhere. Source: blockwise policy-drift gating (PDG).
    """
    match statistic:
        case "signed":
            drift_N = group_means(d_N, block_N)
        case "abs":
            drift_N = group_means(d_N.abs(), block_N)
        case "rms":
            drift_N = group_means(d_N.square(), block_N).sqrt()
    return (-tau * drift_N.abs()).exp()


def freshness(staleness_N: Tensor, policy_drift_N: Tensor, *, alpha: float) -> Tensor:
    """1 / (staleness + 1) * exp(-alpha * sqrt(policy_drift)) [N].

    Staleness counts policies between the row's and the current one; the drift is that of the row.
    The published term for a changed teacher is left out: here the teacher is frozen, and scores of
    another one are another artifact. Source: f-OPD.
    """
    return (-alpha * policy_drift_N.clamp(min=0).sqrt()).exp() / (staleness_N + 1)


def largest_of_rows(values_N: Tensor, row_N: Tensor, *, share: float) -> Tensor:
    """Whether each token is among the largest `share` of its row, rounded up [N].

    Of equal ones the earlier. A row is never cut between micro-batches, so the choice depends on
    neither them nor the number of processes.
    """
    import torch

    order_N = values_N.argsort(descending=True, stable=True)
    order_N = order_N[row_N[order_N].argsort(stable=True)]
    counts_B = row_N.bincount()
    rank_N = torch.empty_like(order_N)
    places_N = torch.arange(len(order_N), device=order_N.device)
    rank_N[order_N] = places_N - (counts_B.cumsum(0) - counts_B)[row_N[order_N]]
    kept_B = (counts_B.double() * share - 1e-9).ceil()  # 0.1 * 30 is a little above 3
    return rank_N < kept_B[row_N]


def fixed_blocks(tokens: int, size: int) -> NDArray[np.int64]:
    """Block of each token of a completion [T]."""
    return np.arange(tokens) // size


def newline_spans(is_newline_T: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Span of each token: a line, short ones joined, long ones cut; fixed blocks without a newline.

    A span holds 16 to 128 tokens, the last of a completion perhaps fewer.
    """
    if not is_newline_T.any():
        return fixed_blocks(len(is_newline_T), FALLBACK_BLOCK)
    span_T = np.zeros(len(is_newline_T), np.int64)
    span, held = 0, 0
    for place, is_newline in enumerate(is_newline_T.tolist()):
        span_T[place] = span
        held += 1
        if (is_newline and held >= SHORTEST_SPAN) or held == LONGEST_SPAN:
            span, held = span + 1, 0
    return span_T


def own_tokens(row: ScoredRow) -> NDArray[np.bool_]:
    """Completion tokens of a row that its author wrote: not those of others in a trajectory [T]."""
    if row.loss_mask is None or row.chunk_ids is not None:  # the mask of chunks; no trajectory
        return np.ones(len(row.completion_ids), np.bool_)
    return row.loss_mask


def trained_mask(
    row: ScoredRow,
    window_tokens: int,
    masked_ids: Collection[int] = (),
    segment: Segment | None = None,
) -> NDArray[np.bool_]:
    """Which completion tokens of a row train: window, loss mask, first occurrences, segment [T'].

    A chunk of a teacher with another tokenizer trains whole or not at all.
    """
    length = min(len(row.completion_ids), window_tokens)
    mask = np.ones(length, np.bool_) if row.loss_mask is None else row.loss_mask[:length].copy()
    if masked_ids:
        said = np.where(own_tokens(row), row.completion_ids, -1)[:length]
        mask &= ~first_occurrences(said, masked_ids)
    if segment is not None:
        mask[: segment.first] = mask[segment.end :] = False
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
