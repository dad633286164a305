"""What the command prints: lines for a person as they come, or one JSON object for a program."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.console import Live
from pipeline.doctor.findings import Check, Finding, Report

WIDTH = 18  # of the longest name of a check: lines are written before all names are known


class Screen(Live):
    """Writes each finding when it is known; on a terminal stderr names the check at work."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._as_json = as_json

    def begin(self, check: Check) -> None:
        """Name the check at work, with a clock of its own."""
        if not self._live:
            return
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._bars.add_task(check.name, total=None)

    def found(self, finding: Finding) -> None:
        """Write a finding, unless all are wanted in one document."""
        if not self._as_json:
            self.write(finding_lines(finding))

    def end(self, report: Report) -> None:
        """Write what no finding says."""
        self.write([as_json(report)] if self._as_json else last_lines(report))


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
