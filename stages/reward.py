"""The verifiable reward of a student in training: sampled answers to a few prompts, judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.store.shards import prompts_batch
from opd_stream.tasks.judges import open_judge
from opd_stream.types import PromptBatch
from stages.train_job import TrainJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The same prompts, seeds and sampling settings for every point that is scored."""

    prompts: PromptBatch
    answers: tuple[str, ...]
    is_right: Callable[[str, str], bool]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int

    def accuracy(self, model: Any) -> float:
        """Share of right answers of a model in memory."""
        engine = TransformersEngine.over(model)
        rollouts = engine.sample(
            self.prompts,
            window_tokens=self.max_new_tokens,
            samples_per_prompt=1,
            temperature=self.temperature,
            seed=self.seed,
            stop_ids=self.stop_ids,
        )
        texts = self.tokenizer.batch_decode(
            [ids.tolist() for ids in rollouts.completion_ids], skip_special_tokens=True
        )
        pairs = zip(texts, self.answers, strict=True)
        return sum(self.is_right(text, answer) for text, answer in pairs) / len(texts)


def open_reward(job: TrainJob) -> Reward:
    """The reward that a job's extrapolation asks for: its first prompts, judged as in evaluation.

    With several benchmarks, as in the first.

    Raises:
        UserError: a prompt has no reference answer.
    """
    from transformers import AutoTokenizer

    settings = job.config.train.extrapolation
    assert job.config.evaluation is not None
    assert settings is not None
    evaluation = next(iter(job.config.evaluation.parts().values()))
    assert evaluation.judge is not None
    table = job.store().by_fingerprint("prompts", job.prompts).read_unit(0)
    table = table.slice(0, settings.prompts)
    answers = table["answer"].to_pylist()
    if None in answers:
        raise UserError(
            "train.extrapolation.signal reward judges answers to training prompts, and a prompt "
            "has none; set prompts.answer_field, or use signal kl"
        )
    return Reward(
        prompts=prompts_batch(table),
        answers=tuple(answers),
        is_right=open_judge(evaluation.judge),
        tokenizer=AutoTokenizer.from_pretrained(job.base, trust_remote_code=False),
        stop_ids=job.stop_ids,
        max_new_tokens=evaluation.max_new_tokens,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
    )
