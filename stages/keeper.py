"""The callback that schedules, measures, decides and checkpoints a round of training.

Its numbers come from sums over all processes, so every process takes the same decisions; only the
first one writes.
"""

import json
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from opd_stream.errors import UserError
from opd_stream.objectives import tolerates_staleness
from opd_stream.schedule import learning_rate
from opd_stream.staleness import Decision, StalenessBounds, decide_epoch
from opd_stream.statistics import drift_of, means, reverse_kl_by_position
from opd_stream.store.files import publish
from stages.extrapolate import Extrapolate
from stages.metrics import forget_metrics_from, write_csv
from stages.progress import Progress
from stages.student_module import StudentModule
from stages.train_job import TrainJob
from stages.training_state import optimizer_state, save_checkpoint, weights


class Keeper(Callback):
    """State of the round beside weights and optimizer."""

    def __init__(
        self,
        job: TrainJob,
        steps_per_epoch: int,
        progress: Progress,
        extrapolate: Extrapolate | None,
    ) -> None:
        self._job, self._steps_per_epoch, self._progress = job, steps_per_epoch, progress
        self._extrapolate = extrapolate
        staleness = job.config.staleness
        self._bounds = StalenessBounds(
            max_epochs=staleness.max_epochs,
            policy_drift=staleness.policy_drift,
            effective_sample_fraction=staleness.effective_sample_fraction,
        )
        self.steps = 0  # optimizer steps of this round
        self._trained_tokens = 0
        self._first: dict[str, float] = {}  # means of the round's first step
        self._epoch_sums: dict[str, float] = {}
        self._decisions: list[dict[str, Any]] = []
        self._since = time.perf_counter()
        self._processes = 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "steps": self.steps,
            "trained_tokens": self._trained_tokens,
            "first": self._first,
            "epoch_sums": self._epoch_sums,
            "decisions": self._decisions,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.steps, self._trained_tokens = state["steps"], state["trained_tokens"]
        self._first, self._epoch_sums = state["first"], state["epoch_sums"]
        self._decisions = state["decisions"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._processes = trainer.world_size
        if trainer.is_global_zero:
            forget_metrics_from(Path(self._job.metrics), self._job.first_step + self.steps)
        self._progress.start("train", self._steps_per_epoch * self._bounds.max_epochs)
        self._progress.advance("train", self.steps)
        self._since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(self._job.config.seed * 1_000_003 + batch.number)  # dropout
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self._learning_rate()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: StudentModule = pl_module
        sums, rate = module.step_sums, self._learning_rate()
        for name, value in sums.items():
            self._epoch_sums[name] = self._epoch_sums.get(name, 0.0) + value
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        line = {
            "round": self._job.round_index,
            "epoch": len(self._decisions),
            "step": batch.number,
            "learning_rate": rate,
            "window_tokens": batch.window_tokens,
            "trained_tokens": int(sums["tokens"]),
            "grad_norm": module.grad_norm,
            **means(sums),
            "seconds": round(seconds, 4),
        }
        if not self.steps:
            self._first = {name: line[name] for name in ("policy_drift", "mean_absolute_d")}
            self._refuse_stale_rows(line["policy_drift"])
        self.steps += 1
        self._trained_tokens += int(sums["tokens"])
        if trainer.is_global_zero:
            with Path(self._job.metrics).open("a") as file:
                file.write(json.dumps(line) + "\n")
        for logger in trainer.loggers:
            numbers = {name: value for name, value in line.items() if name not in ("round", "step")}
            logger.log_metrics(numbers, step=batch.number)
        note = f"loss {line['loss']:.3f} drift {line['policy_drift']:.4f}"
        rate_text = f"{line['trained_tokens'] / max(seconds, 1e-9):,.0f} tokens/s"
        self._progress.advance("train", 1, f"{note} {rate_text}")
        jumped = None if self._extrapolate is None else self._extrapolate.drift_after_jump
        if jumped is not None and jumped > self._bounds.policy_drift:
            bound = self._bounds.policy_drift
            reason = (
                f"an extrapolation drifted too far: policy_drift {jumped:.4f} (bound {bound:g})"
            )
            self._decide(trainer, Decision(action="regenerate", reason=reason))
        elif self.steps % self._steps_per_epoch == 0:
            self._decide(trainer)
        elif self.steps % self._job.config.train.checkpoint_steps == 0:
            self._checkpoint(trainer, module)

    def outcome(self) -> dict[str, Any]:
        """What the round did, for the policy's manifest and the round's report."""
        return {
            "steps": self.steps,
            "trained_tokens": self._trained_tokens,
            "epochs": self._decisions,
            "sampler_gap": self._first["mean_absolute_d"] if self._job.is_fresh else None,
            "extrapolations": [] if self._extrapolate is None else self._extrapolate.outcomes,
            "processes": self._processes,
            "made_by": self._job.made_by,
        }

    def write_round_metrics(self, folder: Path) -> None:
        """The lines of this round beside the policy, and the run's table."""
        metrics = Path(self._job.metrics)
        lines = metrics.read_text().splitlines(keepends=True)
        own = [line for line in lines if json.loads(line)["round"] == self._job.round_index]
        publish(folder / "metrics.jsonl", "".join(own).encode())
        write_csv(metrics)

    def _decide(self, trainer: lightning.Trainer, early: Decision | None = None) -> None:
        """At the end of an epoch, or early: go on with the same scores, or not."""
        drift, epochs_done = drift_of(self._epoch_sums), len(self._decisions) + 1
        decision = early or decide_epoch(drift, epochs_done=epochs_done, bounds=self._bounds)
        self._decisions.append(
            {
                "epoch": epochs_done - 1,
                "action": decision.action,
                "reason": decision.reason,
                **means(self._epoch_sums),
                "reverse_kl_by_position": reverse_kl_by_position(self._epoch_sums),
            }
        )
        self._epoch_sums = {}
        if decision.action == "regenerate":
            trainer.should_stop = True

    def _refuse_stale_rows(self, policy_drift: float) -> None:
        """A reverse KL on rows that another student wrote teaches for prefixes it does not write.

        Raises:
            UserError: the drift of the first step is above the bound.
        """
        bound = self._bounds.policy_drift
        if policy_drift > bound and not tolerates_staleness(self._job.objectives()):
            raise UserError(
                f"the rollouts are stale: policy_drift {policy_drift:.3f} before training, bound "
                f"{bound:g}, and the objective holds a reverse KL; generate and score again, use a "
                "forward objective, or raise staleness.policy_drift"
            )

    def _checkpoint(self, trainer: lightning.Trainer, module: StudentModule) -> None:
        assert module.student is not None
        state = {
            "weights": weights(module.student),
            "optimizer": optimizer_state(module.student, trainer.optimizers[0]),
            "keeper": self.state(),
            "extrapolation": None if self._extrapolate is None else self._extrapolate.state(),
            "mean_loss": module.mean_loss,
        }
        if trainer.is_global_zero:
            save_checkpoint(Path(self._job.scratch), self.steps, state)

    def _learning_rate(self) -> float:
        planned = self._steps_per_epoch * self._bounds.max_epochs
        train = self._job.config.train
        return learning_rate(
            train.schedule,
            peak=train.learning_rate,
            warmup=train.warmup,
            progress=(self._job.round_index + (self.steps + 0.5) / planned)
            / self._job.config.rounds,
        )
