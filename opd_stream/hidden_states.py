"""A teacher's hidden states: rounded so that distributions stay, and turned into scores.

With the head's weight W and p the distribution at a state h, moving h by d costs
KL = 1/2 d' F d, F = W' (diag(p) - p p') W, up to higher orders. The basis makes the mean of F over
typical states the identity and their coordinates uncorrelated; the step of each token follows from
its own F, and what rounding really cost is measured, not assumed.

Shapes: N tokens, n of a chunk, H hidden, V vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray

from opd_stream.engines.base import HiddenStates, RowScores, ScoringSettings, score_batch
from opd_stream.fused import OutputHead
from opd_stream.logprobs import HeadScores, head_scores
from opd_stream.store.codecs.hidden import PER_OCTAVE, StateBasis, step_of
from opd_stream.types import RolloutBatch, ScoreBatch

RIDGE = 1e-4  # of the mean of F's diagonal: directions that no token needs are kept all the same
LARGEST_STEP = 1.0  # in spreads of a typical channel: beyond, the second order says nothing
AIMED = 0.8  # of the bound, so that a unit of a few tokens holds it, too
CHECKED_TOKENS = 256  # of a unit, evenly spread
HALVINGS = 2  # of what is aimed at, before a unit is refused


class Rounded(NamedTuple):
    """Rounded states, and what that cost."""

    integers_NH: NDArray[np.int32]  # [N, 1 + H], the code of the step first
    kl_M: NDArray[np.float64]  # KL(true | rebuilt) of the tokens that were checked, nats


def exact_head(head: OutputHead) -> OutputHead:
    """The head in float32: rebuilt distributions are not rounded as those of 16-bit engines are."""
    bias_V = None if head.bias_V is None else head.bias_V.detach().float()
    return replace(head, weight_VH=head.weight_VH.detach().float(), bias_V=bias_V)


@torch.inference_mode()
def fit_basis(states_NH: NDArray[np.float32], head: OutputHead) -> StateBasis:
    """The basis of states like these under an exact head; any states do, alike ones best."""
    states = torch.as_tensor(states_NH, device=head.weight_VH.device)
    metric = _mean_metric(states, head).double()
    width = len(metric)
    metric += RIDGE * metric.trace() / width * torch.eye(width, device=metric.device).double()
    values, vectors = _eigh(metric)
    root = vectors * values.sqrt() @ vectors.t()
    mean_H = states.double().mean(0)
    spread = (states.double() - mean_H) @ root
    _, axes = _eigh(spread.t() @ spread)
    inverse_HH = axes.t() @ (vectors * values.rsqrt() @ vectors.t())
    return StateBasis(
        mean_H=mean_H.float().cpu().numpy(), inverse_HH=inverse_HH.float().cpu().numpy()
    )


def _mean_metric(states_NH: torch.Tensor, head: OutputHead) -> torch.Tensor:
    weight_VH = head.weight_VH * head.scale
    mass_V = torch.zeros_like(weight_VH[:, 0])
    outer_HH = weight_VH.new_zeros(weight_VH.shape[1], weight_VH.shape[1])
    for states in torch.split(states_NH, head.chunk_rows):
        p = head(states).softmax(1)
        mass_V += p.sum(0)
        mean = p @ weight_VH
        outer_HH.addmm_(mean.t(), mean)
    return ((weight_VH * mass_V[:, None]).t() @ weight_VH - outer_HH) / len(states_NH)


def _eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cast(Any, torch.linalg.eigh(symmetric))  # pyright: ignore[reportUnknownMemberType]


class StateRounding:
    """A basis under an exact head, ready to round states."""

    @torch.inference_mode()
    def __init__(self, basis: StateBasis, head: OutputHead) -> None:
        self._head, device = head, head.weight_VH.device
        inverse = torch.tensor(basis.inverse_HH, device=device)
        self._forward_HH = cast("torch.Tensor", torch.linalg.inv(inverse.double())).float()  # pyright: ignore
        self._inverse_HH, self._mean_H = inverse, torch.tensor(basis.mean_H, device=device)
        self._noise_HH = inverse.t() @ inverse * head.scale**2  # of unit noise in all coordinates
        self._noise_V = ((head.weight_VH @ self._noise_HH) * head.weight_VH).sum(1)

    @torch.inference_mode()
    def rounded(
        self, states_NH: NDArray[np.float32], *, max_kl: float, max_kl_p99: float
    ) -> Rounded:
        """States whose distributions are, in the mean, at most `max_kl` nats from the true ones.

        Both bounds are held on the tokens that are checked, if steps that are a little finer than
        expected can hold them; if not, the result says what was reached.
        """
        if not len(states_NH):
            empty = np.zeros((0, 1 + states_NH.shape[1]), np.int32)
            return Rounded(empty, np.zeros(0))
        states = torch.as_tensor(states_NH, device=self._head.weight_VH.device)
        every = max(1, -(-len(states) // CHECKED_TOKENS))
        true = states[::every]
        coordinates = (states - self._mean_H) @ self._forward_HH
        costs_N = self._costs(states)
        largest = LARGEST_STEP * float(coordinates.std(0, correction=0).median())
        for halving in range(HALVINGS + 1):
            aimed = AIMED * max_kl / 2**halving
            steps = (aimed / costs_N.clamp(min=1e-30)).sqrt().clamp(max=max(largest, 1e-6))
            codes_N = (PER_OCTAVE * steps.log2()).round().clamp(-127, 127)
            widths = torch.as_tensor(step_of(codes_N.cpu().numpy()), device=states.device)
            integers = (coordinates / widths[:, None]).round().clamp(-(2**30), 2**30)
            scaled = integers[::every] * widths[::every, None]
            kl_M = self._kl(true, scaled @ self._inverse_HH + self._mean_H)
            if kl_M.mean() <= max_kl and np.quantile(kl_M, 0.99) <= max_kl_p99:
                break
        whole = torch.cat([codes_N[:, None], integers], dim=1)  # pyright: ignore
        return Rounded(whole.to(torch.int32).cpu().numpy(), kl_M)  # pyright: ignore

    def _costs(self, states_NH: torch.Tensor) -> torch.Tensor:
        """Nats that a step of 1 costs each token: 1/24 of the trace of F times the noise."""
        found: list[torch.Tensor] = []
        for states in torch.split(states_NH, self._head.chunk_rows):
            p = torch.softmax(self._head(states), 1)
            mean = p @ self._head.weight_VH
            found.append(p @ self._noise_V - ((mean @ self._noise_HH) * mean).sum(1))
        return torch.cat(found).clamp(min=0) / 24

    def _kl(self, true_NH: torch.Tensor, rebuilt_NH: torch.Tensor) -> NDArray[np.float64]:
        found: list[torch.Tensor] = []
        rows = max(1, self._head.chunk_rows // 2)
        pairs = zip(torch.split(true_NH, rows), torch.split(rebuilt_NH, rows), strict=True)
        for true, rebuilt in pairs:
            left, right = (self._head(side).log_softmax(1) for side in (true, rebuilt))
            found.append((left.exp() * (left - right)).sum(1))
        return torch.cat(found).double().clamp(min=0).cpu().numpy()


def scores_of_states(
    hidden: HiddenStates, head: OutputHead, rollouts: RolloutBatch, settings: ScoringSettings
) -> ScoreBatch:
    """What an engine's `score` gives, from its hidden states and its exact head."""
    device = head.weight_VH.device
    asked = [ids.astype(np.int64)[:, None] for ids in rollouts.completion_ids]
    if rollouts.candidate_ids is not None:
        pairs = zip(asked, rollouts.candidate_ids, strict=True)
        asked = [np.concatenate([ids, more.astype(np.int64)], axis=1) for ids, more in pairs]
    scores = head_scores(
        torch.as_tensor(np.concatenate(hidden.states), device=device),
        head,
        asked_ids_NJ=torch.as_tensor(np.concatenate(asked), device=device),
        forced_ids_F=torch.tensor(settings.forced_ids, dtype=torch.long, device=device),
        top_k=settings.top_k,
        vocabulary=settings.vocabulary,
        chunk_rows=head.chunk_rows,
    )
    ends = np.cumsum([len(ids) for ids in asked])[:-1]
    columns = [getattr(scores, name).cpu().numpy() for name in HeadScores.__slots__]
    rows = [
        RowScores(*parts)
        for parts in zip(*(np.split(column, ends) for column in columns), strict=True)
    ]
    rows = [row._replace(top_ids=row.top_ids.astype(np.int32)) for row in rows]
    found = score_batch(rows, rollouts)
    return replace(
        found,
        teacher_states=tuple(
            states[:0] if row in found.refused else states
            for row, states in enumerate(hidden.states)
        ),
    )
