"""Which prompts a round draws: of levels that the student neither fails nor has mastered, first.

A level is a field of a prompt's row. Its pass rate is that of the student's rollouts of the latest
round that had prompts of it, so the choice follows from what rounds before have recorded.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from opd_stream.outcome import LevelRate
from opd_stream.section import Section
from opd_stream.tasks.judges import AnyJudge


class Select(Section):
    """Prompts of a round by the pass rate of their level, prompts.level_field."""

    judge: AnyJudge = Field(description="says whether a rollout of the round before is right")
    min_pass: float = Field(default=0.0, ge=0, le=1, description="pass rate of a level, at least")
    max_pass: float = Field(default=1.0, ge=0, le=1, description="pass rate of a level, at most")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_pass > self.max_pass:
            raise ValueError(
                f"rollouts.select.min_pass {self.min_pass:g} is above max_pass {self.max_pass:g}; "
                "expected a band; lower min_pass"
            )
        if (self.min_pass, self.max_pass) == (0, 1):
            raise ValueError(
                "rollouts.select has neither min_pass nor max_pass, so that every level is in its "
                "band; expected a bound; set one, or leave select out"
            )
        return self

    def beyond(self, rate: float) -> float:
        """How far a pass rate lies outside of the band; 0: inside."""
        return max(self.min_pass - rate, rate - self.max_pass, 0.0)


def measured_levels(
    earlier: Iterable[LevelRate], verdicts: Iterable[tuple[str, bool]]
) -> tuple[LevelRate, ...]:
    """The pass rate of each level after a round: of this one, else of an earlier one.

    Args:
        earlier: after the round before.
        verdicts: level and verdict of each rollout that the judge could judge.

    Example:
        >>> measured_levels((), [("easy", True), ("easy", False)])
        (LevelRate(level='easy', right=1, judged=2),)
    """
    found = {each.level: each for each in earlier}
    counts: dict[str, list[int]] = {}
    for level, is_right in verdicts:
        right_judged = counts.setdefault(level, [0, 0])
        right_judged[0] += is_right
        right_judged[1] += 1
    found |= {
        level: LevelRate(level=level, right=right, judged=judged)
        for level, (right, judged) in counts.items()
    }
    return tuple(found[level] for level in sorted(found))


def chosen_prompts(
    select: Select,
    levels: Sequence[str],
    rates: Iterable[LevelRate],
    *,
    seed: int,
    round_index: int,
    per_round: int,
) -> list[int]:
    """Row numbers of the prompts of a round, drawn from levels in the band.

    One that was never measured counts as in it. Where there are fewer such prompts than the round
    has, the rest are of the levels nearest to the band.
    """
    beyond = {each.level: select.beyond(each.rate) for each in rates}
    digest = hashlib.sha256(f"select/{seed}/{round_index}".encode()).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big"))).permutation(
        len(levels)
    )
    numbers: list[int] = order.tolist()
    return sorted(numbers, key=lambda row: beyond.get(levels[row], 0.0))[:per_round]


def levels_text(select: Select, rates: Iterable[LevelRate]) -> str:
    """What the next round draws from, in words.

    Example:
        >>> levels_text(Select(judge=..., max_pass=0.9), rates)
        'prompts of levels passed at 0% to 90%: hard 25% of 32; after them easy 98% of 64'
    """
    inside: list[str] = []
    outside: list[str] = []
    for each in rates:
        part = outside if select.beyond(each.rate) else inside
        part.append(f"{each.level} {each.rate:.0%} of {each.judged:,}")
    after = f"; after them {', '.join(outside)}" if outside else ""
    band = f"{select.min_pass:.0%} to {select.max_pass:.0%}"
    return f"prompts of levels passed at {band}: {', '.join(inside) or 'none measured'}{after}"
