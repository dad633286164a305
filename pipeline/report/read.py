"""Everything that a report shows of a run, read from the run's folder alone."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.section import Record, read_record
from opd_stream.store.files import read_json
from pipeline.records import CacheRecord, RoundPlanRecord, RoundReport, RunSummary
from pipeline.run_folder import RunFolder


class Versions(Record):
    """Of `run.json`: what the run was made with."""

    python: str | None = None
    versions: dict[str, str] = Field(default={})


class Step(Record):
    """A line of metrics.jsonl."""

    round: int
    epoch: int = 0
    step: int
    policy_drift: float | None = None
    effective_sample_fraction: float | None = None
    mean_drift_weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as far as it is.

    Example:
        >>> read_run(Path("runs/quickstart")).summary.finished
        True
    """

    name: str
    config: Config
    versions: dict[str, str]
    summary: RunSummary | None
    plans: list[RoundPlanRecord]
    rounds: list[RoundReport]
    steps: list[Step]

    def caches(self) -> dict[int, tuple[CacheRecord, ...]]:
        """What each round trains on, finished or not."""
        planned = {plan.round_index: plan.caches for plan in self.plans}
        return planned | {report.round: report.caches for report in self.rounds}


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in the same order, with names that tell them apart.

    Raises:
        UserError: a folder is no run, or a file in it is not what opd-stream writes.
    """
    names = [folder.resolve().name for folder in folders]
    distinct = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, distinct, strict=True)]


def read_run(folder: Path, name: str | None = None) -> Run:
    """One run; raises as `read_runs`."""
    run, made_with = RunFolder(folder), folder / "run.json"
    config, versions = run.config(), dict[str, str]()
    if made_with.is_file():
        found = read_record(Versions, read_json(made_with), str(made_with))
        versions = {**({"python": found.python} if found.python else {}), **found.versions}
    return Run(
        name=name or folder.resolve().name,
        config=config,
        versions=versions,
        summary=run.summary(),
        plans=run.plans(),
        rounds=run.reports(),
        steps=list(_steps(run.metrics)),
    )


def _steps(path: Path) -> Iterator[Step]:
    """Whole lines; one that is still being written is left out."""
    text = path.read_text() if path.is_file() else ""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            where = f"line {number} of {path}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{where} is not valid JSON ({error}); expected what opd-stream writes; "
                    "continue the run, or leave it out of the report"
                ) from error
            yield read_record(Step, value, where)
