"""A round's cached rollouts, and one of them as it is shown: texts, figures, marks, verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.reader import ScoredRow, ScoredRows
from opd_stream.store.store import Store
from opd_stream.tasks.judges import open_judge
from opd_stream.tokens import (
    FIGURES,
    Figure,
    TokenText,
    Values,
    candidate_counts,
    drawn_places,
    token_figures,
    visible,
)
from opd_stream.types import last_turn
from opd_stream.weighting import own_tokens, trained_mask
from pipeline.records import RoundPlanRecord
from stages.recipes import is_given

WORST_TOKENS = 10


class Candidate(NamedTuple):
    """What the teacher would have written."""

    token_id: int
    text: str
    probability: float
    is_drawn: bool  # the student wrote it


class Mark(NamedTuple):
    """A boundary in front of a token."""

    place: int  # of the token, from 0
    text: str


class Verdict(NamedTuple):
    """What the judge of the run's evaluation says."""

    judge: str
    is_right: bool
    answer: str

    def __str__(self) -> str:
        return "right" if self.is_right else "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCache:
    """Units of one scores artifact that a round trains on."""

    number: int  # among the round's caches
    rollouts: Artifact
    scores: Artifact
    units: tuple[int, ...]
    policy_version: int  # of the oldest tokens in it
    teacher: str | None = None  # who scored, of several

    @property
    def is_given(self) -> bool:
        """Whether the student did not write its rollouts: it has no log-probabilities of them."""
        return is_given(self.rollouts.recipe)

    def rows(self, units: Sequence[int] | None = None) -> ScoredRows:
        """Its rows, or those of some units."""
        chosen = self.units if units is None else units
        return ScoredRows([(self.rollouts, self.scores)], units=[chosen])


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedRow:
    """A rollout of a round, and where it was found."""

    cache: RoundCache
    row: ScoredRow
    others: tuple[int, ...] = ()  # further caches of the round with a rollout of this name


@dataclass(frozen=True, kw_only=True)
class RoundReader:
    """Reads the rollouts of a round."""

    run: Path
    config: Config
    store: Store
    plan: RoundPlanRecord
    caches: tuple[RoundCache, ...]
    text: TokenText
    masked_ids: tuple[int, ...]  # first occurrences do not train
    _answers: dict[int, dict[str, str | None]] = field(default_factory=dict)

    @cached_property
    def windows(self) -> dict[int, int]:
        """Window -> the first planned step of the round that trains up to it."""
        plan, window = self.plan, self.config.rollouts.window
        if window.is_decided:
            return {plan.window_tokens: plan.first_step}
        steps = range(plan.first_step, plan.first_step + max(1, plan.planned_steps))
        return {window.tokens_at(step): step for step in reversed(steps)}

    def trains(self, row: ScoredRow) -> NDArray[np.bool_]:
        """Which completion tokens train in some step of the round [T]."""
        mask = trained_mask(row, max(self.windows), self.masked_ids, self.config.train.segment)
        return np.pad(mask, (0, len(row.completion_ids) - len(mask)))

    def figures(self, cache: RoundCache, row: ScoredRow, by: str) -> dict[str, Values]:
        """Every figure of a row that the cache holds; refuses where `by` is not among them."""
        is_drawn = cache.scores.recipe.settings["codec"]["kind"] == "sampled"
        found = token_figures(row, has_ranks=not is_drawn and row.teacher_top_ids.shape[1] > 0)
        if cache.is_given:
            found.pop("reverse_kl")
        else:
            found["reverse_kl"] = np.where(own_tokens(row), found["reverse_kl"], 0.0)
        if by not in found:
            raise UserError(
                f"{cache.scores.name} holds no ranked candidates, and so no {by}; "
                f"choose --by {' or '.join(found)}"
            )
        return found

    def view(self, located: LocatedRow, by: str) -> "RolloutView":
        """A rollout under one figure; raises as `figures`.

        A given one has no reverse_kl, and shows teacher_nll instead.
        """
        row = located.row
        by = "teacher_nll" if by == "reverse_kl" and located.cache.is_given else by
        ids, before = row.completion_ids.tolist(), int(row.prompt_ids[-1])
        return RolloutView(
            reader=self,
            located=located,
            figure=FIGURES[by],
            figures=self.figures(located.cache, row, by),
            trains=self.trains(row),
            pieces=tuple(self.text.pieces(ids, before=before)),
        )

    def verdict(self, cache: RoundCache, row: ScoredRow) -> Verdict | None:
        """None where the run has no judge or the prompt no answer that it can read."""
        evaluation = self.config.evaluation and self.config.evaluation.judged()
        if evaluation is None:
            return None
        if cache.number not in self._answers:
            self._answers[cache.number] = self._read_answers(cache)
        answer = self._answers[cache.number].get(row.prompt_id)
        if answer is None:
            return None
        judge = evaluation.judge
        assert judge is not None  # validated
        answer_ids = row.completion_ids[last_turn(own_tokens(row))]
        text = self.text.whole(answer_ids.tolist(), special=False)
        opened = open_judge(judge)
        return (
            Verdict(judge.kind, opened(text, answer), answer) if opened.can_read(answer) else None
        )

    def _read_answers(self, cache: RoundCache) -> dict[str, str | None]:
        """Reference answers by prompt id; empty for imported rows."""
        fingerprint = cache.rollouts.recipe.inputs.get("prompts")
        if fingerprint is None:
            return {}
        table = self.store.by_fingerprint("prompts", fingerprint).read_all()
        pairs = zip(table["prompt_id"].to_pylist(), table["answer"].to_pylist(), strict=True)
        return dict(pairs)


@dataclass(frozen=True, kw_only=True)
class RolloutView:
    """A rollout under one figure."""

    reader: RoundReader
    located: LocatedRow
    figure: Figure
    figures: dict[str, Values]  # name -> one value a completion token
    trains: NDArray[np.bool_]  # [T]
    pieces: tuple[str, ...]  # text of each completion token

    @property
    def row(self) -> ScoredRow:
        """The rollout and its scores."""
        return self.located.row

    @property
    def values(self) -> Values:
        """The chosen figure [T]."""
        return self.figures[self.figure.name]

    @property
    def prompt(self) -> str:
        """The prompt as the student read it, special tokens included."""
        return visible(self.reader.text.whole(self.row.prompt_ids.tolist()))

    @property
    def teacher_prompt(self) -> str | None:
        """The prompt as the teacher read it; None: as the student did."""
        scores = self.located.cache.scores.recipe
        if "prompts" not in scores.inputs or "alignment" in scores.settings:
            return None
        table = self.reader.store.by_fingerprint("prompts", scores.inputs["prompts"]).read_all()
        place = table["prompt_id"].to_pylist().index(self.row.prompt_id)
        return visible(self.reader.text.whole(table["prompt_ids"][place].as_py()))

    @property
    def source(self) -> str:
        """Where the rollout comes from."""
        cache, index = self.located.cache, self.reader.plan.round_index
        author = "given, not the student's" if cache.is_given else f"policy {cache.policy_version}"
        return f"round {index}, {author}, {cache.scores.name}"

    def student_probability(self, place: int) -> float | None:
        """Of the token at a place, when it was drawn; None: nobody drew it."""
        is_drawn = not self.located.cache.is_given and own_tokens(self.row)[place]
        return math.exp(self.row.behavior_logprobs[place]) if is_drawn else None

    @property
    def mean(self) -> float:
        """Of the chosen figure over the tokens that train; nan if none does."""
        return mean_of(self.values, self.trains)

    @cached_property
    def verdict(self) -> Verdict | None:
        """See `RoundReader.verdict`."""
        return self.reader.verdict(self.located.cache, self.row)

    @property
    def own_tokens(self) -> int:
        """Tokens of its author: of a trajectory without those of others."""
        return int(own_tokens(self.row).sum())

    @property
    def finish(self) -> str:
        """Why the text ends: stop, window or context, and where."""
        tokens, own = len(self.row.completion_ids), self.own_tokens
        of_student = f", {own} of them the student's" if own < tokens else ""
        window = self.located.cache.rollouts.recipe.settings.get("window_tokens")
        if self.row.finish_reason == "stop":
            last = visible(self.pieces[-1]) if self.pieces else ""
            what = "it ends" if self.located.cache.is_given else "the student ended it"
            return f"stop: {what} with {last} after {tokens} tokens{of_student}"
        if window is None:
            why = "imported rows do not say why"
            return f"length: no terminator in {tokens} tokens{of_student}; {why}"
        if tokens >= window:
            return f"window: cut after {tokens} tokens{of_student}"
        if own < tokens:
            return f"length: cut after {tokens} tokens{of_student}: no room for another turn"
        return f"context: cut after {tokens} tokens, before its window of {window}"

    @cached_property
    def marks(self) -> tuple[Mark, ...]:
        """Where windows of the round end, and where a later policy continued, in order of place."""
        windows, store = self.reader.windows.items(), self.reader.store
        found = [Mark(window, f"window {window} from step {step}") for window, step in windows]
        recipe = self.located.cache.rollouts.recipe
        while "extends" in recipe.settings:
            recipe = store.by_fingerprint("rollouts", recipe.inputs["rollouts"]).recipe
            found.append(Mark(recipe.settings["window_tokens"], "a later policy continues"))
        inside = [mark for mark in found if mark.place < len(self.pieces)]
        return tuple(sorted(inside, key=lambda mark: mark.place))

    def worst(self, count: int) -> list[int]:
        """Places of the tokens that train with the largest figure, the largest first."""
        places = np.flatnonzero(self.trains)
        order = np.argsort(-self.values[places], kind="stable")
        return places[order[:count]].tolist()

    def worst_tokens(self) -> list[int]:
        """The worst places to show: those that are coloured, but at least one."""
        places = self.worst(WORST_TOKENS)
        coloured = [p for p in places if self.figure.level(float(self.values[p])) > 0]
        return coloured or places[:1]

    def candidates(self, place: int, count: int) -> list[Candidate]:
        """The teacher's most probable tokens at a place."""
        row = self.row
        logprobs, ids = row.teacher_top_logprobs[place], row.teacher_top_ids[place]
        order = np.argsort(-logprobs, kind="stable")[:count]
        before = (row.prompt_ids if place == 0 else row.completion_ids)[place - 1]
        return [
            Candidate(
                int(ids[k]),
                self.reader.text.after(int(before), int(ids[k])),
                math.exp(logprobs[k]),
                is_drawn=int(ids[k]) == int(row.completion_ids[place]),
            )
            for k in order
            if np.isfinite(logprobs[k])
        ]

    @cached_property
    def ranks(self) -> list[str]:
        """Rank of each drawn token among the teacher's candidates, as text; empty without ranks."""
        if "rank" not in self.figures:
            return [""] * len(self.pieces)
        outside, place = drawn_places(self.row)
        counts = candidate_counts(self.row)
        return [
            f">{count}" if is_outside else str(at + 1)
            for is_outside, at, count in zip(outside, place, counts, strict=True)
        ]

    def retained_mass(self, place: int) -> float | None:
        """The teacher's probability of its candidates; None without ranks."""
        if "tail_mass" not in self.figures:
            return None
        return -math.expm1(self.row.teacher_tail_logprobs[place])


def mean_of(values: Values, trains: NDArray[np.bool_]) -> float:
    """Mean over the tokens that train; nan if none does."""
    return float(values[trains].mean()) if trains.any() else math.nan
