"""What every engine can do, whatever runs below it.

An engine holds one set of weights at a time. Teacher and student are roles, not classes. Sampling
is a function of (weights, prompt, `seed`, `prompt_id`, `sample_index`) and of nothing else that
matters: the k-th token of a rollout uses the k-th number of that rollout's own random stream, so a
longer window continues the same rollout and another batch size changes nothing but rounding.
"""

from pathlib import Path
from typing import Protocol

from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch


class Engine(Protocol):
    """A language model that samples and scores."""

    def load(self, folder: Path) -> None:
        """Replace the weights by those of a Hugging Face folder with the same architecture."""
        ...

    def sample(
        self,
        prompts: PromptBatch,
        *,
        window_tokens: int,
        samples_per_prompt: int,
        temperature: float,
        seed: int,
        stop_ids: tuple[int, ...],
        extra_draws: int = 0,
    ) -> RolloutBatch:
        """Sample up to `window_tokens` new tokens for each prompt, `samples_per_prompt` times.

        A rollout ends with the first id of `stop_ids` it draws (kept, finish_reason "stop") or at
        the window (finish_reason "length"). Temperature 0 is greedy. `behavior_logprobs` are raw:
        log-softmax of the logits before temperature. With `extra_draws` M, M further ids are drawn
        at every position from the same distribution, with replacement, and kept as candidates; they
        do not change what is sampled.

        Raises:
            UserError: a prompt plus the window does not fit the model's context.
        """
        ...

    def score(
        self,
        rollouts: RolloutBatch,
        *,
        top_k: int,
        forced_ids: tuple[int, ...],
        draws: int = 0,
        seed: int = 0,
    ) -> ScoreBatch:
        """Score every completion token at temperature 1 over the full vocabulary.

        Candidate ids of the rollouts are scored too. With `draws` above 0, the top K are replaced
        by that many ids drawn from the teacher with replacement, a function of `seed` and the
        rollout.

        Raises:
            UserError: `top_k` is larger than the vocabulary.
        """
        ...
