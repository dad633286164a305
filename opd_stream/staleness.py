"""When cached rows have been used enough: pure decisions on measured drift.

The first pass over a cache is always finished: its scores are paid for. The number of further
passes is an outcome, and so is the number of rounds that a unit of the cache lives. Every training
step measures the drift of the rows it trains on; after an epoch, and inside a further one, the sums
decide whether training goes on. Between rounds a sample of the rows of each unit decides whether
the unit is kept, continued to a longer window, or made again. Only a student that diverges is
stopped at once.

Every decision is held against `bounds` that fit the pair (`Staleness.fitted`), on the drift above
`floor`, the policy_drift of fresh rows before training: that is what engine and trainer disagree
about, and no drift.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field

from opd_stream.drift import DriftSums
from opd_stream.objectives import Objective
from opd_stream.outcome import EpochAction
from opd_stream.section import Section

LOOKS_PER_EPOCH = 4
LEAST_DISTANCE = 0.5  # nats per token; a student nearer to its teacher may still move so far

UnitAction = Literal["train", "gated", "extend", "regenerate", "retire"]


class Staleness(Section):
    """When a cache has been used enough."""

    max_epochs: int = Field(default=1, ge=1, description="passes over a round's scores, at most")
    policy_drift: float = Field(
        default=0.1,
        gt=0,
        description="no further pass above, nor above distance_share; k3, nats per token",
    )
    distance_share: float = Field(
        default=0.5,
        ge=0,
        description="policy_drift that is allowed as a share of the distance to the teacher, "
        "where that is more: a student that learns leaves the one that wrote the rollouts",
    )
    effective_sample_fraction: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="no further pass below, with objectives that weigh by importance",
    )
    diverged: float = Field(
        default=2.0,
        gt=1,
        description="stop the run where the student has moved further than so many distances to "
        "the teacher (at least 0.5 nats each)",
    )
    gated_from: float = Field(
        default=0.0, ge=0, description="policy_drift from which train.gate and freshness weigh"
    )
    max_policies: int = Field(
        default=0,
        ge=0,
        description="how many policies later a unit of rollouts may still train; 0: every round "
        "samples all of its rollouts",
    )
    keep_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="keep a unit while its drift is below this share of policy_drift: with more, "
        "the next round would stop for it",
    )
    student_top_mass: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="make a kept unit again when the student puts less on the teacher's candidates",
    )
    sample_share: float = Field(
        default=0.02,
        gt=0,
        le=1,
        description="rows of a unit that measure its drift between rounds (never below 8)",
    )

    def fitted(self, distance: float, objectives: Sequence[Objective]) -> Self:
        """The bounds for a pair: learning is drift, up to the distance that is to be learned.

        Args:
            distance: KL(behavior || teacher) of the rows, nats per token.
            objectives: in training; without importance weights a few tokens that carry most of
                them hurt nothing.
        """
        weighs = any(part.is_sampled for part in objectives)
        return self.model_copy(
            update={
                "policy_drift": max(self.policy_drift, self.distance_share * distance),
                "effective_sample_fraction": self.effective_sample_fraction if weighs else 0.0,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do with the rows in training, and the sentence with the numbers that decided it."""

    action: EpochAction
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitState:
    """What is known of a unit when a round begins.

    Example:
        >>> UnitState(drift=DriftSums(...), student_top_mass=0.99, policies=2, window_tokens=64,
        ...           unfinished=12)
    """

    drift: DriftSums  # of a sample of its rows, under the weights that the round starts from
    student_top_mass: float  # of the same sample, mean
    policies: int  # between the one that wrote it and the current one
    window_tokens: int  # it was sampled with
    unfinished: int  # rows that this window ended


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDecision:
    """What happens to a unit, and the sentence with the numbers that decided it."""

    action: UnitAction
    reason: str
    is_gated: bool = False  # kept on condition that drift weighs its tokens

    @property
    def is_kept(self) -> bool:
        """Whether its rows train again."""
        return self.action in ("train", "gated", "extend")


def beyond(drift: DriftSums, *, floor: float) -> float:
    """policy_drift above that of fresh rows (`drift_floor` of a report).

    The `sampler_gap` of a report is the mean |d| of the same rows; no drift is held against it.
    """
    return max(0.0, drift.policy_drift - floor)


def decide_epoch(
    drift: DriftSums, *, epochs_done: int, bounds: Staleness, floor: float = 0.0
) -> Decision:
    """After an epoch over a cache: another one, with or without gate, or fresh rollouts.

    `drift` are sums over the tokens of the epoch that has just ended, `epochs_done` counts it.
    """
    bound = f"epoch {epochs_done} of at most {bounds.max_epochs}"
    measured = f"{_measured(drift, bounds, floor)}, {bound}"
    reason = too_far(drift, bounds, floor=floor)
    if reason is not None:
        return Decision(action="regenerate", reason=f"{reason}: {measured}")
    if epochs_done >= bounds.max_epochs:
        return Decision(action="regenerate", reason=f"all epochs done: {measured}")
    if bounds.gated_from and beyond(drift, floor=floor) >= bounds.gated_from:
        return Decision(action="gated", reason=f"weights by drift from here on: {measured}")
    return Decision(action="train", reason=f"the cache is still fresh: {measured}")


def is_look_due(step: int, steps_per_epoch: int) -> bool:
    """Whether drift is looked at after so many steps of an epoch: four times, evenly spread.

    The end of the epoch is the fourth.
    """
    now, before = (n * LOOKS_PER_EPOCH // steps_per_epoch for n in (step, step - 1))
    return now > before


def decide_stop(drift: DriftSums, *, bounds: Staleness, floor: float = 0.0) -> Decision | None:
    """Inside a further epoch: stop if the rows of the latest steps are too far, or None."""
    reason = too_far(drift, bounds, floor=floor)
    if reason is None:
        return None
    return Decision(
        action="stop", reason=f"{reason} inside the epoch: {_measured(drift, bounds, floor)}"
    )


def divergence(
    drift: DriftSums, *, at_start: float, distance: float, bounds: Staleness
) -> str | None:
    """Why the latest rows say that the student leaves behavior and teacher behind; None: it stays.

    What is measured is the mean fall of the drawn tokens' log-probability, an estimate of
    KL(behavior || student) that no single token can dominate. Of the teacher it is the distance.

    Args:
        drift: of the rows of the latest steps.
        at_start: its `signed_mean` before training.
        distance: KL(behavior || teacher) of the rows, nats per token.
        bounds: of the config.
    """
    moved, most = at_start - drift.signed_mean, bounds.diverged * max(distance, LEAST_DISTANCE)
    if moved <= most:
        return None
    return (
        f"the student diverges: the log-probability of its own tokens fell by {moved:.2f} nats, "
        f"where the teacher is {distance:.2f} nats away (bound {most:.2f})"
    )


def decide_unit(
    state: UnitState, *, window_tokens: int, bounds: Staleness, floor: float = 0.0
) -> UnitDecision:
    """Between rounds: train on a unit again, continue it, or make it again.

    The round that keeps a unit moves the student on, so a unit is kept only with room to drift: up
    to `keep_share` of the bound that stops training. One with a shorter window than the coming
    round's `window_tokens` is continued; its old tokens have drifted as those of any kept unit.
    """
    kept_below = bounds.policy_drift * bounds.keep_share
    bounds = bounds.model_copy(update={"policy_drift": kept_below})
    measured = (
        f"{_measured(state.drift, bounds, floor)}, student_top_mass {state.student_top_mass:.3f} "
        f"(bound {bounds.student_top_mass:g}), {state.policies} policies old (bound "
        f"{bounds.max_policies})"
    )
    if not state.drift.tokens:
        return UnitDecision(action="regenerate", reason="no row of it can be trained on")
    reason = too_far(state.drift, bounds, floor=floor)
    if state.policies > bounds.max_policies:
        return UnitDecision(action="retire", reason=f"too old: {measured}")
    if reason is not None:
        return UnitDecision(action="regenerate", reason=f"{reason}: {measured}")
    if state.student_top_mass < bounds.student_top_mass:
        return UnitDecision(
            action="regenerate", reason=f"the student left the teacher's candidates: {measured}"
        )
    is_gated = bool(bounds.gated_from) and beyond(state.drift, floor=floor) >= bounds.gated_from
    weighed = ", weights by drift" if is_gated else ""
    if state.unfinished and state.window_tokens < window_tokens:
        return UnitDecision(
            action="extend",
            reason=f"{state.unfinished} rows go on from {state.window_tokens} to {window_tokens} "
            f"tokens{weighed}: {measured}",
            is_gated=is_gated,
        )
    return UnitDecision(
        action="gated" if is_gated else "train",
        reason=f"kept{weighed}: {measured}",
        is_gated=is_gated,
    )


def may_run_ahead(policy_drift: float, *, bounds: Staleness, floor: float = 0.0) -> bool:
    """Whether the next rollouts may be written by the policy before the one they will train.

    `policy_drift` is of the last finished round's last epoch; the next is expected to drift alike.
    """
    return policy_drift - floor <= bounds.policy_drift


def too_far(drift: DriftSums, bounds: Staleness, *, floor: float) -> str | None:
    """Which bound drift passed; None: none."""
    if beyond(drift, floor=floor) > bounds.policy_drift:
        return "drift passed its bound"
    if drift.effective_sample_fraction < bounds.effective_sample_fraction:
        return "too few effective samples"
    return None


def _measured(drift: DriftSums, bounds: Staleness, floor: float) -> str:
    above = f" above a floor of {floor:.4f}" if floor >= 5e-5 else ""
    fraction = bounds.effective_sample_fraction
    held = f" (bound {fraction:g})" if fraction else ""
    return (
        f"policy_drift {drift.policy_drift:.4f} (bound {bounds.policy_drift:.3g}{above}), "
        f"effective_sample_fraction {drift.effective_sample_fraction:.3f}{held}"
    )
