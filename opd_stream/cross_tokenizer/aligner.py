"""Scores that a teacher gave its own tokens, as scores of the student's tokens.

Shapes: T tokens of the student, N positions, K candidates, F forced ids of the student, J ids that
the teacher was asked for, V ids of the teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_stream.cross_tokenizer.alignment import Alignment, align, matching_ids
from opd_stream.cross_tokenizer.byte_tokenizer import ByteTokenizer
from opd_stream.engines.base import Ids, RowScores
from opd_stream.types import RolloutBatch, ScoreBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherReading:
    """Rollouts as the teacher reads them."""

    batch: RolloutBatch  # its prompts, its tokens, one of its terminators where the student stopped
    rows: tuple[int, ...]  # of the student's rollouts; the others stand in `refused`
    alignments: tuple[Alignment, ...]
    refused: dict[int, str]  # row of the student's rollouts -> reason


class Aligner:
    """A student's and a teacher's tokenizer, for the scores of one cache."""

    def __init__(
        self,
        student: ByteTokenizer,
        teacher: ByteTokenizer,
        *,
        vocab_size: int,
        student_vocabulary: int,
        student_stops: Sequence[int],
        teacher_stops: Sequence[int],
        max_chunk_tokens: int,
    ) -> None:
        """Prepare for a teacher of `vocab_size` logits.

        Ids from `student_vocabulary` on are none of the student's.
        """
        self._student, self.teacher = student, teacher
        self._student_stops, self._teacher_stops = tuple(student_stops), tuple(teacher_stops)
        self._max_chunk_tokens = max_chunk_tokens
        self._matches_V = matching_ids(
            student,
            teacher,
            vocab_size=vocab_size,
            student_stops=student_stops,
            teacher_stops=teacher_stops,
        )
        self._matches_V[self._matches_V >= student_vocabulary] = -1

    def asked_ids(self, forced_ids: Sequence[int]) -> tuple[int, ...]:
        """The teacher's ids that stand for some of the student's."""
        wanted = np.flatnonzero(np.isin(self._matches_V, list(forced_ids)))
        return tuple(wanted.tolist())

    def read(self, rollouts: RolloutBatch, prompts: Mapping[str, Ids]) -> TeacherReading:
        """The rollouts in the teacher's tokens, as `prompts` are, by id."""
        rows: list[int] = []
        alignments: list[Alignment] = []
        completions: list[NDArray[np.int64]] = []
        refused: dict[int, str] = {}
        for row, ids in enumerate(rollouts.completion_ids):
            stops = self._stops(ids)
            aligned = align(
                self._student,
                self.teacher,
                ids[: len(ids) - stops],
                student_ids_V=self._matches_V,
                max_chunk_tokens=self._max_chunk_tokens,
                is_cut=not stops,
            )
            read = np.concatenate([aligned.teacher_ids, self._teacher_stops[:1] * stops])
            if rollouts.prompt_id[row] not in prompts:
                refused[row] = "its prompt is too long in the teacher's tokens"
            elif not len(read):
                refused[row] = "the teacher's tokenizer reads nothing in it"
            else:
                rows.append(row)
                alignments.append(aligned)
                completions.append(read.astype(np.int64))
        batch = RolloutBatch(
            prompt_id=tuple(rollouts.prompt_id[row] for row in rows),
            sample_index=rollouts.sample_index[rows],
            prompt_ids=tuple(prompts[rollouts.prompt_id[row]] for row in rows),
            completion_ids=tuple(completions),
            behavior_logprobs=tuple(np.zeros(len(ids), np.float32) for ids in completions),
            finish_reason=tuple(rollouts.finish_reason[row] for row in rows),
        )
        return TeacherReading(
            batch=batch, rows=tuple(rows), alignments=tuple(alignments), refused=refused
        )

    def scores(
        self,
        rollouts: RolloutBatch,
        reading: TeacherReading,
        scored: ScoreBatch,
        forced_ids: Sequence[int],
    ) -> ScoreBatch:
        """The teacher's scores of `reading.batch` as scores of the rollouts.

        `scored` was asked for `asked_ids(forced_ids)`. Where the student's token is not one of the
        teacher's, a position has no candidates, everything in its tail, and forced ids of -inf.
        """
        asked = self.asked_ids(forced_ids)
        width = scored.teacher_top_ids[0].shape[1] if reading.rows else 0
        places = {row: place for place, row in enumerate(reading.rows)}
        refused = {reading.rows[place]: reason for place, reason in scored.refused.items()}
        refused |= reading.refused
        rows: list[_Row] = []
        for row, ids in enumerate(rollouts.completion_ids):
            if row in refused:
                rows.append(_empty_row(0, width, len(forced_ids)))
                continue
            place = places[row]
            teacher = RowScores(
                asked=scored.teacher_logprobs[place][:, None],
                top_ids=scored.teacher_top_ids[place].astype(np.int32),
                top_logprobs=scored.teacher_top_logprobs[place],
                tail=scored.teacher_tail_logprobs[place],
                forced=self._forced(scored.teacher_forced_logprobs[place], asked, forced_ids),
            )
            rows.append(self._row(ids, reading.alignments[place], teacher, forced_ids))
        return ScoreBatch(
            teacher_logprobs=tuple(row.logprobs.astype(np.float32) for row in rows),
            teacher_top_ids=tuple(row.top_ids for row in rows),
            teacher_top_logprobs=tuple(row.top_logprobs for row in rows),
            teacher_tail_logprobs=tuple(row.tail for row in rows),
            teacher_forced_logprobs=tuple(row.forced for row in rows),
            refused=refused,
            chunk_ids=tuple(row.chunk_ids for row in rows),
            same_tokens=tuple(row.same_tokens for row in rows),
        )

    def _stops(self, ids: Ids) -> int:
        """Terminators at the end of a completion: 0 or 1."""
        return int(len(ids) > 0 and int(ids[-1]) in self._student_stops)

    def _row(
        self, ids: Ids, alignment: Alignment, teacher: RowScores, forced_ids: Sequence[int]
    ) -> "_Row":
        """The scores of the student's tokens, from those of the teacher's."""
        row = _empty_row(len(ids), teacher.top_ids.shape[1], len(forced_ids))
        stops, read = self._stops(ids), len(alignment.teacher_ids)
        text = len(ids) - stops
        source = np.full(len(ids), -1, np.int64)  # place among the teacher's tokens
        source[:text] = alignment.same
        row.logprobs[:text] = alignment.shares(teacher.asked[:read, 0].astype(np.float64))
        trains = np.append(alignment.trains, False)[alignment.student_chunk]
        row.chunk_ids[:text] = np.where(trains, alignment.student_chunk, -1)
        if stops:
            columns = [n for n, each in enumerate(forced_ids) if each in self._student_stops]
            source[-1] = read
            row.logprobs[-1] = np.logaddexp.reduce(teacher.forced[read, columns])
            row.chunk_ids[-1] = len(alignment.trains)
        row.same_tokens[:] = (source >= 0) & (row.chunk_ids >= 0)
        places, teachers = np.flatnonzero(row.same_tokens), source[row.same_tokens]
        row.forced[places] = teacher.forced[teachers]
        row.top_ids[places], row.top_logprobs[places], row.tail[places] = self._candidates(
            teacher.top_ids[teachers],
            teacher.top_logprobs[teachers],
            teacher.tail[teachers],
            teacher.forced[teachers],
            forced_ids,
        )
        return row

    def _forced(
        self, teacher_NJ: NDArray[np.float32], asked: Sequence[int], forced_ids: Sequence[int]
    ) -> NDArray[np.float32]:
        """Log-probability of the student's forced ids [N, F]; -inf: the teacher has none."""
        forced_NF = np.full((len(teacher_NJ), len(forced_ids)), -np.inf, np.float32)
        for column, each in enumerate(forced_ids):
            places = np.flatnonzero(self._matches_V[list(asked)] == each)
            if len(places):
                forced_NF[:, column] = np.logaddexp.reduce(teacher_NJ[:, places], axis=1)
        return forced_NF

    def _candidates(
        self,
        ids_NK: Ids,
        logprobs_NK: NDArray[np.float32],
        tail_N: NDArray[np.float32],
        forced_NF: NDArray[np.float32],
        forced_ids: Sequence[int],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """The teacher's candidates as the student's, in rank order, and what is outside them."""
        own_NK = self._matches_V[ids_NK]
        values_NK, tail = logprobs_NK.astype(np.float64), tail_N.astype(np.float64)
        lost_N = np.where(own_NK < 0, np.exp(values_NK), 0.0).sum(1)
        _merge_equal(own_NK, values_NK)
        values_NK[own_NK < 0] = -np.inf
        for column, each in enumerate(forced_ids):
            if each in self._student_stops and (self._matches_V == each).sum() > 1:
                rows, columns = np.nonzero(own_NK == each)  # also those outside the teacher's K
                event = forced_NF[rows, column].astype(np.float64)
                np.add.at(lost_N, rows, np.exp(values_NK[rows, columns]) - np.exp(event))
                values_NK[rows, columns] = event
        with np.errstate(divide="ignore"):
            moved = np.log(np.maximum(np.exp(tail) + lost_N, 0.0))
        order = np.argsort(-values_NK, axis=1, kind="stable")
        values_NK = np.take_along_axis(values_NK, order, axis=1)
        ids = np.where(values_NK > -np.inf, np.take_along_axis(own_NK, order, axis=1), 0)
        tail = np.where(lost_N == 0, tail, np.minimum(moved, 0.0))
        return ids, values_NK.astype(np.float32), tail.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """The scores of the student's tokens in one row, filled in place."""

    logprobs: NDArray[np.float64]  # [T]
    top_ids: Ids  # [T, K]
    top_logprobs: NDArray[np.float32]  # [T, K]
    tail: NDArray[np.float32]  # [T]
    forced: NDArray[np.float32]  # [T, F], of the student's forced ids
    chunk_ids: NDArray[np.int32]  # [T]
    same_tokens: NDArray[np.bool_]  # [T]


def _empty_row(tokens: int, top_k: int, forced: int) -> _Row:
    """A row where the teacher has no candidate: everything is in the tail."""
    return _Row(
        logprobs=np.zeros(tokens, np.float64),
        top_ids=np.zeros((tokens, top_k), np.int64),
        top_logprobs=np.full((tokens, top_k), -np.inf, np.float32),
        tail=np.zeros(tokens, np.float32),
        forced=np.full((tokens, forced), -np.inf, np.float32),
        chunk_ids=np.full(tokens, -1, np.int32),
        same_tokens=np.zeros(tokens, np.bool_),
    )


def _merge_equal(ids_NK: NDArray[np.int64], logprobs_NK: NDArray[np.float64]) -> None:
    """Add candidates of the same id to the first of them, in place; the others become -1."""
    in_order = np.sort(ids_NK, axis=1)
    twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(1)
    for row in np.flatnonzero(twice):
        seen: dict[int, int] = {}
        for place, each in enumerate(ids_NK[row].tolist()):
            first = seen.setdefault(each, place)
            if each >= 0 and first != place:
                pair = logprobs_NK[row, [first, place]]
                logprobs_NK[row, first] = np.logaddexp.reduce(pair)
                ids_NK[row, place] = -1
