"""Scored rollouts as one sequence of rows, read from any number of caches.

The order of rows is that of the caches and, inside one, of its prompts: it depends on neither unit
size nor the workers that wrote it. A few decoded units are kept, so memory does not grow with the
cache.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.schema import rollouts_batch, rows_of
from opd_stream.types import RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """One rollout and the teacher's view of it.

    Shapes: P prompt tokens, T completion tokens, K teacher top-k; log-probabilities in nats over
    the full vocabulary.
    """

    prompt_id: str
    prompt_ids: NDArray[np.int32]  # [P]
    completion_ids: NDArray[np.int32]  # [T]
    behavior_logprobs: NDArray[np.float32]  # [T]
    teacher_logprobs: NDArray[np.float32]  # [T]
    teacher_top_ids: NDArray[np.int32]  # [T, K]
    teacher_top_logprobs: NDArray[np.float16]  # [T, K]
    teacher_tail_logprobs: NDArray[np.float32]  # [T]
    cache: int  # which of the caches the row comes from


@dataclass(frozen=True, slots=True)
class _Unit:
    rollouts: RolloutBatch
    columns: dict[str, tuple[NDArray[np.generic], ...]]
    trainable: list[int]  # rows with completion tokens that the teacher did not refuse


class ScoredRows:
    """Random access to the trainable rows of (rollouts, scores) pairs; every read is verified.

    Example:
        >>> rows = ScoredRows([(rollouts, scores)])
        >>> rows[17].teacher_top_ids.shape
        (151, 16)
    """

    def __init__(
        self, caches: list[tuple[Artifact, Artifact]], *, units_in_memory: int = 64
    ) -> None:
        self._caches = caches
        self._units_in_memory = units_in_memory
        self._decoded: OrderedDict[tuple[int, int], _Unit] = OrderedDict()
        self._index: list[tuple[int, int, int]] = []  # cache, unit, row in unit
        for cache, (_, scores) in enumerate(caches):
            for unit in scores.units():
                rows = self._unit(cache, unit).trainable
                self._index.extend((cache, unit, row) for row in rows)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> ScoredRow:
        cache, unit, row = self._index[position]
        decoded = self._unit(cache, unit)
        rollouts, columns = decoded.rollouts, decoded.columns
        return ScoredRow(
            prompt_id=rollouts.prompt_id[row],
            prompt_ids=rollouts.prompt_ids[row],
            completion_ids=rollouts.completion_ids[row],
            behavior_logprobs=rollouts.behavior_logprobs[row],
            cache=cache,
            **{name: rows[row] for name, rows in columns.items()},  # pyright: ignore
        )

    def _unit(self, cache: int, unit: int) -> _Unit:
        key = (cache, unit)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        rollouts_artifact, scores_artifact = self._caches[cache]
        record, source = scores_artifact.commit_record(unit), rollouts_artifact.commit_record(unit)
        scores = scores_artifact.read_unit(unit)
        rollouts = rollouts_batch(rollouts_artifact.read_unit(unit))
        if record is None or source is None or record.source_sha256 != source.sha256:
            raise DamagedUnit(scores_artifact, unit, "it scores other bytes than its rollouts unit")
        columns = {
            name: rows_of(scores[name])
            for name in (
                "teacher_logprobs",
                "teacher_top_ids",
                "teacher_top_logprobs",
                "teacher_tail_logprobs",
            )
        }
        refused = scores["refused"].to_pylist()
        trainable = [
            row
            for row, reason in enumerate(refused)
            if reason is None and len(rollouts.completion_ids[row])
        ]
        decoded = _Unit(rollouts, columns, trainable)
        self._decoded[key] = decoded
        while len(self._decoded) > self._units_in_memory:
            self._decoded.popitem(last=False)
        return decoded
