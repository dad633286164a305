"""What commands say while they work: bars on a terminal, else plain lines or JSON lines, on stderr.

Results go to stdout, so that a pipe gets nothing else.
"""

import io
import json
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Self, TextIO

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

LOG = logging.getLogger("opd_stream")
RATE_SECONDS = 60.0  # rates are of the latest minute, or of two events if they are further apart
LINE_SECONDS = 30.0  # between two lines of a stage where there are no bars
NARROW, WIDE = 60, 110  # columns from which a line of progress has a bar, and a long one
COUNTED = {"train": "steps", "verify": "artifacts"}  # what a stage counts, if not units


class Level(StrEnum):
    """The lowest level that is printed."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"


class JsonLines(logging.Formatter):
    """Time (ISO 8601, UTC), level, message and fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if record.name != LOG.name:
            fields["logger"] = record.name
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        time_ = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        level, message = record.levelname.lower(), record.getMessage()
        line = {"time": time_, "level": level, "message": message, "fields": fields}
        return json.dumps(line, default=str)


class PlainLines(logging.Formatter):
    """The message, with `warning: ` in front of a warning."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        text = super().format(record)
        return prefix + (one_line(text) if record.name == LOG.name else visible(text))


class _StderrHandler(logging.Handler):
    """Writes to what stderr is at the moment, so that lines appear above bars."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr.stream if isinstance(sys.stderr, _JsonStderr) else sys.stderr
        stream.write(self.format(record) + "\n")
        stream.flush()


class _JsonStderr(io.TextIOBase):
    """Stderr for what does not go through a logger: each line becomes a record, so it is JSON."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._rest = stream, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                logging.getLogger("stderr").warning("%s", line)
        return len(text)

    def fileno(self) -> int:
        return self.stream.fileno()


def set_up(level: Level, *, as_json: bool) -> None:
    """Print lines of this level and above; of libraries, from their warnings on."""
    root = logging.getLogger()
    root.handlers = [each for each in root.handlers if not isinstance(each, _StderrHandler)]
    handler = _StderrHandler()
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    root.addHandler(handler)
    LOG.setLevel(level.upper())
    logging.captureWarnings(as_json)
    if as_json and not is_json():
        sys.stderr = _JsonStderr(sys.stderr)


_UNSEEN = re.compile(  # all controls but the end of a line, and marks that turn text around
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


def visible(text: str) -> str:
    """Text from anywhere for a terminal: characters that would command it are escaped."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The same for a line, in which nothing of data begins another one."""
    return visible(text).replace("\n", "\\n")


def echo(*lines: str) -> None:
    """Lines of a command's result, on stdout."""
    for line in lines:
        typer.echo(one_line(line))


def print_error(*lines: str) -> None:
    """Mistakes of the user, each in one line."""
    if is_json():
        LOG.error("%s", "\n".join(lines))
    else:
        sys.stderr.write(f"opd-stream: {chr(10).join(map(one_line, lines))}\n")


def is_json() -> bool:
    """Whether stderr is for programs."""
    return isinstance(sys.stderr, _JsonStderr)


def shows_bars() -> bool:
    """Whether stderr is a terminal on which bars can move, and somebody asked for progress."""
    if is_json() or not LOG.isEnabledFor(logging.INFO) or os.environ.get("CI"):
        return False
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def age_text(seconds: float) -> str:
    """How long ago something was, in the largest unit of which there are two."""
    for name, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def clock_text(seconds: float) -> str:
    """A duration as H:MM:SS, with days where there are any; a short one as seconds."""
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))


def rate_text(per_second: float) -> str:
    """A rate with as many digits as it needs."""
    if per_second >= 100:
        return f"{per_second:,.0f}"
    return f"{per_second:.2f}" if per_second >= 0.1 else f"{per_second:.2g}"


def print_lines(console: Console, lines: Iterable[str | Text]) -> None:
    """Lines as they are: nothing in them is marked up or wrapped."""
    for line in lines:
        line = Text(one_line(line)) if isinstance(line, str) else line
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def facts_text(facts: dict[str, float], between: str) -> str:
    """Counts whole, measures with four digits."""
    return between.join(f"{k} {v if isinstance(v, int) else f'{v:.4f}'}" for k, v in facts.items())


class Live:
    """Bars or clocks, shown between entering and leaving where somebody can see them."""

    def __init__(
        self, *columns: str | ProgressColumn, console: Console | None = None, expand: bool = False
    ) -> None:
        self._live = shows_bars()
        self._bars = Progress(
            *columns,
            console=console or Console(stderr=True),
            transient=True,
            expand=expand,
            redirect_stdout=False,  # results stay apart from what is said about them
        )

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live:
            self._bars.stop()

    def write(self, lines: Iterable[str]) -> None:
        """Lines of the command's result, on stdout, above what moves."""
        if self._live:
            self._bars.stop()
        for line in lines:
            sys.stdout.write(one_line(line) + "\n")
        sys.stdout.flush()
        if self._live:
            self._bars.start()


@dataclass(slots=True, kw_only=True)
class _StageState:
    """A stage that is running; times are seconds of the progress's clock."""

    name: str
    total: int
    done: int
    printed_at: float  # when its latest line was written
    printed_done: int  # what that line said
    tokens: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    events: deque[tuple[float, int, int]] = field(default_factory=deque)  # (time, done, tokens)

    @property
    def unit(self) -> str:
        return COUNTED.get(self.name, "units")

    def add(self, now: float, count: int, tokens: int) -> None:
        self.done += count
        self.tokens += tokens
        self.events.append((now, self.done, self.tokens))
        while len(self.events) > 2 and self.events[1][0] <= now - RATE_SECONDS:
            self.events.popleft()

    def numbers(self) -> dict[str, float]:
        """Done, total, and rates and time left as soon as there are any."""
        (since, before, tokens_before), (now, done, tokens) = self.events[0], self.events[-1]
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
        units = {"units_per_second": self.unit, "tokens_per_second": "tokens"}
        words = [f"{rate_text(numbers[n])} {unit}/s" for n, unit in units.items() if n in numbers]
        if "eta_seconds" in numbers:
            words.append(f"ETA {clock_text(numbers['eta_seconds'])}")
        facts = facts_text(self.facts, ", ")
        if facts and self.name in COUNTED:  # a round's own numbers are means over it
            facts = f"latest {self.unit.removesuffix('s')}: {facts}"
        return ", ".join([*words, facts] if facts else words)


def bar_columns(width: int) -> list[ProgressColumn]:
    """What a line of progress has: its name and M/N always, the rest as far as there is room."""
    name = TextColumn("{task.description:>9}", table_column=Column(no_wrap=True))
    done = MofNCompleteColumn(table_column=Column(no_wrap=True))
    bar = [BarColumn(bar_width=24 if width >= WIDE else 10)] if width >= NARROW else []
    elapsed = [TimeElapsedColumn(table_column=Column(no_wrap=True))] if width >= NARROW else []
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return [name, *bar, done, *elapsed, TextColumn("{task.fields[note]}", table_column=rest)]


class TerminalProgress(Live):
    """`stages.step.Progress` for a person: one bar a stage; starting a stage again resets it.

    Without bars a stage has a line now and then, and one at its end.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, console: Console | None = None
    ) -> None:
        console = console or Console(stderr=True)
        super().__init__(*bar_columns(console.width), console=console, expand=True)
        self._clock = clock
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, _StageState] = {}

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._print_unfinished()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """A stage begins."""
        now = self._clock()
        self._print_unfinished()
        state = _StageState(name=stage, total=total, done=done, printed_at=now, printed_done=done)
        state.add(now, 0, 0)
        self._stages[stage] = state
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))
        if self._live and total:
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done, note="")

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        """More is done."""
        if stage not in self._stages:
            return
        state, now = self._stages[stage], self._clock()
        state.facts |= facts
        if count:
            state.add(now, count, tokens)
        if stage in self._tasks:
            note = state.note(state.numbers())
            self._bars.update(self._tasks[stage], advance=count, note=note)
        elif count:
            is_due = state.done >= state.total or now - state.printed_at >= LINE_SECONDS
            self._print(state, logging.INFO if is_due else logging.DEBUG)

    def say(self, line: str) -> None:
        """A line above the bars."""
        LOG.info(line)

    def warn(self, line: str) -> None:
        """The same, as a warning."""
        LOG.warning(line)

    def result(self, line: str) -> None:
        """A line of the command's result, on stdout, above the bars."""
        self.write([line])

    def _print_unfinished(self) -> None:
        """The last line of a stage that ended early, as training does when drift stops it."""
        for state in () if self._live else self._stages.values():
            if state.done > state.printed_done:
                self._print(state, logging.INFO)

    def _print(self, state: _StageState, level: int) -> None:
        numbers = state.numbers()
        line = f"{state.name}: {state.done} of {state.total} {state.unit}, {state.note(numbers)}"
        fields = {"stage": state.name, **numbers, **state.facts}
        LOG.log(level, line.removesuffix(", "), extra={"fields": fields})
        if level == logging.INFO:
            state.printed_at, state.printed_done = state.events[-1][0], state.done
