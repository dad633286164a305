"""What every engine can do, whatever runs below it.

An engine holds one set of weights at a time. Teacher and student are roles, not classes. Sampling
is a function of (weights, prompt, `seed`, `prompt_id`, `sample_index`) and of nothing else that
matters: the k-th token of a rollout uses the k-th number of that rollout's own random stream, so a
longer window continues the same rollout and another batch size changes nothing but rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """What `sample` and `extend` are asked for alike."""

    window_tokens: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSettings:
    """What `score` is asked for."""

    top_k: int
    forced_ids: tuple[int, ...]
    draws: int = 0
    seed: int = 0


def unfinished(rollouts: RolloutBatch, window_tokens: int) -> list[int]:
    """Rows that a window shorter than `window_tokens` ended."""
    return [
        row
        for row, reason in enumerate(rollouts.finish_reason)
        if reason == "length" and len(rollouts.completion_ids[row]) < window_tokens
    ]


def extended(
    rollouts: RolloutBatch,
    grown: Mapping[int, tuple[NDArray[np.integer[Any]], NDArray[np.float32]]],
    stop_ids: tuple[int, ...],
) -> RolloutBatch:
    """The rollouts with new ids and log-probabilities at the end of some rows."""
    ids, logprobs = list(rollouts.completion_ids), list(rollouts.behavior_logprobs)
    reasons = list(rollouts.finish_reason)
    for row, (new_ids, new_logprobs) in grown.items():
        ids[row] = np.concatenate([ids[row], new_ids])
        logprobs[row] = np.concatenate([logprobs[row], new_logprobs]).astype(np.float32)
        reasons[row] = "stop" if int(ids[row][-1]) in stop_ids else "length"
    return replace(
        rollouts,
        completion_ids=tuple(ids),
        behavior_logprobs=tuple(logprobs),
        finish_reason=tuple(reasons),
        candidate_ids=None,
        candidate_behavior_logprobs=None,
    )


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

    def extend(
        self,
        rollouts: RolloutBatch,
        *,
        window_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: tuple[int, ...],
    ) -> RolloutBatch:
        """Continue the rollouts that a window ended, up to `window_tokens` tokens each.

        Finished ones stay. New tokens have the log-probabilities of the weights at hand. Under the
        weights, seed and temperature of the first sampling, the result is what `sample` with the
        longer window would have given. Candidates of the student are not kept.

        Raises:
            UserError: a row plus the window does not fit the model's context.
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
