"""What a row that another program wrote must be."""

import math
from itertools import chain
from typing import Any

from opd_stream.errors import UserError

REQUIRED = (
    "prompt_ids",
    "completion_ids",
    "behavior_logprobs",
    "teacher_logprobs",
    "teacher_top_ids",
    "teacher_top_logprobs",
)
OPTIONAL = ("teacher_tail_logprobs", "teacher_forced_logprobs")


def check_row(place: str, row: dict[str, Any]) -> None:
    """Refuse a row that lacks a column, or whose lists do not agree.

    Raises:
        UserError: names the place.
    """
    missing = [name for name in REQUIRED if row.get(name) is None]
    if missing:
        raise UserError(
            f"{place} has no {', '.join(missing)}; expected the columns of docs/cache-format.md; "
            "add them"
        )
    tokens = 0 if row.get("refused") else len(row["completion_ids"])
    for name in REQUIRED[2:]:
        wanted = len(row["completion_ids"]) if name == "behavior_logprobs" else tokens
        if len(row[name]) != wanted:
            raise UserError(
                f"{place} has {len(row[name])} {name} for {wanted} completion tokens; expected one "
                "for each; mend the row"
            )
    for name in OPTIONAL:
        if row.get(name) is not None and len(row[name]) != tokens:
            raise UserError(
                f"{place} has {len(row[name])} {name} for {tokens} scored tokens; expected one for "
                "each, or none; mend the row"
            )
    _check_numbers(place, row)
    for ids, logprobs in zip(row["teacher_top_ids"], row["teacher_top_logprobs"], strict=True):
        if len(ids) != len(logprobs):
            raise UserError(
                f"{place} has {len(ids)} teacher_top_ids and {len(logprobs)} teacher_top_logprobs "
                "at a position; expected as many of one as of the other; mend the row"
            )


def _check_numbers(place: str, row: dict[str, Any]) -> None:
    flat = [("behavior_logprobs", row["behavior_logprobs"])]
    if not row.get("refused"):
        flat += [
            (name, row[name])
            for name in ("teacher_logprobs", "teacher_tail_logprobs")
            if row.get(name) is not None
        ]
        flat += [("teacher_top_logprobs", list(chain.from_iterable(row["teacher_top_logprobs"])))]
        forced = row.get("teacher_forced_logprobs") or []
        flat += [("teacher_forced_logprobs", list(chain.from_iterable(forced)))]
        if len({len(values) for values in forced}) > 1:
            raise UserError(
                f"{place} has unequal numbers of teacher_forced_logprobs at its positions; "
                "expected one for each forced id everywhere; mend the row"
            )
    for name, values in flat:
        if any(value is None or not value < math.inf for value in values):
            raise UserError(
                f"{place} has {name} that are no log-probabilities (null, NaN or infinite); mend "
                "the row"
            )
