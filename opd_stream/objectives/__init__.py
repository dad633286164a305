"""Objectives: pure functions from one cache row and the current student to one loss a token.

    losses_N = token_losses(Bucket(direction="reverse"), inputs)

All of them train from the same cached columns, so the choice is made when training, not when
scoring. docs/objectives.md says what each computes and cannot see.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from opd_stream.objectives.dense import bucket_forward, bucket_reverse, lsm
from opd_stream.objectives.inputs import SMALLEST_LOGPROB, ObjectiveInputs
from opd_stream.objectives.sampled import drawn_forward, sampled_pg


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """KL over K candidates and one tail bucket."""

    direction: Literal["reverse", "forward"] = "reverse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lsm:
    """Reverse KL, both sides renormalised over the K candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnForward:
    """Cross-entropy to ids drawn from the teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledPg:
    """Policy gradient on the sampled token."""


Objective = Bucket | Lsm | DrawnForward | SampledPg


def token_losses(objective: Objective, inputs: ObjectiveInputs) -> torch.Tensor:
    """The loss of each completion token [N], nats."""
    match objective:
        case Bucket(direction="reverse"):
            return bucket_reverse(inputs)
        case Bucket():
            return bucket_forward(inputs)
        case Lsm():
            return lsm(inputs)
        case DrawnForward():
            return drawn_forward(inputs)
        case SampledPg():
            return sampled_pg(inputs)


def build_objective(*, kind: str, **settings: Any) -> Objective:
    """The objective of a config section."""
    kinds = {
        "bucket": Bucket,
        "lsm": Lsm,
        "drawn_forward": DrawnForward,
        "sampled_pg": SampledPg,
    }
    return kinds[kind](**settings)


__all__ = [
    "SMALLEST_LOGPROB",
    "Bucket",
    "DrawnForward",
    "Lsm",
    "Objective",
    "ObjectiveInputs",
    "SampledPg",
    "build_objective",
    "token_losses",
]
