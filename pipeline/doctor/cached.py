"""Whether scores that are in the store already are what the teacher says today."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.config.collection import Model
from opd_stream.engines import open_engine
from opd_stream.store.artifact import Artifact
from opd_stream.store.reader import ScoredRow, ScoredRows
from opd_stream.types import RolloutBatch
from pipeline.doctor.findings import Check, Finding
from pipeline.doctor.rounding import of_candidates, of_drawn
from pipeline.doctor.trial import in_own_process
from pipeline.setup import Setup
from pipeline.walk import walk
from stages.checkpoints import Checkpoint

CACHED = Check(
    name="cached-scores",
    why="scores in the store are trained on as they are; if the teacher, its engine or the bytes "
    "changed, the student learns from something that no longer exists",
)
CONTROLS = 4.0  # a cached score may differ by so many times what two live ones differ by
FLOOR = 1e-4  # nats, where two live ones are alike
PROBABLE = -7.0  # candidates below this log-probability are left out: rounding of tails is no error


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Differences of log-probabilities over the tokens and candidates of a few rows, nats."""

    mean: float
    largest: float


def cached_scores(setup: Setup, teacher: Checkpoint) -> list[Finding]:
    """Score two cached rows again, alone and together, and compare with the store.

    Raises:
        DamagedUnit: the bytes are not the committed ones.
    """
    here = next(walk(setup))
    cache = here.caches[-1]
    settings = cache.scores.recipe.settings
    units = _committed(cache.rollouts, cache.scores)
    if not units:
        return _other_teacher(setup, cache.scores)
    if "engine" not in settings:
        return [
            CACHED.warning(
                f"{cache.scores.name} was imported; which teacher scored it is not known",
                "compare it with that teacher before it is trained on",
            )
        ]
    rows = ScoredRows([(cache.rollouts, cache.scores)], units=[units])
    if not len(rows):
        return [
            CACHED.error(
                f"no row of {cache.scores.name} can be trained on",
                "look at the teacher's checkpoint, and score again",
            )
        ]
    chosen = [rows[0], rows[len(rows) - 1]]
    model = setup.config.teacher
    assert model is not None
    live = in_own_process(settings["engine"], _live, teacher.folder, model, settings, chosen)
    if live is None:
        return [
            CACHED.error(
                f"the teacher's log-probabilities for {cache.scores.name} are not finite today",
                "look at the teacher's checkpoint",
            )
        ]
    alone, together = live
    control = _gap([_difference(a, b) for a, b in zip(alone, together, strict=True)])
    stored = _gap(
        [
            _unrounded(_stored(row, settings), values, settings)
            for row, values in zip(chosen, alone, strict=True)
        ]
    )
    allowed = Gap(mean=CONTROLS * control.mean + FLOOR, largest=CONTROLS * control.largest + FLOOR)
    told = (
        f"{cache.scores.name}, 2 rows: beyond the codec's rounding, cached and live differ by "
        f"{stored.mean:.1e} nats in the mean, {stored.largest:.1e} at most; live in batches of 1 "
        f"and 2 differ by {control.mean:.1e} and {control.largest:.1e} (allowed {allowed.mean:.1e} "
        f"and {allowed.largest:.1e})"
    )
    if stored.mean <= allowed.mean and stored.largest <= allowed.largest:
        return [CACHED.ok(told)]
    return [
        CACHED.error(
            told,
            f"restore the teacher that scored them, or remove {cache.scores.folder} to score again",
        )
    ]


def _committed(rollouts: Artifact, scores: Artifact) -> list[int]:
    return sorted(set(rollouts.commits()) & set(scores.commits()))


def _other_teacher(setup: Setup, scores: Artifact) -> list[Finding]:
    """Nothing is there; were the same rollouts scored by another teacher?"""
    nearest = setup.store.nearest(scores.recipe)
    if nearest is not None and set(nearest[1]) == {"inputs.teacher"}:
        old, new = nearest[1]["inputs.teacher"]
        return [
            CACHED.warning(
                f"the store has these rollouts scored by teacher {str(old)[:12]}; the config's is "
                f"{str(new)[:12]}: its weights, tokenizer or architecture are others, and all is "
                "scored again",
                "restore the teacher if it was not meant to change",
            )
        ]
    return [CACHED.ok("no scores of this config are in the store yet")]


Live = tuple[
    NDArray[np.floating[Any]], NDArray[np.floating[Any]]
]  # drawn token [T], cached candidates [T, K]


def _live(
    folder: Path, model: Model, settings: dict[str, Any], rows: Sequence[ScoredRow]
) -> tuple[list[Live], list[Live]] | None:
    """Today's scores of each row alone, and of all together; None: not finite."""
    engine = open_engine(
        engine=settings["engine"],
        folder=folder,
        dtype=settings["dtype"],
        batch_rows=model.batch_rows,
        vllm=model.vllm,
    )

    def scored(batch: RolloutBatch) -> list[Live] | None:
        found = engine.score(
            batch, top_k=settings["top_k"], forced_ids=tuple(settings["forced_ids"])
        )
        assert found.candidate_teacher_logprobs is not None
        pairs = zip(found.teacher_logprobs, found.candidate_teacher_logprobs, strict=True)
        return None if found.refused else list(pairs)

    alone = [scored(_batch([row])) for row in rows]
    together = scored(_batch(rows))
    if together is None or None in alone:
        return None
    return [each[0] for each in alone if each is not None], together


def _batch(rows: Sequence[ScoredRow]) -> RolloutBatch:
    """Rows as the engine takes them; the cached ids stand as candidates, so they are scored too."""
    width = max(row.teacher_top_ids.shape[1] for row in rows)
    candidates = [
        np.pad(row.teacher_top_ids, [(0, 0), (0, width - row.teacher_top_ids.shape[1])])
        for row in rows
    ]
    return RolloutBatch(
        prompt_id=tuple(row.prompt_id for row in rows),
        sample_index=np.array([row.sample_index for row in rows], np.int32),
        prompt_ids=tuple(row.prompt_ids for row in rows),
        completion_ids=tuple(row.completion_ids for row in rows),
        behavior_logprobs=tuple(row.behavior_logprobs for row in rows),
        finish_reason=("length",) * len(rows),
        candidate_ids=tuple(each.astype(np.int64) for each in candidates),
    )


def _stored(row: ScoredRow, settings: dict[str, Any]) -> Live:
    """The cached values; ids drawn from the teacher have counts, which no second pass repeats."""
    is_drawn = settings["codec"]["kind"] == "sampled"
    top_TK = row.teacher_top_logprobs
    return row.teacher_logprobs, np.full_like(top_TK, -np.inf) if is_drawn else top_TK


def _difference(left: Live, right: Live) -> NDArray[np.float64]:
    """|left - right| over drawn tokens and probable candidates."""
    width = min(left[1].shape[1], right[1].shape[1])
    a = np.concatenate([left[0], left[1][:, :width].reshape(-1)]).astype(np.float64)
    b = np.concatenate([right[0], right[1][:, :width].reshape(-1)]).astype(np.float64)
    drawn = np.arange(len(a)) < len(left[0])
    kept = np.isfinite(a) & np.isfinite(b) & (drawn | (np.maximum(a, b) > PROBABLE))
    return np.abs(a - b)[kept]


def _unrounded(stored: Live, live: Live, settings: dict[str, Any]) -> NDArray[np.float64]:
    """How much further the stored values are than their codec's rounding explains."""
    width = stored[1].shape[1]
    live = live[0], live[1][:, :width]
    most = of_drawn(settings["codec"]), of_candidates(settings["codec"], live[1])
    drawn, candidates = (
        np.where(np.isfinite(s), value + np.clip(s - value, -r, r), value)
        for s, value, r in zip(stored, live, most, strict=True)
    )
    return _difference(stored, (drawn, candidates))


def _gap(differences: Sequence[NDArray[np.float64]]) -> Gap:
    joined = np.concatenate(differences)
    return Gap(mean=float(joined.mean()), largest=float(joined.max()))
