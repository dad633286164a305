"""Everything that a report shows of a run, read from the run's folder alone."""

from dataclasses import dataclass
from pathlib import Path

from opd_stream.config import Config
from opd_stream.outcome import StepMetrics, read_metrics
from pipeline.records import CacheRecord, MadeBy, RoundPlanRecord, RoundReport, RunSummary
from pipeline.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as far as it is.

    Example:
        >>> read_run(Path("runs/quickstart")).summary.finished
        True
    """

    name: str
    folder: Path
    config: Config
    made_by: MadeBy | None  # None: the folder does not say
    summary: RunSummary | None
    plans: list[RoundPlanRecord]
    rounds: list[RoundReport]
    steps: list[StepMetrics]

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
    run = RunFolder(folder)
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        config=run.config(),
        made_by=run.made_by() if (folder / "run.json").is_file() else None,
        summary=run.summary(),
        plans=run.plans(),
        rounds=run.reports(),
        steps=[step for _, step in read_metrics(run.metrics)],
    )
