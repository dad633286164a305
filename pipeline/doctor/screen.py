"""What the command prints: lines for a person, or one JSON object for a program."""

import json
from collections.abc import Iterator
from dataclasses import asdict

from pipeline.doctor.findings import Report


def lines(report: Report) -> Iterator[str]:
    """Findings in order, those that ask for something with why and what to do; then the verdict."""
    width = max((len(finding.check) for finding in report.findings), default=0)
    for finding in report.findings:
        yield f"{finding.level:8} {finding.check:{width}}  {finding.found}"
        if finding.level != "ok":
            indent = " " * (width + 11)
            yield f"{indent}why: {finding.why}"
            yield f"{indent}do:  {finding.todo}"
    for check, reason in report.not_checked.items():
        yield f"{'-':8} {check:{width}}  not checked: {reason}"
    errors, warnings = report.count("error"), report.count("warning")
    verdict = "the run may start" if report.may_start else "do not start this run"
    yield f"{verdict}: errors {errors}, warnings {warnings}"


def as_json(report: Report) -> str:
    """The same as JSON."""
    value = {
        "may_start": report.may_start,
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "findings": [asdict(finding) for finding in report.findings],
        "not_checked": report.not_checked,
    }
    return json.dumps(value, indent=2)
