"""pass@k: the chance that at least one of k samples is right, without bias (2107.03374, eq. 1)."""

from math import comb, sqrt


def pass_at_k(correct: list[int], *, samples: int, k: int) -> float:
    """Mean over problems of 1 - C(n - c, k) / C(n, k).

    Args:
        correct: right samples of each problem, c.
        samples: samples of each problem, n.
        k: at most `samples`.

    Raises:
        ValueError: k is larger than the number of samples.
    """
    if k > samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem; there are {samples}")
    misses = [comb(samples - right, k) / comb(samples, k) for right in correct]
    return 1 - sum(misses) / len(misses)


def standard_error(correct: list[int], *, samples: int) -> float:
    """Standard error of pass@1 over problems; 0 for a single problem."""
    rates = [right / samples for right in correct]
    mean = sum(rates) / len(rates)
    if len(rates) < 2:
        return 0.0
    return sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1) / len(rates))
