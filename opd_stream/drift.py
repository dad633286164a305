"""How far the student has moved from the weights that wrote the rollouts.

One sign everywhere: d = student_logprobs - behavior_logprobs on the sampled tokens. Everything is
kept as sums, so micro-batches, epochs and units add up exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, cast

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


def drift_sums(student_logprobs_N: Tensor, behavior_logprobs_N: Tensor) -> DriftSums:
    """The sums of N tokens, in float64."""
    everything = student_logprobs_N.new_ones(len(student_logprobs_N)).double()
    sums = drift_tensor(student_logprobs_N, behavior_logprobs_N, everything)
    values = cast("list[float]", sums.tolist())  # pyright: ignore[reportUnknownMemberType]
    return DriftSums(*values)


def drift_tensor(
    student_logprobs_N: Tensor,
    behavior_logprobs_N: Tensor,
    counted_N: Tensor,
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
