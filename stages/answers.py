"""What a student in training answers to some prompts: how often rightly, and how often whole."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opd_stream.engines.base import SamplingSettings
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.store.shards import prompts_batch
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.tasks.judges import open_judge
from opd_stream.types import PromptBatch, RolloutBatch
from stages.evaluate import judged_rows
from stages.train_job import TrainJob

SAMPLE_KEY = 0x0A25E2  # of the prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answers of a student in training to some prompts, the same for every point."""

    prompts: PromptBatch
    sampling: SamplingSettings

    def rollouts(self, model: Any) -> RolloutBatch:
        """Of a model in memory."""
        return TransformersEngine.over(model).sample(self.prompts, self.sampling)

    def cut_share(self, model: Any) -> float:
        """Share of its answers that the window ended."""
        reasons = self.rollouts(model).finish_reason
        return reasons.count("length") / len(reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The verifiable reward of a student in training: its answers, judged."""

    asked: Answers
    answers: tuple[str, ...]
    is_right: Callable[[str, str], bool]
    tokenizer: Any

    def accuracy(self, model: Any) -> float:
        """Share of right answers of a model in memory."""
        texts = self.tokenizer.batch_decode(
            [ids.tolist() for ids in self.asked.rollouts(model).completion_ids],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        pairs = zip(texts, self.answers, strict=True)
        return sum(self.is_right(text, answer) for text, answer in pairs) / len(texts)


def open_reward(job: TrainJob) -> Reward:
    """Random training prompts that can be judged, as in evaluation (of several, the first)."""
    assert job.config.evaluation is not None
    evaluation = job.config.evaluation.judged()
    assert evaluation is not None
    assert evaluation.judge is not None
    judge = open_judge(evaluation.judge)
    table, _ = judged_rows(_prompts(job), judge)
    table = _some(table, job)
    sampling = SamplingSettings(
        window_tokens=evaluation.max_new_tokens,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
        top_p=evaluation.top_p,
        top_k=evaluation.top_k,
        min_p=evaluation.min_p,
        stop_ids=job.vocabulary.stop_ids,
        vocabulary=job.vocabulary.size,
    )
    return Reward(
        asked=Answers(prompts=prompts_batch(table), sampling=sampling),
        answers=tuple(table["answer"].to_pylist()),
        is_right=judge,
        tokenizer=open_tokenizer(Path(job.base)),
    )


def open_lengths(job: TrainJob) -> Answers:
    """Greedy answers to random training prompts, in the window of the round."""
    sampling = SamplingSettings(
        window_tokens=job.window_tokens,
        temperature=0.0,
        seed=job.config.seed,
        stop_ids=job.vocabulary.stop_ids,
        vocabulary=job.vocabulary.size,
    )
    return Answers(prompts=prompts_batch(_some(_prompts(job), job)), sampling=sampling)


def _prompts(job: TrainJob) -> pa.Table:
    return job.store().by_fingerprint("prompts", job.prompts).read_all()


def _some(table: pa.Table, job: TrainJob) -> pa.Table:
    """Random rows, others in every round."""
    settings = job.config.train.extrapolation
    assert settings is not None
    random = np.random.default_rng([job.config.seed, SAMPLE_KEY, job.first_step])
    return table.take(np.sort(random.permutation(table.num_rows)[: settings.prompts]))
