"""What the doctor says: findings as lines while they come, or as one JSON object at the end."""

import json
import threading
from dataclasses import asdict, dataclass, field
from typing import Literal

from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.console import LOG, Live

Level = Literal["ok", "warning", "error"]
WIDTH = 18  # of the longest name of a check: lines are written before all names are known
QUIET_SECONDS = 2.0  # without a terminal, a check that takes longer is named


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings, and what could not be looked at."""

    findings: list[Finding] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)  # check -> reason

    @property
    def may_start(self) -> bool:
        """Whether nothing was found that should keep the run from starting."""
        return not self.count("error")

    def count(self, level: Level, check: str | None = None) -> int:
        """Findings of a level, of one check or of all."""
        return sum(f.level == level and check in (None, f.check) for f in self.findings)

    def last_lines(self) -> list[str]:
        """What was not looked at, then the verdict."""
        lines = [
            f"{'-':8} {check:{WIDTH}}  not checked: {reason}"
            for check, reason in self.not_checked.items()
        ]
        verdict = "the run may start" if self.may_start else "do not start this run"
        errors, warnings = self.count("error"), self.count("warning")
        return [*lines, f"{verdict}: errors {errors}, warnings {warnings}"]

    def as_json(self) -> str:
        """For programs."""
        value = {
            "may_start": self.may_start,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "findings": [asdict(finding) for finding in self.findings],
            "not_checked": self.not_checked,
        }
        return json.dumps(value, indent=2)


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
        self.write([report.as_json()] if self._as_json else report.last_lines())

    def __exit__(self, *raised: object) -> None:
        self._stop_timer()
        super().__exit__(*raised)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
