"""The folder of a run: what was asked, what was decided, and where the artifacts lie.

    runs/quickstart/config.json          the resolved config
    runs/quickstart/run.json             id of the run, versions of the libraries
    runs/quickstart/metrics.jsonl        one line per optimizer step
    runs/quickstart/rounds/0003/         plan.json and report.json
    runs/quickstart/summary.json         the run in one file, for other programs
    runs/quickstart/training/            checkpoints of the round in training

Deleting it loses no teacher work: the artifacts are in the store.
"""

import json
import math
import platform
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from opd_stream.config import PLACEMENT, Config, counts_rounds
from opd_stream.config_file import problems_of
from opd_stream.errors import UserError
from opd_stream.outcome import read_metrics
from opd_stream.store.files import make_folder, publish, remove_file
from opd_stream.store.recipe import differing_fields
from opd_stream.store.sealed import (
    DamagedRecord,
    load_record,
    pretty_json,
    publish_new_record,
    publish_record,
    read_json,
    say_mended,
    sealed,
    unsealed,
)
from pipeline.records import MadeBy, RoundPlanRecord, RoundReport, RunSummary
from pipeline.rounds import Round

LIBRARIES = ("opd-stream", "torch", "transformers", "lightning", "ray", "pyarrow")
CONFIG = "config.json"
SHOWN = 3  # settings named in a refusal


class RunFolder:
    """Reads and writes the folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"

    def open(self, config: Config) -> str:
        """Join or start the run; returns its id.

        Raises:
            UserError: the folder belongs to a run with other settings, or cannot be written.
        """
        make_folder(self.path)
        self.check(config)
        value = sealed(config.model_dump(mode="json"), CONFIG)
        publish(self.path / CONFIG, pretty_json(value))
        return self._record()

    def join(self, config: Config) -> str:
        """As `open`, for evaluating: whatever the config's evaluation, and without keeping it.

        Raises:
            UserError: as `open`.
        """
        make_folder(self.path)
        self.check(config, "evaluation", "held_out_prompts")
        return self._record()

    def _record(self) -> str:
        """Write who made the run, once; returns its id."""
        record = MadeBy(
            id=uuid.uuid4().hex,
            python=platform.python_version(),
            versions={name: version(name) for name in LIBRARIES},
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            host=platform.node() or None,
            commit=_commit(),
        )
        if publish_new_record(self.path / "run.json", record, is_pretty=True) and self.has_rounds():
            what = "the run has a new id; what it made before counts as another run's"
            say_mended(self.path / "run.json", "is missing", what)
        return self.made_by().id

    def check(self, config: Config, *without: str) -> None:
        """Refuse a folder that belongs to another run, or that can be none; writes nothing.

        Sections named in `without` may differ.

        Raises:
            UserError: says which settings differ, or which file is in the way.
        """
        there = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        if not there.is_dir():
            raise UserError(
                f"{there} is a file; expected the folder of a run; name another --run-dir"
            )
        other = self._differing(config, *without) if self.is_run() else {}
        if other:
            fields = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in other.items()]
            more = f"; and {len(fields) - SHOWN} more" if len(fields) > SHOWN else ""
            raise UserError(
                f"{self.path} is a run with other settings ({'; '.join(fields[:SHOWN])}{more}); "
                "use another --run-dir, or delete this one: what both share is found in the store"
            )

    def is_run(self) -> bool:
        """Whether a run was begun in this folder."""
        return (self.path / "config.json").is_file()

    def is_of(self, config: Config) -> bool:
        """Whether the folder belongs to the run of this config, evaluation and all."""
        return self.is_run() and not self._differing(config)

    def config(self) -> Config:
        """The config of an existing run.

        Raises:
            UserError: the folder is no run, or its config is none of this version.
        """
        stored = self.path / "config.json"
        if not stored.is_file():
            raise UserError(
                f"{self.path} has no config.json; expected the folder of a run; name one below "
                "runs/ that opd-stream made"
            )
        found = unsealed(read_json(stored), stored, CONFIG)
        try:
            return Config.model_validate(found)
        except ValidationError as error:
            problems = problems_of(error, found)
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise UserError(
                f"{stored} was made by another version of opd-stream: "
                f"{'; '.join(problems[:SHOWN])}{more}; look at the run with that version"
            ) from error

    def plan(self, round_index: int) -> RoundPlanRecord:
        """What a round will do or did, and the artifacts it names.

        Raises:
            UserError: the round is not planned.
        """
        path = self._round(round_index) / "plan.json"
        if not path.is_file():
            there = sorted(int(found.parent.name) for found in self.path.glob("rounds/*/plan.json"))
            known = f"rounds {there[0]} to {there[-1]}" if there else "no round yet"
            raise UserError(
                f"{self.path} has no round {round_index}; it has {known}; choose --round, or "
                "continue the run (of stages on several machines: where one of it was run)"
            )
        return load_record(RoundPlanRecord, path)

    def plans(self) -> list[RoundPlanRecord]:
        """The plans of the rounds that have one, in order."""
        paths = sorted(self.path.glob("rounds/*/plan.json"))
        return [load_record(RoundPlanRecord, path) for path in paths]

    def is_planned(self, round_index: int) -> bool:
        """Whether a round has a plan; a damaged one is named."""
        path = self._round(round_index) / "plan.json"
        try:
            return bool(load_record(RoundPlanRecord, path))
        except FileNotFoundError:
            return False
        except DamagedRecord as damaged:
            say_mended(path, damaged.reason)
            return False

    def last_round(self) -> int:
        """The last finished round.

        Raises:
            UserError: none is finished.
        """
        reports = self.path.glob("rounds/*/report.json")
        finished = sorted(int(report.parent.name) for report in reports)
        if not finished:
            raise UserError(
                f"{self.path} has no finished round; continue the run, or choose --round"
            )
        return finished[-1]

    def made_by(self) -> MadeBy:
        """Who made an existing run.

        Raises:
            UserError: the record is damaged or missing.
        """
        path = self.path / "run.json"
        if not path.exists():
            raise UserError(
                f"{path} is missing; expected a run's id; continue the run: it gets one"
            )
        return load_record(MadeBy, path)

    def write_plan(self, round_: Round) -> None:
        """What the round will do, and the artifacts it names."""
        record = RoundPlanRecord(
            **asdict(round_.plan),
            caches=tuple(cache.record() for cache in round_.caches),
            unit_decisions=round_.unit_decisions,
            policy=round_.policy.fingerprint,
        )
        publish_record(self._round(round_.index) / "plan.json", record, is_pretty=True)

    def write_report(self, report: RoundReport) -> None:
        """What a round did."""
        publish_record(self._round(report.round) / "report.json", report, is_pretty=True)

    def report(self, round_index: int) -> RoundReport | None:
        """What a round did; None where no report that this version reads is there."""
        path = self._round(round_index) / "report.json"
        try:
            return load_record(RoundReport, path)
        except DamagedRecord as damaged:
            say_mended(path, damaged.reason)
            return None
        except (OSError, ValueError):
            return None

    def reports(self) -> list[RoundReport]:
        """The reports of the finished rounds, in order.

        Raises:
            UserError: one was written by another version.
        """
        paths = sorted(self.path.glob("rounds/*/report.json"))
        return [load_record(RoundReport, path) for path in paths]

    def write_summary(self, summary: RunSummary) -> None:
        """The run so far."""
        publish_record(self.path / "summary.json", summary, is_pretty=True)

    def summary(self) -> RunSummary | None:
        """The summary; None before the first.

        Raises:
            UserError: another version wrote it.
        """
        path = self.path / "summary.json"
        return load_record(RunSummary, path) if path.exists() else None

    def sound_summary(self) -> RunSummary | None:
        """The summary; a damaged one is named and removed, for a run writes it again."""
        try:
            return self.summary()
        except DamagedRecord as damaged:
            say_mended(damaged.path, damaged.reason, "it is written again, without earlier seconds")
            remove_file(damaged.path)
            return None

    def has_rounds(self) -> bool:
        """Whether a round was planned."""
        return (self.path / "rounds").exists()

    def has_summary(self) -> bool:
        """Whether a summary was written."""
        return (self.path / "summary.json").exists()

    def is_finished(self, config: Config) -> bool:
        """Whether the run of this config did all of its rounds."""
        summary = self.sound_summary()
        is_whole = summary is not None and summary.rounds >= config.rounds
        return is_whole and self.is_of(config)

    def calls(self) -> dict[str, float]:
        """Seconds of the calls of `run` so far, as the summary has them; empty before the first."""
        summary = self.sound_summary()
        if summary is None or summary.seconds.wall is None or summary.seconds.other is None:
            return {}
        return {"wall": summary.seconds.wall, "other": summary.seconds.other}

    def scratch(self, round_: Round) -> Path:
        """Checkpoints of a round in training."""
        return self.path / "training" / round_.policy.fingerprint[:16]

    def add_metrics(self, round_: Round) -> None:
        """Take the metrics of a round over from its policy, unless they are here already."""
        source = round_.policy.folder("texts") / "metrics.jsonl"
        published = "".join(line for line, _ in read_metrics(source)).encode()
        there = self._metrics_bytes() or b""
        before = there.removesuffix(published)
        if _last_round(before) >= round_.index:  # rounds are written in order, but for accidents
            lines = list(read_metrics(self.metrics))
            before = "".join(line for line, step in lines if step.round < round_.index).encode()
            after = "".join(line for line, step in lines if step.round > round_.index).encode()
            published += after
        wanted = before + published
        if wanted != there or not self.metrics.is_file():
            publish(self.metrics, wanted)

    def _metrics_bytes(self) -> bytes | None:
        """What metrics.jsonl holds; None: there is no such file."""
        return self.metrics.read_bytes() if self.metrics.is_file() else None

    def mend_metrics(self, lines: bytes) -> None:
        """Write metrics.jsonl again where it is not the lines of all rounds."""
        if self._metrics_bytes() != lines:
            say_mended(self.metrics, "is not what its rounds' policies have")
            publish(self.metrics, lines)

    def training_lines(self, asked: Sequence[Round]) -> dict[int, list[dict[str, Any]]]:
        """The lines of metrics.jsonl of rounds, as far as they were trained on this machine.

        A round has none where this folder's round has other settings.
        """
        own: dict[int, list[dict[str, Any]]] = {}
        for round_ in asked:
            plan = self._round(round_.index) / "plan.json"
            if plan.exists() and self.plan(round_.index).policy == round_.policy.fingerprint:
                own[round_.index] = []
        for _, step in read_metrics(self.metrics, backwards=True) if own else ():
            if step.round < min(own):
                break
            if step.round in own:
                own[step.round].append(step.as_json())
        return {index: lines[::-1] for index, lines in own.items()}

    def checkpoint_steps(self, round_: Round) -> int | None:
        """Steps of the round in its latest checkpoint on this machine, while it is in training."""
        found = sorted(path.name for path in self.scratch(round_).glob("[0-9]*"))
        return int(found[-1]) if found else None

    def _round(self, index: int) -> Path:
        return self.path / "rounds" / f"{index:04d}"

    def _differing(self, config: Config, *without: str) -> dict[str, tuple[Any, Any]]:
        """Fields in which the folder's run is another one, with both values."""
        path = self.path / CONFIG
        found = unsealed(read_json(path), path, CONFIG)
        free = [*PLACEMENT, *without]
        if not counts_rounds(config) and found["rounds"] <= config.rounds:
            free.append("rounds")  # it goes on
        other = differing_fields(found, config.model_dump(mode="json"))
        return {field: values for field, values in other.items() if not is_below(field, free)}


def _commit() -> str | None:
    """The commit of the checkout that runs; None: it is none, or there is no git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _last_round(lines: bytes) -> float:
    """The round of the last line of metrics; infinite where that is not a whole one."""
    if not lines:
        return -1
    try:
        return int(json.loads(lines[lines.rstrip(b"\n").rfind(b"\n") + 1 :])["round"])
    except (ValueError, LookupError, TypeError):
        return math.inf


def is_below(field: str, names: Iterable[str]) -> bool:
    """Whether a dotted field of a config is one of the named ones, or a part of one.

    In a name, * stands for any key.
    """
    keys = field.split(".")
    return any(
        len(parts) <= len(keys)
        and all(part in ("*", key) for part, key in zip(parts, keys, strict=False))
        for parts in (name.split(".") for name in names)
    )
