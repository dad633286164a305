"""How far a stage is and how fast it goes, from commit records or from lines of training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_stream.store.artifact import Commit, summed_counts
from pipeline.accounting import Span, busy_seconds

QUIET_SECONDS = 60.0  # a stage is quiet when nothing came for this long
QUIET_UNITS = 3.0  # and as long again as this many of its longest units took


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """A stage of a round; None stands for what is not known.

    Example:
        >>> Pace(done=3, total=8, is_complete=False, tokens=9_216, busy_seconds=12.0,
        ...      units_per_second=0.25, tokens_per_second=768.0, eta_seconds=20.0,
        ...      idle_seconds=1.2, is_quiet=False, facts={})
    """

    done: int  # units; optimizer steps in training
    total: int | None
    is_complete: bool
    tokens: int = 0  # of completions
    busy_seconds: float | None = None  # in which at least one worker was at it
    units_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None  # None also where it is complete or quiet
    idle_seconds: float | None = None  # since the latest unit
    is_quiet: bool = False  # not complete, and nothing came for long
    facts: dict[str, float] = field(default_factory=dict)  # loss, policy_drift, pass@1, …


def pace_of_units(
    commits: Sequence[Commit], *, total: int | None, is_complete: bool, now: float
) -> Pace:
    """The pace of the units of one stage, over all machines that make them.

    Rates are per second in which at least one worker was busy, so pauses do not count; `now` is in
    seconds since the epoch.
    """
    timed = [commit for commit in commits if commit.made_at]
    busy = busy_seconds(spans_of(timed))
    pace = Pace(
        done=len(commits),
        total=total,
        is_complete=is_complete,
        tokens=int(summed_counts(commits).get("completion_tokens", 0)),
    )
    if not busy:
        return pace
    tokens = summed_counts(timed).get("completion_tokens", 0)
    latest = max(commit.made_at for commit in timed)
    return _with_rates(
        replace(pace, busy_seconds=busy),
        units=len(timed) / busy,
        tokens=tokens / busy,
        idle=max(0.0, now - latest),
        longest=max(commit.seconds for commit in timed),
    )


def pace_of_steps(
    lines: Sequence[dict[str, Any]], *, total: int, is_complete: bool, now: float, latest: float
) -> Pace:
    """The pace of training, from its lines of metrics.jsonl; `latest` is when the last was written.

    The steps that are planned are at most done: drift may stop the round earlier.
    """
    seconds = [line["seconds"] for line in lines]
    tokens = sum(line["trained_tokens"] for line in lines)
    pace = Pace(
        done=len(lines),
        total=len(lines) if is_complete else total,
        is_complete=is_complete,
        tokens=tokens,
    )
    if not sum(seconds):
        return pace
    return _with_rates(
        replace(
            pace,
            busy_seconds=sum(seconds),
            facts={name: lines[-1][name] for name in ("loss", "policy_drift")},
        ),
        units=len(lines) / sum(seconds),
        tokens=tokens / sum(seconds),
        idle=max(0.0, now - latest),
        longest=max(seconds),
    )


def spans_of(commits: Iterable[Commit]) -> list[Span]:
    """When each unit was being made, seconds since the epoch, where that is known."""
    return [(each.made_at - each.seconds, each.made_at) for each in commits if each.made_at]


def after(pace: Pace, earlier: Pace) -> Pace:
    """A stage that works on what an earlier one makes cannot end before it."""
    if pace.eta_seconds is None or earlier.is_complete:
        return pace
    if earlier.eta_seconds is None:
        return replace(pace, eta_seconds=None)
    return replace(pace, eta_seconds=max(pace.eta_seconds, earlier.eta_seconds))


def _with_rates(pace: Pace, *, units: float, tokens: float, idle: float, longest: float) -> Pace:
    is_quiet = not pace.is_complete and idle > QUIET_SECONDS + QUIET_UNITS * longest
    left = None if pace.total is None else pace.total - pace.done
    if pace.is_complete or is_quiet:
        left = None
    return replace(
        pace,
        units_per_second=units,
        tokens_per_second=tokens,
        idle_seconds=idle,
        is_quiet=is_quiet,
        eta_seconds=None if left is None else left / units,
    )
