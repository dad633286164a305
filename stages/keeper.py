"""The callback that schedules, measures, decides and checkpoints a round of training.

Its numbers come from sums over all processes, so every process takes the same decisions; only the
first one writes.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from opd_stream.errors import UserError
from opd_stream.objectives import tolerates_staleness
from opd_stream.schedule import learning_rate
from opd_stream.staleness import Decision, beyond, decide_epoch, decide_jump, decide_stop
from opd_stream.statistics import NAMES, by_position, drift_of, means
from opd_stream.store.files import publish
from opd_stream.store.reader import ScoredRows
from stages.cache_units import bounds_of
from stages.clock import Clock
from stages.data_module import BatchPlan
from stages.extrapolate import Extrapolate
from stages.measure import measure_units
from stages.metrics import forget_metrics_from, write_csv
from stages.progress import Progress
from stages.student_module import StudentModule
from stages.train_job import TrainJob
from stages.training_state import optimizer_state, save_checkpoint, weights

TRAINED = ("tokens", "row_tokens", "row_pairs")  # sums the cost of training follows from
LOOKS_PER_EPOCH = 4


class Keeper(Callback):
    """State of the round beside weights and optimizer."""

    def __init__(
        self,
        job: TrainJob,
        rows: ScoredRows,
        plan: BatchPlan,
        progress: Progress,
        extrapolate: Extrapolate | None,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._job, self._rows, self._plan, self._progress = job, rows, plan, progress
        self._steps_per_epoch = len(plan.epoch_steps(len(rows), 0))
        self._extrapolate = extrapolate
        self._bounds = bounds_of(job.config)
        self.steps = 0  # optimizer steps of this round
        self._trained = dict.fromkeys(TRAINED, 0.0)
        self._start: dict[str, Any] = {}  # drift of a sample of the rows before training
        self._is_gated = True
        self._epoch_sums: dict[str, float] = {}
        self._recent_sums: dict[str, float] = {}  # since the latest look at drift
        self._units: list[dict[str, Any]] = []  # after training, where units may be kept
        self._decisions: list[dict[str, Any]] = []
        self._since = time.perf_counter()
        self._processes = 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "steps": self.steps,
            "trained": self._trained,
            "start": self._start,
            "is_gated": self._is_gated,
            "epoch_sums": self._epoch_sums,
            "recent_sums": self._recent_sums,
            "decisions": self._decisions,
            "spent": self._clock.spent(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.steps, self._trained = state["steps"], state["trained"]
        self._start, self._is_gated = state["start"], state["is_gated"]
        self._epoch_sums, self._recent_sums = state["epoch_sums"], state["recent_sums"]
        self._decisions = state["decisions"]
        self._clock.add(state.get("spent", {"seconds": 0.0, "cpu_seconds": 0.0}))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._processes = trainer.world_size
        if trainer.is_global_zero:
            forget_metrics_from(Path(self._job.metrics), self._job.first_step + self.steps)
        if not self._start:
            self._measure_start(trainer, pl_module)
        pl_module.is_gated = self._is_gated
        planned = self._steps_per_epoch * self._bounds.max_epochs
        self._progress.start("train", planned, self.steps)
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
        _add(self._epoch_sums, sums)
        _add(self._recent_sums, sums)
        for name in TRAINED:
            self._trained[name] += sums[name]
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
        self.steps += 1
        if trainer.is_global_zero:
            with Path(self._job.metrics).open("a") as file:
                file.write(json.dumps(line) + "\n")
        for logger in trainer.loggers:
            numbers = {name: value for name, value in line.items() if name not in ("round", "step")}
            logger.log_metrics(numbers, step=batch.number)
        facts = {"window": batch.window_tokens, "loss": line["loss"], "drift": line["policy_drift"]}
        self._progress.advance("train", 1, line["trained_tokens"], **facts)
        if (jump := self._look_after_jump()) is not None:
            self._decide(trainer, jump)
        elif self.steps % self._steps_per_epoch == 0:
            self._decide(trainer)
            module.is_gated = self._is_gated
        elif (stop := self._look()) is not None:
            self._decide(trainer, stop)
        elif self.steps % self._job.config.train.checkpoint_steps == 0:
            self._checkpoint(trainer, module)

    def outcome(self) -> dict[str, Any]:
        """What the round did, for the policy's manifest and the round's report."""
        return {
            "steps": self.steps,
            "trained": self._trained,
            "epochs": self._decisions,
            "start": self._start,
            "units": self._units,
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
        decision = early or decide_epoch(
            drift, epochs_done=epochs_done, bounds=self._bounds, floor=self._floor
        )
        self._decisions.append(
            {
                "epoch": epochs_done - 1,
                "action": decision.action,
                "reason": decision.reason,
                **means(self._epoch_sums),
                "by_position": by_position(self._epoch_sums),
            }
        )
        self._epoch_sums, self._recent_sums = {}, {}
        asked = self._job.is_gated or decision.action == "gated"
        self._is_gated = asked or not self._bounds.gated_from
        if decision.action in ("regenerate", "stop"):
            trainer.should_stop = True

    def _look(self) -> Decision | None:
        """Inside an epoch, four times: stop if the rows since the last look are too far."""
        if self.steps % max(1, self._steps_per_epoch // LOOKS_PER_EPOCH):
            return None
        drift, self._recent_sums = drift_of(self._recent_sums), {}
        if tolerates_staleness(self._job.objectives()):
            return None
        return decide_stop(drift, bounds=self._bounds, floor=self._floor)

    def _look_after_jump(self) -> Decision | None:
        """Where an extrapolation moved the weights: stop if they are too far."""
        jumped = None if self._extrapolate is None else self._extrapolate.drift_after_jump
        if jumped is None:
            return None
        return decide_jump(jumped, bounds=self._bounds, floor=self._floor)

    @property
    def _floor(self) -> float:
        """policy_drift of the latest rows that were fresh, of this round or an earlier one."""
        return self._start["floor"] or 0.0

    def _measure(
        self, trainer: lightning.Trainer, module: StudentModule
    ) -> dict[tuple[int, int], dict[str, float]]:
        share = self._job.config.staleness.sample_share
        module.eval()
        with trainer.precision_plugin.forward_context():  # as a training step computes
            measured = measure_units(module, self._rows, self._plan, share=share)
        module.train()
        return measured

    def _measure_start(self, trainer: lightning.Trainer, module: StudentModule) -> None:
        """Before any training: sampler_gap, the floor of drift, drift of all rows, gate or not."""
        job, everything, fresh = self._job, dict[str, float](), dict[str, float]()
        for (cache, _), sums in self._measure(trainer, module).items():
            _add(everything, sums)
            if job.is_fresh and job.caches[cache].policy_version == job.round_index:
                _add(fresh, sums)
        unmoved = drift_of(fresh) if fresh else None  # only the engine is what differs
        self._start = {
            "tokens": int(everything["tokens"]),
            "policy_drift": drift_of(everything).policy_drift,
            "sampler_gap": None if unmoved is None else unmoved.absolute_mean,
            "floor": job.earlier_floor() if unmoved is None else unmoved.policy_drift,
        }
        drift = beyond(drift_of(everything), floor=self._floor)
        self._is_gated = job.is_gated or drift >= self._bounds.gated_from
        decided = self._bounds.max_policies or job.config.rollouts.ahead
        if not decided:  # else the rows were looked at before they were taken
            self._refuse_stale_rows(drift)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """What is known of each unit when the next round decides about it."""
        job = self._job
        if not self._bounds.max_policies or job.round_index == job.config.rounds - 1:
            return
        measured = self._measure(trainer, pl_module)
        for number, cache in enumerate(job.caches):
            for slot in cache.slots:
                sums = measured.get((number, slot.unit), dict.fromkeys(NAMES, 0.0))
                unit = asdict(replace(cache, slots=())) | asdict(slot)
                del unit["slots"]
                self._units.append(
                    {
                        **unit,
                        "drift": drift_of(sums).as_dict(),
                        "student_top_mass": means(sums)["student_top_mass"],
                    }
                )

    def _refuse_stale_rows(self, policy_drift: float) -> None:
        """A reverse KL on rows that another student wrote teaches for prefixes it does not write.

        Raises:
            UserError: the drift before training is above the bound.
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


def _add(total: dict[str, float], sums: dict[str, float]) -> None:
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + value
