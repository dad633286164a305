"""What every training step measures, as sums: they add over micro-batches, ranks, steps and epochs.

One vector in float64, so a step costs one transfer from the device, and one reduction over ranks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from opd_stream.drift import DriftSums, drift_tensor

LARGEST_IMPORTANCE = 5.0  # p / b above it is counted as capped
ABSOLUTE_EDGES = tuple(float(edge) for edge in np.geomspace(1e-4, 32, 27))  # nats, |reverse_kl|
POSITION_BINS = 14  # bin b holds places 2^b - 1 to 2^(b + 1) - 2 of a completion

_MEANS = (
    "loss",
    "reverse_kl",
    "student_top_mass",
    "teacher_top_mass",
    "student_entropy",
    "teacher_entropy",
    "capped_importance",
)
_DRIFT = tuple(f"drift.{name}" for name in DriftSums.__dataclass_fields__)
_ABSOLUTE = tuple(f"absolute.{bin_}" for bin_ in range(len(ABSOLUTE_EDGES) + 1))
_POSITION_TOKENS = tuple(f"position_tokens.{bin_}" for bin_ in range(POSITION_BINS))
_POSITION_SUMS = tuple(f"position_reverse_kl.{bin_}" for bin_ in range(POSITION_BINS))
NAMES = (
    "tokens",
    "drift_weight",
    "drift_weight_squared",
    "overlap",
    "overlap_tokens",
    *_MEANS,
    *_DRIFT,
    *_ABSOLUTE,
    *_POSITION_TOKENS,
    *_POSITION_SUMS,
)


@torch.no_grad()
def step_sums(
    *,
    losses_N: torch.Tensor,
    counted_N: torch.Tensor,
    drift_weights_N: torch.Tensor,
    student_logprobs_N: torch.Tensor,
    behavior_logprobs_N: torch.Tensor,
    reverse_kl_N: torch.Tensor,
    student_top_mass_N: torch.Tensor,
    teacher_top_mass_N: torch.Tensor,
    student_entropy_N: torch.Tensor,
    teacher_entropy_N: torch.Tensor,
    overlap_M: torch.Tensor,
    positions_N: torch.Tensor,
) -> torch.Tensor:
    """The sums of N tokens, in the order of `NAMES`.

    Only tokens of `counted_N` are. Drift weights are those of gate and freshness, before
    normalisation. `overlap_M` is the share of the student's own candidates
    among the teacher's, on a sample of M tokens; positions count from 0 in each completion.
    """
    counted_N = counted_N.double()
    drift_N = drift_weights_N.double() * counted_N
    importance_N = (student_logprobs_N - behavior_logprobs_N).exp()
    columns = torch.stack(
        [
            losses_N,
            reverse_kl_N,
            student_top_mass_N,
            teacher_top_mass_N,
            student_entropy_N,
            teacher_entropy_N,
            (importance_N > LARGEST_IMPORTANCE).to(losses_N.dtype),
        ]
    ).double()
    edges = torch.tensor(ABSOLUTE_EDGES, device=losses_N.device, dtype=reverse_kl_N.dtype)
    absolute_N = torch.bucketize(reverse_kl_N.abs(), edges)
    place_N = (positions_N + 1).log2().long().clamp(max=POSITION_BINS - 1)
    zeros = counted_N.new_zeros
    return torch.cat(
        [
            torch.stack(
                [counted_N.sum(), drift_N.sum(), drift_N.square().sum(), overlap_M.double().sum()]
            ),
            counted_N.new_tensor([len(overlap_M)]),
            torch.where(counted_N > 0, columns, 0.0).sum(1),
            drift_tensor(student_logprobs_N, behavior_logprobs_N, counted_N),
            zeros(len(_ABSOLUTE)).index_add(0, absolute_N, counted_N),
            zeros(POSITION_BINS).index_add(0, place_N, counted_N),
            zeros(POSITION_BINS).index_add(0, place_N, reverse_kl_N.double() * counted_N),
        ]
    )


def named(sums: torch.Tensor) -> dict[str, float]:
    """The vector with its names."""
    return dict(zip(NAMES, sums.tolist(), strict=True))


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per token: what a line of metrics or an epoch's record shows."""
    tokens = max(sums["tokens"], 1.0)
    drift = drift_of(sums)
    mean_weight = sums["drift_weight"] / tokens
    return {
        **{name: sums[name] / tokens for name in _MEANS},
        **absolute_percentiles(sums),
        "overlap": sums["overlap"] / max(sums["overlap_tokens"], 1.0),
        "mean_drift_weight": mean_weight,
        "drift_weight_spread": max(sums["drift_weight_squared"] / tokens - mean_weight**2, 0.0)
        ** 0.5,
        "policy_drift": drift.policy_drift,
        "mean_absolute_d": drift.absolute_mean,
        "effective_sample_fraction": drift.effective_sample_fraction,
    }


def absolute_percentiles(sums: Mapping[str, float]) -> dict[str, float]:
    """Upper edges of the bins in which percentiles of |reverse_kl| lie, nats."""
    counts = np.array([sums[name] for name in _ABSOLUTE]).cumsum()
    edges = [*ABSOLUTE_EDGES, float("inf")]
    found: dict[str, float] = {}
    for percent in (50, 90, 99):
        place = int(np.searchsorted(counts, percent / 100 * counts[-1]))
        found[f"absolute_reverse_kl_p{percent}"] = edges[min(place, len(ABSOLUTE_EDGES) - 1)]
    return found


def reverse_kl_by_position(sums: Mapping[str, float]) -> list[dict[str, Any]]:
    """Mean reverse_kl of the places of each bin that has any."""
    return [
        {
            "first": 2**bin_ - 1,
            "tokens": int(sums[tokens]),
            "reverse_kl": sums[total] / sums[tokens],
        }
        for bin_, (tokens, total) in enumerate(zip(_POSITION_TOKENS, _POSITION_SUMS, strict=True))
        if sums[tokens]
    ]


def drift_of(sums: Mapping[str, float]) -> DriftSums:
    """The drift among the sums."""
    return DriftSums.from_dict({name.removeprefix("drift."): sums[name] for name in _DRIFT})
