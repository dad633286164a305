"""What the command prints: lines for a person as they come, or one JSON object for a program."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.doctor.findings import Check, Finding, Report
from pipeline.log import shows_bars

WIDTH = 18  # of the longest name of a check: lines are written before all names are known


class Screen:
    """Writes each finding when it is known; on a terminal stderr names the check at work."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json, self._live = as_json, shows_bars()
        self._at_work = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # findings stay apart from what is said about them
        )

    def __enter__(self) -> Self:
        if self._live:
            self._at_work.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._at_work.stop()

    def begin(self, check: Check) -> None:
        """Name the check at work, with a clock of its own."""
        if not self._live:
            return
        for task in self._at_work.task_ids:
            self._at_work.remove_task(task)
        self._at_work.add_task(check.name, total=None)

    def found(self, finding: Finding) -> None:
        """Write a finding, unless all are wanted in one document."""
        if not self._as_json:
            self._write(finding_lines(finding))

    def end(self, report: Report) -> None:
        """Write what no finding says."""
        self._write([as_json(report)] if self._as_json else last_lines(report))

    def _write(self, lines: Iterator[str] | list[str]) -> None:
        if self._live:
            self._at_work.stop()
        for line in lines:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if self._live:
            self._at_work.start()


def finding_lines(finding: Finding) -> Iterator[str]:
    """What was found; where it asks for something, why and what to do too."""
    yield f"{finding.level:8} {finding.check:{WIDTH}}  {finding.found}"
    if finding.level != "ok":
        indent = " " * (WIDTH + 11)
        yield f"{indent}why: {finding.why}"
        yield f"{indent}do:  {finding.todo}"


def last_lines(report: Report) -> Iterator[str]:
    """What was not looked at, then the verdict."""
    for check, reason in report.not_checked.items():
        yield f"{'-':8} {check:{WIDTH}}  not checked: {reason}"
    errors, warnings = report.count("error"), report.count("warning")
    verdict = "the run may start" if report.may_start else "do not start this run"
    yield f"{verdict}: errors {errors}, warnings {warnings}"


def as_json(report: Report) -> str:
    """The whole report as JSON."""
    value = {
        "may_start": report.may_start,
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "findings": [asdict(finding) for finding in report.findings],
        "not_checked": report.not_checked,
    }
    return json.dumps(value, indent=2)
