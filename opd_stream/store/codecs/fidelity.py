"""What an encoder kept and lost, as sums that add over units."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from opd_stream.section import later

BINS_PER_DECADE = 8
DECADES = 8  # lost mass from 1e-8 to 1
BINS = BINS_PER_DECADE * DECADES


class StateErrors(BaseModel):
    """KL of the true to the rebuilt distributions of tokens, nats."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    tokens: int
    kl: float  # sum
    kl_bins: tuple[int, ...]  # log-spaced, 1e-8 to 1

    def __add__(self, other: "StateErrors") -> "StateErrors":
        return StateErrors(
            tokens=self.tokens + other.tokens,
            kl=self.kl + other.kl,
            kl_bins=tuple(a + b for a, b in zip(self.kl_bins, other.kl_bins, strict=True)),
        )


class Fidelity(BaseModel):
    """Sums over the tokens of a unit, as they stand in its commit record.

    Example:
        >>> (one_unit + another_unit).max_error
        0.0078
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    tokens: int = 0
    entries: int = 0  # candidates stored
    mass: float = 0.0  # sum over tokens of the teacher's probability of the stored candidates
    lost_mass_bins: tuple[int, ...] = (0,) * BINS  # log-spaced, 1e-8 to 1
    error: float = 0.0  # sum over finite entries of |stored - true| log-probability, nats
    max_error: float = 0.0  # largest of them and of the tails
    bound: float | None = None  # what the codec promises for it; None: no promise
    states: StateErrors | None = None  # of rounded hidden states
    # Mean |difference| of two answers of a served teacher to one question, nats; None: of files.
    teacher_noise: float | None = later(default=None)

    def __add__(self, other: "Fidelity") -> "Fidelity":
        bounds = [bound for bound in (self.bound, other.bound) if bound is not None]
        noises = [each for each in (self.teacher_noise, other.teacher_noise) if each is not None]
        return Fidelity(
            tokens=self.tokens + other.tokens,
            entries=self.entries + other.entries,
            mass=self.mass + other.mass,
            lost_mass_bins=tuple(
                a + b for a, b in zip(self.lost_mass_bins, other.lost_mass_bins, strict=True)
            ),
            error=self.error + other.error,
            max_error=max(self.max_error, other.max_error),
            bound=max(bounds) if bounds else None,
            states=_added(self.states, other.states),
            teacher_noise=max(noises) if noises else None,
        )

    def report(self) -> dict[str, Any]:
        """The figures a person reads.

        `kl_error_estimate`: KL(student || teacher) over the stored candidates and the tail differs
        from that with unrounded scores by at most the largest error of a log-probability, because
        it is their mean under the student. An estimate, since training merges terminators: where
        a tail held little else, what is left of it is a difference of stored numbers.
        """
        tokens, entries = max(1, self.tokens), max(1, self.entries)
        return {
            "tokens": self.tokens,
            "candidates_per_token": self.entries / tokens,
            "retained_mass_mean": self.mass / tokens,
            "retained_mass_p1": 1 - _quantile(self.lost_mass_bins, 0.99),
            "logprob_error_mean": self.error / entries,
            "logprob_error_max": self.max_error,
            "logprob_error_bound": self.bound,
            **self._of_candidates_alone(),
            **({} if self.teacher_noise is None else {"teacher_noise": self.teacher_noise}),
        }

    def _of_candidates_alone(self) -> dict[str, Any]:
        if self.states is None:
            return {"kl_error_estimate": self.max_error}
        return {
            "state_kl_mean": self.states.kl / max(1, self.states.tokens),
            "state_kl_p99": _quantile(self.states.kl_bins, 0.99),
        }


def _added(left: StateErrors | None, right: StateErrors | None) -> StateErrors | None:
    return right if left is None else left if right is None else left + right


def _quantile(bins: Sequence[int], share: float) -> float:
    """Upper edge of the bin in which a quantile lies."""
    counts = list(accumulate(bins))
    if not counts[-1]:
        return 0.0
    place = bisect_left(counts, share * counts[-1])
    return float(10 ** ((place + 1) / BINS_PER_DECADE - DECADES))


def state_errors(kl_N: NDArray[np.float64]) -> StateErrors:
    """The errors of tokens."""
    return StateErrors(tokens=len(kl_N), kl=float(kl_N.sum()), kl_bins=_bins(kl_N))


def _bins(values_N: NDArray[np.float64]) -> tuple[int, ...]:
    place = (np.log10(np.maximum(values_N, 1e-300)) + DECADES) * BINS_PER_DECADE
    return tuple(np.bincount(place.clip(0, BINS - 1).astype(np.int64), minlength=BINS).tolist())


def measure(
    *,
    mass_N: NDArray[np.float64],
    lost_N: NDArray[np.float64],
    true_E: NDArray[np.floating[Any]],
    stored_E: NDArray[np.floating[Any]],
    stored_tail_N: NDArray[np.floating[Any]],
    bound: float | None,
) -> Fidelity:
    """Fidelity of N tokens with E stored candidates; the true tails are those of `lost_N`.

    Raises:
        ValueError: a finite value is further from the true one than the bound.
    """
    finite = np.isfinite(true_E)
    if not np.array_equal(finite, np.isfinite(stored_E)):
        raise ValueError("a finite log-probability would be stored as -inf, or the reverse")
    error = np.abs(
        stored_E[finite].astype(np.float64, copy=False)
        - true_E[finite].astype(np.float64, copy=False)
    )
    has_tail_N = (lost_N > 0) & np.isfinite(stored_tail_N)
    tail_error = np.abs(stored_tail_N[has_tail_N] - np.log(lost_N[has_tail_N]))
    largest = max((float(each.max()) for each in (error, tail_error) if len(each)), default=0.0)
    if bound is not None and largest > bound:
        raise ValueError(
            f"a stored log-probability would be {largest:.6g} nats off; "
            f"the codec promises {bound:g}"
        )
    return Fidelity(
        tokens=len(mass_N),
        entries=int(finite.sum()),  # where a position has fewer candidates, -inf fills up
        mass=float(mass_N.sum()),
        lost_mass_bins=_bins(lost_N),
        error=float(error.sum()),
        max_error=largest,
        bound=bound,
    )
