"""Progress on stderr: bars on a terminal, plain lines in pipes and CI, JSON lines if asked for."""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from pipeline.live import Live
from pipeline.log import LOG
from pipeline.pace import clock_text, rate_text

RATE_SECONDS = 60.0  # rates are of the latest minute, or of two signs if they are further apart
THINGS = {"train": "steps", "verify": "artifacts"}  # what a stage counts, if not units
LINE_SECONDS = 30.0  # between two lines of a stage where there are no bars


@dataclass(slots=True, kw_only=True)
class _Stage:
    """What is known of a stage that is going on; times are seconds of the clock given."""

    name: str
    total: int
    done: int
    said: float  # when its latest line was written
    said_done: int  # what that line said
    tokens: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    signs: deque[tuple[float, int, int]] = field(default_factory=deque)  # (time, done, tokens)

    def add(self, now: float, count: int, tokens: int) -> None:
        self.done += count
        self.tokens += tokens
        self.signs.append((now, self.done, self.tokens))
        while len(self.signs) > 2 and self.signs[1][0] <= now - RATE_SECONDS:
            self.signs.popleft()

    def numbers(self) -> dict[str, float]:
        """Done, total, rates and the time that is left, as far as they are known."""
        (since, before, tokens_before), (now, done, tokens) = self.signs[0], self.signs[-1]
        found: dict[str, float] = {"done": self.done, "total": self.total}
        if now > since and done > before:
            found["units_per_second"] = (done - before) / (now - since)
            if tokens > tokens_before:
                found["tokens_per_second"] = (tokens - tokens_before) / (now - since)
            if self.done < self.total:
                found["eta_seconds"] = (self.total - self.done) / found["units_per_second"]
        return found

    def note(self, numbers: dict[str, float]) -> str:
        """Rates, time left and facts in words."""
        unit = THINGS.get(self.name, "units")
        words = [
            f"{rate_text(numbers[f'{what}_per_second'])} {unit if what == 'units' else what}/s"
            for what in ("units", "tokens")
            if f"{what}_per_second" in numbers
        ]
        if "eta_seconds" in numbers:
            words.append(f"ETA {clock_text(numbers['eta_seconds'])}")
        facts = ", ".join(f"{name} {_number(value)}" for name, value in self.facts.items())
        if facts and self.name in THINGS:  # a round's own numbers are means over it
            facts = f"latest {THINGS[self.name].removesuffix('s')}: {facts}"
        return ", ".join([*words, facts] if facts else words)


class TerminalProgress(Live):
    """One bar for each stage of the round at hand; starting a stage again resets its bar."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._clock = clock
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, _Stage] = {}

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._say_rest()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """A stage begins."""
        now = self._clock()
        self._say_rest()
        self._stages[stage] = _Stage(name=stage, total=total, done=done, said=now, said_done=done)
        self._stages[stage].add(now, 0, 0)
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))
        if self._live and total:
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done, note="")

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        """More is done; without bars a line now and then, and one when the stage is complete."""
        if stage not in self._stages:
            return
        here, now = self._stages[stage], self._clock()
        here.facts |= facts
        if count:
            here.add(now, count, tokens)
        if stage in self._tasks:
            note = here.note(here.numbers())
            self._bars.update(self._tasks[stage], advance=count, note=note)
        elif count:
            is_due = here.done >= here.total or now - here.said >= LINE_SECONDS
            self._line(here, logging.INFO if is_due else logging.DEBUG)

    def say(self, line: str) -> None:
        """A line above the bars."""
        LOG.info(line)

    def warn(self, line: str) -> None:
        """The same at the level of a warning."""
        LOG.warning(line)

    def result(self, line: str) -> None:
        """A line of the command's result, on stdout, above the bars."""
        self.write([line])

    def _say_rest(self) -> None:
        """The last line of a stage that ended early, as training does when drift stops it."""
        for here in () if self._live else self._stages.values():
            if here.done > here.said_done:
                self._line(here, logging.INFO)

    def _line(self, here: _Stage, level: int) -> None:
        numbers = here.numbers()
        unit = THINGS.get(here.name, "units")
        text = f"{here.name}: {here.done} of {here.total} {unit}, {here.note(numbers)}"
        fields = {"stage": here.name, **numbers, **here.facts}
        LOG.log(level, text.removesuffix(", "), extra={"fields": fields})
        if level == logging.INFO:
            here.said, here.said_done = here.signs[-1][0], here.done


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
