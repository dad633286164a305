"""The distance of a policy to its teacher: the student's side of a unit, and the figures of all.

The teacher has stored hidden states on the policy's samples and on text of its own, and its head.
Here the student reads the same tokens, so that the two distributions of each token meet without the
two models.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from opd_stream.engines import hidden_engine
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs.columns import list_rows
from opd_stream.store.sealed import load_record
from opd_stream.store.shards import rollouts_batch, rows_of
from opd_stream.store.store import Store
from opd_stream.tasks.distance import (
    FIGURES,
    DistanceManifest,
    DistanceResult,
    MeasuredRow,
    text_distance,
)
from opd_stream.types import RolloutBatch
from stages.generate import GenerateWorker, token_counts
from stages.prompts import ids_by_name, unit_prompts, with_prompts
from stages.recipes import distance_evaluation_recipe
from stages.workers import TaskResult

if TYPE_CHECKING:
    from opd_stream.engines.base import HiddenEngine, HiddenStates
    from opd_stream.fused import OutputHead

ROWS_AT_ONCE = 64  # whose hidden states of the student exist at one time


class StudentWorker(GenerateWorker):
    """The student's worker; compares it with its teacher, too, where a task asks for that."""

    _head: "tuple[str, OutputHead] | None" = None  # the teacher's, with its fingerprint

    def work(self, result: TaskResult) -> TaskResult:
        return super().work(result) if result.task.distances is None else self._measured(result)

    def _measured(self, result: TaskResult) -> TaskResult:
        """Measure a task's unit unless it is measured."""
        from stages.teacher_head import hidden_of

        task = result.task
        assert task.distances is not None
        distances = self.artifact("distances", task.distances)
        if distances.commit_record(task.unit) is not None:
            return result
        start, cpu = time.time(), time.process_time()
        recipe = distances.recipe
        rollouts = self.artifact("rollouts", recipe.inputs["rollouts"])
        hidden = self.artifact("hidden", recipe.inputs["hidden"])
        source = hidden.commit_record(task.unit)
        batch = rollouts_batch(rollouts.read_unit(task.unit))
        states = hidden_of(hidden.read_unit(task.unit))
        engine = self.engine(lambda: self.student_folder(task), recipe.inputs["student"], recipe)
        head = self._teacher_head(hidden.recipe.inputs["head"])
        read = batch
        if "prompts" in recipe.inputs:  # text of the teacher behind the prompts of the student
            prompts = unit_prompts(self.store, rollouts, task.unit, recipe.inputs["prompts"])
            read = with_prompts(batch, ids_by_name(prompts))
        table = measured_table(hidden_engine(engine), read, states, head)
        end = time.time()
        distances.commit(
            task.unit,
            table,
            counts={
                **token_counts(batch),
                "rows": len(batch),
                "cpu_seconds": round(time.process_time() - cpu, 3),
            },
            made_by=task.made_by,
            seconds=end - start,
            source_sha256=None if source is None else source.sha256,
        )
        return replace(result, generate_span=(start, end), generated_tokens=batch.completion_tokens)

    def _teacher_head(self, fingerprint: str) -> "OutputHead":
        from opd_stream.hidden_states import read_head

        if self._head is None or self._head[0] != fingerprint:
            artifact = self.artifact("heads", fingerprint)
            self._head = (fingerprint, read_head(artifact))
        return self._head[1]


def measured_table(
    engine: "HiddenEngine", batch: RolloutBatch, teacher: "HiddenStates", head: "OutputHead"
) -> pa.Table:
    """The distances of every completion token of some rollouts, as a shard: of trajectories, of
    the tokens of their author.

    Args:
        engine: the student.
        batch: rollouts behind the student's prompts.
        teacher: hidden states of the teacher on the same completions.
        head: the teacher's.

    Raises:
        UserError: rebuilt log-probabilities are not those that the teacher stored.
    """
    figures: list[np.ndarray[Any, Any]] = []
    for first in range(0, len(batch), ROWS_AT_ONCE):
        rows = range(first, min(first + ROWS_AT_ONCE, len(batch)))
        figures += _measured(engine, batch, rows, teacher, head)
    columns = {
        "prompt_id": pa.array(batch.prompt_id, pa.string()),
        "sample_index": pa.array(batch.sample_index, pa.int32()),
        **{
            name: list_rows(
                [row[number, batch.own_tokens(place)] for place, row in enumerate(figures)],
                np.float32,
            )
            for number, name in enumerate(FIGURES)
        },
    }
    return pa.table(columns)


def _measured(
    engine: "HiddenEngine",
    batch: RolloutBatch,
    rows: range,
    teacher: "HiddenStates",
    head: "OutputHead",
) -> Iterator["np.ndarray[Any, Any]"]:
    """The figures of some rows [M, T]."""
    import torch

    from opd_stream.divergence import token_distances
    from stages.teacher_head import check_bound, head_input

    part = slice(rows.start, rows.stop)
    completions = batch.completion_ids[part]
    some = RolloutBatch(
        prompt_id=batch.prompt_id[part],
        sample_index=batch.sample_index[part],
        prompt_ids=batch.prompt_ids[part],
        completion_ids=completions,
        behavior_logprobs=batch.behavior_logprobs[part],
        finish_reason=batch.finish_reason[part],
    )
    student_head = engine.head()
    device = student_head.weight_VH.device
    own = head_input(np.concatenate(engine.hidden(some).states), student_head)
    theirs = head_input(np.concatenate(teacher.states[part]), head)
    ids = np.concatenate(completions).astype(np.int64)
    found = token_distances(
        own, student_head, theirs.to(device), head, torch.from_numpy(ids).to(device)
    )
    rebuilt = found.teacher_logprobs.cpu().numpy()
    check_bound(rebuilt, np.concatenate(teacher.logprobs[part]), head)
    values = np.stack([getattr(found, name).cpu().numpy() for name in FIGURES])
    ends = np.cumsum([len(completion) for completion in completions])[:-1]
    yield from np.split(values, ends, axis=1)


def write_figures(store: Store, distances: Mapping[str, Artifact]) -> None:
    """The figures of complete distances, unless the store has them; damaged ones are taken again.

    Raises:
        UserError: no completion has a finite distance.
        DamagedUnit: a shard is not what was committed.
    """
    mend_figures(store, distances)
    if distance_result(store, distances) is not None:
        return
    texts, sums = {}, {}
    for text, artifact in distances.items():
        try:
            texts[text], sums[text] = text_distance(_rows_of(artifact))
        except ValueError as error:
            raise UserError(
                f"{artifact.name}: {error}; expected a token at least; look at the prompts, and at "
                "both models with `opd-stream doctor`"
            ) from error
    artifact = _figures_artifact(store, distances)
    manifest = DistanceManifest.of(artifact.recipe, result=DistanceResult(texts=texts, sums=sums))
    artifact.publish_figures(manifest)


def mend_figures(store: Store, distances: Mapping[str, Artifact]) -> None:
    """Take out damaged figures of distances."""
    _figures_artifact(store, distances).mend_figures(DistanceManifest)


def distance_result(
    store: Store, distances: Mapping[str, Artifact]
) -> tuple[str, DistanceResult] | None:
    """The evaluation's name and result, if they are in the store."""
    artifact = _figures_artifact(store, distances)
    path = artifact.folder / "manifest.json"
    if not path.exists():
        return None
    return artifact.name, load_record(DistanceManifest, path).result


def _figures_artifact(store: Store, distances: Mapping[str, Artifact]) -> Artifact:
    texts = {text: artifact.fingerprint for text, artifact in distances.items()}
    return store.artifact(distance_evaluation_recipe(texts))


def _rows_of(distances: Artifact) -> Iterator[MeasuredRow]:
    for unit in distances.units():
        table = distances.read_unit(unit)
        columns = [rows_of(table[name], np.float32) for name in FIGURES]
        for name, *figures in zip(table["prompt_id"].to_pylist(), *columns, strict=True):
            yield MeasuredRow(name, np.stack(figures))
