"""What a round's training leaves on disk while it runs, so that any number of processes can resume.

A checkpoint is a folder `STEPS/` with the state of the loop, weights, optimizer moments, and the
digests of these files. They are gathered to whole tensors by parameter name before they are
written, so a run may resume with another number of processes or another strategy. The two latest
ones stay; the newest that is what was written is resumed from.
"""

import csv
import io
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch.distributed.tensor import DTensor, distribute_tensor

from opd_stream.drift import NAMES
from opd_stream.outcome import (
    EpochRecord,
    ExtrapolationRecord,
    StartDrift,
    WindowAudit,
    read_metrics,
)
from opd_stream.store.files import publish, sha256_file, sync_tree, whole_or_gone
from opd_stream.store.sealed import DamagedRecord, Sealed, load_record, publish_record
from opd_stream.store.tree import load_tree, save_tree

LOG = logging.getLogger("opd_stream")
RECORD = "checkpoint.json"
COUNTED = ("tokens", "row_tokens", "row_pairs")  # sums the cost of training follows from


class TrainState(BaseModel):
    """The loop's state; every process computes the same one from all-reduced sums.

    Sums are those of `opd_stream.drift.NAMES`.
    """

    steps: int = 0  # optimizer steps of this round
    trained: dict[str, float] = dict.fromkeys(COUNTED, 0.0)
    cached_tokens: int = 0  # completion tokens of all rows, each once
    cut_tokens: int = 0  # of these, behind the training window
    start: StartDrift | None = None  # None: not measured yet
    is_gated: bool = True  # drift weighs tokens
    mean_loss: float | None = None  # of the student's rows in the step before, for the soft clamp
    epoch_sums: dict[str, float] = {}
    recent_sums: dict[str, float] = {}  # since the latest look at drift
    epochs: list[EpochRecord] = []
    extrapolations: list[ExtrapolationRecord] = []
    audits: list[WindowAudit] = []  # of the window, within the round
    decision_age: int | None = None  # of the window of a step, in steps, at most
    seconds: float = 0.0  # of training, over all calls, up to the checkpoint
    cpu_seconds: float = 0.0

    @property
    def floor(self) -> float:
        """policy_drift of the latest rows that were fresh, of this round or an earlier one."""
        return 0.0 if self.start is None else self.start.floor or 0.0

    @property
    def is_over(self) -> bool:
        """Whether these rows train no further."""
        return bool(self.epochs) and self.epochs[-1].action in ("regenerate", "stop")

    def add(self, sums: Mapping[str, float]) -> None:
        """Count an optimizer step."""
        self.steps += 1
        own = sums["tokens"] - sums.get("given_tokens", 0.0)
        if own:
            self.mean_loss = (sums["loss"] - sums.get("given_loss", 0.0)) / own
        add_sums(self.epoch_sums, sums)
        add_sums(self.recent_sums, sums)
        for name in COUNTED:
            self.trained[name] += sums[name]


def add_sums(total: dict[str, float], sums: Mapping[str, float]) -> None:
    """Add sums to a total, name by name."""
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + value


def total_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums of sums."""
    total = dict.fromkeys(NAMES, 0.0)
    for sums in rows:
        add_sums(total, sums)
    return total


class Clock:
    """Seconds of a round's training, over all calls that did a part of it."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.time(), time.process_time()

    def add_earlier(self, seconds: float, cpu_seconds: float) -> None:
        """Count what earlier calls had spent."""
        self._wall -= seconds
        self._cpu -= cpu_seconds

    @property
    def seconds(self) -> float:
        """Wall time."""
        return round(time.time() - self._wall, 3)

    @property
    def cpu_seconds(self) -> float:
        """Of this process."""
        return round(time.process_time() - self._cpu, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCheckpoint:
    """Everything that the rest of a round follows from."""

    state: TrainState
    weights: dict[str, torch.Tensor]  # that are trained
    optimizer: dict[str, Any]  # {parameter name: moments}
    base: dict[str, torch.Tensor] | None  # of the next extrapolation


class CheckpointRecord(Sealed):
    """`checkpoint.json` of a checkpoint."""

    policy: str  # that is trained: the name of the folder of its checkpoints
    steps: int
    files: dict[str, str]  # name -> SHA-256

    def misplaced(self, path: Path) -> str | None:
        """A record of another checkpoint."""
        expected = f"{self.policy}/{self.steps:08d}"
        return None if expected == "/".join(path.parts[-3:-1]) else f"it is of {expected}"


def save_checkpoint(scratch: Path, checkpoint: TrainCheckpoint) -> None:
    """Write a checkpoint, named by the steps of the round; it appears whole.

    All but one go before, so that the disk never holds more than two that are whole.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    target = scratch / f"{checkpoint.state.steps:08d}"
    for older in [path for path in _checkpoints(scratch) if path != target][:-1]:
        shutil.rmtree(older, ignore_errors=True)
    temporary = scratch / f".{target.name}.{uuid.uuid4().hex}.tmp"
    tree = {
        "state": checkpoint.state.model_dump(),
        "weights": checkpoint.weights,
        "optimizer": checkpoint.optimizer,
        "base": checkpoint.base,
    }
    with whole_or_gone(temporary):
        save_tree(tree, temporary)
        record = CheckpointRecord(
            policy=scratch.name,
            steps=checkpoint.state.steps,
            files={path.name: sha256_file(path) for path in sorted(temporary.iterdir())},
        )
        publish_record(temporary / RECORD, record)
        sync_tree(temporary)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one of as many steps
        temporary.rename(target)


def latest_checkpoint(scratch: Path) -> TrainCheckpoint | None:
    """The checkpoint to resume from: the newest that is what was written; None: there is none.

    Each other one is named in the log.
    """
    found = _checkpoints(scratch)
    for number, folder in enumerate(reversed(found)):
        reason = _damage(folder)
        if reason is None:
            tree = load_tree(folder)
            return TrainCheckpoint(
                state=TrainState.model_validate(tree["state"]),
                weights=tree["weights"],
                optimizer=tree["optimizer"],
                base=tree["base"],
            )
        is_last = number == len(found) - 1
        then = "the round is trained from its start" if is_last else "the one before is used"
        LOG.warning("checkpoint %s/%s is damaged (%s); %s", scratch.name, folder.name, reason, then)
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None; every byte is read."""
    try:
        files = load_record(CheckpointRecord, checkpoint / RECORD).files
        changed = [name for name, each in files.items() if sha256_file(checkpoint / name) != each]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except DamagedRecord as damaged:
        return f"{RECORD} {damaged.reason}"
    return f"{changed[0]} is not what was written" if changed else None


def _checkpoints(scratch: Path) -> list[Path]:
    return sorted(path for path in scratch.glob("[0-9]*") if path.is_dir())


def gathered(tensors: Mapping[str, torch.Tensor], *, is_kept: bool) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, those of several devices put together.

    Args:
        tensors: name -> tensor; every process takes part.
        is_kept: whether this process wants them; else it gets none.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_kept:
            whole[name] = tensor.detach().cpu()
    return whole


def laid_out_as(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device, or over the devices, of a parameter."""
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    whole = whole.to(parameter.to_local().device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)  # all have the whole


def trained_weights(model: torch.nn.Module, *, is_kept: bool) -> dict[str, torch.Tensor]:
    """The weights that are trained, and buffers, as `gathered` does."""
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    trained = {name: t for name, t in model.state_dict().items() if name not in frozen}
    return gathered(trained, is_kept=is_kept)


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put saved weights back."""
    for name, tensor in model.state_dict().items():
        if name in weights:
            tensor.copy_(laid_out_as(tensor, weights[name]))


def optimizer_moments(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    is_kept: bool,
) -> dict[str, Any]:
    """{parameter name: moments}, as `gathered` does; parameters are in the optimizer's order."""
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        whole = gathered(tensors, is_kept=is_kept)  # every process takes part
        found[name] = {**state, **whole} if is_kept else {}
    return found


def load_moments(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Any],
) -> None:
    """Continue with moments that were saved before; settings stay those of the optimizer."""
    state = optimizer.state_dict()
    state["state"] = {
        number: {
            key: value if key == "step" else laid_out_as(parameter, value)
            for key, value in moments[name].items()
        }
        for number, (name, parameter) in enumerate(parameters.items())
    }
    optimizer.load_state_dict(state)


def forget_metrics_from(metrics: Path, step: int) -> None:
    """Remove the lines of steps that will be done again."""
    if metrics.exists():
        kept = [line for line, found in read_metrics(metrics) if found.step < step]
        publish(metrics, "".join(kept).encode())


def write_round_metrics(metrics: Path, round_index: int, folder: Path) -> None:
    """The lines of a round beside its policy, and those of the run as a table beside them."""
    lines = list(read_metrics(metrics))
    own = [line for line, found in lines if found.round == round_index]
    rows = [json.loads(line) for line, _ in lines]
    publish(folder / "metrics.jsonl", "".join(own).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    publish(metrics.with_suffix(".csv"), text.getvalue().encode())
