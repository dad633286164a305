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
from opd_stream.engines.head import from_numpy
from opd_stream.fused import OutputHead
from opd_stream.logprobs import HeadScores, head_scores
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs.columns import widened
from opd_stream.store.codecs.hidden import PER_OCTAVE, StateBasis, step_of
from opd_stream.types import RolloutBatch, ScoreBatch

RIDGE = 1e-4  # of the mean of F's diagonal: directions that no token needs are kept all the same
LARGEST_STEP = 0.5  # in root mean square spreads: beyond, the second order says little
AIMED = 0.8  # of the bound of the mean, so that a unit of a few tokens holds it, too
HALVINGS = 4  # of the step of a token that loses too much, before a unit is refused


class Rounded(NamedTuple):
    """Rounded states, and what that cost."""

    integers_NH: NDArray[np.int32]  # [N, 1 + H], the code of the step first
    kl_N: NDArray[np.float64]  # KL(true | rebuilt), nats


def exact_head(head: OutputHead) -> OutputHead:
    """The head in float32: rebuilt distributions are not rounded as those of 16-bit engines are."""
    bias_V = None if head.bias_V is None else head.bias_V.detach().float()
    return replace(head, weight_VH=head.weight_VH.detach().float(), bias_V=bias_V)


def read_head(artifact: Artifact, device: str = "cpu") -> OutputHead:
    """The head that a complete artifact holds.

    Raises:
        DamagedUnit: a shard is not what was committed.
    """
    tables = [artifact.read_unit(unit) for unit in artifact.units()]
    said = {
        key.decode(): value.decode() for key, value in (tables[0].schema.metadata or {}).items()
    }
    dtype = getattr(torch, said["dtype"])

    def whole(name: str) -> torch.Tensor:
        parts = [
            widened(chunk.flatten().to_numpy(zero_copy_only=False))
            for table in tables
            for chunk in table[name].chunks
        ]
        return from_numpy(np.concatenate(parts), torch.device(device)).to(dtype)

    return OutputHead(
        weight_VH=whole("weight").view(-1, int(said["width"])),
        bias_V=whole("bias") if "bias" in tables[0].column_names else None,
        scale=float(said["scale"]),
        cap=float(said["cap"]) if "cap" in said else None,
    )


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
        mean_H=mean_H.float().cpu().numpy(),
        inverse_HH=inverse_HH.float().cpu().numpy(),
        largest_step=max(LARGEST_STEP * float(spread.square().mean().sqrt()), 1e-6),
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
        self._largest_step = basis.largest_step
        inverse = torch.tensor(basis.inverse_HH, device=device)
        self._forward_HH = cast("torch.Tensor", torch.linalg.inv(inverse.double())).float()  # pyright: ignore
        self._inverse_HH, self._mean_H = inverse, torch.tensor(basis.mean_H, device=device)
        self._noise_HH = inverse.t() @ inverse * head.scale**2  # of unit noise in all coordinates
        self._noise_V = ((head.weight_VH @ self._noise_HH) * head.weight_VH).sum(1)

    @torch.inference_mode()
    def rounded(
        self, states_NH: NDArray[np.float32], *, max_kl: float, max_kl_p99: float
    ) -> Rounded:
        """States whose distributions are at most so far from the true ones, as far as steps help.

        What rounding costs is measured for every token. One that loses more than `max_kl_p99` is
        rounded again, finer, and where the mean is above `max_kl` those above it are, too: only
        few tokens or a very curved head need that.
        """
        states = torch.as_tensor(states_NH, device=self._head.weight_VH.device)
        integers, kl_N = self._rounded(states, aimed=AIMED * max_kl)
        for limit, is_mean in ((max_kl_p99, False), (max_kl, True)):
            for _ in range(HALVINGS):
                is_worse = kl_N > limit
                if not is_worse.any() or (is_mean and kl_N.mean() <= max_kl):
                    break
                finer = integers[is_worse, 0] - PER_OCTAVE
                integers[is_worse], kl_N[is_worse] = self._rounded(states[is_worse], codes_N=finer)
        return Rounded(integers.cpu().numpy(), kl_N.double().clamp(min=0).cpu().numpy())

    def _rounded(
        self,
        states_NH: torch.Tensor,
        *,
        aimed: float = 0.0,
        codes_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers behind the codes of steps [N, 1 + H], and what they cost [N], nats.

        The codes are given, or those at which each token is expected to lose what is aimed at.
        """
        tokens, width = states_NH.shape
        found = torch.empty(tokens, 1 + width, dtype=torch.int32, device=states_NH.device)
        kl_N = torch.empty(tokens, device=states_NH.device)
        rows = max(1, self._head.chunk_rows // 2)  # both distributions at one time
        for start in range(0, tokens, rows):
            chunk = slice(start, start + rows)
            true = self._head(states_NH[chunk]).log_softmax(1)
            p = true.exp()
            codes = self._codes(p, aimed) if codes_N is None else codes_N[chunk].float()
            codes = codes.clamp(-127, 127)
            steps = torch.as_tensor(step_of(codes.cpu().numpy()), device=codes.device)[:, None]
            coordinates = (states_NH[chunk] - self._mean_H) @ self._forward_HH
            integers = (coordinates / steps).round().clamp(-(2**30), 2**30)
            rebuilt = integers * steps @ self._inverse_HH + self._mean_H
            kl_N[chunk] = p.mul_(true - self._head(rebuilt).log_softmax(1)).sum(1)
            found[chunk, 0], found[chunk, 1:] = codes.int(), integers.int()
        return found, kl_N

    def _codes(self, p_NV: torch.Tensor, aimed: float) -> torch.Tensor:
        """Codes of steps [N]: one of 1 costs a token 1/24 of the trace of F times the noise."""
        mean = p_NV @ self._head.weight_VH
        traces_N = p_NV @ self._noise_V - ((mean @ self._noise_HH) * mean).sum(1)
        steps = (24 * aimed / traces_N.clamp(min=1e-30)).sqrt().clamp(max=self._largest_step)
        return (PER_OCTAVE * steps.log2()).round()


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
