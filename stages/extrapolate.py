"""EffOPD: after steps 1, 2, 4, 8, ... look further along the way the weights came.

Scores are those of the first process, broadcast to all, and every process moves its own shard.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd_stream.config.sections import Extrapolation
from opd_stream.drift import DriftSums, drift_of
from opd_stream.engines.base import SamplingSettings
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.extrapolation import Outcome, Score, is_due, moved_parameters, search
from opd_stream.outcome import ExtrapolationRecord, PointScore
from opd_stream.store.policy import BASE
from opd_stream.store.reader import ScoredRows, epoch_order
from opd_stream.store.shards import prompts_batch
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.store.tree import load_tree, save_tree
from opd_stream.tasks.judges import open_judge
from opd_stream.types import PromptBatch
from stages.evaluate import judged_rows
from stages.learner import Learner
from stages.train_data import BatchPlan, step_batches
from stages.train_job import TrainJob
from stages.train_state import gathered, laid_out_as

SAMPLE_KEY = 0x0EFF0BD  # of the rows that score a point


class Extrapolator:
    """The searches of a round, and the point that the next direction starts from."""

    def __init__(
        self,
        settings: Extrapolation,
        learner: Learner,
        rows: ScoredRows,
        plan: BatchPlan,
        *,
        reward: "Reward | None" = None,
        base: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """A base is that of the round before, or of a checkpoint; None: the current weights."""
        self._settings, self._learner, self._reward = settings, learner, reward
        self._rows, self._plan = rows, plan
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
        moved, learner, drift = self._moved(), self._learner, None
        ordinary = {name: parameter.detach().clone() for name, parameter in moved.items()}
        learner.student.eval()
        outcome = search(
            list(moved.values()),
            [self._base[name] for name in moved],
            lambda: self._score(step),
            step=step + 1,
            settings=self._settings,
        )
        if outcome.kept:
            drift = self._drift(step)
            if not math.isfinite(drift.policy_drift):  # a reward does not see it
                _put_back(moved, ordinary)
                outcome, drift = replace(outcome, kept=0), None
        if outcome.kept and self._settings.reset_moments:
            _reset_moments(learner.optimizer, list(moved.values()))
        learner.student.train()
        if self._settings.base == "accepted":
            ordinary = {name: parameter.detach().clone() for name, parameter in moved.items()}
        self._base = ordinary
        learner.state.extrapolations.append(_record(outcome, drift))

    def base(self) -> dict[str, torch.Tensor]:
        """The base as whole tensors of the first process; every process takes part."""
        return gathered(self._base, is_kept=self._learner.fabric.is_global_zero)

    def _moved(self) -> dict[str, torch.nn.Parameter]:
        return moved_parameters(self._learner.student.named_parameters())

    def _score(self, step: int) -> Score:
        signal, reward, kl = self._settings.signal, None, None
        if signal in ("reward", "both"):
            assert self._reward is not None
            reward = self._reward.accuracy(self._learner.student.model)
        if signal in ("kl", "both"):
            sums = self._sums(step)
            kl = -sums["loss"] / max(sums["tokens"], 1.0)
        reward, kl = self._learner.fabric.broadcast((reward, kl))
        return Score(reward=reward, kl=kl)

    def _drift(self, step: int) -> DriftSums:
        with self._learner.fabric.autocast():  # as a training step and the floor
            sums = self._sums(step)
        return drift_of(self._learner.fabric.broadcast(sums))

    def _sums(self, step: int) -> dict[str, float]:
        """Cached objective and drift of a fixed sample of rows under the current weights."""
        order = epoch_order(len(self._rows), (self._plan.seed, SAMPLE_KEY))
        sample = order[: self._settings.rows].tolist()
        chosen = [self._plan.used(self._rows[position]) for position in sample]
        return self._learner.sums(step_batches(chosen, self._plan, step))


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
    settings = job.config.train.extrapolation
    if settings is None:
        return None
    left = Path(job.base) / BASE
    if base is None and job.is_continued and left.exists():
        base = load_tree(left)
    reward = None if settings.signal == "kl" else open_reward(job)
    return Extrapolator(settings, learner, rows, plan, reward=reward, base=base)


def save_base(base: dict[str, torch.Tensor], policy: Path) -> None:
    """Leave the base for the next round."""
    save_tree(base, policy / BASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The verifiable reward of a student in training: sampled answers to a few prompts, judged.

    Prompts, seeds and sampling settings are the same for every point that is scored.
    """

    prompts: PromptBatch
    answers: tuple[str, ...]
    is_right: Callable[[str, str], bool]
    tokenizer: Any
    sampling: SamplingSettings

    def accuracy(self, model: Any) -> float:
        """Share of right answers of a model in memory."""
        rollouts = TransformersEngine.over(model).sample(self.prompts, self.sampling)
        texts = self.tokenizer.batch_decode(
            [ids.tolist() for ids in rollouts.completion_ids],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        pairs = zip(texts, self.answers, strict=True)
        return sum(self.is_right(text, answer) for text, answer in pairs) / len(texts)


def open_reward(job: TrainJob) -> Reward:
    """The first training prompts that can be judged, as in evaluation (of several, the first)."""

    settings = job.config.train.extrapolation
    assert job.config.evaluation is not None
    assert settings is not None
    evaluation = job.config.evaluation.judged()
    assert evaluation is not None
    assert evaluation.judge is not None
    judge = open_judge(evaluation.judge)
    table, _ = judged_rows(job.store().by_fingerprint("prompts", job.prompts).read_all(), judge)
    table = table.slice(0, settings.prompts)
    return Reward(
        prompts=prompts_batch(table),
        answers=tuple(table["answer"].to_pylist()),
        is_right=judge,
        tokenizer=open_tokenizer(Path(job.base)),
        sampling=SamplingSettings(
            window_tokens=evaluation.max_new_tokens,
            temperature=evaluation.temperature,
            seed=evaluation.seed,
            top_p=evaluation.top_p,
            top_k=evaluation.top_k,
            min_p=evaluation.min_p,
            stop_ids=job.vocabulary.stop_ids,
            vocabulary=job.vocabulary.size,
        ),
    )


def _record(outcome: Outcome, drift: DriftSums | None) -> ExtrapolationRecord:
    """For reports; a score that is not finite is None there."""
    scores = [
        {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in asdict(score).items()
        }
        for score in outcome.scores
    ]
    return ExtrapolationRecord(
        step=outcome.step,
        scores=tuple(PointScore(**score) for score in scores),
        kept=outcome.kept,
        policy_drift=None if drift is None else drift.policy_drift,
    )


@torch.no_grad()
def _put_back(moved: dict[str, torch.nn.Parameter], ordinary: dict[str, torch.Tensor]) -> None:
    for name, parameter in moved.items():
        parameter.copy_(ordinary[name])


def _reset_moments(optimizer: torch.optim.Optimizer, moved: list[torch.nn.Parameter]) -> None:
    for parameter in moved:
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][name].zero_()
