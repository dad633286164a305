"""The files of a run's folder as records; what an old or unfinished run does not have is empty."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opd_stream.errors import UserError
from opd_stream.store.files import read_json

Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """A part of a file: fields that are not there are empty, others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class PositionBin(Record):
    """Means over the tokens from one place of a completion up to the next bin's."""

    first: Count
    tokens: Count = 0
    reverse_kl: float | None = None
    teacher_entropy: float | None = None  # nats


class Epoch(Record):
    """An epoch over a round's cache, with what was decided after it."""

    epoch: Count
    action: str = ""
    reason: str = ""
    reverse_kl: float | None = None
    teacher_entropy: float | None = None
    policy_drift: float | None = None
    effective_sample_fraction: float | None = None
    teacher_top_mass: float | None = None
    student_top_mass: float | None = None
    by_position: list[PositionBin] = []


class WindowChoice(Record):
    """What the adaptive window decided for the next round."""

    window_tokens: Count
    cosines: list[float] = []
    fell_back: bool = False
    reason: str = ""


class UnitChoice(Record):
    """What was decided about a unit of the round before."""

    first: Count
    last: Count
    action: str
    reason: str = ""


class Extrapolation(Record):
    """A search along the way the weights came."""

    step: Count
    kept: Count = 0
    policy_drift: float | None = None


class CacheUse(Record):
    """Units of one scores artifact that a round trained on."""

    rollouts: str
    scores: str
    origin: str = ""
    policy_version: Count | None = None
    window_tokens: Count | None = None
    units: list[int] | None = None


class Policy(Record):
    """A policy of the run."""

    version: Count
    fingerprint: str
    weights_sha256: str = ""


class Evaluation(Record):
    """Sampled answers of one policy; `round` is its version."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    round: Count
    pass_at_1: float = Field(alias="pass@1")
    standard_error: float | None = None
    problems: Count | None = None
    samples: Count | None = None

    def passes(self) -> dict[str, float]:
        """pass@k of every k that was evaluated, by name."""
        extra = self.model_extra or {}
        found = {
            name: float(value)
            for name, value in extra.items()
            if name.startswith("pass@") and isinstance(value, int | float)
        }
        return {"pass@1": self.pass_at_1, **found}


class Reused(Record):
    """What of a round was made by others."""

    rollout_units: Count = 0
    score_units: Count = 0
    policy: bool = False


class RoundRecord(Record):
    """The report of a finished round."""

    round: Count
    window_tokens: Count | None = None
    first_step: Count | None = None
    steps: Count | None = None
    tokens: dict[str, float] = {}
    flops: dict[str, float] = {}
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    cache_bytes: Count | None = None
    length_share: float | None = None
    reused: Reused | None = None
    extrapolations: list[Extrapolation] = []
    window_decision: WindowChoice | None = None
    unit_decisions: list[UnitChoice] = []
    epochs: list[Epoch] = []
    decision: str = ""
    policy: Policy | None = None
    caches: list[CacheUse] = []


class Plan(Record):
    """The plan of a round, finished or not."""

    round_index: Count
    window_tokens: Count | None = None
    planned_steps: Count | None = None
    caches: list[CacheUse] = []
    unit_decisions: list[UnitChoice] = []
    policy: str = ""


class Summary(Record):
    """The whole run so far."""

    finished: bool = False
    rounds_planned: Count | None = None
    evaluations: list[Evaluation] = []
    tokens: dict[str, float] = {}
    flops: dict[str, float] = {}
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    reused: Reused | None = None
    policies: list[Policy] = []
    final_policy: str | None = None
    refused_rows: Count = 0


class Step(Record):
    """A line of metrics.jsonl."""

    round: Count
    epoch: Count = 0
    step: Count
    window_tokens: Count | None = None
    policy_drift: float | None = None
    effective_sample_fraction: float | None = None
    mean_drift_weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that a report shows of one run.

    Example:
        >>> read_run(Path("runs/quickstart")).summary.finished
        True
    """

    name: str
    folder: Path
    config: dict[str, Any]
    versions: dict[str, str]
    summary: Summary | None
    plans: list[Plan]
    rounds: list[RoundRecord]
    steps: list[Step]

    def setting(self, field: str) -> Any:
        """A field of the config by its dotted name; None where the config has none."""
        value: Any = self.config
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


R = TypeVar("R", bound=Record)


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in the order given, with names that tell them apart.

    Raises:
        UserError: a folder is no run, or a file in it is not what opd-stream writes.
    """
    names = [folder.resolve().name for folder in folders]
    distinct = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, distinct, strict=True)]


def read_run(folder: Path, name: str | None = None) -> Run:
    """One run.

    Raises:
        UserError: the folder is no run, or a file in it is not what opd-stream writes.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"{folder} has no config.json; expected the folder of a run; "
            "name a folder below runs/ that opd-stream made"
        )
    record, summary = folder / "run.json", folder / "summary.json"
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        config=_object(config),
        versions=_versions(record),
        summary=_read(Summary, summary) if summary.is_file() else None,
        plans=[_read(Plan, path) for path in sorted(folder.glob("rounds/*/plan.json"))],
        rounds=[_read(RoundRecord, path) for path in sorted(folder.glob("rounds/*/report.json"))],
        steps=list(_steps(folder / "metrics.jsonl")),
    )


def _versions(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    record = _object(path)
    found = record.get("versions")
    versions = found if isinstance(found, dict) else {}
    python = {"python": record["python"]} if "python" in record else {}
    return {str(name): str(value) for name, value in {**python, **versions}.items()}


def _steps(path: Path) -> Iterator[Step]:
    """Whole lines; one that is still being written is left out."""
    text = path.read_text() if path.is_file() else ""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                yield Step.model_validate(json.loads(line))
            except ValueError as error:
                raise _refused(f"line {number} of {path}", error) from error


def _read(kind: type[R], path: Path) -> R:
    try:
        return kind.model_validate(_object(path))
    except ValidationError as error:
        raise _refused(str(path), error) from error


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise _refused(str(path), ValueError(f"it holds {type(value).__name__}, not an object"))
    return value


def _refused(place: str, error: ValueError) -> UserError:
    reason = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return UserError(
        f"{place} cannot be shown ({reason}); expected what opd-stream writes; "
        "continue the run, or leave it out of the report"
    )
