"""One optimizer step of the student, as Lightning runs it.

A Lightning batch is everything of one optimizer step on this process: its micro-batches. Gradients
are those of one mean over the tokens of the whole step, whatever the number of micro-batches and
processes. `student_logprobs` of the sampled tokens are needed by the objective anyway; their
difference to the cached `behavior_logprobs` is the policy drift, so staleness is measured on every
row at every step without another pass.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from opd_stream.batch_loss import BatchLoss
from opd_stream.batches import Batch
from opd_stream.errors import UserError
from opd_stream.objectives import Objective
from opd_stream.statistics import NAMES, named
from opd_stream.weighting import Weighting
from stages.data_module import Step
from stages.student_model import Loader, StudentModel
from stages.training_state import load_optimizer_state


class StudentModule(lightning.LightningModule):
    """A student, its objectives and its optimizer."""

    def __init__(
        self,
        load: Loader,
        objectives: tuple[Objective, ...],
        *,
        optimizer: dict[str, Any],
        optimizer_state: dict[str, Any] | None = None,
        clip_norm: float = math.inf,
        merge_terminators: bool = True,
        soft_clamp: float | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._load, self._objectives = load, objectives
        self._optimizer, self._optimizer_state = optimizer, optimizer_state
        self._clip_norm, self._merge_terminators = clip_norm, merge_terminators
        self._soft_clamp, self._weighting = soft_clamp, weighting
        self.student: StudentModel | None = None
        self.mean_loss: float | None = None  # of the step before, for the soft clamp
        self.is_gated = True  # whether the weighting acts
        self.step_sums: dict[str, float] = {}  # of the latest step, over all processes
        self.grad_norm = 0.0
        self._resumed: Callable[[StudentModel], None] | None = None

    def load_weights_with(self, load: Callable[[StudentModel], None]) -> None:
        """Weights of a checkpoint, put in once the model is there."""
        self._resumed = load

    def configure_model(self) -> None:
        if self.student is not None:
            return
        with torch.device("cpu"):  # transformers takes a strategy's device for a device_map
            student = self._load()
        if isinstance(self._trainer and self.trainer.strategy, ModelParallelStrategy):
            student.shard(self.device_mesh["data_parallel"])  # pyright: ignore
        self.student = student
        if self._resumed is not None:
            self._resumed(student)

    def training_step(self, step: Step, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        parts: list[tuple[Batch, torch.Tensor]] = []
        sums = torch.zeros(len(NAMES), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(step.batches):
            with self._synchronised(number + 1 == len(step.batches)):
                found = self.loss(batch)
                # Strategies average over processes; the loss is a sum over them.
                self.manual_backward(found.loss * self.trainer.world_size)
            sums += found.sums
            parts.append((batch, found.losses_N))
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        self.step_sums = named(sums)
        trained = [p for p in self.parameters() if p.requires_grad]
        if self._weighting is not None and self.step_sums["drift_weight"] > 0:
            mean_weight = self.step_sums["drift_weight"] / self.step_sums["tokens"]
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.div_(mean_weight)
        norm = torch.nn.utils.clip_grad_norm_(trained, self._clip_norm)
        self.grad_norm = float(getattr(norm, "full_tensor", lambda: norm)())
        if not math.isfinite(self.step_sums["loss"] + self.grad_norm):
            raise UserError(self._not_finite(step, parts))
        optimizer.step()
        optimizer.zero_grad()
        self.mean_loss = self.step_sums["loss"] / max(self.step_sums["tokens"], 1.0)

    def loss(self, batch: Batch) -> BatchLoss:
        """Loss of one micro-batch under the current weights."""
        assert self.student is not None
        limit = None
        if self._soft_clamp is not None and self.mean_loss is not None:
            limit = self._soft_clamp * self.mean_loss
        return self.student(
            batch,
            self._objectives,
            merge_terminators=self._merge_terminators,
            limit=limit,
            weighting=self._weighting if self.is_gated else None,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True, **self._optimizer)
        if self._optimizer_state is not None:
            assert self.student is not None
            load_optimizer_state(self.student, optimizer, self._optimizer_state)
        return optimizer

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients travel between processes once a step, with the last micro-batch."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            assert self.student is not None
            self.student.set_requires_gradient_sync(is_last)  # pyright: ignore
        elif isinstance(strategy, DDPStrategy) and not is_last:
            return strategy.model.no_sync()  # pyright: ignore
        return nullcontext()

    def _not_finite(self, step: Step, parts: list[tuple[Batch, torch.Tensor]]) -> str:
        rows = sorted(
            {
                batch.names[row]
                for batch, losses_N in parts
                for row in batch.row_N[~losses_N.isfinite()].tolist()
            }
        )
        where = f"rows {', '.join(rows[:8])}" if rows else "no row; the gradient is what is not"
        return (
            f"the loss of step {step.number} is not finite in {where}; the policy of the round "
            "before is intact; lower train.learning_rate, or look at these rows' scores"
        )
