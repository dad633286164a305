"""A student set up for training: Fabric, the objectives, the optimizer, and the loss of a batch."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import ClusterEnvironment, MixedPrecision
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy

from opd_stream.batches import Batch, collate
from opd_stream.config import Train
from opd_stream.drift import NAMES, named
from opd_stream.loss import BatchLoss
from opd_stream.objectives import Objective
from opd_stream.rebuilt import TeacherHead
from opd_stream.store.reader import ScoredRows, epoch_order
from opd_stream.weighting import Weighting
from stages.loggers import open_loggers
from stages.master_weights import MasterWeights
from stages.student_model import StudentModel
from stages.train_data import BatchPlan
from stages.train_job import TrainJob
from stages.train_state import (
    TrainCheckpoint,
    TrainState,
    gathered,
    load_moments,
    load_weights,
    optimizer_moments,
    trained_weights,
)

SAMPLE_KEY = 0x5A3B1E  # of the rows of a unit that measure its drift
LEAST_ROWS = 8  # of a unit
UNCUT = 2**31  # a window that cuts nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """A student in training, on one process or as one of several."""

    fabric: Fabric
    student: StudentModel  # its parameters, perhaps sharded
    model: Any  # the student as Fabric wraps it: its forward pass synchronises gradients
    optimizer: torch.optim.Optimizer
    masters: MasterWeights | None  # what the optimizer steps on where the student is bfloat16
    objectives: tuple[Objective, ...]
    given_objectives: tuple[Objective, ...]  # of rows that are not the student's
    weighting: Weighting | None
    merge_terminators: bool
    soft_clamp: float | None  # in mean losses of the step before
    teacher: TeacherHead | None  # of cached hidden states
    state: TrainState

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that train."""
        return [p for p in self.student.parameters() if p.requires_grad]

    def loss(self, batch: Batch, model: Any = None) -> BatchLoss:
        """Loss of a micro-batch under the current weights.

        Args:
            batch: on the learner's device.
            model: the student to use, `Learner.model` for a step that trains; None: the plain one.
        """
        weighting, limit = self.weighting, None
        if weighting is not None and not self.state.is_gated:
            weighting = weighting.without_drift()
        if self.soft_clamp is not None and self.state.mean_loss is not None:
            limit = self.soft_clamp * self.state.mean_loss
        return (model or self.student)(
            batch,
            self.given_objectives if batch.is_given else self.objectives,
            merge_terminators=self.merge_terminators,
            limit=limit,
            weighting=weighting,
            teacher=self.teacher,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """Those that train, whole, for the first process; every process takes part."""
        is_kept = self.fabric.is_global_zero
        if self.masters is not None:
            return gathered(self.masters.parameters, is_kept=is_kept)
        return trained_weights(self.student, is_kept=is_kept)

    def moments(self) -> dict[str, Any]:
        """{parameter name: moments of the optimizer}, as `weights`."""
        is_kept = self.fabric.is_global_zero
        stepped = stepped_parameters(self.student, self.masters)
        return optimizer_moments(stepped, self.optimizer, is_kept=is_kept)

    def step(self) -> None:
        """An optimizer step; gradients are used up."""
        if self.masters is not None:
            return self.masters.step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def sums(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Sums (`opd_stream.drift.NAMES`) of batches under the current weights."""
        device = self.fabric.device
        total = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
        for batch in batches:
            total += self.loss(batch.to(device)).sums
        return named(total)


def open_fabric(job: TrainJob, environment: ClusterEnvironment | None = None) -> Fabric:
    """Devices, precision and loggers as the config says.

    Args:
        job: the round.
        environment: of one of several processes that were started together; None: the only one.
    """
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    strategy: Strategy | str = "auto"
    plugins: list[Any] = [environment or LightningEnvironment()]  # whatever Slurm's variables say
    if environment is not None:
        strategy = DDPStrategy()
        if job.config.pools.trainer.strategy == "fsdp2":
            size = environment.world_size()
            strategy = ModelParallelStrategy(
                _shard, data_parallel_size=size, tensor_parallel_size=1
            )
    if job.config.train.precision == "bf16-mixed":
        plugins.append(_MixedPrecision("bf16-mixed", accelerator))
    fabric = Fabric(
        accelerator=accelerator,
        strategy=strategy,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if environment is not None else 1,
        plugins=plugins,
        loggers=open_loggers(job.config.train.loggers, Path(job.metrics).parent, job.made_by),
    )
    fabric.launch()
    return fabric


def open_learner(job: TrainJob, fabric: Fabric, checkpoint: TrainCheckpoint | None) -> Learner:
    """The student, from a checkpoint of the round or from the policy that the round starts from."""
    settings = job.config.train
    student = job.load_student(gradient_checkpointing=settings.gradient_checkpointing)
    masters = None
    if settings.precision == "bf16-true":  # before a strategy looks at dtypes; never sharded
        if checkpoint is not None:
            load_weights(student, checkpoint.weights)
        masters = MasterWeights(student.to(fabric.device))
    model = fabric.setup_module(student)
    if checkpoint is not None and masters is None:
        load_weights(student, checkpoint.weights)
    stepped = stepped_parameters(student, masters)
    optimizer = open_optimizer(settings, list(stepped.values()))
    moments = job.previous_moments() if checkpoint is None else checkpoint.optimizer
    if moments is not None:
        load_moments(stepped, optimizer, moments)
    return Learner(
        fabric=fabric,
        student=student,
        model=model,
        optimizer=optimizer,
        masters=masters,
        objectives=job.objectives(),
        given_objectives=job.config.train.given_objective or job.objectives(),
        weighting=job.weighting(),
        merge_terminators=settings.guards.merge_terminators,
        soft_clamp=settings.guards.soft_clamp,
        teacher=job.teacher(fabric.device, vocabulary=student.vocabulary),
        state=TrainState() if checkpoint is None else checkpoint.state,
    )


def stepped_parameters(
    student: StudentModel, masters: MasterWeights | None
) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter that the optimizer steps on."""
    if masters is not None:
        return masters.parameters
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def open_optimizer(settings: Train, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a config asks for."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay)
    if settings.optimizer == "adamw-8bit":
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        library: Any = bitsandbytes
        return library.optim.AdamW8bit(
            parameters, lr=rate, betas=settings.betas, weight_decay=decay
        )
    return torch.optim.AdamW(
        parameters, lr=rate, betas=settings.betas, weight_decay=decay, fused=True
    )


def measure_units(
    learner: Learner, rows: ScoredRows, plan: BatchPlan, *, share: float
) -> dict[tuple[int, int], list[dict[str, float]]]:
    """Sums of each row of a sample of each (cache, unit), in the precision of a training step.

    The sample is a function of the plan's seed and of the unit's size, so the rows measured at the
    end of a round are those of the start of the next. All that is stored of a row counts, whatever
    the window. Every process of a sharded model takes part. Rows that are not the student's have
    no drift, and are left out.
    """
    learner.student.eval()
    sums: dict[tuple[int, int], list[dict[str, float]]] = {}
    for (cache, unit), positions in rows.positions_by_unit().items():
        if plan.given and plan.given[cache]:
            continue
        order = epoch_order(len(positions), (plan.seed, SAMPLE_KEY + unit))
        size = max(LEAST_ROWS, round(share * len(positions)))
        chosen = [plan.used(rows[positions[place]]) for place in order[:size].tolist()]
        batches = (
            collate([row], window_tokens=UNCUT, masked_ids=plan.masked_ids) for row in chosen
        )
        with learner.fabric.autocast():
            sums[cache, unit] = [learner.sums([batch]) for batch in batches]
    learner.student.train()
    return sums


def _shard(student: StudentModel, mesh: Any) -> StudentModel:
    student.shard(mesh["data_parallel"])
    return student


class _MixedPrecision(MixedPrecision):
    """Autocast alone: cached log-probabilities stay float32, and measured sums float64."""

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data
