"""The train stage: epochs over cached scores, until they are used up or the student has drifted.

The trainer is never kept between rounds: a round starts from the policy folder and the optimizer
state beside it, so an uninterrupted run and a resumed one are the same computation. Inside a round
a checkpoint carries everything, down to the position in the epoch.
"""

import json
import logging
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from opd_stream.config import Config
from opd_stream.drift import DriftSums
from opd_stream.errors import UserError
from opd_stream.objectives import build_objective
from opd_stream.schedule import learning_rate
from opd_stream.staleness import StalenessBounds, decide_epoch
from opd_stream.store.files import publish
from opd_stream.store.policy import PolicyArtifact
from opd_stream.store.reader import ScoredRows
from opd_stream.store.tree import save_tree
from opd_stream.windows import Window
from stages.checkpoint_io import TreeCheckpointIO
from stages.data_module import BatchPlan, CacheDataModule
from stages.progress import Progress
from stages.student_module import StudentModule


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """One round of training."""

    base: Path  # Hugging Face folder the round starts from
    optimizer_state: Path | None  # folder of the previous round's optimizer, if any
    rows: ScoredRows
    config: Config
    window: Window
    first_step: int  # optimizer steps done before the round
    round_index: int
    scratch: Path  # checkpoints of this round; removed when the policy is published
    metrics: Path  # metrics.jsonl of the run
    made_by: str  # id of the run


def train(job: TrainJob, policy: PolicyArtifact, progress: Progress) -> None:
    """Train and publish the policy.

    Raises:
        UserError: no row can be trained on, or the loss is not finite.
    """
    if not len(job.rows):
        raise UserError(
            "no rollout can be trained on: every one is empty or was refused by the teacher; "
            "look at the teacher's checkpoint, then run the score stage again"
        )
    _quiet()
    settings, started = job.config.train, time.time()
    torch.set_num_threads(settings.threads)
    plan = BatchPlan(
        rows_per_step=settings.rows_per_step,
        rows_per_microbatch=min(settings.rows_per_microbatch, settings.rows_per_step),
        seed=job.config.seed,
        first_step=job.first_step,
        window=job.window,
    )
    optimizer = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    module = StudentModule(
        job.base,
        build_objective(**settings.objective.model_dump()),
        optimizer,
        job.optimizer_state,
        micro_steps=plan.micro_steps,
    )
    keeper = _Keeper(job, len(plan.epoch_steps(len(job.rows), 0)), progress)
    trainer = lightning.Trainer(
        max_epochs=job.config.staleness.max_epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=settings.clip_norm,
        accumulate_grad_batches=plan.micro_steps,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        plugins=[TreeCheckpointIO()],
        callbacks=[keeper],
    )
    resumed = latest_checkpoint(job.scratch)
    keeper.forget_metrics_after(resumed)
    data = CacheDataModule(job.rows, plan)
    trainer.fit(module, data, ckpt_path=None if resumed is None else str(resumed))
    attempt = policy.new_attempt()
    module.model.save_pretrained(attempt)
    _copy_tokenizer(job.base, attempt)
    save_tree(trainer.optimizers[0].state_dict(), attempt / "optimizer")
    publish(attempt / "metrics.jsonl", "".join(keeper.round_metrics()).encode())
    policy.publish(attempt, {**keeper.outcome(), "seconds": round(time.time() - started, 3)})
    shutil.rmtree(job.scratch, ignore_errors=True)


class _Keeper(Callback):
    """Schedules, measures, decides and checkpoints; its state travels in the checkpoint."""

    def __init__(self, job: TrainJob, steps_per_epoch: int, progress: Progress) -> None:
        self._job, self._steps_per_epoch, self._progress = job, steps_per_epoch, progress
        staleness = job.config.staleness
        self._bounds = StalenessBounds(
            max_epochs=staleness.max_epochs,
            policy_drift=staleness.policy_drift,
            effective_sample_fraction=staleness.effective_sample_fraction,
        )
        self._steps = 0  # optimizer steps of this round
        self._trained_tokens = 0
        self._epoch_sums: dict[str, float] = {}
        self._decisions: list[dict[str, Any]] = []
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "trained_tokens": self._trained_tokens,
            "epoch_sums": self._epoch_sums,
            "decisions": self._decisions,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = state_dict["steps"]
        self._trained_tokens = state_dict["trained_tokens"]
        self._epoch_sums = state_dict["epoch_sums"]
        self._decisions = state_dict["decisions"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._progress.start("train", self._steps_per_epoch * self._bounds.max_epochs)
        self._progress.advance("train", self._steps)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.step_sums:
            return  # a later micro-batch of the same step
        torch.manual_seed(self._job.config.seed * 1_000_003 + self._global_step())  # dropout
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self._learning_rate()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # the optimizer has not stepped yet
        rate, first = self._learning_rate(), self._global_step()
        sums: dict[str, float] = {}
        for micro in pl_module.step_sums:
            for key, value in micro.items():
                sums[key] = sums.get(key, 0.0) + value
                self._epoch_sums[key] = self._epoch_sums.get(key, 0.0) + value
        pl_module.step_sums = []
        self._steps += 1
        self._trained_tokens += int(sums["tokens"])
        line = self._line(trainer, first, rate, sums, batch.window_tokens)
        if not all(torch.isfinite(torch.tensor(value)) for value in sums.values()):
            raise UserError(
                f"the loss of step {first} is not finite; the policy of the last round is intact; "
                "lower train.learning_rate, or look at the teacher's scores"
            )
        with self._job.metrics.open("a") as file:
            file.write(line)
        self._progress.advance("train", 1, f"loss {sums['loss'] / sums['tokens']:.3f}")
        last_of_epoch = self._steps % self._steps_per_epoch == 0
        if self._steps % self._job.config.train.checkpoint_steps == 0 and not last_of_epoch:
            self._checkpoint(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        drift = _drift(self._epoch_sums)
        epochs_done = len(self._decisions) + 1
        decision = decide_epoch(drift, epochs_done=epochs_done, bounds=self._bounds)
        tokens = self._epoch_sums["tokens"]
        self._decisions.append(
            {
                "epoch": epochs_done - 1,
                "action": decision.action,
                "reason": decision.reason,
                "policy_drift": drift.policy_drift,
                "effective_sample_fraction": drift.effective_sample_fraction,
                "loss": self._epoch_sums["loss"] / tokens,
                "reverse_kl": self._epoch_sums["reverse_kl"] / tokens,
                "student_top_mass": self._epoch_sums["student_top_mass"] / tokens,
                "teacher_top_mass": self._epoch_sums["teacher_top_mass"] / tokens,
            }
        )
        self._epoch_sums = {}
        if decision.action == "regenerate":
            trainer.should_stop = True

    def outcome(self) -> dict[str, Any]:
        """What the round did, for the policy's manifest and the round's report."""
        return {
            "steps": self._steps,
            "rows": len(self._job.rows),
            "trained_tokens": self._trained_tokens,
            "epochs": self._decisions,
            "made_by": self._job.made_by,
        }

    def round_metrics(self) -> list[str]:
        """The lines of metrics.jsonl that belong to this round."""
        lines = self._job.metrics.read_text().splitlines(keepends=True)
        return [line for line in lines if json.loads(line)["round"] == self._job.round_index]

    def forget_metrics_after(self, checkpoint: Path | None) -> None:
        """Remove the lines of steps that will be done again."""
        metrics = self._job.metrics
        if not metrics.exists():
            return
        steps = 0 if checkpoint is None else int(checkpoint.name)
        first_again = self._job.first_step + steps
        kept = [
            line
            for line in metrics.read_text().splitlines(keepends=True)
            if line.endswith("\n") and json.loads(line)["step"] < first_again
        ]
        publish(metrics, "".join(kept).encode())

    def _global_step(self) -> int:
        return self._job.first_step + self._steps

    def _learning_rate(self) -> float:
        planned = self._steps_per_epoch * self._bounds.max_epochs
        train = self._job.config.train
        return learning_rate(
            train.schedule,
            peak=train.learning_rate,
            warmup=train.warmup,
            progress=(self._job.round_index + (self._steps + 0.5) / planned)
            / self._job.config.rounds,
        )

    def _line(
        self,
        trainer: lightning.Trainer,
        step: int,
        rate: float,
        sums: dict[str, float],
        window: int,
    ) -> str:
        drift, tokens = _drift(sums), sums["tokens"]
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        record = {
            "round": self._job.round_index,
            "epoch": trainer.current_epoch,
            "step": step,
            "loss": sums["loss"] / tokens,
            "reverse_kl": sums["reverse_kl"] / tokens,
            "learning_rate": rate,
            "window_tokens": window,
            "trained_tokens": int(tokens),
            "policy_drift": drift.policy_drift,
            "effective_sample_fraction": drift.effective_sample_fraction,
            "student_top_mass": sums["student_top_mass"] / tokens,
            "teacher_top_mass": sums["teacher_top_mass"] / tokens,
            "student_entropy": sums["student_entropy"] / tokens,
            "seconds": round(seconds, 4),
        }
        return json.dumps(record) + "\n"

    def _checkpoint(self, trainer: lightning.Trainer) -> None:
        scratch = self._job.scratch
        scratch.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(scratch / f"{self._steps:08d}")
        for older in _checkpoints(scratch)[:-1]:
            shutil.rmtree(older, ignore_errors=True)


def _drift(sums: dict[str, float]) -> DriftSums:
    return DriftSums.from_dict(
        {k.removeprefix("drift."): v for k, v in sums.items() if k.startswith("drift.")}
    )


def latest_checkpoint(scratch: Path) -> Path | None:
    """The checkpoint to continue from, named by its steps in the round."""
    found = _checkpoints(scratch)
    return found[-1] if found else None


def _checkpoints(scratch: Path) -> list[Path]:
    return sorted(path for path in scratch.glob("[0-9]*") if path.is_dir())


def _copy_tokenizer(base: Path, target: Path) -> None:
    """Everything of the base folder that is neither weights nor what `save_pretrained` wrote."""
    for path in sorted(base.iterdir()):
        is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        is_ours = path.name in ("metrics.jsonl", "model.safetensors.index.json")
        if path.is_file() and not is_weights and not is_ours and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _quiet() -> None:
    """Leave the terminal to the stages' own progress."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*treespec.*deprecated.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
