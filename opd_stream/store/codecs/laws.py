"""What the columns of a shard and the values in them have to be, whoever wrote them.

A digest says that bytes are those that were written, not that they are right. The columns are
declared beside the code that writes them (`COLUMNS` of shards.py and of each codec); the values of
decoded rows obey one set of laws. Imported rows, units that are read for the first time and `cache
verify --deep` go through the same two functions. Shapes as in `ScoreBlock`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.store.codecs.columns import flat, lengths_of, offsets_of, row_offsets
from opd_stream.types import RolloutBatch

if TYPE_CHECKING:
    from opd_stream.store.codecs.columns import ScoreBlock

MOST_CANDIDATES = 2048  # of a token: 1,024 of the teacher and as many of the student
TOLERANCE = 0.01  # of a log-probability above 0, nats: rounding
MASS_TOLERANCE = 0.05  # of a mass away from 1: what codec compact keeps, exported and imported too
AGREEMENT = 0.25  # between two log-probabilities of one token in one row, nats: rounding
LARGEST_SHARE, SMALLEST_BOUND = 256, 2**28  # bytes that compressed ones may become

Entries = Literal["value", "tokens", "multiple", "any"]


class BrokenLaw(ValueError):
    """A value that no row of a cache may have."""

    def __init__(self, row: int | None, text: str) -> None:
        super().__init__(text if row is None else f"row {row}: {text}")
        self.row, self.text = row, text

    def at(self, first: int) -> str:
        """The line, with the row counted from that of a whole unit."""
        return self.text if self.row is None else f"row {first + self.row}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The type of a column, and how many entries its lists have.

    Example:
        >>> Column(types=("uint16",), entries="tokens", most=MOST_CANDIDATES)
    """

    types: tuple[str, ...]  # of an entry, as Arrow writes them
    entries: Entries | str = "tokens"  # or the column whose values say how many a token has
    is_matrix: bool = False  # a list of K for each entry
    is_planes: bool = False  # columns NAME_0, NAME_1, ... of bytes
    is_optional: bool = False
    is_nullable: bool = False
    most: int | None = None  # largest value


Columns = Mapping[str, Column]


def check_expansion(stored: int, claimed: int, what: str) -> None:
    """Refuse bytes that claim to become many more; nothing has been expanded yet.

    Raises:
        BrokenLaw: says both numbers.
    """
    most = SMALLEST_BOUND + LARGEST_SHARE * stored
    if not 0 <= claimed <= most:
        raise BrokenLaw(
            None,
            f"{what} of {stored:,} bytes claims to hold {claimed:,}; expected at most {most:,}",
        )


def check_columns(batch: pa.RecordBatch, columns: Columns, tokens_R: NDArray[np.int64]) -> None:
    """Refuse a record batch without these columns; `tokens_R` are the tokens of each row.

    Raises:
        BrokenLaw: names the column, and the row where it is one row's.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:160]
        raise BrokenLaw(None, f"the record batch is not valid ({reason})") from error
    if batch.num_rows != len(tokens_R):
        raise BrokenLaw(None, f"{batch.num_rows} rows; expected {len(tokens_R)}")
    for name, column in columns.items():
        for part in _parts(batch, name, column):
            _check_column(batch, part, column, tokens_R)


def row_lengths(column: pa.Array) -> NDArray[np.int64]:
    """Entries of each row of a list column [R]."""
    return np.diff(row_offsets(column))


def _parts(batch: pa.RecordBatch, name: str, column: Column) -> list[str]:
    """The columns of a name."""
    wanted = [f"{name}_{plane}" for plane in range(4)] if column.is_planes else [name]
    found = [each for each in wanted if each in batch.schema.names]
    if found != wanted[: max(len(found), 0 if column.is_optional else 1)]:
        missing = next(each for each in wanted if each not in found)
        raise BrokenLaw(None, f"there is no column {missing}")
    return found


def _check_column(
    batch: pa.RecordBatch, name: str, column: Column, tokens_R: NDArray[np.int64]
) -> None:
    found = batch.column(name)
    inner, depth = found.type, 0
    while pa.types.is_list(inner) or pa.types.is_fixed_size_list(inner):
        inner, depth = inner.value_type, depth + 1
    wanted = 0 if column.entries == "value" else 1 + column.is_matrix
    if str(inner) not in column.types or depth != wanted:
        kinds = "list of " * wanted + " or ".join(column.types)
        raise BrokenLaw(None, f"column {name} is {found.type}; expected {kinds}")
    items = found.flatten() if wanted else found
    values = items.flatten() if column.is_matrix else items
    if not column.is_nullable and (found.null_count or items.null_count or values.null_count):
        nulls = np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))
        raise BrokenLaw(int(nulls[0]) if len(nulls) else None, f"{name} is null")
    if column.entries in ("value", "any"):
        return
    lengths_R = row_lengths(found)
    wanted_R = _entries(batch, column.entries, tokens_R, lengths_R)
    wrong = np.flatnonzero(lengths_R != wanted_R)
    if len(wrong):
        row = int(wrong[0])
        raise BrokenLaw(
            row, f"{name} has {lengths_R[row]} entries; expected {wanted_R[row]}, by its tokens"
        )
    if column.most is not None and len(values):
        numbers = values.to_numpy(zero_copy_only=False)
        beyond = np.flatnonzero(numbers > column.most)
        if len(beyond):
            row = _row(row_offsets(found), int(beyond[0]))
            raise BrokenLaw(row, f"{name} is {numbers[beyond[0]]}; expected at most {column.most}")


def _entries(
    batch: pa.RecordBatch, entries: str, tokens_R: NDArray[np.int64], lengths_R: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Entries that each row of a column has."""
    if entries == "tokens":
        return tokens_R
    if entries == "multiple":
        return tokens_R * (int(lengths_R.sum()) // max(1, int(tokens_R.sum())))
    counts = batch.column(entries)
    sums = np.append(0, np.cumsum(counts.flatten().to_numpy(zero_copy_only=False).astype(np.int64)))
    return np.diff(sums[row_offsets(counts)])


@dataclass(frozen=True, slots=True)
class _Values:
    """Values of all rows behind one another, and which of them break the law."""

    column: str
    values: NDArray[Any]  # [E] or [N, K]
    is_wrong: NDArray[np.bool_]  # the same shape, or [N]
    offsets: NDArray[np.int64]  # [R + 1]
    expected: str


def check_rollouts(batch: RolloutBatch, *, vocabulary: int | None = None) -> None:
    """Refuse rollouts with ids that are none, or log-probabilities that are none.

    Raises:
        BrokenLaw: names row, column and value.
    """
    for row, reason in enumerate(batch.finish_reason):
        if reason not in ("stop", "length"):
            raise BrokenLaw(row, f"finish_reason is {reason!r:.40}; expected stop or length")
        if len(batch.completion_ids[row]) and not len(batch.prompt_ids[row]):
            raise BrokenLaw(row, "prompt_ids is empty; expected at least one token")
    _refuse(_rollout_values(batch, 2**32 if vocabulary is None else vocabulary))


def _rollout_values(batch: RolloutBatch, vocabulary: int) -> Iterator[_Values]:
    for name in ("prompt_ids", "completion_ids", "candidate_ids", "student_top_ids"):
        if (rows := getattr(batch, name)) is not None:
            ids = flat(rows, np.int64)
            is_wrong = (ids < 0) | (ids >= vocabulary)
            yield _Values(name, ids, is_wrong, _offsets(rows), f"0 to {vocabulary - 1:,}")
    for name in ("behavior_logprobs", "candidate_behavior_logprobs"):
        if (rows := getattr(batch, name)) is not None:
            values = flat(rows, np.float32)
            is_wrong = ~((values <= TOLERANCE) & (values > -np.inf))
            yield _Values(name, values, is_wrong, _offsets(rows), "a finite number of at most 0")


def check_scores(
    block: "ScoreBlock", *, error: float = 0.0, is_ranked: bool, vocabulary: int | None = None
) -> None:
    """Refuse scores that are no distribution.

    Args:
        block: decoded rows.
        error: by which a stored log-probability may be away from the true one, nats.
        is_ranked: candidates stand in rank order.
        vocabulary: ids are below it; None: it is not known.

    Raises:
        BrokenLaw: names row, column and value.
    """
    _refuse(_score_values(block, error, is_ranked, 2**32 if vocabulary is None else vocabulary))


def _score_values(
    block: "ScoreBlock", error: float, is_ranked: bool, vocabulary: int
) -> Iterator[_Values]:
    at, at_most = block.offsets, "at most 0, and a number"
    has_chunks = block.chunk_ids is not None
    for name in (
        "teacher_logprobs",
        "teacher_top_logprobs",
        "teacher_tail_logprobs",
        "teacher_forced_logprobs",
        "candidate_teacher_logprobs",
    ):
        if (values := getattr(block, name)) is not None:
            yield _Values(name, values, ~(values <= TOLERANCE + error), at, at_most)
    if not has_chunks:
        is_wrong = np.isneginf(block.teacher_logprobs)
        yield _Values("teacher_logprobs", block.teacher_logprobs, is_wrong, at, "a finite number")
    ids, logprobs = block.teacher_top_ids.astype(np.int64), block.teacher_top_logprobs
    is_there = logprobs > -np.inf
    beyond = is_there & (ids >= vocabulary)
    yield _Values("teacher_top_ids", ids, beyond, at, f"0 to {vocabulary - 1:,}")
    if not has_chunks:
        count = is_there.sum(1)
        yield _Values("the number of teacher_top_ids", count, count == 0, at, "at least 1")
    nothing = 2**33 + np.arange(ids.shape[1], dtype=np.int64)  # is no id, and no other place's
    rising: NDArray[np.int64] = np.sort(np.where(is_there, ids, nothing), axis=1)
    is_twice = rising[:, 1:] == rising[:, :-1]
    yield _Values("teacher_top_ids", rising[:, 1:], is_twice, at, "no candidate twice")
    mass = np.exp(logprobs, dtype=np.float64).sum(1)
    whole = mass + np.exp(block.teacher_tail_logprobs, dtype=np.float64)
    most = float(np.exp(error)) * (1 + MASS_TOLERANCE)
    name = "teacher_top_logprobs (their mass, with the tail)"
    yield _Values(name, whole, whole > most, at, f"at most 1, or {most:.2f} by rounding")
    if not has_chunks:
        least = float(np.exp(-error)) * (1 - MASS_TOLERANCE)
        yield _Values(name, whole, whole < least, at, f"1, or {least:.2f} by rounding")
    if is_ranked:
        is_wrong = np.zeros_like(is_there)
        is_wrong[:, 1:] = logprobs[:, 1:] > logprobs[:, :-1]
        yield _Values("teacher_top_logprobs", logprobs, is_wrong, at, "the most probable first")
    if block.chunk_ids is not None:
        yield _Values("chunk_ids", block.chunk_ids, block.chunk_ids < -1, at, "-1 or more")


def check_agreement(
    block: "ScoreBlock", ids_N: NDArray[np.int64], logprobs_N: NDArray[np.float32], column: str
) -> None:
    """Refuse log-probabilities of ids that the candidates or the tail contradict.

    Args:
        block: rows without alignment, whose candidates are no draws.
        ids_N: an id of each token.
        logprobs_N: its log-probability, by the column.
        column: its name.

    Raises:
        BrokenLaw: names row, column and value.
    """
    is_it = (block.teacher_top_ids == ids_N[:, None]) & (block.teacher_top_logprobs > -np.inf)
    is_candidate = is_it.any(1)
    theirs = np.where(is_it, block.teacher_top_logprobs, -np.inf).max(1, initial=-np.inf)
    away = np.abs(np.where(is_candidate, logprobs_N, 0) - np.where(is_candidate, theirs, 0))
    excess = np.exp(logprobs_N, dtype=np.float64) - np.exp(block.teacher_tail_logprobs)
    is_wrong = np.where(is_candidate, ~(away <= AGREEMENT), excess > MASS_TOLERANCE)
    expected = f"that of the same id among the candidates, by {AGREEMENT}, or a part of the tail"
    _refuse(iter([_Values(column, logprobs_N, is_wrong, block.offsets, expected)]))


def _refuse(found: Iterator[_Values]) -> None:
    for each in found:
        if not each.is_wrong.any():
            continue
        place = tuple(int(part) for part in np.argwhere(each.is_wrong)[0])
        row = _row(each.offsets, place[0])
        token = place[0] - int(each.offsets[row])
        value = f"{each.values[place]:.6g}" if each.values.dtype.kind == "f" else each.values[place]
        raise BrokenLaw(row, f"{each.column} is {value} at token {token}; expected {each.expected}")


def _offsets(rows: tuple[NDArray[Any], ...]) -> NDArray[np.int64]:
    return offsets_of(lengths_of(rows))


def _row(offsets: NDArray[np.int64], place: int) -> int:
    return int(np.searchsorted(offsets, place, side="right")) - 1
