"""pass@k and avg@n of an evaluation, with bootstrap intervals, of one policy or of two.

pass@k is the chance that at least one of k samples is right, estimated without bias (2107.03374,
eq. 1); avg@n, the mean over all n samples, is pass@1 estimated from n samples. Intervals resample
problems: both the choice of problems and the draw of answers show in how problems differ.

Shapes: P problems, M values of each (one for each k), R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

POWERS = (1, 2, 4, 8, 16, 32, 64)
RESAMPLES_AT_ONCE = 200

Interval = tuple[float, float]


def pass_at_k(correct: Sequence[int], *, samples: int, k: int) -> float:
    """Mean over problems of 1 - C(n - c, k) / C(n, k).

    Args:
        correct: right samples of each problem, c.
        samples: samples of each problem, n.
        k: at most `samples`.

    Raises:
        ValueError: k is larger than the number of samples.
    """
    return sum(_pass_at_k_of_each(correct, samples, k)) / len(correct)


def _pass_at_k_of_each(correct: Sequence[int], samples: int, k: int) -> list[float]:
    if k > samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem; there are {samples}")
    return [1 - comb(samples - right, k) / comb(samples, k) for right in correct]


def default_ks(samples: int) -> tuple[int, ...]:
    """The k that are shown when nobody asks for others."""
    return tuple(k for k in POWERS if k <= samples)


def standard_error(correct: Sequence[int], *, samples: int) -> float:
    """Standard error of pass@1 over problems; 0 for a single problem."""
    rates = [right / samples for right in correct]
    mean = sum(rates) / len(rates)
    if len(rates) < 2:
        return 0.0
    return sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1) / len(rates))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How intervals are made; the same settings give the same interval.

    Example:
        >>> Bootstrap(confidence=0.9).intervals([[[0.0], [1.0], [1.0]]])
    """

    confidence: float = 0.95
    resamples: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1:
            raise ValueError(
                f"confidence {self.confidence} and resamples {self.resamples}; expected a share "
                "between 0 and 1, and at least one resample"
            )

    def intervals(self, groups: Sequence[ArrayLike]) -> list[Interval]:
        """Percentile intervals of M means, each the mean over groups of the mean over problems.

        Args:
            groups: arrays [P, M], one for each set of problems; P may differ, M may not.

        Raises:
            ValueError: there is no group, or one without problems.
        """
        arrays = [np.asarray(group, dtype=np.float64) for group in groups]
        if not arrays or any(array.ndim != 2 or not len(array) for array in arrays):
            raise ValueError("expected at least one group of shape [P, M] with problems")
        tail = (1 - self.confidence) / 2
        means_RM = np.mean([self._means(each, number) for number, each in enumerate(arrays)], 0)
        low_M, high_M = np.quantile(means_RM, [tail, 1 - tail], axis=0)
        return list(zip(low_M.tolist(), high_M.tolist(), strict=True))

    def _means(self, values_PM: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        """The means over problems drawn with replacement [R, M]."""
        problems = len(values_PM)
        random = np.random.default_rng([self.seed, number])
        parts: list[NDArray[np.float64]] = []
        for start in range(0, self.resamples, RESAMPLES_AT_ONCE):
            size = min(RESAMPLES_AT_ONCE, self.resamples - start)
            parts.append(values_PM[random.integers(problems, size=(size, problems))].mean(1))
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How often a policy was right on one set of problems.

    Example:
        >>> Counts(correct={"amc-0": 3, "amc-1": 0}, samples=8)
    """

    correct: Mapping[str, int]  # prompt_id -> right samples
    samples: int  # of each problem

    def columns(self, ks: Sequence[int]) -> NDArray[np.float64]:
        """pass@k of each problem [P, M], problems in the order of their ids."""
        counts = [self.correct[prompt_id] for prompt_id in sorted(self.correct)]
        return np.array([_pass_at_k_of_each(counts, self.samples, k) for k in ks]).T


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An estimate for two policies on the same problems, and by how much the second is better."""

    left: float
    right: float
    difference: float  # right - left
    interval: Interval  # of the difference


def estimates(
    sets: Sequence[Counts], ks: Sequence[int], bootstrap: Bootstrap | None = None
) -> dict[str, tuple[float, Interval]]:
    """Name -> (estimate, interval): pass@k, and avg@n where all sets have n samples.

    With several sets each estimate is the mean over sets, each counting the same.

    Raises:
        ValueError: there is no set or an empty one, or a k above the samples of one.
    """
    arrays = [counts.columns(ks) for counts in sets]
    intervals = (bootstrap or Bootstrap()).intervals(arrays)
    means = _means_over_sets(arrays)
    named = {f"pass@{k}": (mean, each) for k, mean, each in zip(ks, means, intervals, strict=True)}
    numbers = {counts.samples for counts in sets}
    if len(numbers) == 1 and "pass@1" in named:
        named[f"avg@{numbers.pop()}"] = named["pass@1"]
    return named


def differences(
    left: Sequence[Counts],
    right: Sequence[Counts],
    ks: Sequence[int],
    bootstrap: Bootstrap | None = None,
) -> dict[str, Difference]:
    """Name -> the paired difference: both policies are measured on every resampled problem.

    Args:
        left: sets of problems of one policy.
        right: the same sets of the other, in the same order.
        ks: of pass@k.
        bootstrap: how intervals are made.

    Raises:
        ValueError: the problems or their numbers of samples are not the same.
    """
    for a, b in zip(left, right, strict=True):
        if set(a.correct) != set(b.correct) or a.samples != b.samples:
            raise ValueError(
                f"{len(a.correct)} problems with {a.samples} samples beside {len(b.correct)} with "
                f"{b.samples}; expected the same problems and samples"
            )
    sides = [[counts.columns(ks) for counts in side] for side in (left, right)]
    paired = [b - a for a, b in zip(*sides, strict=True)]
    intervals = (bootstrap or Bootstrap()).intervals(paired)
    return {
        f"pass@{k}": Difference(left=a, right=b, difference=b - a, interval=interval)
        for k, a, b, interval in zip(ks, *map(_means_over_sets, sides), intervals, strict=True)
    }


def _means_over_sets(arrays: Sequence[NDArray[np.float64]]) -> list[float]:
    return np.mean([array.mean(0) for array in arrays], axis=0).tolist()
