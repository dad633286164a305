"""Extrapolation along the update direction (EffOPD): pure parts, without a trainer.

After optimizer step t = 2^n the weights may jump further along the way they came: candidates
W + 2 k (W - base), k = 1, 2, ..., are scored and the last one before the score stops rising, or
drift passes its bound, is kept. Nothing is trained, the optimizer's state stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from opd_stream.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from opd_stream.config.sections import Extrapolation

BLOCKS = re.compile(r"\.(self_attn|attn|attention|mlp|feed_forward)\.")
LAYER_NORM = "post_attention_layernorm"  # moves in the official code, whose names match "attention"
HELD_OUT_SHARE = 8  # one in so many rows, at most, scores points instead of training
LONGER = 0.05  # rise of the share of cut answers that undoes a jump: 3 of 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a point is worth; higher is better in both. None: not asked for."""

    reward: float | None = None
    kl: float | None = None  # minus KL(student || teacher) over candidates and tail, nats a token
    policy_drift: float | None = None
    is_within: bool = True  # the bounds on drift


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A search: the scores of k = 0, 1, ... and the k that was kept (0: rejected)."""

    step: int
    scores: tuple[Score, ...]
    kept: int


def is_due(step: int) -> bool:
    """Whether a search follows optimizer step `step` (counted from 1): powers of two."""
    return step > 0 and step & (step - 1) == 0


def is_better(candidate: Score, best: Score, acceptance: Literal["strict", "equal"]) -> bool:
    """Whether a candidate replaces the best point; with two signals neither may fall.

    A score that is not finite is below every other, and never accepted; nor is a point whose drift
    passed its bound.
    """
    if not candidate.is_within:
        return False
    pairs = [
        (ours, theirs if math.isfinite(theirs) else -math.inf)
        for ours, theirs in ((candidate.reward, best.reward), (candidate.kl, best.kl))
        if ours is not None and theirs is not None
    ]
    if any(not math.isfinite(ours) or ours < theirs for ours, theirs in pairs):
        return False
    return acceptance == "equal" or any(ours > theirs for ours, theirs in pairs)


def moved_parameters(
    named: Iterator[tuple[str, Parameter]], which: Literal["matrices", "official"] = "matrices"
) -> dict[str, Parameter]:
    """The parameters that an extrapolation moves: trained matrices of attention and MLP.

    Embeddings, norms and the head stay. `official` moves what the names in the official code match:
    beside these matrices their biases, the norms of queries and keys, and
    `post_attention_layernorm`. A LoRA product B A is bilinear, so only its factor B moves: the
    product then moves along a straight line.

    Raises:
        UserError: there are none.
    """
    found = {name: p for name, p in named if p.requires_grad}
    moved = {name: p for name, p in found.items() if ".lora_B." in name and p.ndim == 2}
    if not moved and which == "matrices":
        moved = {
            name: p
            for name, p in found.items()
            if p.ndim == 2 and BLOCKS.search(name) and name.endswith("weight")
        }
    elif not moved:
        moved = {n: p for n, p in found.items() if BLOCKS.search(n) or LAYER_NORM in n}
    if not moved:
        raise UserError(
            "train.extrapolation finds no matrix of attention or MLP among the student's "
            f"parameters (the first: {next(iter(found), 'none trains')}); leave it out"
        )
    return moved


def held_out_rows(rows: float, settings: Extrapolation | None) -> float:
    """How many of a round's rows score points instead of training, where whole prompts allow it."""
    if settings is None or settings.signal == "reward":
        return 0
    return max(1, min(settings.rows, rows // HELD_OUT_SHARE))


def search(
    parameters: Sequence[Tensor],
    bases: Sequence[Tensor],
    score: Callable[[], Score],
    *,
    step: int,
    settings: Extrapolation,
) -> Outcome:
    """Move the parameters to the best candidate; exactly where they were if none is better.

    Element-wise, so every process moves its own shard; `score` must agree between processes.
    """
    import torch

    with torch.no_grad():
        start = [parameter.detach().clone() for parameter in parameters]
        scores, kept = [score()], 0
        for k in range(1, settings.candidates + 1):
            _place(parameters, start, bases, k)
            scores.append(score())
            if not is_better(scores[-1], scores[kept], settings.acceptance):
                break
            kept = k
        _place(parameters, start, bases, kept)
    return Outcome(step=step, scores=tuple(scores), kept=kept)


def _place(
    parameters: Sequence[Tensor],
    start: Sequence[Tensor],
    bases: Sequence[Tensor],
    k: int,
) -> None:
    """W + 2 k (W - base), differenced in float32; k = 0 copies W back bit for bit."""
    for parameter, now, base in zip(parameters, start, bases, strict=True):
        if k == 0:
            parameter.copy_(now)
        else:
            parameter.copy_(now.float() + 2 * k * (now.float() - base.float()))
