"""EffOPD: after steps 1, 2, 4, 8, ... look further along the way the weights came.

Scores are those of the first process, broadcast to all, and every process moves its own shard. A
point is scored on rows that the round does not train on, by the KL over candidates and tail: the
objective's own value may fall while the student leaves the tokens that it reads.
"""

import math
from itertools import chain
from pathlib import Path

import torch

from opd_stream.config.sections import Extrapolation
from opd_stream.drift import DriftSums, drift_of
from opd_stream.errors import UserError
from opd_stream.extrapolation import (
    LONGER,
    Outcome,
    Score,
    held_out_rows,
    is_due,
    moved_parameters,
    search,
)
from opd_stream.outcome import ExtrapolationRecord, PointScore
from opd_stream.staleness import too_far
from opd_stream.store.policy import BASE
from opd_stream.store.reader import ScoredRows, epoch_order
from opd_stream.store.tree import load_tree, save_tree
from stages.answers import open_lengths, open_reward
from stages.learner import Learner
from stages.train_data import BatchPlan, step_batches
from stages.train_job import TrainJob
from stages.train_state import gathered, laid_out_as

SAMPLE_KEY = 0x0EFF0BD  # of the rows that score a point


class Extrapolator:
    """The searches of a round, and the point that the next direction starts from."""

    def __init__(
        self,
        job: TrainJob,
        learner: Learner,
        rows: ScoredRows,
        plan: BatchPlan,
        *,
        base: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """A base is that of the round before, or of a checkpoint; None: the current weights."""
        settings = job.config.train.extrapolation
        assert settings is not None
        self._settings, self._learner, self._staleness = settings, learner, job.config.staleness
        self._rows, self._plan = rows, plan
        self._scored = sorted(plan.held_out) or own_rows(rows, plan, settings.rows)
        self._reward = None if settings.signal == "kl" else open_reward(job)
        self._lengths = open_lengths(job) if settings.prompts else None
        self._base = {
            name: p.detach().clone() if base is None else laid_out_as(p, base[name])
            for name, p in self._moved().items()
        }

    def after_step(self, step: int) -> None:
        """Search if it is time to, and record it, with the drift where the weights jumped to.

        Args:
            step: the step that was just done, from 0.
        """
        if not is_due(step + 1):
            return
        moved, learner = self._moved(), self._learner
        ordinary = {name: parameter.detach().clone() for name, parameter in moved.items()}
        learner.student.eval()
        outcome = search(
            list(moved.values()),
            [self._base[name] for name in moved],
            lambda: self._score(step),
            step=step + 1,
            settings=self._settings,
        )
        record = _record(outcome)
        if outcome.kept and self._lengths is not None:
            record = self._unless_longer(record, moved, ordinary)
        if record.kept and self._settings.reset_moments:
            _reset_moments(learner.optimizer, list(moved.values()))
        learner.student.train()
        if self._settings.base == "accepted":
            ordinary = {name: parameter.detach().clone() for name, parameter in moved.items()}
        self._base = ordinary
        learner.state.extrapolations.append(record)

    def base(self) -> dict[str, torch.Tensor]:
        """The base as whole tensors of the first process; every process takes part."""
        return gathered(self._base, is_kept=self._learner.fabric.is_global_zero)

    def _moved(self) -> dict[str, torch.nn.Parameter]:
        return moved_parameters(self._learner.student.named_parameters(), self._settings.parameters)

    def _score(self, step: int) -> Score:
        signal, learner = self._settings.signal, self._learner
        reward = None if self._reward is None else self._reward.accuracy(learner.student.model)
        chosen = [self._plan.used(self._rows[position]) for position in self._scored]
        with learner.fabric.autocast():  # as a training step and the floor of drift
            sums = learner.sums(step_batches(chosen, self._plan, step))
        reward, sums = learner.fabric.broadcast((reward, sums))
        drift = drift_of(sums)
        return Score(
            reward=reward,
            kl=None if signal == "reward" else -sums["seen_kl"] / max(sums["tokens"], 1.0),
            policy_drift=drift.policy_drift,
            is_within=self._is_within(drift),
        )

    def _is_within(self, drift: DriftSums) -> bool:
        """Whether the round would train on from such a drift."""
        start, learner = self._learner.state.start, self._learner
        assert start is not None
        bounds = self._staleness.fitted(start.distance, learner.objectives)
        is_finite = math.isfinite(drift.policy_drift)
        return is_finite and too_far(drift, bounds, floor=learner.state.floor) is None

    def _unless_longer(
        self,
        record: ExtrapolationRecord,
        moved: dict[str, torch.nn.Parameter],
        ordinary: dict[str, torch.Tensor],
    ) -> ExtrapolationRecord:
        """Take a jump back where more answers than before do not end in the window.

        Cached rows end where their student ended them; what a jump does to the end of a text that
        the student now writes shows in new texts alone.
        """
        assert self._lengths is not None
        jumped = {name: parameter.detach().clone() for name, parameter in moved.items()}
        after = self._lengths.cut_share(self._learner.student.model)
        _place(moved, ordinary)
        before = self._lengths.cut_share(self._learner.student.model)
        before, after = self._learner.fabric.broadcast((before, after))
        found = {"length_shares": (before, after)}
        if after > before + LONGER:
            return record.model_copy(
                update={**found, "undone": record.kept, "kept": 0, "policy_drift": None}
            )
        _place(moved, jumped)
        return record.model_copy(update=found)


def own_rows(rows: ScoredRows, plan: BatchPlan, most: int) -> list[int]:
    """Positions of some of the newest rows that the student wrote; the same in every call.

    Raises:
        UserError: there are none.
    """
    found = list(chain.from_iterable(_newest(rows, plan).values()))
    order = epoch_order(len(found), (plan.seed, SAMPLE_KEY))
    return [found[place] for place in order[:most].tolist()]


def held_out(rows: ScoredRows, plan: BatchPlan, settings: Extrapolation) -> frozenset[int]:
    """Positions of the rows that score points, and that no step of the round trains on.

    They are of the round's newest rollouts, which an earlier round has trained on only where all
    were kept, and whole prompts, whoever scored them: what is learned of a prompt says nothing of
    the others.

    Raises:
        UserError: nothing would be left to train on, or nothing is the student's.
    """
    by_cache = _newest(rows, plan)
    found = list(chain.from_iterable(by_cache.values()))
    wanted = held_out_rows(len(found), settings)
    of_prompt = _of_any_teacher(rows, found) if len(by_cache) > 1 else None
    chosen = set[int]()
    for place in epoch_order(len(found), (plan.seed, SAMPLE_KEY, plan.first_step)).tolist():
        if len(chosen) >= wanted:
            break
        name = rows[found[place]].prompt_id
        if of_prompt is not None:
            chosen.update(of_prompt[name])
            continue
        for direction in (range(place, len(found)), range(place - 1, -1, -1)):
            for other in direction:
                if rows[found[other]].prompt_id != name:
                    break
                chosen.add(found[other])
    if not wanted or len(chosen) == len(rows):
        raise UserError(
            "train.extrapolation keeps a prompt of the round from training to score its points, "
            "and there is no other; raise rollouts.prompts_per_round, or set its signal=reward"
        )
    return frozenset(chosen)


def _of_any_teacher(rows: ScoredRows, found: list[int]) -> dict[str, list[int]]:
    """Prompt -> positions of its rows, which several caches have where several teachers score."""
    by_name: dict[str, list[int]] = {}
    for position in found:
        by_name.setdefault(rows[position].prompt_id, []).append(position)
    return by_name


def _newest(rows: ScoredRows, plan: BatchPlan) -> dict[int, list[int]]:
    """Positions of the rows of the newest student, of each cache that has some."""
    ages = plan.staleness
    own = {
        place: positions
        for place, positions in rows.positions_by_unit().items()
        if not (plan.given and plan.given[place[0]])
    }
    if not own:
        raise UserError(
            "train.extrapolation measures points on rollouts of the student, and all of the round "
            "are given; leave it out, or lower rollouts.given_share"
        )
    newest = min(ages[cache] for cache, _ in own) if ages else 0
    found: dict[int, list[int]] = {}
    for (cache, _), positions in own.items():
        if not ages or ages[cache] == newest:
            found.setdefault(cache, []).extend(positions)
    return found


def open_extrapolator(
    job: TrainJob,
    learner: Learner,
    rows: ScoredRows,
    plan: BatchPlan,
    base: dict[str, torch.Tensor] | None,
) -> Extrapolator | None:
    """The searches that a round's config asks for, if any.

    Args:
        job: the round.
        learner: what moves.
        rows: that score a point.
        plan: of the round.
        base: of a checkpoint of the round; None: that of the round before, where there is one.
    """
    if job.config.train.extrapolation is None:
        return None
    left = Path(job.base) / BASE
    if base is None and job.is_continued and left.exists():
        base = load_tree(left)
    return Extrapolator(job, learner, rows, plan, base=base)


def save_base(base: dict[str, torch.Tensor], policy: Path) -> None:
    """Leave the base for the next round."""
    save_tree(base, policy / BASE)


def _record(outcome: Outcome) -> ExtrapolationRecord:
    """For reports; a score that is not finite is None there."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    scores = [
        PointScore(
            reward=finite(score.reward),
            kl=finite(score.kl),
            policy_drift=finite(score.policy_drift),
        )
        for score in outcome.scores
    ]
    return ExtrapolationRecord(
        step=outcome.step,
        scores=tuple(scores),
        kept=outcome.kept,
        policy_drift=scores[outcome.kept].policy_drift if outcome.kept else None,
    )


@torch.no_grad()
def _place(moved: dict[str, torch.nn.Parameter], where: dict[str, torch.Tensor]) -> None:
    for name, parameter in moved.items():
        parameter.copy_(where[name])


def _reset_moments(optimizer: torch.optim.Optimizer, moved: list[torch.nn.Parameter]) -> None:
    for parameter in moved:
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][name].zero_()
