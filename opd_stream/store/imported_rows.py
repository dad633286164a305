"""Rows of scored rollouts as other programs write them, checked one by one.

docs/cache-format.md describes their columns. Nothing in them is trusted and nothing converted.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError

from opd_stream.errors import UserError, shortened
from opd_stream.section import Record
from opd_stream.store.codecs.laws import MOST_CANDIDATES
from opd_stream.types import FinishReason, RolloutBatch, ScoreBatch

LOWEST = float(np.finfo(np.float32).min)
PlacedRow = tuple[str, object]  # where a row stands, and its JSON value

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Logprob = Annotated[float, Field(le=-LOWEST)]
Candidates = Annotated[list[Logprob], Field(max_length=MOST_CANDIDATES)]


class ImportedRow(Record):
    """A row that another program wrote; lists of a refused row's scores are empty.

    Nothing is converted: neither text nor `true` is a number, and 4.0 is no id.
    """

    model_config = ConfigDict(strict=True)

    prompt_id: str | int | Annotated[float, Field(allow_inf_nan=False)] | None = None
    sample_index: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    prompt_ids: list[TokenId]
    completion_ids: list[TokenId]
    behavior_logprobs: list[Logprob]
    finish_reason: FinishReason | None = None
    teacher_logprobs: list[Logprob]
    teacher_top_ids: list[list[TokenId]]
    teacher_top_logprobs: list[Candidates]
    teacher_tail_logprobs: list[Logprob] | None = None
    teacher_forced_logprobs: list[Candidates] | None = None
    refused: str | None = None
    loss_mask: list[bool | Literal[0, 1]] | None = None

    @property
    def trains(self) -> list[bool]:
        """Which completion tokens may train."""
        if self.loss_mask is None:
            return [True] * len(self.completion_ids)
        return [bool(each) for each in self.loss_mask]


def imported_batches(
    chunk: list[PlacedRow], stop_ids: Sequence[int]
) -> tuple[RolloutBatch, ScoreBatch]:
    """Rollouts and scores of rows; `stop_ids` name the first of teacher_forced_logprobs.

    Raises:
        UserError: a row lacks a column, or has one of another length or type (names the place).
    """
    rows = [_checked(place, value, stop_ids) for place, value in chunk]
    most = max((len(ids) for row in rows for ids in row.teacher_top_ids), default=0)
    tops = [_ranked(row, most) for row in rows]
    forced = [row.teacher_forced_logprobs or [[] for _ in row.teacher_logprobs] for row in rows]
    widths = {len(values[0]) for values in forced if values}
    if len(widths) > 1:
        raise UserError(
            f"rows of {chunk[0][0]} and after have {sorted(widths)} teacher_forced_logprobs a "
            "token; expected as many in every row; mend the rows"
        )

    def arrays(column: Iterable[Any], dtype: Any) -> tuple[NDArray[Any], ...]:
        return tuple(np.array(values, dtype) for values in column)

    rollouts = RolloutBatch(
        prompt_id=tuple(
            place if row.prompt_id is None else str(row.prompt_id)
            for (place, _), row in zip(chunk, rows, strict=True)
        ),
        sample_index=np.array([row.sample_index or 0 for row in rows], np.int32),
        prompt_ids=arrays((row.prompt_ids for row in rows), np.int64),
        completion_ids=arrays((row.completion_ids for row in rows), np.int64),
        behavior_logprobs=arrays((row.behavior_logprobs for row in rows), np.float32),
        finish_reason=tuple(row.finish_reason or "length" for row in rows),
        loss_mask=(
            None
            if all(row.loss_mask is None for row in rows)
            else arrays((row.trains for row in rows), np.bool_)
        ),
    )
    return rollouts, ScoreBatch(
        teacher_logprobs=arrays((row.teacher_logprobs for row in rows), np.float32),
        teacher_top_ids=tuple(ids for ids, _ in tops),
        teacher_top_logprobs=tuple(logprobs for _, logprobs in tops),
        teacher_tail_logprobs=tuple(
            _tail_of(top)
            if row.teacher_tail_logprobs is None
            else np.array(row.teacher_tail_logprobs, np.float32)
            for row, (_, top) in zip(rows, tops, strict=True)
        ),
        teacher_forced_logprobs=tuple(
            np.array(values, np.float32).reshape(len(values), max(widths, default=0))
            for values in forced
        ),
        refused={n: row.refused for n, row in enumerate(rows) if row.refused},
    )


def _check_range(place: str, row: ImportedRow) -> None:
    """Refuse log-probabilities that no float32 holds."""
    for name, values in _logprobs(row):
        lowest = min((value for value in values if value > -math.inf), default=0.0)
        if lowest < LOWEST:
            raise UserError(
                f"{place} has {lowest:g} in {name}; expected {LOWEST:g} or more, the lowest of a "
                "float32, or -Infinity; mend the row"
            )


def _checked(place: str, value: object, stop_ids: Sequence[int]) -> ImportedRow:
    """A row whose columns are there and agree, filled up where nothing trains.

    Raises:
        UserError: names the place.
    """
    try:
        row = ImportedRow.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "values"
        if first["type"] == "missing" or (len(first["loc"]) == 1 and first["input"] is None):
            raise UserError(
                f"{place} has no {name}; expected the columns of docs/cache-format.md; add it"
            ) from error
        kind = f"such ({first['msg']})"
        if "logprobs" in name:
            kind = "log-probabilities (null, NaN or infinite)"
        where = "".join(f"[{part}]" for part in first["loc"][1:])
        raise UserError(
            f"{place} has {name} that are no {kind}: {name}{where} is {shortened(first['input'])}; "
            "mend the row"
        ) from error
    row = row if row.loss_mask is None else _filled(place, row, stop_ids)
    _check_range(place, row)
    tokens = len(row.completion_ids)
    scored = 0 if row.refused else tokens
    for name, values, wanted in (
        ("behavior_logprobs", row.behavior_logprobs, tokens),
        ("teacher_logprobs", row.teacher_logprobs, scored),
        ("teacher_top_ids", row.teacher_top_ids, scored),
        ("teacher_top_logprobs", row.teacher_top_logprobs, scored),
        ("teacher_tail_logprobs", row.teacher_tail_logprobs, scored),
        ("teacher_forced_logprobs", row.teacher_forced_logprobs, scored),
    ):
        if values is not None and len(values) != wanted:
            what = "completion" if values is row.behavior_logprobs else "scored"
            is_masked = row.loss_mask is not None and wanted > 0
            own = f", or for each of the {sum(row.trains)} to train" if is_masked else ""
            raise UserError(
                f"{place} has {len(values)} {name} for {wanted} {what} tokens; expected one for "
                f"each{own}; mend the row"
            )
    if len({len(values) for values in row.teacher_forced_logprobs or ()}) > 1:
        raise UserError(
            f"{place} has unequal numbers of teacher_forced_logprobs at its positions; "
            "expected one for each forced id everywhere; mend the row"
        )
    for ids, logprobs in zip(row.teacher_top_ids, row.teacher_top_logprobs, strict=True):
        if len(ids) != len(logprobs):
            raise UserError(
                f"{place} has {len(ids)} teacher_top_ids and {len(logprobs)} teacher_top_logprobs "
                "at a position; expected as many of one as of the other; mend the row"
            )
    return row


def _filled(place: str, row: ImportedRow, stop_ids: Sequence[int]) -> ImportedRow:
    """A row with an entry of each column for each completion token.

    Columns may hold entries of the tokens that train alone, or no candidates at the others. There
    they are those of a teacher that is sure of the token, which nothing reads.
    """
    trains, ids = row.trains, row.completion_ids
    if len(trains) != len(ids):
        raise UserError(
            f"{place} has {len(trains)} loss_mask for {len(ids)} completion tokens; expected one "
            "for each; mend the row"
        )
    if ids and not any(trains):
        raise UserError(
            f"{place} has a loss_mask in which no token trains; expected one at least; mend or "
            "remove the row"
        )
    changes: dict[str, Any] = {"behavior_logprobs": _spread(row.behavior_logprobs, trains, 0.0)}
    if not row.refused:
        changes |= _filled_scores(row, stop_ids)
    return row.model_copy(update=changes)


def _filled_scores(row: ImportedRow, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The teacher's columns of a row for each completion token."""
    trains, own = row.trains, row.completion_ids
    width = max((len(values) for values in row.teacher_forced_logprobs or ()), default=0)
    asked = [*stop_ids, *[-1] * width][:width]
    sure = {
        "teacher_logprobs": [0.0] * len(own),
        "teacher_top_ids": [[token] for token in own],
        "teacher_top_logprobs": [[0.0]] * len(own),
        "teacher_tail_logprobs": [-math.inf] * len(own),
        "teacher_forced_logprobs": [
            [0.0 if each == token else -math.inf for each in asked] for token in own
        ],
    }
    columns = {name: getattr(row, name) for name in sure}
    spread = {
        name: _spread(values, trains, None)
        for name, values in columns.items()
        if values is not None
    }
    tops = spread["teacher_top_ids"]
    is_sure = [
        not is_trained
        and (
            not tops[n : n + 1]
            or not tops[n]
            or any(v[n : n + 1] == [None] for v in spread.values())
        )
        for n, is_trained in enumerate(trains)
    ]
    return {
        name: [
            sure[name][n] if n < len(is_sure) and is_sure[n] else each
            for n, each in enumerate(values)
        ]
        for name, values in spread.items()
    }


def _spread(values: list[Any], trains: Sequence[bool], fill: Any) -> list[Any]:
    """Entries of the tokens that train in their places among all; others stay as they are."""
    if len(values) != sum(trains) or len(values) == len(trains):
        return values
    found = iter(values)
    return [next(found) if each else fill for each in trains]


def _logprobs(row: ImportedRow) -> Iterator[tuple[str, Iterable[float]]]:
    """The log-probabilities of a row, by column."""
    yield "behavior_logprobs", row.behavior_logprobs
    yield "teacher_logprobs", row.teacher_logprobs
    yield "teacher_tail_logprobs", row.teacher_tail_logprobs or ()
    yield "teacher_top_logprobs", chain.from_iterable(row.teacher_top_logprobs)
    yield "teacher_forced_logprobs", chain.from_iterable(row.teacher_forced_logprobs or ())


def _ranked(row: ImportedRow, most: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Candidates in rank order, filled up to `most` with id 0 and -inf [T, K]."""
    length = len(row.teacher_top_ids)
    ids = np.zeros((length, most), np.int64)
    logprobs = np.full((length, most), -np.inf, np.float32)
    for place in range(length):
        values = np.array(row.teacher_top_logprobs[place], np.float32)
        order = np.argsort(-values, kind="stable")
        logprobs[place, : len(values)] = values[order]
        ids[place, : len(values)] = np.array(row.teacher_top_ids[place], np.int64)[order]
    return ids, logprobs


def _tail_of(logprobs_TK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of what the candidates leave; below 1e-7 that is rounding of theirs."""
    rest = 1 - np.exp(logprobs_TK.astype(np.float64)).sum(1)
    return np.log(rest.clip(1e-7)).astype(np.float32)
