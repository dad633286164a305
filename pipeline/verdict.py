"""What a run's status comes to, in a sentence."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.console import age_text

if TYPE_CHECKING:
    from pipeline.status import RoundStatus, RunStatus

FRESH_SECONDS = 60.0  # so recent work may be that of another machine


def age_of(rounds: "tuple[RoundStatus, ...]", folder_age: float | None) -> float | None:
    """Seconds since anything of a run was made; None: nothing was.

    Args:
        rounds: of the run.
        folder_age: seconds since its folder was written to; None: it was not.
    """
    paces = [pace for each in rounds if not each.is_complete for pace in each.stages.values()]
    ages = [pace.idle_seconds for pace in paces] + [folder_age]
    return min((age for age in ages if age is not None), default=None)


def verdict(status: "RunStatus", holder: str | None) -> str:
    """Whether a run is finished, running or stopped, where, and what to do.

    Args:
        status: of the run.
        holder: the process that works in its folder; None: none does.
    """
    age = "" if status.age_seconds is None else age_text(status.age_seconds)
    done = f"{status.rounds_complete} of {status.rounds_planned} rounds complete"
    if status.is_finished:
        return f"finished {age} ago: {done}"
    place = "; ".join([done, *_places(status)])
    if holder is None and status.age_seconds is None:
        return f"not begun: {done}"
    if holder is None and status.age_seconds is not None and status.age_seconds >= FRESH_SECONDS:
        return f"stopped, last news {age} ago: {place}; the same command resumes it"
    if holder is None:
        return f"no process of it here, last news {age} ago: {place}; another machine may be at it"
    if any(pace.is_quiet for each in status.rounds for pace in each.stages.values()):
        return f"stuck? {holder} is at work, last news {age} ago: {place}; look at what it says"
    return f"running ({holder}), last news {age} ago: {place}"


def _places(status: "RunStatus") -> Iterator[str]:
    """The stage of the first round that is not complete which has begun last."""
    for each in status.rounds:
        begun = [(n, p) for n, p in each.stages.items() if p.done and not p.is_complete]
        if begun:
            name, pace = begun[-1]
            where = "the start" if each.round is None else f"round {each.round}"
            yield f"{where}: {name} {pace.done} of {pace.total}"
            return
