"""The figures of an evaluation: pass@k and avg@n with intervals, of one policy or of two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd_stream.tasks.bootstrap import Bootstrap, paired_differences
from opd_stream.tasks.pass_at_k import chances

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How often a policy was right on one set of problems.

    Example:
        >>> Counts(correct={"amc-0": 3, "amc-1": 0}, samples=8)
    """

    correct: Mapping[str, int]  # prompt_id -> right samples
    samples: int  # of each problem

    def columns(self, ks: Sequence[int]) -> np.ndarray:
        """pass@k of each problem [P, M], problems in the order of their ids."""
        counts = [self.correct[prompt_id] for prompt_id in sorted(self.correct)]
        return np.array([chances(counts, samples=self.samples, k=k) for k in ks]).T


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A figure of two policies on the same problems, and by how much the second is better."""

    left: float
    right: float
    difference: float  # right - left
    interval: Interval  # of the difference


def figures(
    sets: Sequence[Counts], ks: Sequence[int], bootstrap: Bootstrap | None = None
) -> dict[str, tuple[float, Interval]]:
    """Name -> (estimate, interval): pass@k, and avg@n where all sets have n samples.

    With several sets every figure is the mean over sets, each counting the same.

    Raises:
        ValueError: there is no set or an empty one, or a k above the samples of one.
    """
    arrays = [counts.columns(ks) for counts in sets]
    intervals = (bootstrap or Bootstrap()).intervals(arrays)
    means = np.mean([array.mean(0) for array in arrays], axis=0).tolist()
    found = {f"pass@{k}": (mean, each) for k, mean, each in zip(ks, means, intervals, strict=True)}
    numbers = {counts.samples for counts in sets}
    if len(numbers) == 1 and "pass@1" in found:
        found[f"avg@{numbers.pop()}"] = found["pass@1"]
    return found


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
    pairs = list(zip(left, right, strict=True))
    for a, b in pairs:
        if set(a.correct) != set(b.correct) or a.samples != b.samples:
            raise ValueError(
                f"{len(a.correct)} problems with {a.samples} samples beside {len(b.correct)} with "
                f"{b.samples}; expected the same problems and samples"
            )
    arrays = [paired_differences(a.columns(ks), b.columns(ks)) for a, b in pairs]
    intervals = (bootstrap or Bootstrap()).intervals(arrays)
    means = [
        np.mean([counts.columns(ks).mean(0) for counts in side], axis=0).tolist()
        for side in (left, right)
    ]
    names = [f"pass@{k}" for k in ks]
    return {
        name: Difference(left=a, right=b, difference=b - a, interval=interval)
        for name, a, b, interval in zip(names, *means, intervals, strict=True)
    }
