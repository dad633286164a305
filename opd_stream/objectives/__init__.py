"""Objectives: from one cache row and the current student to one loss a token.

    losses_N = token_losses((Bucket(direction="reverse"),), inputs)

Each is declared once, as the section of the config that names it, with its loss as a method. All
but two train from the columns that every ranked cache has, so the choice is made when training, not
when scoring. docs/objectives.md says what each computes, reads and cannot see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from opd_stream.objectives.base import (
    SMALLEST_LOGPROB,
    Draws,
    Objective,
    ObjectiveInputs,
    kl,
    outcomes,
)
from opd_stream.objectives.dense import Bucket, EntropyAware, Lsm, Skew
from opd_stream.objectives.sampled import DrawnForward, Hybrid, MonteCarlo, SampledPg
from opd_stream.section import Kinds

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SMALLEST_LOGPROB",
    "AnyObjective",
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
    "kl",
    "outcomes",
    "token_losses",
    "tolerates_staleness",
]

AnyObjective = Annotated[
    Objective,
    Kinds(
        Bucket,
        Skew,
        Lsm,
        Hybrid,
        SampledPg,
        MonteCarlo,
        DrawnForward,
        EntropyAware,
        group="opd_stream.objectives",
    ),
]


def token_losses(objectives: Sequence[Objective], inputs: ObjectiveInputs) -> Tensor:
    """The loss of each completion token [N], nats: the weighted sum of the objectives."""
    import torch

    return torch.stack([part.weight * part.token_losses(inputs) for part in objectives]).sum(0)


def tolerates_staleness(objectives: Sequence[Objective]) -> bool:
    """Whether stale rows leave the objectives what they are: no reverse KL among them."""
    return all(part.tolerates_staleness for part in objectives)
