"""The learning rate as a function of progress through the whole run.

Progress counts rounds, not steps, because the number of epochs on a cache is an outcome: a round
that stops early because of drift moves the schedule to the next round's place.
"""

import math
from typing import Literal


def learning_rate(
    schedule: Literal["constant", "linear", "cosine"],
    *,
    peak: float,
    warmup: float,
    progress: float,
) -> float:
    """The rate at `progress` in [0, 1), after a linear rise over the first `warmup` of the run.

    Example:
        >>> learning_rate("linear", peak=4e-4, warmup=0.2, progress=0.6)
        0.0002
    """
    if progress < warmup:
        return peak * progress / warmup
    if schedule == "constant":
        return peak
    left = (1 - progress) / (1 - warmup)
    return peak * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
