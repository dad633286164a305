"""The distance of a policy to its teacher: means per token, by position, with intervals.

Tokens of a completion depend on one another, so intervals resample prompts with all that was
written to them, never tokens: the mean is a ratio of sums over prompts, nats over tokens.

Shapes: P prompts, M figures, T tokens of a row, R resamples of the prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_stream.section import Record
from opd_stream.store.recipe import RecipeRecord
from opd_stream.tasks.pass_at_k import Difference, Interval

FIGURES = ("reverse_kl", "forward_kl", "agreement", "cross_entropy")
EDGES = (0, 8, 32, 128, 512, 2048, 8192)  # of positions in a completion; the last bin is open

TEXT_NAMES = {"samples": "own samples", "teacher_text": "the teacher's text"}
FIGURE_NAMES = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "agreement": "agreement",
    "cross_entropy": "cross-entropy",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How intervals of distances are made; the same settings give the same interval."""

    confidence: float = 0.95
    resamples: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1:
            raise ValueError(
                f"confidence {self.confidence} and resamples {self.resamples}; expected a share "
                "between 0 and 1, and at least one resample"
            )


class Figures(Record):
    """Means per token; KL and cross-entropy in nats, over the whole vocabulary."""

    tokens: int
    reverse_kl: float  # KL(student | teacher)
    forward_kl: float  # KL(teacher | student)
    agreement: float  # share of tokens where both find the same id most probable
    cross_entropy: float  # of the student under the teacher


class Position(Figures):
    """The same of a stretch of every completion."""

    first: int  # token of a completion, from 0
    last: int | None  # exclusive; None: to the end


class TextDistance(Figures):
    """The same of all completions of one kind, with intervals over prompts."""

    rows: int
    intervals: dict[str, Interval]
    positions: tuple[Position, ...]
    left_out: int = 0  # rows whose distributions are not finite


class DistanceResult(Record):
    """How far a policy is from its teacher, on its own samples and on the teacher's text."""

    texts: dict[str, TextDistance]  # by the keys of TEXT_NAMES
    sums: dict[str, dict[str, tuple[float, ...]]]  # prompt_id -> tokens, then the FIGURES' sums


class DistanceManifest(RecipeRecord):
    """`manifest.json` of an evaluation of kind distance."""

    result: DistanceResult


class MeasuredRow(NamedTuple):
    """The tokens of one completion."""

    prompt_id: str
    figures_MT: NDArray[np.float32]  # in the order of FIGURES


def text_distance(
    rows: Iterable[MeasuredRow], bootstrap: Bootstrap | None = None
) -> tuple[TextDistance, dict[str, tuple[float, ...]]]:
    """The figures of some completions, and the sums of each prompt that they follow from.

    Raises:
        ValueError: no row has a token with finite figures.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    bins = np.zeros((len(EDGES), 1 + len(FIGURES)))
    count = left_out = 0
    for row in rows:
        values_MT = row.figures_MT.astype(np.float64)
        if not np.isfinite(values_MT).all():
            left_out += 1
            continue
        counted = np.concatenate([np.ones_like(values_MT[:1]), values_MT])
        for number, (first, last) in enumerate(_stretches()):
            bins[number] += counted[:, first:last].sum(1)
        before = sums.get(row.prompt_id, np.zeros(len(counted)))
        sums[row.prompt_id] = before + counted.sum(1)
        count += 1
    if not bins[:, 0].any():
        raise ValueError("no completion has a token with a finite distance")
    table = np.array([sums[name] for name in sorted(sums)])
    intervals = ratio_intervals([table], bootstrap)
    text = TextDistance(
        **_means(table.sum(0)).model_dump(),
        rows=count,
        intervals=dict(zip(FIGURES, intervals, strict=True)),
        positions=tuple(
            Position(first=first, last=last, **_means(total).model_dump())
            for (first, last), total in zip(_stretches(), bins, strict=True)
            if total[0]
        ),
        left_out=left_out,
    )
    return text, {name: tuple(each.tolist()) for name, each in sums.items()}


def ratio_intervals(
    sides: Sequence[NDArray[np.float64]], bootstrap: Bootstrap | None = None
) -> list[Interval]:
    """Percentile intervals of M ratios of sums over prompts, or of the difference of two sides.

    Args:
        sides: one array [P, 1 + M] of tokens and sums, or two whose rows are the same prompts; the
            interval is then that of the second's ratios less the first's.
        bootstrap: how intervals are made.
    """
    asked = bootstrap or Bootstrap()
    prompts = len(sides[0])
    random = np.random.default_rng([asked.seed, 0])
    # How often each prompt is drawn, with replacement.
    counts_RP = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=asked.resamples)
    ratios = [_ratios(counts_RP @ side) for side in sides]
    found_RM = ratios[1] - ratios[0] if len(sides) == 2 else ratios[0]
    tail = (1 - asked.confidence) / 2
    low_M, high_M = np.quantile(found_RM, [tail, 1 - tail], axis=0)
    return list(zip(low_M.tolist(), high_M.tolist(), strict=True))


def distance_differences(
    left: Mapping[str, tuple[float, ...]],
    right: Mapping[str, tuple[float, ...]],
    bootstrap: Bootstrap | None = None,
) -> dict[str, Difference]:
    """Figure -> the paired difference of two policies: both are measured on every drawn prompt.

    Raises:
        ValueError: the prompts are not the same.
    """
    if set(left) != set(right):
        raise ValueError(f"{len(left)} prompts beside {len(right)}; expected the same")
    sides = [np.array([side[name] for name in sorted(left)]) for side in (left, right)]
    intervals = ratio_intervals(sides, bootstrap)
    a_M, b_M = (_ratios(side.sum(0)[None])[0].tolist() for side in sides)
    return {
        name: Difference(left=a, right=b, difference=b - a, interval=interval)
        for name, a, b, interval in zip(FIGURES, a_M, b_M, intervals, strict=True)
    }


def _stretches() -> list[tuple[int, int | None]]:
    return [*pairwise(EDGES), (EDGES[-1], None)]


def _means(sums: NDArray[np.float64]) -> Figures:
    """The means per token, from tokens and sums."""
    means = sums[1:] / max(sums[0], 1)
    return Figures(tokens=int(sums[0]), **dict(zip(FIGURES, means.tolist(), strict=True)))


def _ratios(sums_RM: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums_RM[:, 1:] / np.maximum(sums_RM[:, :1], 1)
