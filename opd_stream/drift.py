"""What every training step measures, as sums: they add over micro-batches, ranks, steps and epochs.

One sign everywhere: d = student_logprobs - behavior_logprobs on the sampled tokens, how far the
student has moved from the weights that wrote the rollouts. One vector in float64, so a step costs
one transfer from the device and one reduction over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_DIFFERENCE = 20.0  # nats; caps |d| before the exponential


@dataclass(frozen=True, slots=True)
class DriftSums:
    """Additive statistics of d over tokens.

    Example:
        >>> (drift_sums(now, then) + drift_sums(now_too, then_too)).policy_drift
        0.0123
    """

    tokens: float = 0.0
    k3: float = 0.0  # sum of exp(d) - 1 - d
    signed: float = 0.0  # sum of d
    absolute: float = 0.0  # sum of |d|
    squared: float = 0.0  # sum of d^2
    weight: float = 0.0  # sum of exp(d)
    weight_squared: float = 0.0  # sum of exp(2 d)

    def __add__(self, other: DriftSums) -> DriftSums:
        mine, others = self.as_dict(), other.as_dict()
        return DriftSums(**{name: mine[name] + others[name] for name in mine})

    @property
    def policy_drift(self) -> float:
        """Mean of exp(d) - 1 - d: unbiased for KL(behavior || student) per token, nats, >= 0."""
        return self.k3 / self.tokens if self.tokens else 0.0

    @property
    def signed_mean(self) -> float:
        """Mean of d: estimates -KL(behavior || student); shifts of opposite sign cancel."""
        return self.signed / self.tokens if self.tokens else 0.0

    @property
    def absolute_mean(self) -> float:
        """Mean of |d|, nats."""
        return self.absolute / self.tokens if self.tokens else 0.0

    @property
    def root_mean_square(self) -> float:
        """Root of the mean of d^2, nats."""
        return (self.squared / self.tokens) ** 0.5 if self.tokens else 0.0

    @property
    def effective_sample_fraction(self) -> float:
        """(sum w)^2 / (n sum w^2), w = exp(d): 1 = fresh, 1 / n = one token carries everything."""
        if not self.tokens:
            return 1.0
        return self.weight**2 / (self.tokens * self.weight_squared)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(value: dict[str, float]) -> DriftSums:
        """From JSON."""
        return DriftSums(**{field.name: value.get(field.name, 0.0) for field in fields(DriftSums)})


LARGEST_IMPORTANCE = 5.0  # p / b above it is counted as capped
ABSOLUTE_EDGES = tuple(float(edge) for edge in np.geomspace(1e-4, 32, 27))  # nats, |reverse_kl|
WEIGHT_BINS = 21  # of drift weights: bin b holds b / 20 up to the next
POSITION_BINS = 14  # bin b holds places 2^b - 1 to 2^(b + 1) - 2 of a completion

_MEANS = (
    "loss",
    "reverse_kl",
    "student_top_mass",
    "teacher_top_mass",
    "student_entropy",
    "teacher_entropy",
    "capped_importance",
    "block_drift",
    "seen_kl",
    "unseen_kl",
)
_DRIFT = tuple(f"drift.{name}" for name in DriftSums.__dataclass_fields__)
_ABSOLUTE = tuple(f"absolute.{bin_}" for bin_ in range(len(ABSOLUTE_EDGES) + 1))
_POSITIONS = {  # of what a place of a completion holds
    name: tuple(f"position_{name}.{bin_}" for bin_ in range(POSITION_BINS))
    for name in ("tokens", "reverse_kl", "k3", "entropy")
}
_WEIGHTS = tuple(f"weight.{bin_}" for bin_ in range(WEIGHT_BINS))
NAMES = (
    "tokens",
    "row_tokens",
    "row_pairs",
    "drift_weight",
    "drift_weight_squared",
    "overlap",
    "overlap_tokens",
    *_MEANS,
    *_DRIFT,
    *_ABSOLUTE,
    *(name for names in _POSITIONS.values() for name in names),
    *_WEIGHTS,
    "given_tokens",
    "given_loss",
)
# What counts of rows that are not the student's, which have no drift and are no draws of it.
_OF_GIVEN = {"tokens", "row_tokens", "row_pairs", "drift_weight", "drift_weight_squared", "loss"}


def drift_sums(student_logprobs_N: Tensor, behavior_logprobs_N: Tensor) -> DriftSums:
    """The sums of N tokens, in float64."""
    everything = student_logprobs_N.new_ones(len(student_logprobs_N)).double()
    sums = drift_tensor(student_logprobs_N, behavior_logprobs_N, everything)
    values = cast("list[float]", sums.tolist())  # pyright: ignore[reportUnknownMemberType]
    return DriftSums(*values)


def drift_tensor(
    student_logprobs_N: Tensor, behavior_logprobs_N: Tensor, counted_N: Tensor
) -> Tensor:
    """The same as one vector in the order of the fields; `counted_N` is 1.0 or 0.0 for a token."""
    import torch

    d = (student_logprobs_N.detach().double() - behavior_logprobs_N.double()).clamp(
        -LARGEST_DIFFERENCE, LARGEST_DIFFERENCE
    )
    d, weight = d * counted_N, d.exp() * counted_N
    k3 = d.expm1() - d
    columns = [counted_N, k3, d, d.abs(), d * d, weight, weight * weight]
    return torch.stack(columns).sum(1)


def group_means(values_N: Tensor, group_N: Tensor) -> Tensor:
    """Mean of each group, at each of its tokens [N]."""
    groups = int(group_N.max()) + 1 if len(group_N) else 0
    sums = values_N.new_zeros(groups).index_add(0, group_N, values_N)
    counts = values_N.new_zeros(groups).index_add(0, group_N, values_N.new_ones(len(values_N)))
    return (sums / counts.clamp(min=1))[group_N]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTokens:
    """N tokens of B rows, as a step measures them; log-probabilities and entropies in nats."""

    row_tokens_B: Tensor  # prompt and completion together
    losses_N: Tensor
    counted_N: Tensor  # bool: nothing else of the N is counted
    drift_weights_N: Tensor  # of gate and freshness, before normalisation
    student_logprobs_N: Tensor
    behavior_logprobs_N: Tensor
    reverse_kl_N: Tensor
    student_top_mass_N: Tensor
    teacher_top_mass_N: Tensor
    seen_kl_N: Tensor  # reverse KL over candidates and tail
    unseen_kl_N: Tensor  # estimate of what is missing to the full one
    student_entropy_N: Tensor
    teacher_entropy_N: Tensor
    overlap_M: Tensor  # share of the student's own candidates among the teacher's, of a sample
    positions_N: Tensor  # from 0 in each completion
    block_N: Tensor  # of the gate
    is_given: bool = False  # the rows are not the student's


def step_sums(of: MeasuredTokens) -> Tensor:
    """The sums, in the order of `NAMES`."""
    import torch

    with torch.no_grad():
        counted_N = of.counted_N.double()
        drift_N = of.drift_weights_N.double() * counted_N
        read_B = of.row_tokens_B * counted_N.any()  # a row without weight fills up a process
        d_N = of.student_logprobs_N - of.behavior_logprobs_N
        d_N = d_N.clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
        columns = [
            of.losses_N,
            of.reverse_kl_N,
            of.student_top_mass_N,
            of.teacher_top_mass_N,
            of.student_entropy_N,
            of.teacher_entropy_N,
            (d_N.exp() > LARGEST_IMPORTANCE).to(of.losses_N.dtype),
            group_means(d_N, of.block_N).abs(),
            of.seen_kl_N,
            of.unseen_kl_N,
        ]
        totals = [
            counted_N.sum(),
            read_B.sum(),
            (read_B * (read_B + 1) / 2).sum(),
            drift_N.sum(),
            drift_N.square().sum(),
            of.overlap_M.double().sum(),
            counted_N.new_tensor(len(of.overlap_M)),
        ]
        sums = torch.cat(
            [
                torch.stack(totals),
                torch.where(counted_N > 0, torch.stack(columns).double(), 0.0).sum(1),
                drift_tensor(of.student_logprobs_N, of.behavior_logprobs_N, counted_N),
                *_histograms(of, counted_N, d_N.double()),
                counted_N.new_zeros(2),
            ]
        )
        return _given_sums(sums) if of.is_given else sums


def _given_sums(sums: Tensor) -> Tensor:
    """What counts of the sums of given rows."""
    import torch

    counts = torch.tensor([name in _OF_GIVEN for name in NAMES], device=sums.device)
    sums = torch.where(counts, sums, 0.0)
    sums[-2], sums[-1] = sums[NAMES.index("tokens")], sums[NAMES.index("loss")]
    return sums


def _histograms(of: MeasuredTokens, counted_N: Tensor, d_N: Tensor) -> list[Tensor]:
    """Sums over bins: of |reverse_kl|, of places, of drift weights."""
    import torch

    def sums(values_N: Tensor, bin_N: Tensor, bins: int) -> Tensor:
        return values_N.new_zeros(bins).index_add(0, bin_N, values_N)

    edges = torch.tensor(ABSOLUTE_EDGES, device=counted_N.device, dtype=of.reverse_kl_N.dtype)
    place_N = (of.positions_N + 1).log2().long().clamp(max=POSITION_BINS - 1)
    weight_N = (of.drift_weights_N * (WEIGHT_BINS - 1)).long().clamp(0, WEIGHT_BINS - 1)
    at_places = [
        counted_N,
        of.reverse_kl_N.double() * counted_N,
        (d_N.expm1() - d_N) * counted_N,
        torch.where(counted_N > 0, of.teacher_entropy_N.double(), 0.0),
    ]
    return [
        sums(counted_N, torch.bucketize(of.reverse_kl_N.abs(), edges), len(_ABSOLUTE)),
        *(sums(values_N, place_N, POSITION_BINS) for values_N in at_places),
        sums(counted_N, weight_N, WEIGHT_BINS),
    ]


def ratio_error(values: Sequence[float], counts: Sequence[float]) -> float:
    """Standard error of sum(values) / sum(counts), where a pair is what one row adds to both."""
    if len(values) < 2:
        return 0.0
    of, by = np.asarray(values, np.float64), np.asarray(counts, np.float64)
    left = of - of.sum() / by.sum() * by
    return float(np.sqrt((left @ left) * len(of) / (len(of) - 1)) / by.sum())


def distance_sum(sums: Mapping[str, float]) -> float:
    """Sum over tokens of log behavior - log teacher, an estimate of KL(behavior || teacher)."""
    return sums["reverse_kl"] - drift_of(sums).signed


def named(sums: Tensor) -> dict[str, float]:
    """The vector with its names."""
    values = cast("list[float]", sums.tolist())  # pyright: ignore[reportUnknownMemberType]
    return dict(zip(NAMES, values, strict=True))


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per token: what a line of metrics or an epoch's record shows.

    Loss and weights are of all tokens, everything else of those that the student wrote.
    """
    tokens, given = max(sums["tokens"], 1.0), sums.get("given_tokens", 0.0)
    drift = drift_of(sums)
    own = max(sums["tokens"] - given, 1.0)
    mean_weight = sums["drift_weight"] / tokens
    return {
        **{name: sums[name] / (tokens if name == "loss" else own) for name in _MEANS},
        **({"given_loss": sums["given_loss"] / given} if given else {}),
        **absolute_percentiles(sums),
        "overlap": sums["overlap"] / max(sums["overlap_tokens"], 1.0),
        "mean_drift_weight": mean_weight,
        "drift_weight_spread": max(sums["drift_weight_squared"] / tokens - mean_weight**2, 0.0)
        ** 0.5,
        **_weight_range(sums),
        "policy_drift": drift.policy_drift,
        "mean_d": drift.signed_mean,
        "mean_absolute_d": drift.absolute_mean,
        "rms_d": drift.root_mean_square,
        "effective_sample_fraction": drift.effective_sample_fraction,
    }


def absolute_percentiles(sums: Mapping[str, float]) -> dict[str, float]:
    """Upper edges of the bins in which percentiles of |reverse_kl| lie, nats."""
    counts: NDArray[np.float64] = np.array([sums[name] for name in _ABSOLUTE]).cumsum()
    edges = [*ABSOLUTE_EDGES, float("inf")]
    found: dict[str, float] = {}
    for percent in (50, 90, 99):
        place = int(np.searchsorted(counts, percent / 100 * float(counts[-1])))
        found[f"absolute_reverse_kl_p{percent}"] = edges[min(place, len(ABSOLUTE_EDGES) - 1)]
    return found


def _weight_range(sums: Mapping[str, float]) -> dict[str, float]:
    """Least and greatest drift weight before normalisation, to the bins' width."""
    filled = [bin_ for bin_, name in enumerate(_WEIGHTS) if sums[name]] or [WEIGHT_BINS - 1]
    width = 1 / (WEIGHT_BINS - 1)
    return {"least_drift_weight": filled[0] * width, "greatest_drift_weight": filled[-1] * width}


def by_position(sums: Mapping[str, float]) -> list[dict[str, Any]]:
    """Means over the places of each bin that has any tokens."""
    return [
        {
            "first": 2**bin_ - 1,
            "tokens": int(sums[tokens]),
            "reverse_kl": sums[total] / sums[tokens],
            "policy_drift": sums[k3] / sums[tokens],
            "teacher_entropy": sums[entropy] / sums[tokens],
        }
        for bin_, (tokens, total, k3, entropy) in enumerate(zip(*_POSITIONS.values(), strict=True))
        if sums[tokens]
    ]


def drift_of(sums: Mapping[str, float]) -> DriftSums:
    """The drift among the sums."""
    return DriftSums.from_dict({name.removeprefix("drift."): sums[name] for name in _DRIFT})
