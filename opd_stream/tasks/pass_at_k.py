"""pass@k: the chance that at least one of k samples is right, without bias (2107.03374, eq. 1).

avg@n, the mean over all n samples, is the same number as pass@1 estimated from n samples.
"""

from collections.abc import Sequence
from math import comb, sqrt

POWERS = (1, 2, 4, 8, 16, 32, 64)


def pass_at_k(correct: Sequence[int], *, samples: int, k: int) -> float:
    """Mean over problems of 1 - C(n - c, k) / C(n, k).

    Args:
        correct: right samples of each problem, c.
        samples: samples of each problem, n.
        k: at most `samples`.

    Raises:
        ValueError: k is larger than the number of samples.
    """
    return sum(chances(correct, samples=samples, k=k)) / len(correct)


def chances(correct: Sequence[int], *, samples: int, k: int) -> list[float]:
    """The chance of each problem; arguments and errors as `pass_at_k`."""
    if k > samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem; there are {samples}")
    return [1 - comb(samples - right, k) / comb(samples, k) for right in correct]


def usual_ks(samples: int) -> tuple[int, ...]:
    """The k that are shown where nobody asks for others."""
    return tuple(k for k in POWERS if k <= samples)


def standard_error(correct: list[int], *, samples: int) -> float:
    """Standard error of pass@1 over problems; 0 for a single problem."""
    rates = [right / samples for right in correct]
    mean = sum(rates) / len(rates)
    if len(rates) < 2:
        return 0.0
    return sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1) / len(rates))
