"""What a worker does to one unit: sample it, score it, publish it.

The same two classes run in Ray Data actor pools and in the plain local loop. An order names the
unit; everything that decides its content is read from the recipe in the store, so a worker needs
nothing but the store and a checkpoint folder.
"""

import time
from collections.abc import Callable, Container
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.aligned_scores import Aligner
from opd_stream.costs import TokenCounts, counts_of
from opd_stream.engines import open_engine
from opd_stream.engines.base import Engine
from opd_stream.engines.vllm_options import VllmOptions
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs import SampledCodec, codec_of, encode_scores
from opd_stream.store.files import PATIENCE
from opd_stream.store.policy import identify
from opd_stream.store.schema import (
    prompts_batch,
    rollouts_batch,
    rollouts_table,
)
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch, ScoreBatch
from stages.aligned import aligned_counts, open_aligner, score_aligned
from stages.extension import base_rollouts, grown_rows, joined, new_parts, old_scores
from stages.orders import Order, Worked, each, ending_if_hung
from stages.selection import probe_rows, prompts_of


class UnitWorker:
    """A worker with one engine, kept alive between units, rounds and policies."""

    def __init__(
        self,
        store: str,
        batch_rows: int,
        threads: int,
        vllm: VllmOptions,
        unit_seconds: int | None = None,
        store_seconds: float = PATIENCE,
    ) -> None:
        self.store, self.unit_seconds = Store(store, patience=store_seconds), unit_seconds
        self.batch_rows, self.threads, self.vllm = batch_rows, threads, vllm
        self._engine: Engine | None = None
        self._loaded: str | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Work on a table of orders (one row, as the streams are set up)."""
        import torch

        torch.set_num_threads(self.threads)  # the local loop shares the process with training
        with ending_if_hung(self.unit_seconds):
            return each(table, self._watched)

    def _watched(self, worked: Worked) -> Worked:
        with self.store.watched():
            return self.work(worked)

    def work(self, worked: Worked) -> Worked:
        """Make the unit of one order, or pass it on if it is committed."""
        raise NotImplementedError

    def student_folder(self, order: Order) -> Path:
        """The student's checkpoint on this node; a policy of a remote store is fetched."""
        if order.policy is None:
            return Path(order.student)
        return self.store.policy_by_fingerprint(order.policy).folder()

    def engine(
        self, find: Callable[[], Path], expected_identity: str, settings: dict[str, Any]
    ) -> Engine:
        """The engine with the weights the recipe asks for; `find` names their folder.

        Raises:
            UserError: the folder holds other weights.
        """
        if self._loaded == expected_identity and self._engine is not None:
            return self._engine
        folder = find()
        found = identify(folder).fingerprint
        if found != expected_identity:
            raise UserError(
                f"checkpoint {folder} is {found[:12]}; the recipe asks for "
                f"{expected_identity[:12]}; the folder changed during the run: restore it or start "
                "the run again"
            )
        if self._engine is None:
            self._engine = open_engine(
                engine=settings["engine"],
                folder=folder,
                dtype=settings["dtype"],
                batch_rows=self.batch_rows,
                vllm=self.vllm,
            )
        else:
            self._engine.load(folder)
        self._loaded = expected_identity
        return self._engine


class GenerateUnits(UnitWorker):
    """The student's worker: samples the rollouts of a unit unless they are committed."""

    def work(self, worked: Worked) -> Worked:
        order = worked.order
        rollouts = self.store.by_fingerprint("rollouts", order.rollouts)
        if rollouts.commit_record(order.unit) is not None:
            return worked
        start, cpu = time.time(), time.process_time()
        settings = rollouts.recipe.settings
        wanted = rollouts.recipe.inputs["student"]
        engine = self.engine(lambda: self.student_folder(order), wanted, settings)
        sampling = {
            "window_tokens": settings["window_tokens"],
            "temperature": settings["temperature"],
            "seed": settings["seed"],
            "stop_ids": tuple(settings["stop_ids"]),
        }
        before = None
        if "extends" in settings:
            before = base_rollouts(self.store, rollouts.recipe, order.unit)
            batch = engine.extend(before, **sampling)
        elif "probe" in settings:
            batch = engine.extend(probe_rows(self.store, rollouts.recipe), **sampling)
        else:
            prompts = prompts_of(self.store, rollouts.recipe)
            batch = engine.sample(
                prompts_batch(_slice(prompts, rollouts, order.unit)),
                samples_per_prompt=settings["samples_per_prompt"],
                extra_draws=settings["extra_draws"],
                **sampling,
            )
        length_rows = sum(reason == "length" for reason in batch.finish_reason)
        work = _work_counts(batch) if before is None else _extension_counts(before, batch)
        counts = {
            **work,
            "rows": len(batch),
            "length_rows": length_rows,
            "repeated_tokens": sum(repeated_tokens(ids) for ids in batch.completion_ids),
            "cpu_seconds": round(time.process_time() - cpu, 3),
        }
        end = time.time()
        rollouts.commit(
            order.unit,
            rollouts_table(batch),
            counts=counts,
            made_by=order.made_by,
            seconds=end - start,
        )
        return replace(
            worked, generate_span=(start, end), generated_tokens=int(work["completion_tokens"])
        )


class ScoreUnits(UnitWorker):
    """The teacher's worker: scores the rollouts of a unit unless that is committed."""

    _aligner: tuple[str, Aligner] | None = None  # fingerprint of the scores it is for

    def work(self, worked: Worked) -> Worked:
        order = worked.order
        if order.scores is None or order.teacher is None:
            return worked
        scores = self.store.by_fingerprint("scores", order.scores)
        rollouts = self.store.by_fingerprint("rollouts", order.rollouts)
        source = rollouts.commit_record(order.unit)
        if source is None:
            raise UserError(
                f"unit {order.unit} of {rollouts.name} is not generated yet; "
                "run the generate stage of this round first"
            )
        standing = scores.commit_record(order.unit)
        if standing is not None and standing.source_sha256 == source.sha256:
            return worked
        if standing is not None:
            scores.condemn(order.unit)
        start, cpu = time.time(), time.process_time()
        settings = scores.recipe.settings
        teacher = Path(order.teacher)
        engine = self.engine(lambda: teacher, scores.recipe.inputs["teacher"], settings)
        batch = rollouts_batch(rollouts.read_unit(order.unit))
        codec = codec_of(settings["codec"])
        asked = {
            "top_k": settings["top_k"],
            "forced_ids": tuple(settings["forced_ids"]),
            "draws": codec.draws if isinstance(codec, SampledCodec) else 0,
            "seed": settings["seed"],
        }
        aligned: dict[str, float] = {}
        if "alignment" in settings:
            aligner = self._aligner_of(order, scores, rollouts)
            scored, read = score_aligned(engine, aligner, batch, asked)
            work, aligned = _work_counts(read), aligned_counts(batch, scored)
        elif "extends" in rollouts.recipe.settings:
            scored, work = self._score_new(engine, scores, rollouts, order.unit, batch, asked)
        else:
            scored = engine.score(batch, **asked)
            work = _work_counts(batch, without=scored.refused)
        try:
            table, fidelity = encode_scores(codec, scored, batch)
        except ValueError as error:
            raise UserError(
                f"unit {order.unit} of {scores.name} cannot be stored: {error}; raise "
                "scores.codec.max_error, or use scores.codec={kind: exact}"
            ) from error
        counts = {
            **work,
            **aligned,
            "rows": len(batch),
            "refused_rows": len(scored.refused),
            "cpu_seconds": round(time.process_time() - cpu, 3),
        }
        end = time.time()
        scores.commit(
            order.unit,
            table,
            counts=counts,
            made_by=order.made_by,
            seconds=end - start,
            source_sha256=source.sha256,
            skipped_rows=[
                row
                for row in range(len(batch))
                if row in scored.refused or not _trains(batch, scored, row)
            ],
            fidelity=fidelity,
        )
        return replace(
            worked, score_span=(start, end), scored_tokens=int(work["completion_tokens"])
        )

    def _aligner_of(self, order: Order, scores: Artifact, rollouts: Artifact) -> Aligner:
        """The aligner of a teacher with another tokenizer, kept between units of an artifact."""
        if self._aligner is None or self._aligner[0] != scores.fingerprint:
            assert order.teacher is not None
            made = open_aligner(
                self.store,
                scores.recipe,
                rollouts.recipe,
                student=self.student_folder(order),
                teacher=Path(order.teacher),
            )
            self._aligner = (scores.fingerprint, made)
        return self._aligner[1]

    def _score_new(
        self,
        engine: Engine,
        scores: Artifact,
        rollouts: Artifact,
        unit: int,
        batch: RolloutBatch,
        asked: dict[str, Any],
    ) -> tuple[ScoreBatch, dict[str, float]]:
        """The scores of an extended unit: the old ones, and new ones of new tokens."""
        before = base_rollouts(self.store, rollouts.recipe, unit)
        base = self.store.by_fingerprint("scores", scores.recipe.inputs["scores"])
        rows = grown_rows(before, batch)
        old = old_scores(base, rollouts.recipe.settings["extends"][unit])
        if not rows:
            return old, _extension_counts(before, batch)
        new = engine.score(new_parts(before, batch, rows), **asked)
        return joined(old, new, rows), _extension_counts(before, batch)


def _slice(prompts: pa.Table, artifact: Artifact, unit: int) -> pa.Table:
    rows = artifact.unit_rows(unit)
    return prompts.slice(rows.start, len(rows))


def _work_counts(batch: RolloutBatch, *, without: Container[int] = ()) -> dict[str, float]:
    """What the cost of rows follows from: tokens and attended pairs."""
    total = TokenCounts(tokens=0, completion_tokens=0, pairs=0)
    for row in range(len(batch)):
        if row not in without:
            prompt, completion = len(batch.prompt_ids[row]), len(batch.completion_ids[row])
            total += counts_of(prompt_tokens=prompt, completion_tokens=completion)
    return asdict(total)


def _extension_counts(before: RolloutBatch, after: RolloutBatch) -> dict[str, float]:
    """The same of an extension: rows that grew are read whole, only their new tokens are made."""
    return _work_counts(new_parts(before, after, grown_rows(before, after)))


def repeated_tokens(ids: NDArray[np.integer[Any]]) -> int:
    """Tokens of a completion that end a stretch of 4 which stood in it before."""
    if len(ids) < 5:
        return 0
    stretches = np.lib.stride_tricks.sliding_window_view(ids, 4)
    return len(stretches) - len(np.unique(stretches, axis=0))


def _trains(batch: RolloutBatch, scored: ScoreBatch, row: int) -> bool:
    mask = np.ones(len(batch.completion_ids[row]), np.bool_)
    if batch.loss_mask is not None:
        mask &= batch.loss_mask[row]
    if scored.chunk_ids is not None:
        mask &= scored.chunk_ids[row] >= 0
    return bool(mask.any())
