"""When a cache has been used enough: a pure decision on measured drift.

The number of epochs on a cache is an outcome. Every training step measures the drift of the rows it
trains on; after each epoch the sums decide whether another epoch pays or fresh rollouts are due.
"""

from dataclasses import dataclass
from typing import Literal

from opd_stream.drift import DriftSums


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessBounds:
    """Example:
    >>> StalenessBounds(max_epochs=4, policy_drift=0.1, effective_sample_fraction=0.5)
    """

    max_epochs: int
    policy_drift: float  # k3, nats per token
    effective_sample_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and the sentence with the numbers that decided it."""

    action: Literal["train", "regenerate"]
    reason: str


def decide_epoch(drift: DriftSums, *, epochs_done: int, bounds: StalenessBounds) -> Decision:
    """After an epoch over a cache: another one, or fresh rollouts.

    Args:
        drift: sums over the tokens of the epoch that has just ended.
        epochs_done: epochs over this cache, with that one.
        bounds: the limits.
    """
    measured = (
        f"policy_drift {drift.policy_drift:.4f} (bound {bounds.policy_drift:g}), "
        f"effective_sample_fraction {drift.effective_sample_fraction:.3f} "
        f"(bound {bounds.effective_sample_fraction:g}), "
        f"epoch {epochs_done} of at most {bounds.max_epochs}"
    )
    if drift.policy_drift > bounds.policy_drift:
        return Decision(action="regenerate", reason=f"drift passed its bound: {measured}")
    if drift.effective_sample_fraction < bounds.effective_sample_fraction:
        return Decision(action="regenerate", reason=f"too few effective samples: {measured}")
    if epochs_done >= bounds.max_epochs:
        return Decision(action="regenerate", reason=f"all epochs done: {measured}")
    return Decision(action="train", reason=f"the cache is still fresh: {measured}")
