"""What the doctor says: findings as lines while they come, or as one JSON object at the end."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, computed_field
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from opd_stream.section import Record
from pipeline.console import LOG, Live

Level = Literal["ok", "warning", "error"]
WIDTH = 18  # of the longest name of a check: lines are written before all names are known
QUIET_SECONDS = 2.0  # without a terminal, a check that takes longer is named


class NotChecked(Exception):
    """Something could not be looked at, and why."""


class Finding(Record):
    """One thing that was looked at.

    Example:
        >>> Finding(check="prompts", level="error", found="2 prompts are training prompts too",
        ...         why="pass@k should be of new ones", todo="take other prompts for evaluation")
    """

    check: str  # name of the check
    level: Level
    found: str
    why: str  # it matters
    todo: str = ""  # empty where all is well, or where `found` ends with it

    def lines(self) -> list[str]:
        """What was found; where that is not well, why it matters and what to do."""
        lines = [f"{self.level:8} {self.check:{WIDTH}}  {self.found}"]
        more = {"why": self.why if self.level != "ok" else "", "do": self.todo}
        return lines + [f"{'':{WIDTH + 11}}{f'{k}:':4} {v}" for k, v in more.items() if v]


@dataclass(frozen=True, slots=True)
class Check:
    """A function that looks at a subject, and why what it finds matters.

    Example:
        >>> list(disk.look(Subject(config, quick=True)))
        [disk.ok("12 GB free")]
    """

    name: str
    why: str
    look: "Look"
    loads_models: bool

    def ok(self, found: str) -> Finding:
        """All is well."""
        return self._say("ok", found)

    def warning(self, found: str, todo: str = "") -> Finding:
        """The run may start, and may not do what is meant."""
        return self._say("warning", found, todo)

    def error(self, found: str, todo: str = "") -> Finding:
        """The run should not start."""
        return self._say("error", found, todo)

    def _say(self, level: Level, found: str, todo: str = "") -> Finding:
        return Finding(check=self.name, level=level, found=found, why=self.why, todo=todo)

    def refused(self, error: Exception) -> Finding:
        """What a run would refuse, in the run's own line, which says what to do."""
        return self.error(" ".join(str(error).split()))

    def or_ok(self, problems: Iterable[Finding], found: str) -> Iterator[Finding]:
        """The problems; where there are none, what is well."""
        yield from list(problems) or [self.ok(found)]


Look = Callable[[Any], Iterator[Finding]]  # of a `Subject`


def check(why: str, *, loads_models: bool = False) -> Callable[[Look], Check]:
    """Make a function a check that is called like it."""
    return lambda look: Check(look.__name__.replace("_", "-"), why, look, loads_models)


class Report(Record):
    """All findings, and what could not be looked at."""

    findings: list[Finding] = Field(default=[])
    not_checked: dict[str, str] = Field(default={})  # check -> reason

    @computed_field
    @property
    def may_start(self) -> bool:
        """Whether nothing was found that should keep the run from starting."""
        return not self.errors

    @computed_field
    @property
    def errors(self) -> int:
        """Number of errors."""
        return self.count("error")

    @computed_field
    @property
    def warnings(self) -> int:
        """Number of warnings."""
        return self.count("warning")

    def count(self, level: Level, check: str | None = None) -> int:
        """Findings of a level, of one check or of all."""
        return sum(f.level == level and check in (None, f.check) for f in self.findings)

    def last_lines(self) -> list[str]:
        """What was not looked at, then the verdict."""
        skipped = self.not_checked.items()
        lines = [f"{'-':8} {name:{WIDTH}}  not checked: {reason}" for name, reason in skipped]
        verdict = "the run may start" if self.may_start else "do not start this run"
        return [*lines, f"{verdict}: errors {self.errors}, warnings {self.warnings}"]


class Screen(Live):
    """Writes each finding when it is known, and names the check at work on stderr.

    A terminal shows it with a clock; elsewhere a line names a check that takes its time.
    """

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._as_json = as_json
        self._timer: threading.Timer | None = None

    def begin(self, name: str) -> None:
        """Name the check at work, with a clock of its own."""
        self._stop_timer()
        if not self._live:
            self._timer = threading.Timer(QUIET_SECONDS, LOG.info, ["checking %s ...", name])
            self._timer.daemon = True
            self._timer.start()
            return
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._bars.add_task(name, total=None)

    def found(self, finding: Finding) -> None:
        """Write a finding, unless all are wanted in one document."""
        if not self._as_json:
            self.write(finding.lines())

    def end(self, report: Report) -> None:
        """Write what no finding says."""
        self._stop_timer()
        text = json.dumps(report.as_json(), indent=2)
        self.write(text.split("\n") if self._as_json else report.last_lines())

    def __exit__(self, *raised: object) -> None:
        self._stop_timer()
        super().__exit__(*raised)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
