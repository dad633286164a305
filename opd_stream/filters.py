"""Which rollouts go to the teacher: a function of their tokens, and of a judge's verdicts.

A rollout that is left out is never scored, so it never trains; its row says why.

    reasons = dropped_rows(Keep(finish_reason="stop", distinct=True), rollouts)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from opd_stream.section import Section
from opd_stream.tasks.judges import AnyJudge
from opd_stream.types import RolloutBatch

Reason = Literal[
    "finish_reason",
    "short",
    "long",
    "repeated",
    "duplicate",
    "unjudged",
    "verdict",
    "per_prompt",
    "teacher",
]
REASONS: dict[Reason, str] = {  # in words, as a row and a round's line have them
    "finish_reason": "another finish_reason",
    "short": "fewer than min_tokens",
    "long": "more than max_tokens",
    "repeated": "repeats itself above max_repeated",
    "duplicate": "the same as an earlier one of its prompt",
    "unjudged": "no reference answer that the judge can read",
    "verdict": "another verdict",
    "per_prompt": "its prompt has per_prompt already",
}
OTHER_TEACHER = "teacher"  # the prompt is none of this one's; not by a condition, so not told of
STRETCH = 4  # tokens

Verdicts = Callable[[Sequence[int]], Sequence[bool | None]]
"""Whether some rows are right; None: there is no reference to say it by."""


class Keep(Section):
    """Which rollouts are scored and train; each condition that is set has to hold."""

    judge: AnyJudge | None = Field(
        default=None, description="says whether a rollout is right, as evaluation.judge does"
    )
    verdict: Literal["correct", "incorrect", "mixed"] = Field(
        default="correct",
        description="rollouts that the judge finds right, or wrong; mixed: all of prompts with "
        "some of both",
    )
    finish_reason: Literal["any", "stop", "length"] = Field(
        default="any", description="stop: ended by a terminator; length: cut by the window"
    )
    min_tokens: int = Field(default=0, ge=0, description="of a completion, at least")
    max_tokens: int | None = Field(default=None, ge=1, description="of a completion, at most")
    max_repeated: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of a completion's tokens that end a stretch of 4 tokens which stood in "
        "it before, at most",
    )
    distinct: bool = Field(default=False, description="of equal rollouts of a prompt, the first")
    per_prompt: int | None = Field(
        default=None,
        ge=1,
        description="rollouts of a prompt, at most: the first ones for which all else holds (best "
        "of N)",
    )

    @model_validator(mode="after")
    def _acts(self) -> Self:
        is_stored = "judge" in self.model_fields_set and self.verdict == "correct"  # every field
        if self.judge is None and "verdict" in self.model_fields_set and not is_stored:
            raise ValueError(
                f"rollouts.keep.verdict is {self.verdict} and nothing judges; expected a judge, "
                "such as {kind: final_number}; add rollouts.keep.judge"
            )
        if not self.model_dump(exclude_defaults=True):
            raise ValueError(
                "rollouts.keep names no condition; expected one, such as finish_reason=stop; add "
                "it, or leave keep out"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"rollouts.keep.min_tokens {self.min_tokens} is above max_tokens "
                f"{self.max_tokens}, so that no rollout is kept; lower min_tokens"
            )
        return self


def dropped_rows(
    keep: Keep, rollouts: RolloutBatch, verdicts: Verdicts | None = None
) -> dict[int, Reason]:
    """Row -> why it is left out: the first condition that does not hold, a judge's last.

    Args:
        keep: the conditions.
        rollouts: all of some prompts, since conditions may compare those of a prompt.
        verdicts: asked of the rows that are left, where the conditions have a judge.

    Example:
        >>> dropped_rows(Keep(min_tokens=8), rollouts)
        {3: 'short'}
    """
    found: dict[int, Reason] = {}
    seen: set[tuple[str, bytes]] = set()
    for row, ids in enumerate(rollouts.completion_ids):
        own = rollouts.own_ids(row)
        key = (rollouts.prompt_id[row], ids.astype(np.int64).tobytes())
        reason = _by_itself(keep, own, rollouts.finish_reason[row])
        if reason is None and keep.distinct and key in seen:
            reason = "duplicate"
        seen.add(key)
        if reason is not None:
            found[row] = reason
    if verdicts is not None:
        left = [row for row in range(len(rollouts)) if row not in found]
        names = [rollouts.prompt_id[row] for row in left]
        reasons = zip(left, _by_verdict(keep, names, verdicts(left)), strict=True)
        found |= {row: reason for row, reason in reasons if reason is not None}
    return found | _beyond_share(keep, rollouts, found)


def dropped_of(counts: Mapping[str, float]) -> dict[str, int]:
    """Reason -> rows, among the counts of scores; only what left some out."""
    found = {reason: int(counts.get(f"dropped_{reason}", 0)) for reason in REASONS}
    return {reason: rows for reason, rows in found.items() if rows}


def dropped_text(rows: Mapping[str, int]) -> str:
    """How many rows were left out, and why.

    Example:
        >>> dropped_text({"verdict": 10, "short": 2})
        'rollouts.keep left out 12 rollouts (verdict 10, short 2)'
    """
    reasons = ", ".join(f"{reason} {number:,}" for reason, number in rows.items())
    return f"rollouts.keep left out {sum(rows.values()):,} rollouts ({reasons})"


def repeated_tokens(ids: NDArray[np.integer[Any]]) -> int:
    """Tokens of a completion that end a stretch of 4 which occurred before."""
    if len(ids) <= STRETCH:
        return 0
    stretches = np.lib.stride_tricks.sliding_window_view(ids, STRETCH)
    return len(stretches) - len(np.unique(stretches, axis=0))


def _by_itself(keep: Keep, ids: NDArray[np.integer[Any]], finish_reason: str) -> Reason | None:
    """Why a rollout is left out whatever the others are."""
    if keep.finish_reason not in ("any", finish_reason):
        return "finish_reason"
    if len(ids) < keep.min_tokens:
        return "short"
    if keep.max_tokens is not None and len(ids) > keep.max_tokens:
        return "long"
    if keep.max_repeated is not None and repeated_tokens(ids) > keep.max_repeated * len(ids):
        return "repeated"
    return None


def _by_verdict(
    keep: Keep, names: Sequence[str], verdicts: Sequence[bool | None]
) -> list[Reason | None]:
    """Why judged rollouts of some prompts are left out."""
    of_prompt: dict[str, set[bool]] = {}
    for name, verdict in zip(names, verdicts, strict=True):
        if verdict is not None:
            of_prompt.setdefault(name, set()).add(verdict)

    def reason(name: str, verdict: bool | None) -> Reason | None:
        if verdict is None:
            return "unjudged"
        if keep.verdict == "mixed":
            return None if len(of_prompt[name]) == 2 else "verdict"
        return None if verdict == (keep.verdict == "correct") else "verdict"

    return [reason(*pair) for pair in zip(names, verdicts, strict=True)]


def _beyond_share(
    keep: Keep, rollouts: RolloutBatch, found: dict[int, Reason]
) -> dict[int, Reason]:
    """Of the rows that are left, those beyond `per_prompt`."""
    if keep.per_prompt is None:
        return {}
    counts: dict[str, int] = {}
    beyond: dict[int, Reason] = {}
    for row, name in enumerate(rollouts.prompt_id):
        if row in found:
            continue
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > keep.per_prompt:
            beyond[row] = "per_prompt"
    return beyond
