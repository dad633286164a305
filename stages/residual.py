"""The style-bias residual of scores: another scores artifact, made from the cache alone."""

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, check_source
from opd_stream.store.codecs import Codec, codec_of, encode_scores, scores_batch
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.style_bias import StyleBias, StyleSettings, style_bias
from opd_stream.types import RolloutBatch, ScoreBatch
from stages.cross_tokenizer import refuse_aligned
from stages.recipes import is_given
from stages.step import Progress, Silent


def make_residual(
    store: Store, scores: Artifact, settings: StyleSettings, progress: Progress | None = None
) -> Artifact:
    """Scores without the teacher's style bias; units that are committed are not made again.

    The sampled token loses the bias of its id and place, and has no more than probability 1, which
    no codec could store. Candidates lose the bias of their ids,
    what is outside them that of an unseen id, and all are renormalised together.

    Raises:
        UserError: the artifact is not complete, or holds ids drawn from the teacher.
        DamagedUnit: a shard is not what was committed.
    """
    rollouts = store.scored_rollouts(scores)
    codec = _codec_of(scores, rollouts)
    target = store.artifact(
        Recipe(
            kind="scores",
            settings={**scores.recipe.settings, "style_bias": asdict(settings)},
            inputs={**scores.recipe.inputs, "scores": scores.fingerprint},
        )
    )
    layout = scores.layout()
    target.create(rows=layout.rows, rows_per_unit=layout.rows_per_unit)
    units = [
        (unit, rollouts_batch(rollouts.read_unit(unit)), scores_batch(scores.read_unit(unit)))
        for unit in scores.units()
    ]
    bias = _fit(units, settings)
    first, progress = 0, progress or Silent()
    progress.start("residual", len(units))
    for unit, batch, scored in units:
        rows = [row for row in range(len(batch)) if len(scored.teacher_logprobs[row])]
        source = rollouts.commit_record(unit)
        record = scores.commit_record(unit)
        assert source is not None
        assert record is not None
        check_source(scores, record, source)
        if target.commit_record(unit) is None:
            forced = np.array(scores.recipe.settings["forced_ids"], np.int64)
            corrected = _corrected(scored, rows, bias, first, forced)
            table, fidelity = encode_scores(codec, corrected, batch)
            target.commit(
                unit,
                table,
                counts=record.counts,
                source_sha256=source.sha256,
                skipped_rows=record.skipped_rows,
                fidelity=fidelity,
            )
        first += len(rows)
        progress.advance("residual", 1, batch.completion_tokens)
    target.finish()
    return target


def _codec_of(scores: Artifact, rollouts: Artifact) -> Codec:
    """The codec of scores that can be corrected."""
    refuse_aligned(scores, "the residual")
    if is_given(rollouts.recipe):
        raise UserError(
            f"{scores.name} is of given rollouts, which nobody drew; the residual compares teacher "
            "and student at drawn tokens; give it scores of the student's rollouts"
        )
    if "environment" in rollouts.recipe.settings or _has_masks(rollouts):
        raise UserError(
            f"{scores.name} is of trajectories, whose turns of others nobody drew; the residual "
            "compares teacher and student at drawn tokens; give it scores of single answers"
        )
    codec = codec_of(scores.recipe.settings["codec"])
    uncorrectable = {"sampled": "ids drawn from the teacher", "hidden": "hidden states"}
    if (held := uncorrectable.get(codec.kind)) is not None:
        raise UserError(
            f"{scores.name} holds {held}, which cannot be corrected; score with codec exact or "
            "compact"
        )
    return codec


def _has_masks(rollouts: Artifact) -> bool:
    record = rollouts.commit_record(0)
    return record is not None and "loss_mask" in rollouts.read_schema(record).names


def _fit(units: list[tuple[int, RolloutBatch, ScoreBatch]], settings: StyleSettings) -> StyleBias:
    rows = [
        (batch.prompt_id[row], batch.completion_ids[row], batch.behavior_logprobs[row], teacher)
        for _, batch, scored in units
        for row, teacher in enumerate(scored.teacher_logprobs)
        if len(teacher)
    ]
    if not rows:
        raise UserError("no row of the cache has scores; there is nothing to correct")
    prompts, ids, reference, teacher = zip(*rows, strict=True)
    return style_bias(prompts, ids, reference, teacher, settings)


def _corrected(
    scored: ScoreBatch,
    rows: list[int],
    bias: StyleBias,
    first: int,
    forced_F: NDArray[np.int64],
) -> ScoreBatch:
    sampled, top_ids = list(scored.teacher_logprobs), list(scored.teacher_top_ids)
    top, tails = list(scored.teacher_top_logprobs), list(scored.teacher_tail_logprobs)
    forced = list(scored.teacher_forced_logprobs)
    for number, row in enumerate(rows, start=first):
        fold = bias.fold[number]
        sampled[row] = np.minimum(sampled[row] - bias.rows[number], 0).astype(np.float32)
        table, unseen = bias.by_id[fold], bias.unseen[fold]
        of_ids = np.vectorize(lambda i, t=table, u=unseen: t.get(int(i), u), otypes=[float])
        ids, logprobs = top_ids[row], top[row].astype(np.float64)
        moved = np.where(np.isfinite(logprobs), logprobs - of_ids(ids), -np.inf)
        tail = tails[row].astype(np.float64) - unseen
        norm = np.logaddexp(np.logaddexp.reduce(moved, axis=1), tail)
        order = np.argsort(-moved, axis=1, kind="stable")
        top_ids[row] = np.take_along_axis(ids, order, 1)
        top[row] = (np.take_along_axis(moved, order, 1) - norm[:, None]).astype(np.float32)
        tails[row] = (tail - norm).astype(np.float32)
        if len(forced_F):
            is_top = ((ids[:, :, None] == forced_F) & np.isfinite(logprobs)[:, :, None]).any(1)
            shift = np.where(is_top, of_ids(forced_F), unseen) + norm[:, None]
            forced[row] = (forced[row] - shift).astype(np.float32)
    return ScoreBatch(
        teacher_logprobs=tuple(sampled),
        teacher_top_ids=tuple(top_ids),
        teacher_top_logprobs=tuple(top),
        teacher_tail_logprobs=tuple(tails),
        teacher_forced_logprobs=tuple(forced),
        refused=scored.refused,
        candidate_teacher_logprobs=scored.candidate_teacher_logprobs,
    )
