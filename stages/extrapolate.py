"""EffOPD as a callback: after steps 1, 2, 4, 8, ... look further along the way the weights came.

It stands before the keeper in the list of callbacks, so a checkpoint of the same step holds the
outcome. Scores are those of the first process, told to all, and every process moves its own shard.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor, distribute_tensor

from opd_stream.config.training import Extrapolation
from opd_stream.drift import DriftSums
from opd_stream.extrapolation import Outcome, Score, Search, is_due, moved_parameters, search
from opd_stream.statistics import NAMES, drift_of, named
from opd_stream.store.reader import ScoredRows, epoch_order
from opd_stream.store.tree import load_tree, save_tree
from stages.data_module import BatchPlan, step_batches
from stages.reward import Reward
from stages.student_module import StudentModule

FOLDER = "extrapolation"  # of the base point inside a policy
SAMPLE_KEY = 0x0EFF0BD  # of the rows that score a point


class Extrapolate(Callback):
    """Searches, and the point the next direction starts from."""

    def __init__(
        self,
        settings: Extrapolation,
        rows: ScoredRows,
        plan: BatchPlan,
        reward: Reward | None,
        base: dict[str, torch.Tensor] | None,
    ) -> None:
        self._settings, self._rows, self._plan, self._reward = settings, rows, plan, reward
        self._search = Search(
            acceptance=settings.acceptance,
            candidates=settings.candidates,
        )
        self._whole_base = base  # of the round before, or of a checkpoint
        self._base: dict[str, torch.Tensor] = {}
        self.outcomes: list[dict[str, Any]] = []
        self.drift_after_jump: DriftSums | None = None  # of the latest step, where it jumped

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        moved = self._moved(pl_module)
        for name, parameter in moved.items():
            if self._whole_base is None:
                self._base[name] = parameter.detach().clone()
            else:
                self._base[name] = _like(parameter, self._whole_base[name])

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.drift_after_jump = None
        step = batch.number + 1
        if not is_due(step):
            return
        moved = self._moved(pl_module)
        ordinary = {name: parameter.detach().clone() for name, parameter in moved.items()}
        pl_module.eval()
        outcome = search(
            list(moved.values()),
            [self._base[name] for name in moved],
            lambda: self._score(trainer, pl_module, batch.number),
            step=step,
            settings=self._search,
        )
        if outcome.kept:
            self.drift_after_jump = self._drift(trainer, pl_module, batch.number)
            if not math.isfinite(self.drift_after_jump.policy_drift):  # a reward does not see it
                _put_back(moved, ordinary)
                outcome, self.drift_after_jump = replace(outcome, kept=0), None
        if outcome.kept and self._settings.reset_moments:
            _reset_moments(trainer.optimizers[0], list(moved.values()))
        pl_module.train()
        for name, parameter in moved.items():
            accepted = self._settings.base == "accepted"
            self._base[name] = parameter.detach().clone() if accepted else ordinary[name]
        self.outcomes.append(_record(outcome, self.drift_after_jump))

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the base as whole tensors; every process takes part."""
        return {"base": {name: _whole(t) for name, t in self._base.items()}, "done": self.outcomes}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._whole_base, self.outcomes = state["base"], state["done"]

    def _moved(self, module: StudentModule) -> dict[str, torch.nn.Parameter]:
        assert module.student is not None
        return moved_parameters(module.student.named_parameters())

    def _score(self, trainer: lightning.Trainer, module: StudentModule, step: int) -> Score:
        signal, reward, kl = self._settings.signal, None, None
        if signal in ("reward", "both"):
            assert self._reward is not None
            assert module.student is not None
            reward = self._reward.accuracy(module.student.model)
        if signal in ("kl", "both"):
            sums = self._sums(module, step)
            kl = -sums["loss"] / max(sums["tokens"], 1.0)
        told = trainer.strategy.broadcast((reward, kl))
        return Score(reward=told[0], kl=told[1])

    def _drift(self, trainer: lightning.Trainer, module: StudentModule, step: int) -> DriftSums:
        with trainer.precision_plugin.forward_context():  # as a training step and the floor
            sums = self._sums(module, step)
        return drift_of(trainer.strategy.broadcast(sums))

    @torch.no_grad()
    def _sums(self, module: StudentModule, step: int) -> dict[str, float]:
        """Cached objective and drift of a fixed sample of rows under the current weights."""
        order = epoch_order(len(self._rows), (self._plan.seed, SAMPLE_KEY))
        sample = order[: self._settings.rows].tolist()
        chosen = [self._plan.used(self._rows[position]) for position in sample]
        total = torch.zeros(len(NAMES), dtype=torch.float64, device=module.device)
        for batch in step_batches(chosen, self._plan, step):
            total += module.loss(batch.to(module.device)).sums
        return named(total)


def save_base(base: dict[str, torch.Tensor], policy: Path) -> None:
    """Leave the base for the next round."""
    save_tree(base, policy / FOLDER)


def load_base(policy: Path) -> dict[str, torch.Tensor] | None:
    """The base that the round before left."""
    return load_tree(policy / FOLDER) if (policy / FOLDER).exists() else None


def _record(outcome: Outcome, drift: DriftSums | None) -> dict[str, Any]:
    """For reports; a score that is not finite is None there."""
    return {
        "step": outcome.step,
        "scores": [
            {name: _finite(value) for name, value in asdict(score).items()}
            for score in outcome.scores
        ],
        "kept": outcome.kept,
        "policy_drift": None if drift is None else drift.policy_drift,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@torch.no_grad()
def _put_back(moved: dict[str, torch.nn.Parameter], ordinary: dict[str, torch.Tensor]) -> None:
    for name, parameter in moved.items():
        parameter.copy_(ordinary[name])


def _reset_moments(optimizer: torch.optim.Optimizer, moved: list[torch.nn.Parameter]) -> None:
    for parameter in moved:
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][name].zero_()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor laid out as the parameter is."""
    if isinstance(parameter, DTensor):
        placed = whole.to(parameter.to_local().device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements)
    return whole.to(parameter.device)
