"""What a round will do: a pure function of the config and of the steps done before it."""

from dataclasses import dataclass

from opd_stream.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """A round before it runs.

    Example:
        >>> RoundPlan(round_index=3, first_step=48, planned_steps=16, window_tokens=144)
    """

    round_index: int
    first_step: int  # optimizer steps done before the round
    planned_steps: int  # optimizer steps if no drift stops it
    window_tokens: int  # new tokens of its rollouts: the window of its last planned step


def plan_round(
    config: Config, *, round_index: int, first_step: int, decided_window: int | None = None
) -> RoundPlan:
    """Plan a round; `decided_window` is that of the round before's audit, if it took one."""
    planned = config.planned_steps
    return RoundPlan(
        round_index=round_index,
        first_step=first_step,
        planned_steps=planned,
        window_tokens=decided_window or config.rollouts.window.tokens_of_round(first_step, planned),
    )


def plan_ahead(config: Config, plan: RoundPlan) -> RoundPlan:
    """The round after one that is not trained yet, as if drift stopped none of its steps.

    A schedule's window is then at least what the training will ask for.
    """
    return plan_round(
        config,
        round_index=plan.round_index + 1,
        first_step=plan.first_step + plan.planned_steps,
    )


def is_due(config: Config, round_index: int) -> bool:
    """Whether the policy of a round is evaluated."""
    if config.evaluation is None:
        return False
    every = config.evaluation.every_rounds
    is_last = round_index == config.rounds - 1
    return is_last or (every is not None and (round_index + 1) % every == 0)
