"""The train stage: epochs over cached scores, until they are used up or the student has drifted.

`train_here` is the whole of it, in reading order: open, measure, step and decide, publish. All
decisions follow from sums over all processes, so every process takes the same ones; only the first
process writes. Nothing is kept between rounds: a round starts from the policy folder and the
optimizer moments beside it, so a run that was stopped is the same computation as one that was not.
"""

import contextlib
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from opd_stream.batches import Batch
from opd_stream.coverage import measured_coverage
from opd_stream.drift import (
    NAMES,
    DriftSums,
    by_position,
    distance_sum,
    drift_of,
    means,
    named,
    ratio_error,
)
from opd_stream.errors import UserError
from opd_stream.objectives import tolerates_staleness
from opd_stream.outcome import (
    EpochRecord,
    PositionMeans,
    StartDrift,
    TrainedCounts,
    TrainOutcome,
    UnitRecord,
    WindowAudit,
)
from opd_stream.staleness import (
    Decision,
    Staleness,
    beyond,
    decide_epoch,
    decide_stop,
    divergence,
    is_look_due,
)
from opd_stream.store.files import whole_or_gone
from opd_stream.store.policy import OPTIMIZER
from opd_stream.store.reader import ScoredRows
from opd_stream.store.tree import save_tree
from opd_stream.windows import AdaptiveWindow, FixedWindow, Window
from stages.audit import Probes, audit, open_probes
from stages.extrapolate import Extrapolator, held_out, open_extrapolator, save_base
from stages.learner import Learner, measure_units, open_fabric, open_learner
from stages.loggers import telling
from stages.step import Progress
from stages.student_model import save_student
from stages.train_data import BatchPlan, StepBatches, read_epoch
from stages.train_job import TrainJob
from stages.train_state import (
    Clock,
    TrainCheckpoint,
    TrainState,
    forget_metrics_from,
    latest_checkpoint,
    load_weights,
    save_checkpoint,
    total_of,
    write_round_metrics,
)


def train(job: TrainJob, progress: Progress) -> None:
    """Train and publish the policy in this process; `stages/train_ray.py` does it on others.

    Raises:
        UserError: no row can be trained on, the rows are too stale for the objective, the loss is
            not finite, or the memory does not suffice.
        DamagedUnit: a shard is not what was committed.
    """
    train_here(job, progress, open_fabric(job))


def train_here(job: TrainJob, progress: Progress, fabric: Fabric) -> None:
    """The same in this process, which may be one of several."""
    _quiet()
    torch.set_num_threads(job.config.train.threads)
    with _memory_explained():
        training = open_training(job, progress, fabric)
        if training.state.start is None:
            measure_start(training)
        audit_window(training)
        progress.start("train", training.planned_steps, training.state.steps)
        while not training.state.is_over:
            train_epoch(training)
        publish(training, measure_end(training))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A round in training."""

    job: TrainJob
    learner: Learner
    state: TrainState  # of the learner
    rows: ScoredRows
    plan: BatchPlan
    extrapolator: Extrapolator | None
    probes: Probes | None  # of audits of the window
    cached_tokens: int | None  # new tokens that its longest rows may have; None: not known
    progress: Progress
    clock: Clock

    @property
    def bounds(self) -> Staleness:
        """Of drift, for this student and teacher."""
        start = self.state.start
        assert start is not None
        return self.job.config.staleness.fitted(start.distance, self.learner.objectives)

    @property
    def fabric(self) -> Fabric:
        return self.learner.fabric

    @property
    def audit_steps(self) -> int | None:
        """Steps from one audit of the window to the next; None: none within the round."""
        window = self.job.config.rollouts.window
        return window.audit_steps if isinstance(window, AdaptiveWindow) else None

    @property
    def is_last_round(self) -> bool:
        """Whether no round follows."""
        return self.job.round_index == self.job.config.rounds - 1

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch(len(self.rows))

    @property
    def planned_steps(self) -> int:
        """Steps of the round if drift never stops it."""
        return self.steps_per_epoch * self.bounds.max_epochs


def open_training(job: TrainJob, progress: Progress, fabric: Fabric) -> Training:
    """The round at its latest checkpoint, or at its start."""
    clock, rows, plan = Clock(), job.rows(), job.plan()
    jumps = job.config.train.extrapolation
    if jumps is not None and jumps.signal != "reward":
        plan = replace(plan, held_out=held_out(rows, plan, jumps))
    checkpoint = latest_checkpoint(Path(job.scratch))
    learner = open_learner(job, fabric, checkpoint)
    clock.add_earlier(learner.state.seconds, learner.state.cpu_seconds)
    training = Training(
        job=job,
        learner=learner,
        state=learner.state,
        rows=rows,
        plan=plan,
        extrapolator=open_extrapolator(
            job, learner, rows, plan, None if checkpoint is None else checkpoint.base
        ),
        probes=open_probes(job, rows),
        cached_tokens=job.cached_tokens,
        progress=progress,
        clock=clock,
    )
    if fabric.is_global_zero:
        forget_metrics_from(Path(job.metrics), job.first_step + learner.state.steps)
    return training


def train_epoch(training: Training) -> None:
    """Steps to the end of an epoch, or until drift stops it."""
    state, fabric, epoch = training.state, training.fabric, len(training.state.epochs)
    steps = read_epoch(
        training.rows,
        training.plan,
        epoch,
        skipped=state.steps - epoch * training.steps_per_epoch,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        decided=lambda: decided_window(training),
    )
    since = time.perf_counter()
    for step in steps:
        rate = rate_of_step(training)
        sums, grad_norm = take_step(training, step, rate)
        state.add(sums)
        if not state.epochs:
            state.cached_tokens += step.cached_tokens
            state.cut_tokens += step.cut_tokens
        if training.extrapolator is not None:
            training.extrapolator.after_step(step.number)
        since, seconds = time.perf_counter(), time.perf_counter() - since
        report_step(training, step, sums, rate=rate, grad_norm=grad_norm, seconds=seconds)
        decision = decide(training)
        if decision is not None:
            end_epoch(training, decision)
        audit_window(training)
        if state.steps % training.job.config.train.checkpoint_steps == 0:
            checkpoint(training)
        if decision is not None:
            return


def audit_window(training: Training) -> None:
    """Decide the window where that is due: before the round, every few steps, and at its end.

    The first process audits the weights of all; what it decides is in the next checkpoint.
    """
    state, job, learner = training.state, training.job, training.learner
    before = state.audits[-1] if state.audits else None
    if training.probes is None or (state.is_over and training.is_last_round):
        return
    if before is not None:
        every, since = training.audit_steps, state.steps - before.steps
        if every is None or not since or (since < every and not state.is_over):
            return
    window, weights, moments = job.config.rollouts.window, learner.weights(), dict[str, Any]()
    if isinstance(window, AdaptiveWindow) and window.metric == "adam":
        moments = learner.moments()
    found: dict[str, Any] | None = None
    if training.fabric.is_global_zero:
        found = audit(
            job,
            training.probes,
            steps=state.steps,
            weights=weights,
            moments=moments,
            earlier=before or job.earlier_decision,
            current=job.window_tokens if before is None else before.window_tokens,
        ).as_json()
    state.audits.append(WindowAudit.model_validate(training.fabric.broadcast(found)))


def decided_window(training: Training) -> Window | None:
    """What an audit within the round decided, as far as cached rows reach; None: nothing."""
    if not training.audit_steps or not training.state.audits:
        return None
    tokens = training.state.audits[-1].window_tokens
    return FixedWindow(tokens=min(tokens, training.cached_tokens or tokens))


def decision_age(training: Training) -> dict[str, int]:
    """For the line of a step that was just taken: the age of its window in steps."""
    state = training.state
    if not training.audit_steps or not state.audits:
        return {}
    age = state.steps - 1 - state.audits[-1].steps
    state.decision_age = max(age, state.decision_age or 0)
    return {"decision_age": age}


def take_step(training: Training, step: StepBatches, rate: float) -> tuple[dict[str, float], float]:
    """One optimizer step: the sums over all its tokens, and the norm of its gradient.

    Gradients are those of one mean over the tokens of the whole step, whatever the number of
    micro-batches and processes. The objective needs `student_logprobs` of the sampled tokens
    anyway; their difference to the cached `behavior_logprobs` is the policy drift, so staleness is
    measured on every row at every step without another pass.

    Raises:
        UserError: the loss or its gradient is not finite.
    """
    learner, fabric = training.learner, training.fabric
    torch.manual_seed(training.job.config.seed * 1_000_003 + step.number)  # dropout
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    sums_S = torch.zeros(len(NAMES), dtype=torch.float64, device=fabric.device)
    losses: list[tuple[Batch, torch.Tensor]] = []
    for number, batch in enumerate(step.batches, start=1):
        batch = batch.to(fabric.device)
        is_last = number == len(step.batches)  # then gradients travel between processes
        with fabric.autocast(), fabric.no_backward_sync(learner.model, enabled=not is_last):
            found = learner.loss(batch, learner.model)
            # Strategies average over processes; the loss is a sum over them.
            fabric.backward(found.loss * fabric.world_size)
        sums_S += found.sums
        losses.append((batch, found.losses_N))
    sums = named(fabric.all_reduce(sums_S, reduce_op="sum"))  # pyright: ignore
    parameters = learner.parameters
    if learner.weighting is not None and sums["drift_weight"] > 0:
        mean_weight = sums["drift_weight"] / sums["tokens"]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(mean_weight)
    norm = torch.nn.utils.clip_grad_norm_(parameters, training.job.config.train.clip_norm)
    grad_norm = float(getattr(norm, "full_tensor", lambda: norm)())
    if not math.isfinite(sums["loss"] + grad_norm):
        raise UserError(_not_finite(step, losses))
    if training.job.has_dropout:
        sums = measure_without_dropout(training, [batch for batch, _ in losses])
    learner.step()
    return sums, grad_norm


def measure_without_dropout(training: Training, batches: list[Batch]) -> dict[str, float]:
    """Sums over the tokens of a step in another pass: dropout would count as drift."""
    learner, fabric = training.learner, training.fabric
    learner.student.eval()
    with fabric.autocast():
        own = learner.sums(batches)
    learner.student.train()
    sums_S = torch.tensor([own[name] for name in NAMES], dtype=torch.float64, device=fabric.device)
    return named(fabric.all_reduce(sums_S, reduce_op="sum"))  # pyright: ignore


def rate_of_step(training: Training) -> float:
    """The learning rate of the coming step."""
    config = training.job.config
    in_round = (training.state.steps + 0.5) / training.planned_steps
    progress = (training.job.round_index + in_round) / config.rounds
    step = training.job.first_step + training.state.steps
    return config.train.learning_rate_at(progress, step)


def report_step(
    training: Training,
    step: StepBatches,
    sums: dict[str, float],
    *,
    rate: float,
    grad_norm: float,
    seconds: float,
) -> None:
    """A line of metrics.jsonl, the loggers, and progress."""
    line = {
        "round": training.job.round_index,
        "epoch": len(training.state.epochs),
        "step": step.number,
        "learning_rate": rate,
        "window_tokens": step.window_tokens,
        **decision_age(training),
        "trained_tokens": int(sums["tokens"]),
        **({"mean_tokens": round(step.cached_tokens / step.rows, 2)} if step.rows else {}),
        "grad_norm": grad_norm,
        **means(sums),
        "seconds": round(seconds, 4),
    }
    if training.fabric.is_global_zero:
        with Path(training.job.metrics).open("a") as file:
            file.write(json.dumps(line) + "\n")
    numbers = {name: value for name, value in line.items() if name not in ("round", "step")}
    with telling(training.job.config.train.loggers):
        training.fabric.log_dict(numbers, step=step.number)
    facts = {"window": step.window_tokens, "loss": line["loss"], "drift": line["policy_drift"]}
    training.progress.advance("train", 1, line["trained_tokens"], **facts)


def decide(training: Training) -> Decision | None:
    """After a step: whether these rows train on, where that is a question; None: they do.

    It is one at the end of an epoch, and a few times inside a further one, of the rows since the
    last time. The first pass over a cache is finished whatever the drift.

    Raises:
        UserError: the student diverges.
    """
    state, bounds = training.state, training.bounds
    place = state.steps % training.steps_per_epoch
    if place and not is_look_due(place, training.steps_per_epoch):
        return None
    recent, state.recent_sums = drift_of(state.recent_sums), {}
    check_divergence(training, recent)
    if place == 0:
        return decide_epoch(
            drift_of(state.epoch_sums),
            epochs_done=len(state.epochs) + 1,
            bounds=bounds,
            floor=state.floor,
        )
    if not state.epochs or tolerates_staleness(training.learner.objectives):
        return None
    return decide_stop(recent, bounds=bounds, floor=state.floor)


def check_divergence(training: Training, recent: DriftSums) -> None:
    """Stop a run that no further step would mend.

    Raises:
        UserError: the student diverges.
    """
    start = training.state.start
    assert start is not None
    reason = divergence(
        recent, at_start=start.mean_d, distance=start.distance, bounds=training.bounds
    )
    if reason is not None:
        raise UserError(
            f"{reason}, at step {training.job.first_step + training.state.steps - 1}; the policy "
            "of the round before is intact; lower train.learning_rate, or raise "
            "staleness.diverged"
        )


def end_epoch(training: Training, decision: Decision) -> None:
    """Record an epoch, whole or not, and what was decided."""
    state = training.state
    state.epochs.append(
        EpochRecord(
            epoch=len(state.epochs),
            action=decision.action,
            reason=decision.reason,
            by_position=tuple(PositionMeans(**place) for place in by_position(state.epoch_sums)),
            **means(state.epoch_sums),
        )
    )
    state.epoch_sums, state.recent_sums = {}, {}
    asked = training.job.is_gated or decision.action == "gated"
    state.is_gated = asked or not training.bounds.gated_from


def measure_start(training: Training) -> None:
    """Before any training: sampler_gap, the floor of drift, drift of all rows, gate or not.

    Raises:
        UserError: the drift before training is above the bound, and the objective holds a reverse
            KL, which on rows that another student wrote teaches for prefixes it does not write.
    """
    job, state = training.job, training.state
    everything, fresh = list[dict[str, float]](), list[dict[str, float]]()
    for (cache, _), rows in _measure(training).items():
        everything += rows
        if job.is_fresh and job.caches[cache].policy_version == job.round_index:
            fresh += rows
    sums, unmoved = total_of(everything), drift_of(total_of(fresh))
    tokens = [row["tokens"] for row in everything]
    state.start = StartDrift(
        tokens=int(sums["tokens"]),
        policy_drift=drift_of(sums).policy_drift,
        sampler_gap=unmoved.absolute_mean if fresh else None,  # only the engine is what differs
        floor=unmoved.policy_drift if fresh else job.earlier_floor(),
        floor_error=None
        if not fresh
        else ratio_error([drift_of(r).k3 for r in fresh], [r["tokens"] for r in fresh]),
        mean_d=drift_of(sums).signed_mean,
        distance=max(0.0, distance_sum(sums) / max(sums["tokens"], 1.0)),
        distance_error=ratio_error([distance_sum(row) for row in everything], tokens),
        coverage=measured_coverage(everything, is_plain=job.is_plain),
    )
    bounds = training.bounds
    drift = beyond(drift_of(sums), floor=state.floor)
    state.is_gated = job.is_gated or drift >= bounds.gated_from
    decided = bounds.max_policies or job.config.rollouts.ahead  # before the rows were taken
    if decided or drift <= bounds.policy_drift:
        return
    if not tolerates_staleness(training.learner.objectives):
        raise UserError(
            f"the rollouts are stale: policy_drift {drift:.3f} before training, bound "
            f"{bounds.policy_drift:g}, and the objective holds a reverse KL; generate and score "
            "again, use a forward objective, or raise staleness.policy_drift"
        )


def measure_end(training: Training) -> tuple[UnitRecord, ...]:
    """Each unit under the trained weights, for the next round to decide about it."""
    job = training.job
    if not training.bounds.max_policies or job.round_index == job.config.rounds - 1:
        return ()
    measured = _measure(training)
    units: list[UnitRecord] = []
    for number, cache in enumerate(job.caches):
        for slot in () if training.plan.given[number] else cache.slots:
            sums = total_of(measured.get((number, slot.unit), ()))
            units.append(
                UnitRecord(
                    rollouts=cache.rollouts,
                    scores=cache.scores,
                    policy_version=cache.policy_version,
                    made_in=cache.made_in,
                    unit=slot.unit,
                    first=slot.first,
                    last=slot.last,
                    drift=drift_of(sums),
                    student_top_mass=means(sums)["student_top_mass"],
                    unfinished=int(training.rows.sampled(number, slot.unit).counts["length_rows"]),
                )
            )
    return tuple(units)


def _measure(training: Training) -> dict[tuple[int, int], list[dict[str, float]]]:
    share = training.job.config.staleness.sample_share
    return measure_units(training.learner, training.rows, training.plan, share=share)


def checkpoint(training: Training) -> None:
    """Write all that the rest of the round follows from; every process helps to gather it."""
    learner, state = training.learner, training.state
    state.seconds, state.cpu_seconds = training.clock.seconds, training.clock.cpu_seconds
    whole = TrainCheckpoint(
        state=state,
        weights=learner.weights(),
        optimizer=learner.moments(),
        base=None if training.extrapolator is None else training.extrapolator.base(),
    )
    if training.fabric.is_global_zero:
        save_checkpoint(Path(training.job.scratch), whole)


def publish(training: Training, units: tuple[UnitRecord, ...]) -> None:
    """Write the policy; every process helps to gather it, the first one writes."""
    job, learner, state = training.job, training.learner, training.state
    trained = learner.weights() if job.is_sharded else {}
    moments = learner.moments()
    base = None if training.extrapolator is None else training.extrapolator.base()
    if not training.fabric.is_global_zero:
        return
    with telling(job.config.train.loggers):
        for logger in training.fabric.loggers:
            logger.finalize("success")
    student = learner.student
    if job.is_sharded:
        student = job.load_student()  # the sharded copy cannot be written as it is
        load_weights(student, trained)
    policy = job.target()
    attempt = policy.new_attempt()
    with whole_or_gone(attempt):
        save_tree(moments, attempt / OPTIMIZER)
        if learner.masters is not None:
            learner.masters.put_back()
        save_student(student, Path(job.base), attempt)
        if base is not None:
            save_base(base, attempt)
        write_round_metrics(Path(job.metrics), job.round_index, attempt)
    assert state.start is not None
    outcome = TrainOutcome(
        steps=state.steps,
        rows=len(training.rows),
        trained=TrainedCounts(**state.trained),
        cached_tokens=state.cached_tokens,
        cut_tokens=state.cut_tokens,
        epochs=tuple(state.epochs),
        start=state.start,
        units=units,
        extrapolations=tuple(state.extrapolations),
        held_out_rows=len(training.plan.held_out),
        window_decision=state.audits[-1] if state.audits and not training.is_last_round else None,
        window_audits=tuple(state.audits) if training.audit_steps else (),
        decision_age=state.decision_age,
        levels=job.levels,
        processes=training.fabric.world_size,
        gradient_checkpointing=job.config.train.gradient_checkpointing,
        made_by=job.made_by,
        seconds=training.clock.seconds,
        cpu_seconds=training.clock.cpu_seconds,
    )
    policy.publish(attempt, outcome)
    shutil.rmtree(job.scratch, ignore_errors=True)


def _not_finite(step: StepBatches, losses: list[tuple[Batch, torch.Tensor]]) -> str:
    rows = sorted(
        {
            batch.names[row]
            for batch, losses_N in losses
            for row in batch.row_N[~losses_N.isfinite()].tolist()
        }
    )
    where = f"rows {', '.join(rows[:8])}" if rows else "no row; the gradient is what is not"
    return (
        f"the loss of step {step.number} is not finite in {where}; the policy of the round "
        "before is intact; lower train.learning_rate, or look at these rows' scores"
    )


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    """Out of memory becomes a line that says which setting to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and "can't allocate memory" not in text:
            raise
        raise UserError(
            f"the memory does not suffice for a step ({text[:120]}); lower "
            "train.tokens_per_microbatch, or set train.gradient_checkpointing=true"
        ) from error


def _quiet() -> None:
    """Leave the terminal to the stages' own progress."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*treespec.*deprecated.*")
