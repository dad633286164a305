"""A language model of a page, for tests of everything around a model: numpy only, no weights read.

The distribution of the next token is a function of (identity of the folder, last token), so
sampling and scoring agree with each other and two folders differ as two models would.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd_stream.errors import UserError
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

CONTEXT_TOKENS = 4096


class FakeEngine:
    """Implements `Engine`; `seconds_per_token` makes it as slow as a real one would be."""

    def __init__(
        self, folder: Path, *, vocab_size: int = 97, seconds_per_token: float = 0.0
    ) -> None:
        self._vocab_size, self._seconds_per_token = vocab_size, seconds_per_token
        self.load(folder)

    def load(self, folder: Path) -> None:
        """Another identity: the digest of the folder's safetensors, or of its name without any."""
        weights = sorted(folder.glob("*.safetensors"))
        content = b"".join(path.read_bytes() for path in weights) or folder.name.encode()
        digest = hashlib.sha256(content).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        logits = random.normal(0, 2, (self._vocab_size, self._vocab_size))
        self._logprobs_VV = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def sample(
        self,
        prompts: PromptBatch,
        *,
        window_tokens: int,
        samples_per_prompt: int,
        temperature: float,
        seed: int,
        stop_ids: tuple[int, ...],
    ) -> RolloutBatch:
        """See `Engine.sample`."""
        rows: list[tuple[str, int, NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = []
        for prompt_id, ids in zip(prompts.prompt_id, prompts.prompt_ids, strict=True):
            if len(ids) + window_tokens > CONTEXT_TOKENS:
                raise UserError(
                    f"prompt {prompt_id!r} has {len(ids)} tokens and the window {window_tokens}; "
                    f"the model reads {CONTEXT_TOKENS}; lower the window or max_prompt_tokens"
                )
            for sample in range(samples_per_prompt):
                key = hashlib.sha256(f"{seed}/{sample}/{prompt_id}".encode()).digest()
                uniforms = np.random.default_rng(list(key)).random(window_tokens)
                tokens = self._continue(int(ids[-1]), uniforms, temperature, stop_ids)
                logprobs = self._rows(int(ids[-1]), tokens)[np.arange(len(tokens)), tokens]
                rows.append((prompt_id, sample, ids, tokens, logprobs.astype(np.float32)))
        time.sleep(self._seconds_per_token * sum(len(row[3]) for row in rows))
        return RolloutBatch(
            prompt_id=tuple(row[0] for row in rows),
            sample_index=np.array([row[1] for row in rows], np.int32),
            prompt_ids=tuple(row[2] for row in rows),
            completion_ids=tuple(row[3] for row in rows),
            behavior_logprobs=tuple(row[4] for row in rows),
            finish_reason=tuple("stop" if row[3][-1] in stop_ids else "length" for row in rows),
        )

    def score(
        self, rollouts: RolloutBatch, *, top_k: int, forced_ids: tuple[int, ...]
    ) -> ScoreBatch:
        """See `Engine.score`."""
        if top_k > self._vocab_size:
            raise UserError(
                f"top_k is {top_k} but the vocabulary has {self._vocab_size} tokens; "
                "lower scores.top_k"
            )
        sampled: list[NDArray[np.float32]] = []
        top_ids: list[NDArray[np.int32]] = []
        top: list[NDArray[np.float32]] = []
        tail: list[NDArray[np.float32]] = []
        forced: list[NDArray[np.float32]] = []
        for prompt, tokens in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
            dense_TV = self._rows(int(prompt[-1]), tokens)
            order_TV = np.argsort(-dense_TV, axis=1, kind="stable")
            ranked_TV = np.take_along_axis(dense_TV, order_TV, axis=1)
            with np.errstate(divide="ignore"):
                tail.append(np.log(np.exp(ranked_TV[:, top_k:]).sum(1)).astype(np.float32))
            sampled.append(dense_TV[np.arange(len(tokens)), tokens].astype(np.float32))
            top_ids.append(order_TV[:, :top_k].astype(np.int32))
            top.append(ranked_TV[:, :top_k].astype(np.float32))
            forced.append(dense_TV[:, list(forced_ids)].astype(np.float32))
        time.sleep(self._seconds_per_token * rollouts.completion_tokens)
        return ScoreBatch(
            teacher_logprobs=tuple(sampled),
            teacher_top_ids=tuple(top_ids),
            teacher_top_logprobs=tuple(top),
            teacher_tail_logprobs=tuple(tail),
            teacher_forced_logprobs=tuple(forced),
            refused={},
        )

    def _continue(
        self,
        last: int,
        uniforms_T: NDArray[np.float64],
        temperature: float,
        stop_ids: tuple[int, ...],
    ) -> NDArray[np.int32]:
        tokens: list[int] = []
        for uniform in uniforms_T:
            logprobs_V = self._logprobs_VV[last % self._vocab_size]
            if temperature == 0:
                last = int(logprobs_V.argmax())
            else:
                cumulative_V = np.exp(logprobs_V / temperature).cumsum()
                last = int(np.searchsorted(cumulative_V, uniform * cumulative_V[-1], side="right"))
            tokens.append(last)
            if last in stop_ids:
                break
        return np.array(tokens, np.int32)

    def _rows(self, last: int, tokens_T: NDArray[np.int32]) -> NDArray[np.float64]:
        """Log-probabilities [T, V] at every place of a completion."""
        before_T = np.concatenate([[last], tokens_T])[: len(tokens_T)]
        return self._logprobs_VV[before_T % self._vocab_size]
