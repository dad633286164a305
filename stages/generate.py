"""The generate stage of one unit: the student samples its rollouts, or continues older ones.

An extension continues rows to a longer window. It holds whole rows, so everything that reads
rollouts and scores reads it like any other artifact. The old part of a row keeps its ids and
behavior log-probabilities; the new part has those of the policy that wrote it.
"""

import time
from collections.abc import Callable, Container
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from opd_stream.costs import TokenCounts, counts_of
from opd_stream.engines.base import Engine, SamplingSettings
from opd_stream.errors import UserError
from opd_stream.filters import repeated_tokens
from opd_stream.store.artifact import Artifact
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import prompts_batch, rollouts_batch, rollouts_table
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch
from stages.given import begun_batch, continued, given_batch
from stages.prompts import probe_rows, prompts_of
from stages.workers import Task, TaskResult, Worker


class GenerateWorker(Worker):
    """The student's worker: samples the rollouts of a unit unless they are committed."""

    def work(self, result: TaskResult) -> TaskResult:
        task = result.task
        if task.author != "student":
            return result
        return sample_unit(self, result, lambda: self.student_folder(task))


def sample_unit(worker: Worker, result: TaskResult, folder: Callable[[], Path]) -> TaskResult:
    """Sample the rollouts of a task's unit unless they are committed; `folder` has the model."""
    task = result.task
    rollouts = worker.artifact("rollouts", task.rollouts)
    if rollouts.commit_record(task.unit) is not None:
        return result
    start, cpu = time.time(), time.process_time()
    if "student" in rollouts.recipe.inputs:
        engine = worker.engine(folder, rollouts.recipe.inputs["student"], rollouts.recipe)
        batch, before = _sampled(worker, engine, task, rollouts)
    else:
        rows = rollouts.unit_rows(task.unit)
        prompts = prompts_of(worker.store, rollouts.recipe, rows)
        batch, before = given_batch(prompts, rollouts.recipe), None
    _check_top_ids(batch, rollouts.recipe)
    work = token_counts(batch) if before is None else extension_counts(before, batch)
    counts = {
        **work,
        "rows": len(batch),
        "length_rows": sum(reason == "length" for reason in batch.finish_reason),
        "repeated_tokens": sum(map(repeated_tokens, map(batch.own_ids, range(len(batch))))),
        **context_counts(batch),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }
    end = time.time()
    rollouts.commit(
        task.unit,
        rollouts_table(batch),
        counts=counts,
        made_by=task.made_by,
        seconds=end - start,
    )
    tokens = int(work["completion_tokens"])
    return replace(result, generate_span=(start, end), generated_tokens=tokens)


def _sampled(
    worker: Worker, engine: Engine, task: Task, rollouts: Artifact
) -> tuple[RolloutBatch, RolloutBatch | None]:
    """The unit's rollouts, and the rows that they continue where these are not new."""
    recipe, store, unit = rollouts.recipe, worker.store, task.unit
    sampling = _sampling_settings(recipe)
    if "extends" in recipe.settings:
        before = base_rollouts(store, recipe, unit)
        return engine.extend(before, sampling), before
    if "probe" in recipe.settings:
        return engine.extend(probe_rows(store, recipe), sampling), None
    prompts = prompts_of(store, recipe, rollouts.unit_rows(unit))
    samples: int = recipe.settings["samples_per_prompt"]
    if "environment" in recipe.settings:
        trajectories = worker.trajectories(task, recipe)
        return trajectories.sample(engine, prompts, sampling, samples_per_prompt=samples), None
    if "prefix_tokens" in recipe.settings:
        return continued(engine, begun_batch(prompts, recipe), sampling), None
    batch = engine.sample(
        prompts_batch(prompts),
        sampling,
        samples_per_prompt=samples,
        extra_draws=recipe.settings["extra_draws"],
    )
    return batch, None


def _sampling_settings(rollouts: Recipe) -> SamplingSettings:
    """What a recipe of rollouts asks an engine for."""
    settings = rollouts.settings
    return SamplingSettings(
        window_tokens=settings["window_tokens"],
        temperature=settings["temperature"],
        seed=settings["seed"],
        stop_ids=tuple(settings["stop_ids"]),
        vocabulary=settings.get("vocabulary"),
        top_p=settings.get("top_p", 1.0),
        top_k=settings.get("top_k", 0),
        min_p=settings.get("min_p", 0.0),
        student_top_k=settings.get("student_top_k", 0),
    )


def _check_top_ids(batch: RolloutBatch, rollouts: Recipe) -> None:
    asked = rollouts.settings.get("student_top_k", 0)
    if asked and batch.student_top_ids is None and len(batch):
        raise UserError(
            f"rollouts.student_top_k is {asked}, but engine {rollouts.settings['engine']} keeps "
            "no ids of its own; use student.engine=transformers, or leave student_top_k out"
        )


def base_rollouts(store: Store, extension: Recipe, unit: int) -> RolloutBatch:
    """The rows that a unit of an extension continues."""
    base = store.by_fingerprint("rollouts", extension.inputs["rollouts"])
    return rollouts_batch(base.read_unit(extension.settings["extends"][unit]))


def grown_rows(before: RolloutBatch, after: RolloutBatch) -> list[int]:
    """Rows that an extension made longer."""
    pairs = zip(before.completion_ids, after.completion_ids, strict=True)
    return [row for row, (old, new) in enumerate(pairs) if len(new) > len(old)]


def new_parts(before: RolloutBatch, after: RolloutBatch, rows: list[int]) -> RolloutBatch:
    """The new tokens of some rows, as completions of everything before them.

    A row's name says where its new part begins, so that draws from the teacher differ from those of
    the part before.
    """
    starts = {row: len(before.completion_ids[row]) for row in rows}
    return RolloutBatch(
        prompt_id=tuple(f"{after.prompt_id[row]}/{starts[row]}" for row in rows),
        sample_index=np.array([after.sample_index[row] for row in rows], np.int32),
        prompt_ids=tuple(
            np.concatenate([after.prompt_ids[row], before.completion_ids[row]]) for row in rows
        ),
        completion_ids=tuple(after.completion_ids[row][starts[row] :] for row in rows),
        behavior_logprobs=tuple(after.behavior_logprobs[row][starts[row] :] for row in rows),
        finish_reason=tuple(after.finish_reason[row] for row in rows),
        student_top_ids=(
            None
            if after.student_top_ids is None
            else tuple(after.student_top_ids[row][starts[row] :] for row in rows)
        ),
    )


def token_counts(batch: RolloutBatch, *, without: Container[int] = ()) -> dict[str, float]:
    """What the cost of rows follows from: tokens and attended pairs.

    Turns of others in a trajectory count as what is read, like the prompt.
    """
    total = TokenCounts(tokens=0, completion_tokens=0, pairs=0)
    for row in range(len(batch)):
        if row not in without:
            completion = int(batch.own_tokens(row).sum())
            context = len(batch.prompt_ids[row]) + len(batch.completion_ids[row]) - completion
            total += counts_of(prompt_tokens=context, completion_tokens=completion)
    return asdict(total)


def context_counts(batch: RolloutBatch) -> dict[str, float]:
    """Of trajectories: completion tokens that their author did not write."""
    if batch.loss_mask is None:
        return {}
    return {"context_tokens": float(sum(int((~mask).sum()) for mask in batch.loss_mask))}


def extension_counts(before: RolloutBatch, after: RolloutBatch) -> dict[str, float]:
    """The same of an extension: rows that grew are read whole, only their new tokens are made."""
    return token_counts(new_parts(before, after, grown_rows(before, after)))
