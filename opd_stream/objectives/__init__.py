"""Objectives: pure functions from one cache row and the current student to one loss a token.

    losses_N = token_losses((Bucket(direction="reverse"),), inputs)

All but two train from the columns that every ranked cache has, so the choice is made when training,
not when scoring. docs/objectives.md says what each computes, reads and cannot see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from opd_stream.objectives.dense import (
    bucket_forward,
    bucket_js,
    bucket_reverse,
    entropy_aware,
    lsm,
    skew_forward,
    skew_reverse,
)
from opd_stream.objectives.inputs import SMALLEST_LOGPROB, Draws, ObjectiveInputs
from opd_stream.objectives.sampled import drawn_forward, hybrid, mc, sampled_pg


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A divergence over K candidates and one tail bucket; `beta` belongs to direction js."""

    direction: Literal["reverse", "forward", "js"] = "reverse"
    beta: float = 0.5
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew:
    """KL to a mixture that holds a share alpha of its own left side."""

    direction: Literal["reverse", "forward"] = "reverse"
    alpha: float = 0.1
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lsm:
    """Reverse KL, both sides renormalised over the K candidates."""

    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hybrid:
    """The full reverse KL: bucket, and the sampled token where it lies outside."""

    importance_cap: float = 5.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledPg:
    """Policy gradient on the sampled token."""

    baseline: Literal["none", "bucket"] = "none"
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MonteCarlo:
    """Policy gradient on several draws."""

    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnForward:
    """Cross-entropy to ids drawn from the teacher."""

    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyAware:
    """Forward KL where the teacher's entropy is above a threshold, nats."""

    threshold: float = 0.67
    weight: float = 1.0


Objective = Bucket | Skew | Lsm | Hybrid | SampledPg | MonteCarlo | DrawnForward | EntropyAware

_KINDS: dict[str, type[Objective]] = {
    "bucket": Bucket,
    "skew": Skew,
    "lsm": Lsm,
    "hybrid": Hybrid,
    "sampled_pg": SampledPg,
    "mc": MonteCarlo,
    "drawn_forward": DrawnForward,
    "entropy_aware": EntropyAware,
}


def token_losses(objectives: Sequence[Objective], inputs: ObjectiveInputs) -> torch.Tensor:
    """The loss of each completion token [N], nats: the weighted sum of the objectives."""
    return torch.stack([part.weight * _losses(part, inputs) for part in objectives]).sum(0)


def tolerates_staleness(objectives: Sequence[Objective]) -> bool:
    """Whether stale rows leave the objectives what they are: no reverse KL among them.

    A reverse KL weighs positions and tokens by the current student, so rows of an older one teach
    it for prefixes it no longer writes; AsyncOPD (2606.24143) measured the forward KL flat and the
    reverse KL falling.
    """
    return all(
        isinstance(part, DrawnForward | EntropyAware)
        or (isinstance(part, Bucket | Skew) and part.direction == "forward")
        for part in objectives
    )


def build_objectives(settings: Sequence[dict[str, Any]]) -> tuple[Objective, ...]:
    """The objectives of a config section."""
    return tuple(
        _KINDS[part["kind"]](**{name: value for name, value in part.items() if name != "kind"})
        for part in settings
    )


def _losses(objective: Objective, inputs: ObjectiveInputs) -> torch.Tensor:
    match objective:
        case Bucket(direction="reverse") | Bucket(direction="js", beta=1.0):
            return bucket_reverse(inputs)
        case Bucket(direction="forward") | Bucket(direction="js", beta=0.0):
            return bucket_forward(inputs)
        case Bucket(beta=beta):
            return bucket_js(inputs, beta=beta)
        case Skew(direction="forward", alpha=alpha):
            return skew_forward(inputs, alpha=alpha)
        case Skew(alpha=alpha):
            return skew_reverse(inputs, alpha=alpha)
        case Lsm():
            return lsm(inputs)
        case Hybrid(importance_cap=cap):
            return hybrid(inputs, importance_cap=cap)
        case SampledPg(baseline=baseline):
            return sampled_pg(inputs, baseline=baseline)
        case MonteCarlo():
            return mc(inputs)
        case DrawnForward():
            return drawn_forward(inputs)
        case EntropyAware(threshold=threshold):
            return entropy_aware(inputs, threshold=threshold)


__all__ = [
    "SMALLEST_LOGPROB",
    "Bucket",
    "DrawnForward",
    "Draws",
    "EntropyAware",
    "Hybrid",
    "Lsm",
    "MonteCarlo",
    "Objective",
    "ObjectiveInputs",
    "SampledPg",
    "Skew",
    "build_objectives",
    "token_losses",
    "tolerates_staleness",
]
