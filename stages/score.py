"""The score stage of one unit: the teacher scores the student's rollouts.

Of an extension only the new tokens are scored; the old scores of its rows are copied from those of
what it continues, as they were stored.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.engines import hidden_engine
from opd_stream.engines.base import (
    CheckedEngine,
    Engine,
    RowScores,
    ScoringSettings,
    score_batch,
)
from opd_stream.errors import UserError
from opd_stream.filters import OTHER_TEACHER, Reason
from opd_stream.store.artifact import Artifact, Commit, DamagedUnit
from opd_stream.store.codecs import SampledCodec, codec_of, encode_scores, scores_batch
from opd_stream.store.codecs.fidelity import StateErrors
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_batch
from opd_stream.types import RolloutBatch, ScoreBatch
from stages.filtering import (
    RolloutFilter,
    chosen_rows,
    decided_rows,
    dropped_counts,
    in_places,
    rows_by_reason,
)
from stages.generate import (
    base_rollouts,
    extension_counts,
    grown_rows,
    new_parts,
    sample_unit,
    token_counts,
)
from stages.prompts import (
    Ids,
    ids_by_name,
    is_rendered,
    prompt_ids_of,
    unit_prompts,
    with_prompts,
)
from stages.workers import Task, TaskResult, Worker

if TYPE_CHECKING:
    from opd_stream.cross_tokenizer.aligner import Aligner
    from opd_stream.store.codecs import StateBasis
    from stages.teacher_states import StateScorer

Scoring = Callable[[RolloutBatch, ScoringSettings], tuple[ScoreBatch, StateErrors | None]]

_COLUMNS = (
    "teacher_logprobs",
    "teacher_top_ids",
    "teacher_top_logprobs",
    "teacher_tail_logprobs",
    "teacher_forced_logprobs",
)
_FILL = {"teacher_top_logprobs": -np.inf}  # of candidates that a row lacks; ids are filled with 0


@dataclass(frozen=True, slots=True)
class _Scored:
    """Scores of a unit, and what making them took."""

    batch: ScoreBatch
    counts: dict[str, float]
    errors: StateErrors | None = None  # of hidden states, where they were rounded
    dropped: dict[int, Reason] = field(default_factory=dict)  # rows that were not read


class ScoreWorker(Worker):
    """The teacher's worker: scores the rollouts of a unit unless they are scored."""

    _aligner: "tuple[str, Aligner] | None" = None  # with the fingerprint of the scores it is for
    _prompts: tuple[tuple[str, ...], dict[str, Ids]] | None = None  # with what they are of
    _scorer: "tuple[str, StateScorer] | None" = None  # with the fingerprint of the scores
    _filter: tuple[Any, RolloutFilter] | None = None  # with its conditions: of all rounds

    def prepare(self, task: Task) -> None:
        if task.scores is None or task.teacher is None or not self.is_asked(task):
            return
        scores = self.artifact(task.teacher_side, task.scores)
        if scores.commit_record(task.unit) is None and "teacher" in scores.recipe.inputs:
            engine = self._open(task, scores.recipe)
            if isinstance(engine, CheckedEngine):
                rollouts = self.artifact("rollouts", task.rollouts).recipe.settings
                own = rollouts.get("student_top_k") or rollouts.get("extra_draws")
                engine.check(_scoring_settings(scores.recipe), own_ids=bool(own))

    def is_asked(self, task: Task) -> bool:
        """Whether the task is for its teacher, where there are several."""
        return task.teacher_name == self.settings.teacher_name

    def _open(self, task: Task, scores: Recipe) -> Engine:
        return self.engine(lambda: self.teacher_folder(task), scores.inputs["teacher"], scores)

    def work(self, result: TaskResult) -> TaskResult:
        task = result.task
        if task.author == "teacher":
            result = sample_unit(self, result, lambda: self.teacher_folder(task))
        if task.scores is None or task.teacher is None or not self.is_asked(task):
            return result
        scores = self.artifact(task.teacher_side, task.scores)
        rollouts = self.artifact("rollouts", task.rollouts)
        source = rollouts.commit_record(task.unit)
        if source is None:
            raise UserError(
                f"unit {task.unit} of {rollouts.name} is not generated yet; "
                "run the generate stage of this round first"
            )
        if task.teacher_side == "hidden":
            from stages.teacher_head import make_head

            opened = partial(self._open, task, scores.recipe)
            make_head(self.store, scores.recipe, opened, task.made_by)
        committed = scores.commit_record(task.unit)
        if committed is not None and committed.source_sha256 == source.sha256:
            return result
        if committed is not None:
            scores.invalidate(task.unit)
        if task.teacher_side == "hidden":
            return self._hidden(result, rollouts, scores, source)
        start, cpu = time.time(), time.process_time()
        batch = rollouts_batch(rollouts.read_unit(task.unit, source))
        codec = codec_of(scores.recipe.settings["codec"])
        scored = self._scored_kept(task, rollouts, scores, batch)
        try:
            table, fidelity = encode_scores(codec, scored.batch, batch, basis=self._basis)
            fidelity = fidelity.model_copy(update=self._errors(scores.recipe, scored))
        except ValueError as error:
            raise UserError(
                f"unit {task.unit} of {scores.name} cannot be stored: {error}; raise "
                "scores.codec.max_error, or use scores.codec={kind: exact}"
            ) from error
        counts = {
            **scored.counts,
            "rows": len(batch),
            "refused_rows": len(scored.batch.refused) - len(scored.dropped),
            **dropped_counts(scored.dropped),
            **student_gap(task, batch, scored.batch),
            "cpu_seconds": round(time.process_time() - cpu, 3),
        }
        end = time.time()
        scores.commit(
            task.unit,
            table,
            counts=counts,
            made_by=task.made_by,
            seconds=end - start,
            source_sha256=source.sha256,
            skipped_rows=_skipped_rows(batch, scored.batch),
            dropped_rows=rows_by_reason(scored.dropped),
            fidelity=fidelity,
        )
        tokens = int(scored.counts["completion_tokens"])
        return replace(result, score_span=(start, end), scored_tokens=tokens)

    def _hidden(
        self, result: TaskResult, rollouts: Artifact, hidden: Artifact, source: Commit
    ) -> TaskResult:
        """The teacher's hidden states on a unit, for distances."""
        from stages.teacher_head import hidden_table

        task, start, cpu = result.task, time.time(), time.process_time()
        engine = hidden_engine(self._open(task, hidden.recipe))
        batch = rollouts_batch(rollouts.read_unit(task.unit, source))
        batch = self._as_read(task, rollouts, hidden.recipe, batch)
        table = hidden_table(engine.hidden(batch))
        counts = {
            **token_counts(batch),
            "rows": len(batch),
            "cpu_seconds": round(time.process_time() - cpu, 3),
        }
        end = time.time()
        hidden.commit(
            task.unit,
            table,
            counts=counts,
            made_by=task.made_by,
            seconds=end - start,
            source_sha256=source.sha256,
        )
        return replace(
            result, score_span=(start, end), scored_tokens=int(counts["completion_tokens"])
        )

    def _dropped(
        self, task: Task, rollouts: Artifact, scores: Recipe, batch: RolloutBatch
    ) -> dict[int, Reason]:
        """Rows that are not scored, and why."""
        read, routed = list(range(len(batch))), scores.inputs.get("prompts")
        if routed is not None and is_rendered(self.store, routed):
            own = self._own_prompts(task, rollouts, routed)
            read = [row for row, name in enumerate(batch.prompt_id) if name in own]
        dropped: dict[int, Reason] = dict.fromkeys({*range(len(batch))} - {*read}, OTHER_TEACHER)
        if "keep" not in scores.settings:
            return dropped
        siblings = [self.artifact("scores", each) for each in task.siblings]
        source = rollouts.commit_record(task.unit) if siblings else None
        known = decided_rows(siblings, scores, task.unit, source)
        dropped |= {row: why for row in read if (why := known.get(row)) is not None}
        read = [row for row in read if row not in known]
        if not read:
            return dropped
        if self._filter is None or self._filter[0] != scores.settings["keep"]:
            opened = RolloutFilter(scores, self.student_folder(task, "texts"))
            self._filter = (scores.settings["keep"], opened)
        prompts = partial(unit_prompts, self.store, rollouts, task.unit)
        found = self._filter[1].dropped(chosen_rows(batch, read), prompts)
        return {**dropped, **{read[place]: reason for place, reason in found.items()}}

    def _scored_kept(
        self, task: Task, rollouts: Artifact, scores: Artifact, batch: RolloutBatch
    ) -> _Scored:
        """The scores of a unit without its dropped rows, in the places of all."""
        if not (dropped := self._dropped(task, rollouts, scores.recipe, batch)):
            return self._scored(task, rollouts, scores, batch)
        rows = [row for row in range(len(batch)) if row not in dropped]
        rest, states = chosen_rows(batch, rows), None
        if rows:
            scored = self._scored(task, rollouts, scores, rest)
        else:
            scored = _Scored(score_batch((), rest), token_counts(rest))
            if "head" in scores.recipe.inputs:
                self._scoring(task, rollouts, scores, self._open(task, scores.recipe))
                states = None if self._scorer is None else self._scorer[1].width
        whole = in_places(scored.batch, rows, dropped, states=states)
        return replace(scored, batch=whole, dropped=dropped)

    def _scored(
        self, task: Task, rollouts: Artifact, scores: Artifact, batch: RolloutBatch
    ) -> _Scored:
        """The scores of a unit: by a teacher with other tokens, of new parts, or of every token."""
        recipe = scores.recipe
        if "teacher" not in recipe.inputs:
            return unscored(batch)
        engine = self._open(task, recipe)
        asked = _scoring_settings(recipe)
        if "alignment" in recipe.settings:
            return self._scored_aligned(engine, asked, rollouts, scores, task, batch)
        batch = self._as_read(task, rollouts, recipe, batch)
        score = self._scoring(task, rollouts, scores, engine)
        if "scores" in recipe.inputs:
            return self._scored_extension(score, asked, rollouts, scores, task, batch)
        scored, errors = score(batch, asked)
        return _Scored(scored, token_counts(batch, without=scored.refused), errors)

    def _errors(self, scores: Recipe, scored: _Scored) -> dict[str, Any]:
        """Of rounded hidden states, and of a served teacher's answers, where one is asked."""
        engine = self._engine if "teacher" in scores.inputs else None
        noise = engine.noise if isinstance(engine, CheckedEngine) else None
        return {"states": scored.errors, "teacher_noise": noise}

    @property
    def _basis(self) -> "StateBasis | None":
        """That of rounded hidden states, where scores have them."""
        return None if self._scorer is None else self._scorer[1].basis

    def _scoring(self, task: Task, rollouts: Artifact, scores: Artifact, engine: Engine) -> Scoring:
        """How rollouts are scored: by the engine, or with hidden states; one scorer serves all."""
        if "head" not in scores.recipe.inputs:
            return lambda batch, asked: (engine.score(batch, asked), None)
        from stages.teacher_states import StateScorer

        if self._scorer is None or self._scorer[0] != scores.fingerprint:
            prompts = scores.recipe.inputs.get("prompts") or rollouts.recipe.inputs["prompts"]
            opened = partial(self._open, task, scores.recipe)
            scorer = StateScorer(self.store, scores.recipe, prompts, opened, task.made_by)
            self._scorer = (scores.fingerprint, scorer)
        return self._scorer[1].score

    def _as_read(
        self, task: Task, rollouts: Artifact, scores: Recipe, batch: RolloutBatch
    ) -> RolloutBatch:
        """Rollouts behind the prompts that the teacher reads: the student's, or its own rendering.

        Completions stay, so that scores align token by token.
        """
        fingerprint = scores.inputs.get("prompts")
        if fingerprint is None:
            return batch
        return with_prompts(batch, self._own_prompts(task, rollouts, fingerprint))

    def _own_prompts(self, task: Task, rollouts: Artifact, fingerprint: str) -> dict[str, Ids]:
        """The prompts that the teacher reads by their names: those of a unit, where it has them.

        Prompts that another tokenizer may have left out are found by name alone, among all.
        """
        by_row = is_rendered(self.store, fingerprint)
        asked = (fingerprint, *((task.rollouts, str(task.unit)) if by_row else ()))
        if self._prompts is None or self._prompts[0] != asked:
            if by_row:
                table = unit_prompts(self.store, rollouts, task.unit, fingerprint)
                self._prompts = (asked, ids_by_name(table))
            else:
                self._prompts = (asked, prompt_ids_of(self.store, fingerprint))
        return self._prompts[1]

    def _scored_aligned(
        self,
        engine: Engine,
        asked: ScoringSettings,
        rollouts: Artifact,
        scores: Artifact,
        task: Task,
        batch: RolloutBatch,
    ) -> _Scored:
        """The scores of a teacher with another tokenizer; the aligner serves all of an artifact."""
        from stages.cross_tokenizer import aligned_counts, open_aligner, score_aligned

        if self._aligner is None or self._aligner[0] != scores.fingerprint:
            folders = {"student": self.student_folder(task), "teacher": self.teacher_folder(task)}
            aligner = open_aligner(self.store, scores.recipe, rollouts.recipe, **folders)
            self._aligner = (scores.fingerprint, aligner)
        own = self._own_prompts(task, rollouts, scores.recipe.inputs["prompts"])
        scored, read = score_aligned(engine, self._aligner[1], batch, asked, own)
        return _Scored(scored, {**token_counts(read), **aligned_counts(batch, scored)})

    def _scored_extension(
        self,
        score: Scoring,
        asked: ScoringSettings,
        rollouts: Artifact,
        scores: Artifact,
        task: Task,
        batch: RolloutBatch,
    ) -> _Scored:
        """The scores of an extended unit: old ones of old tokens, new ones of new tokens."""
        before = base_rollouts(self.store, rollouts.recipe, task.unit)
        before = self._as_read(task, rollouts, scores.recipe, before)
        base = self.artifact("scores", scores.recipe.inputs["scores"])
        rows = grown_rows(before, batch)
        number = rollouts.recipe.settings["extends"][task.unit]
        try:
            old = scores_batch(base.read_unit(number), self._basis)
        except ValueError as error:
            raise DamagedUnit(base, number, str(error)) from error
        old = replace(old, candidate_teacher_logprobs=None)  # an extension keeps no candidates
        counts = extension_counts(before, batch)
        if not rows:
            return _Scored(old, counts)
        new, errors = score(new_parts(before, batch, rows), asked)
        return _Scored(append_scores(old, new, rows), counts, errors)


def unscored(batch: RolloutBatch) -> _Scored:
    """What stands for scores where no teacher is asked: one that is sure of the completion."""
    rows = [
        RowScores(
            asked=np.zeros((len(ids), 1), np.float32),
            top_ids=ids[:, None].astype(np.int32),
            top_logprobs=np.zeros((len(ids), 1), np.float32),
            tail=np.full(len(ids), -np.inf, np.float32),
            forced=np.zeros((len(ids), 0), np.float32),
        )
        for ids in batch.completion_ids
    ]
    return _Scored(score_batch(rows, batch), token_counts(batch, without=range(len(batch))))


def student_gap(task: Task, batch: RolloutBatch, scored: ScoreBatch) -> dict[str, float]:
    """Log-probability of the scored tokens, the student's minus the teacher's, summed (nats).

    By its tokens it is an estimate of the reverse KL to one of several teachers; of one teacher
    training says it, and of another tokenizer's chunks it is not told.
    """
    if scored.chunk_ids is not None or task.teacher_name is None:
        return {}
    rows = [row for row in range(len(batch)) if row not in scored.refused]
    pairs = ((batch.behavior_logprobs[row], scored.teacher_logprobs[row]) for row in rows)
    gaps = (
        np.subtract(own, theirs, dtype=np.float64)[batch.own_tokens(row)].sum()
        for row, (own, theirs) in zip(rows, pairs, strict=True)
    )
    return {"student_gap": float(sum(gaps))}


def append_scores(old: ScoreBatch, new: ScoreBatch, rows: list[int]) -> ScoreBatch:
    """Old scores with new parts at the end of some rows; a refused row stays refused."""
    places = {row: place for place, row in enumerate(rows)}
    refused = {row: new.refused[place] for row, place in places.items() if place in new.refused}
    refused |= old.refused

    def column(name: str) -> tuple[NDArray[Any], ...]:
        parts: list[NDArray[Any]] = []
        for row, part in enumerate(getattr(old, name)):
            if row in refused:
                part = part[:0]
            elif row in places:
                part = _appended(part, getattr(new, name)[places[row]], fill=_FILL.get(name, 0))
            parts.append(part)
        return tuple(parts)

    names = _COLUMNS if old.teacher_states is None else (*_COLUMNS, "teacher_states")
    return replace(old, **{name: column(name) for name in names}, refused=refused)


def _appended(old: NDArray[Any], new: NDArray[Any], *, fill: float) -> NDArray[Any]:
    """One after the other; the one with fewer candidates is filled up."""
    if old.ndim == 2 and old.shape[1] != new.shape[1]:
        width = max(old.shape[1], new.shape[1])
        old, new = (
            np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill)
            for part in (old, new)
        )
    return np.concatenate([old, new])


def _scoring_settings(scores: Recipe) -> ScoringSettings:
    """What a recipe of scores asks an engine for."""
    settings, codec = scores.settings, codec_of(scores.settings["codec"])
    return ScoringSettings(
        top_k=settings["top_k"],
        forced_ids=tuple(settings["forced_ids"]),
        draws=codec.draws if isinstance(codec, SampledCodec) else 0,
        seed=settings["seed"],
        vocabulary=settings.get("vocabulary"),
    )


def _skipped_rows(batch: RolloutBatch, scored: ScoreBatch) -> list[int]:
    """Rows that no token of may train."""
    return [row for row in range(len(batch)) if not _trains(batch, scored, row)]


def _trains(batch: RolloutBatch, scored: ScoreBatch, row: int) -> bool:
    """Whether a row has a token that may train."""
    if row in scored.refused:
        return False
    mask = batch.own_tokens(row)
    if scored.chunk_ids is not None:
        mask = mask & (scored.chunk_ids[row] >= 0)
    return bool(mask.any())
