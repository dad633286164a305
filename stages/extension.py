"""Units continued to a longer window: only new tokens are sampled, only new tokens are scored.

An extension holds whole rows, so everything that reads rollouts and scores reads it like any other
artifact. The old part of a row is what it was, ids, behavior log-probabilities and scores; the new
part has the log-probabilities of the policy that wrote it.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs import decode_scores
from opd_stream.store.codecs.block import ScoreBlock
from opd_stream.store.recipe import Recipe
from opd_stream.store.schema import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch, ScoreBatch


def base_rollouts(store: Store, extension: Recipe, unit: int) -> RolloutBatch:
    """The rows that a unit of an extension continues."""
    base = store.by_fingerprint("rollouts", extension.inputs["rollouts"])
    return rollouts_batch(base.read_unit(extension.settings["extends"][unit]))


def grown_rows(before: RolloutBatch, after: RolloutBatch) -> list[int]:
    """Rows that are longer now."""
    return [
        row
        for row, (old, new) in enumerate(
            zip(before.completion_ids, after.completion_ids, strict=True)
        )
        if len(new) > len(old)
    ]


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
    )


def old_scores(scores: Artifact, unit: int) -> ScoreBatch:
    """The scores of a unit, as they were stored."""
    blocks = [decode_scores(batch) for batch in scores.read_unit(unit).to_batches()]
    columns: dict[str, list[Any]] = {}
    refused: list[str | None] = []
    for block in blocks:
        refused += block.refused
        for name, values in _columns(block).items():
            columns.setdefault(name, []).extend(values)
    return ScoreBatch(
        **{name: tuple(values) for name, values in columns.items()},
        refused={row: reason for row, reason in enumerate(refused) if reason is not None},
    )


def joined(old: ScoreBatch, new: ScoreBatch, rows: list[int]) -> ScoreBatch:
    """Old scores with the new parts of some rows behind them; a refused row stays refused."""
    places = {row: place for place, row in enumerate(rows)}
    refused = dict(old.refused)
    for row, place in places.items():
        if place in new.refused:
            refused.setdefault(row, new.refused[place])
    columns: dict[str, tuple[Any, ...]] = {}
    for name in _NAMES:
        parts: list[Any] = []
        for row, before in enumerate(getattr(old, name)):
            part = before
            if row in refused:
                part = before[:0]
            elif row in places:
                part = _stacked(before, getattr(new, name)[places[row]], fill=_FILL.get(name, 0))
            parts.append(part)
        columns[name] = tuple(parts)
    return replace(old, **columns, refused=refused)


_NAMES = (
    "teacher_logprobs",
    "teacher_top_ids",
    "teacher_top_logprobs",
    "teacher_tail_logprobs",
    "teacher_forced_logprobs",
)
_FILL = {"teacher_top_logprobs": -np.inf}


def _columns(block: ScoreBlock) -> dict[str, list[NDArray[Any]]]:
    rows = range(len(block.offsets) - 1)
    return {
        name: [
            getattr(block, name)[int(block.offsets[row]) : int(block.offsets[row + 1])]
            for row in rows
        ]
        for name in _NAMES
    }


def _stacked(old: NDArray[Any], new: NDArray[Any], *, fill: float) -> NDArray[Any]:
    """One behind the other, the one with fewer candidates filled up."""
    if old.ndim == 2 and old.shape[1] != new.shape[1]:
        width = max(old.shape[1], new.shape[1])
        old, new = (
            np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill)
            for part in (old, new)
        )
    return np.concatenate([old, new])


def extension_layout(base: Artifact, units: list[int]) -> dict[str, int]:
    """Rows (prompts) in all and in a unit."""
    sizes = [len(base.unit_rows(unit)) for unit in units]
    return {"rows": sum(sizes), "rows_per_unit": max(sizes)}
