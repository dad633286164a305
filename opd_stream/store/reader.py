"""Scored rollouts as one sequence of rows, read from any number of caches.

    rows = open_scores("store/scores/3f0c5d…")
    rows[17].teacher_top_ids
    for row in rows.epoch(seed=0, epoch=2, start=1_000): ...

Rows stand in the order of the caches and, inside one, of its prompts, whatever the size of its
units. A row is read with the 64 rows of its record batch, verified, and the latest batches are kept
decoded up to a bound, so memory does not grow with the cache.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, Commit, DamagedUnit, check_source
from opd_stream.store.codecs import ScoreBlock, StateBasis, StoredStates, checked_scores
from opd_stream.store.codecs.columns import is_among, lengths_of
from opd_stream.store.codecs.hidden import basis_of
from opd_stream.store.codecs.laws import BrokenLaw
from opd_stream.store.recipe import RecipeRecord
from opd_stream.store.sealed import load_record
from opd_stream.store.shards import ROWS_PER_PART, checked_rollouts
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch

MEMORY_BYTES = 256 * 2**20
ROWS_AHEAD = 128  # of an epoch, read while the caller works


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """One rollout and the teacher's view of it.

    Shapes: P prompt tokens, T completion tokens, K teacher candidates, F forced ids, M candidates
    of the student; log-probabilities in nats over the full vocabulary. A position with fewer than K
    candidates is filled with id 0 and log-probability -inf.
    """

    prompt_id: str
    sample_index: int
    prompt_ids: NDArray[np.integer[Any]]  # [P]
    completion_ids: NDArray[np.integer[Any]]  # [T]
    behavior_logprobs: NDArray[np.float32]  # [T]
    loss_mask: NDArray[np.bool_] | None  # [T], None: every token may train
    finish_reason: str
    teacher_logprobs: NDArray[np.float32]  # [T]
    teacher_top_ids: NDArray[np.uint32]  # [T, K]
    teacher_top_logprobs: NDArray[np.float32]  # [T, K]
    teacher_tail_logprobs: NDArray[np.float32]  # [T]
    teacher_forced_logprobs: NDArray[np.float32]  # [T, F]
    candidate_ids: NDArray[np.integer[Any]] | None  # [T, M]
    candidate_behavior_logprobs: NDArray[np.float32] | None  # [T, M]
    candidate_teacher_logprobs: NDArray[np.float32] | None  # [T, M]
    terminators: tuple[tuple[int, ...], tuple[int, ...]]  # ids, and their columns in F
    cache: int  # which of the caches the row comes from
    chunk_ids: NDArray[np.int32] | None = None  # [T], of a teacher with another tokenizer; -1: none
    same_tokens: NDArray[np.bool_] | None = None  # [T], where that teacher has the same token
    student_top_ids: NDArray[np.integer[Any]] | None = None  # [T, S], all among the K
    teacher_states: StoredStates | None = None  # of T tokens, of codec hidden
    forced_in_tail: bool = False  # forced ids of -inf were not asked for, and are in the tail

    def first_candidates(self, top_k: int) -> "ScoredRow":
        """The row as a smaller K of the teacher would have given it: the rest joins the tail.

        The student's own ids stay.
        """
        ids, logprobs = self.teacher_top_ids, self.teacher_top_logprobs
        if self.student_top_ids is not None:
            is_kept = is_among(ids, self.student_top_ids)
            is_kept[:, :top_k] = True
            order = np.argsort(~is_kept, axis=1, kind="stable")
            ids, logprobs = (np.take_along_axis(each, order, axis=1) for each in (ids, logprobs))
            is_kept = np.take_along_axis(is_kept, order, axis=1) & (logprobs > -np.inf)
            rest = np.exp(np.where(is_kept, -np.inf, logprobs), dtype=np.float64).sum(1)
            widest = int(is_kept.sum(1).max(initial=0))
            logprobs = np.where(is_kept, logprobs, -np.inf)[:, :widest]
            ids = np.where(is_kept, ids, 0)[:, :widest]
        else:
            rest = np.exp(logprobs[:, top_k:], dtype=np.float64).sum(1)
            ids, logprobs = ids[:, :top_k], logprobs[:, :top_k]
        with np.errstate(divide="ignore"):
            tail = np.log(np.exp(self.teacher_tail_logprobs, dtype=np.float64) + rest)
        return replace(
            self,
            teacher_top_ids=ids,
            teacher_top_logprobs=logprobs,
            teacher_tail_logprobs=tail.astype(np.float32),
        )

    def same_tokens_only(self) -> "ScoredRow":
        """The row with only those tokens training that have candidates of the teacher."""
        if self.same_tokens is None:
            return self
        mask = self.same_tokens if self.loss_mask is None else self.loss_mask & self.same_tokens
        return replace(self, loss_mask=mask)


@dataclass(frozen=True, slots=True)
class _Part:
    """The decoded record batches of 64 rows: the rollouts' and the scores'."""

    rollouts: RolloutBatch
    scores: ScoreBlock
    bytes: int


def open_cache(location: str | Path) -> tuple[Artifact, Artifact]:
    """(rollouts, scores) of a complete scores artifact; the location is as in `open_scores`.

    Raises:
        UserError: there is no complete scores artifact.
    """
    parts = str(location).rstrip("/").rsplit("/", 2)
    if len(parts) < 2 or parts[-2] != "scores":
        raise UserError(
            f"{location} is no scores artifact; expected STORE/scores/FINGERPRINT; "
            "`opd-stream cache ls STORE` lists them"
        )
    store, fingerprint = Store(parts[0] if len(parts) == 3 else "."), parts[-1]
    scores = store.by_fingerprint("scores", fingerprint)
    return store.scored_rollouts(scores), scores


def open_scores(location: str | Path, *, memory_bytes: int = MEMORY_BYTES) -> "ScoredRows":
    """The rows of one scores artifact: `STORE/scores/FINGERPRINT`, a folder or an object store.

    Raises:
        UserError: there is no complete scores artifact.
    """
    return ScoredRows([open_cache(location)], memory_bytes=memory_bytes)


class ScoredRows:
    """Random access to the trainable rows of (rollouts, scores) pairs; every read is verified.

    Rows without a trainable token, and rows the teacher refused, are left out.

    Example:
        >>> rows = ScoredRows([(rollouts, scores)])
        >>> rows[17].teacher_top_ids.shape
        (151, 16)
    """

    def __init__(
        self,
        caches: list[tuple[Artifact, Artifact]],
        *,
        units: Sequence[Sequence[int] | None] = (),
        memory_bytes: int = MEMORY_BYTES,
        vocabulary: int | None = None,
    ) -> None:
        """Open caches; `units` names those that are read of each, None or nothing: all.

        Ids are below `vocabulary`; None: it is not known.
        """
        self._caches, self._memory_bytes = caches, memory_bytes
        self._vocabulary = vocabulary
        self._commits: list[tuple[dict[int, Commit], dict[int, Commit]]] = []
        self._schemas: dict[tuple[int, int], tuple[pa.Schema, pa.Schema]] = {}
        self._decoded: OrderedDict[tuple[int, int, int], _Part] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()
        index: list[NDArray[np.int64]] = [np.zeros((0, 3), np.int64)]
        for cache, (rollouts, scores) in enumerate(caches):
            self._commits.append((rollouts.commits(), scores.commits()))
            chosen = units[cache] if units else None
            for unit in scores.units() if chosen is None else chosen:
                index.append(self._trainable(cache, unit))
        self._index = np.concatenate(index)  # cache, unit, row of the unit
        self._terminators = [_terminators(rollouts, scores) for rollouts, scores in caches]
        self._forced_in_tail = [s.recipe.settings.get("forced") == "tail" for _, s in caches]
        self._bases = [state_basis(scores) for _, scores in caches]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> ScoredRow:
        cache, unit, row = (int(value) for value in self._index[position])
        part = self._part((cache, unit, row // ROWS_PER_PART))
        row %= ROWS_PER_PART
        rollouts, scores = part.rollouts, part.scores
        tokens = slice(int(scores.offsets[row]), int(scores.offsets[row + 1]))
        chunk_ids = _row_of(scores.chunk_ids, tokens)
        return ScoredRow(
            prompt_id=rollouts.prompt_id[row],
            sample_index=int(rollouts.sample_index[row]),
            prompt_ids=rollouts.prompt_ids[row],
            completion_ids=rollouts.completion_ids[row],
            behavior_logprobs=rollouts.behavior_logprobs[row],
            loss_mask=_mask(_row_of(rollouts.loss_mask, row), chunk_ids),
            finish_reason=rollouts.finish_reason[row],
            teacher_logprobs=scores.teacher_logprobs[tokens],
            teacher_top_ids=scores.teacher_top_ids[tokens],
            teacher_top_logprobs=scores.teacher_top_logprobs[tokens],
            teacher_tail_logprobs=scores.teacher_tail_logprobs[tokens],
            teacher_forced_logprobs=scores.teacher_forced_logprobs[tokens],
            candidate_ids=_row_of(rollouts.candidate_ids, row),
            candidate_behavior_logprobs=_row_of(rollouts.candidate_behavior_logprobs, row),
            candidate_teacher_logprobs=_row_of(scores.candidate_teacher_logprobs, tokens),
            terminators=self._terminators[cache],
            cache=cache,
            chunk_ids=chunk_ids,
            same_tokens=_row_of(scores.same_tokens, tokens),
            student_top_ids=_row_of(rollouts.student_top_ids, row),
            teacher_states=_row_of(scores.teacher_states, row),
            forced_in_tail=self._forced_in_tail[cache],
        )

    def sampled(self, cache: int, unit: int) -> Commit:
        """The commit record of the rollouts of a unit, as it was when the caches were opened."""
        return self._commits[cache][0][unit]

    def positions_by_unit(self) -> dict[tuple[int, int], list[int]]:
        """Positions of the rows of each (cache, unit)."""
        found: dict[tuple[int, int], list[int]] = {}
        for position, (cache, unit, _) in enumerate(self._index.tolist()):
            found.setdefault((cache, unit), []).append(position)
        return found

    def epoch(
        self, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[ScoredRow]:
        """The rows of an epoch from position `start` on, read ahead.

        The order is one for all ranks; each takes every `world_size`-th row of what is left, so a
        stopped epoch can go on with another number of ranks from the sum of what they have done.
        """
        order = epoch_order(len(self), (seed, epoch))
        yield from self.ahead(order[start + rank :: world_size].tolist())

    def ahead(self, positions: Sequence[int]) -> Iterator[ScoredRow]:
        """Rows in a given order; the next ones are read while the caller works."""
        with ThreadPoolExecutor(1, "read-ahead") as reader:
            coming: dict[int, Future[ScoredRow]] = {}
            try:
                for number in range(len(positions)):
                    if number % ROWS_AHEAD == 0:
                        last = number + 2 * ROWS_AHEAD
                        for next_number in range(number, min(last, len(positions))):
                            if next_number not in coming:
                                coming[next_number] = reader.submit(
                                    self.__getitem__, positions[next_number]
                                )
                    yield coming.pop(number).result()
            finally:
                for future in coming.values():
                    future.cancel()

    def _trainable(self, cache: int, unit: int) -> NDArray[np.int64]:
        """Index rows of a unit."""
        (rollouts, scores), (sources, commits) = self._caches[cache], self._commits[cache]
        commit, source = commits.get(unit), sources.get(unit)
        if commit is None or source is None:
            artifact = scores if commit is None else rollouts
            raise DamagedUnit(artifact, unit, "its commit record is missing")
        check_source(scores, commit, source)
        rows = np.setdiff1d(np.arange(int(commit.counts["rows"])), np.array(commit.skipped_rows))
        filled = np.empty((len(rows), 3), np.int64)
        filled[:, 0], filled[:, 1], filled[:, 2] = cache, unit, rows
        return filled

    def _part(self, key: tuple[int, int, int]) -> _Part:
        with self._lock:
            if key in self._decoded:
                self._decoded.move_to_end(key)
                return self._decoded[key]
        part = self._read(*key)
        with self._lock:
            if key not in self._decoded:
                self._decoded[key] = part
                self._held_bytes += part.bytes
            while self._held_bytes > self._memory_bytes and len(self._decoded) > 1:
                self._held_bytes -= self._decoded.popitem(last=False)[1].bytes
        return part

    def _read(self, cache: int, unit: int, number: int) -> _Part:
        rollouts, scores = self._caches[cache]
        source, commit = (commits[unit] for commits in self._commits[cache])
        if (cache, unit) not in self._schemas:
            self._schemas[cache, unit] = (rollouts.read_schema(source), scores.read_schema(commit))
        schemas = self._schemas[cache, unit]
        artifact = rollouts
        try:
            texts = pa.Table.from_batches([rollouts.read_part(source, number, schemas[0])])
            batch = checked_rollouts(texts, vocabulary=self._vocabulary)
            artifact = scores
            block = checked_scores(
                scores.read_part(commit, number, schemas[1]),
                lengths_of(batch.completion_ids),
                self._bases[cache],
                vocabulary=self._vocabulary,
            )
        except UserError:
            raise
        except BrokenLaw as error:
            raise DamagedUnit(artifact, unit, error.at(number * ROWS_PER_PART)) from error
        except ValueError as error:
            raise DamagedUnit(artifact, unit, str(error)) from error
        return _Part(batch, block, _bytes_of(batch) + _bytes_of(block))


def broken_law(store: Store, artifact: Artifact, unit: int) -> str | None:
    """What no reader takes of a committed unit of rollouts or scores, or None.

    Raises:
        DamagedUnit: its bytes, or those of its rollouts, are not the committed ones.
        UserError: the store lacks what it was made from.
    """
    table, rows = artifact.read_unit(unit), 0
    try:
        if artifact.recipe.kind == "rollouts":
            checked_rollouts(table)
            return None
        fingerprint = artifact.recipe.inputs["rollouts"]
        texts = store.by_fingerprint("rollouts", fingerprint).read_unit(unit)
        tokens_R = lengths_of(checked_rollouts(texts).completion_ids)
        basis = state_basis(artifact)
        for batch in table.to_batches():
            checked_scores(batch, tokens_R[rows : rows + batch.num_rows], basis)
            rows += batch.num_rows
        return None if rows == len(tokens_R) else f"{rows} rows; expected {len(tokens_R)}"
    except BrokenLaw as error:
        return error.at(rows)


def state_basis(scores: Artifact) -> StateBasis | None:
    """The basis of the hidden states that scores hold rounded; None: they hold none.

    Raises:
        UserError: the store does not have it.
    """
    fingerprint = scores.recipe.inputs.get("basis")
    if fingerprint is None:
        return None
    root = scores.folder.parent.parent
    path = root / "bases" / fingerprint[:16] / "recipe.json"
    if not path.exists():
        raise UserError(
            f"{scores.name} needs bases/{fingerprint[:16]}, which the store does not have; restore "
            "it, or score again"
        )
    return basis_of(Artifact(root, load_record(RecipeRecord, path).recipe).read_unit(0))


def _terminators(rollouts: Artifact, scores: Artifact) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Terminators of the rollouts that the teacher was asked for, and their forced columns."""
    stops = set(rollouts.recipe.settings.get("stop_ids", ()))
    forced = scores.recipe.settings.get("forced_ids", ())
    found = [(token, place) for place, token in enumerate(forced) if token in stops]
    return tuple(token for token, _ in found), tuple(place for _, place in found)


def _mask(
    mask: NDArray[np.bool_] | None, chunk_ids: NDArray[np.int32] | None
) -> NDArray[np.bool_] | None:
    """Tokens that may train: those of the rollouts, and of them those in a chunk that trains."""
    if chunk_ids is None:
        return mask
    return chunk_ids >= 0 if mask is None else mask & (chunk_ids >= 0)


def _row_of(column: Any, row: int | slice) -> Any:
    return None if column is None else column[row]


def _bytes_of(batch: RolloutBatch | ScoreBlock) -> int:
    """Bytes of the arrays in a batch or block, each underlying array once."""
    bases: dict[int, int] = {}
    for field in fields(batch):
        value: Any = getattr(batch, field.name)
        for item in cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,):
            if isinstance(item, StoredStates):
                bases[id(item)] = item.nbytes
            if isinstance(item, np.ndarray):
                array = cast(NDArray[Any], item)
                base: Any = array if array.base is None else array.base
                bases[id(base)] = getattr(base, "nbytes", None) or array.nbytes
    return sum(bases.values())


BLOCK_ROWS = 64
WINDOW_ROWS = 512


def epoch_order(
    rows: int, key: Sequence[int], *, window_rows: int = WINDOW_ROWS
) -> NDArray[np.int64]:
    """Row numbers of an epoch [rows]; `key` is (seed, ..., epoch)."""
    random = np.random.default_rng(list(key))
    if rows <= window_rows:
        return random.permutation(rows)
    order = np.empty(rows, np.int64)
    blocks = random.permutation(-(-rows // BLOCK_ROWS))
    done = 0
    for start in range(0, len(blocks), window_rows // BLOCK_ROWS):
        window = blocks[start : start + window_rows // BLOCK_ROWS, None] * BLOCK_ROWS
        chosen = (window + np.arange(BLOCK_ROWS)).reshape(-1)
        chosen = random.permutation(chosen[chosen < rows])
        order[done : done + len(chosen)] = chosen
        done += len(chosen)
    return order
