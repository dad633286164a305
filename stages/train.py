"""The train stage: epochs over cached scores, until they are used up or the student has drifted.

The trainer is never kept between rounds: a round starts from the policy folder and the optimizer
state beside it, so an uninterrupted run and a resumed one are the same computation. Several devices
are several processes of `stages.train_worker`, started by `stages.launch`.
"""

import logging
import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.outcome import TrainOutcome
from opd_stream.store.reader import ScoredRows
from opd_stream.store.tree import load_tree, save_tree
from stages.audit import audit
from stages.clock import Clock
from stages.data_module import BatchPlan, CacheDataModule
from stages.extrapolate import Extrapolate, load_base, save_base
from stages.keeper import Keeper
from stages.launch import launch
from stages.progress import Progress
from stages.reward import open_reward
from stages.student_model import load_student, save_student
from stages.student_module import StudentModule
from stages.train_job import TrainJob
from stages.training_state import latest_checkpoint, load_weights, optimizer_state, weights

OPTIMIZER = "optimizer"  # folder of the optimizer's state inside a policy


def train(job: TrainJob, progress: Progress) -> None:
    """Train and publish the policy, on as many devices as the config says.

    Raises:
        UserError: no row can be trained on, the rows are too stale for the objective, the loss is
            not finite, or the memory does not suffice.
        DamagedUnit: a shard is not what was committed.
    """
    if job.config.pools.trainer.devices > 1:
        launch(job, progress)
    else:
        train_here(job, progress)


def train_here(job: TrainJob, progress: Progress) -> None:
    """The same in this process, which may be one of several."""
    _quiet()
    settings, clock = job.config.train, Clock()
    torch.set_num_threads(settings.threads)
    rows, plan = job.rows(), job.plan()
    resumed = latest_checkpoint(Path(job.scratch))
    previous = None if job.optimizer_state is None else load_tree(Path(job.optimizer_state))
    module = StudentModule(
        partial(
            load_student,
            Path(job.base),
            lora=settings.lora,
            initial=Path(job.initial),
            gradient_checkpointing=settings.gradient_checkpointing,
            adapter=job.adapter,
        ),
        job.objectives(),
        optimizer={
            "lr": settings.learning_rate,
            "betas": settings.betas,
            "weight_decay": settings.weight_decay,
        },
        optimizer_state=previous if resumed is None else resumed["optimizer"],
        clip_norm=settings.clip_norm,
        merge_terminators=settings.guards.merge_terminators,
        soft_clamp=settings.guards.soft_clamp,
        weighting=job.weighting(),
    )
    is_first = os.environ.get("RANK", "0") == "0"
    decision = audit(job) if is_first else None
    extrapolate = _extrapolate(job, rows, plan)
    keeper = Keeper(job, rows, plan, progress, extrapolate, clock)
    if resumed is not None:
        if extrapolate is not None:
            extrapolate.load_state(resumed["extrapolation"])
        keeper.load_state(resumed["keeper"])
        module.mean_loss = resumed["mean_loss"]
        module.load_weights_with(partial(load_weights, state=resumed["weights"]))
    data = CacheDataModule(rows, plan, steps_done=keeper.steps)
    trainer = lightning.Trainer(
        max_epochs=job.config.staleness.max_epochs - data.first_epoch,
        logger=_loggers(job),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        precision="bf16-mixed" if settings.precision == "bf16-mixed" else "32-true",
        callbacks=[keeper] if extrapolate is None else [extrapolate, keeper],
        **_placement(job.config),
    )
    with _memory_explained():
        trainer.fit(module, data)
    base = None if extrapolate is None else extrapolate.state()["base"]
    spent: dict[str, Any] = {"window_decision": decision, "rows": len(rows), **clock.spent()}
    _publish(job, module, trainer, keeper, base=base, spent=spent)


def _publish(
    job: TrainJob,
    module: StudentModule,
    trainer: lightning.Trainer,
    keeper: Keeper,
    *,
    base: dict[str, torch.Tensor] | None,
    spent: dict[str, Any],
) -> None:
    """Write the policy; every process helps to gather it, the first one writes."""
    assert module.student is not None
    trained = weights(module.student)
    state = optimizer_state(module.student, trainer.optimizers[0])
    if not trainer.is_global_zero:
        return
    student = module.student
    if job.config.pools.trainer.strategy == "fsdp2" and trainer.world_size > 1:
        settings = job.config.train  # the sharded copy cannot be written as it is
        student = load_student(
            Path(job.base),
            lora=settings.lora,
            initial=Path(job.initial),
            gradient_checkpointing=False,
            adapter=job.adapter,
        )
        load_weights(student, trained)
    policy = job.target()
    attempt = policy.new_attempt()
    save_student(student, trained, Path(job.base), attempt)
    save_tree(state, attempt / OPTIMIZER)
    if base is not None:
        save_base(base, attempt)
    keeper.write_round_metrics(attempt)
    outcome = TrainOutcome.model_validate({**keeper.outcome(), **spent})
    policy.publish(attempt, outcome)
    shutil.rmtree(job.scratch, ignore_errors=True)


def _extrapolate(job: TrainJob, rows: ScoredRows, plan: BatchPlan) -> Extrapolate | None:
    settings = job.config.train.extrapolation
    if settings is None:
        return None
    reward = None if settings.signal == "kl" else open_reward(job)
    base = load_base(Path(job.base)) if job.is_continued else None
    return Extrapolate(settings, rows, plan, reward, base)


def _placement(config: Config) -> dict[str, Any]:
    pool, accelerator = config.pools.trainer, "cuda" if torch.cuda.is_available() else "cpu"
    if pool.devices == 1:
        return {"accelerator": accelerator, "devices": 1}
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    strategy: Any = DDPStrategy()
    if pool.strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=pool.devices, tensor_parallel_size=1)
    return {"accelerator": accelerator, "devices": pool.devices, "strategy": strategy}


def _loggers(job: TrainJob) -> list[Logger] | bool:
    """Loggers beside the run's own files."""
    folder, found = Path(job.metrics).parent, []
    for name in job.config.train.loggers:
        from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

        if name == "tensorboard":
            found.append(TensorBoardLogger(folder, name=name, version=""))
        else:
            found.append(WandbLogger(name=folder.name, save_dir=folder, id=job.made_by))
    return found or False


class _memory_explained:
    """Out of memory becomes a line that says which setting to change."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        text = str(error)
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if is_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
            raise UserError(
                f"the memory does not suffice for a step ({' '.join(text.split())[:120]}); lower "
                "train.tokens_per_microbatch, or set train.gradient_checkpointing=true"
            ) from error


def _quiet() -> None:
    """Leave the terminal to the stages' own progress."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*treespec.*deprecated.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
