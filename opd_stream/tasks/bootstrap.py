"""Confidence intervals by bootstrap over problems.

The problems are the sample: what varies from one set of problems to another, and from one draw of
answers to another, both show in how the problems of this set differ. Shapes: P problems, M figures
of each, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK = 200  # resamples at once


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

    def intervals(self, groups: Sequence[ArrayLike]) -> list[tuple[float, float]]:
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
        parts = [
            values_PM[random.integers(problems, size=(size, problems))].mean(1)
            for size in _chunks(self.resamples)
        ]
        return np.concatenate(parts)


def _chunks(resamples: int) -> list[int]:
    whole, rest = divmod(resamples, _CHUNK)
    return [_CHUNK] * whole + [rest] * bool(rest)


def paired_differences(left: ArrayLike, right: ArrayLike) -> NDArray[np.float64]:
    """right - left of each problem [P, M]; their mean has the interval of a paired comparison.

    Raises:
        ValueError: the two are not figures of the same problems.
    """
    left_PM, right_PM = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left_PM.shape != right_PM.shape:
        raise ValueError(
            f"figures of shape {left_PM.shape} beside {right_PM.shape}; expected the same problems"
        )
    return right_PM - left_PM
