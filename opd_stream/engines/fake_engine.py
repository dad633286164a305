"""A language model of a page, for tests of everything around a model: numpy only, no weights read.

The distribution of the next token is a function of (identity of the folder, last token), so
sampling and scoring agree with each other and two folders differ as two models would.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.engines.base import extended, unfinished
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
        extra_draws: int = 0,
    ) -> RolloutBatch:
        """See `Engine.sample`."""
        rows: list[tuple[str, int, NDArray[Any], NDArray[np.int32], NDArray[np.float32]]] = []
        candidates: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = []
        for prompt_id, ids in zip(prompts.prompt_id, prompts.prompt_ids, strict=True):
            if len(ids) + window_tokens > CONTEXT_TOKENS:
                raise UserError(
                    f"prompt {prompt_id!r} has {len(ids)} tokens and the window {window_tokens}; "
                    f"the model reads {CONTEXT_TOKENS}; lower the window or max_prompt_tokens"
                )
            for sample in range(samples_per_prompt):
                key = _key(seed, prompt_id, sample)
                uniforms = _uniforms(seed, prompt_id, sample, window_tokens)
                tokens = self._continue(int(ids[-1]), uniforms, temperature, stop_ids)
                logprobs = self._rows(int(ids[-1]), tokens)[np.arange(len(tokens)), tokens]
                rows.append((prompt_id, sample, ids, tokens, logprobs.astype(np.float32)))
                dense_TV = self._rows(int(ids[-1]), tokens)
                extra = np.random.default_rng([*key, 1]).random((len(tokens), extra_draws, 1))
                cumulative_TV = np.exp(dense_TV).cumsum(1)
                drawn = (extra > cumulative_TV[:, None]).sum(2).clip(max=self._vocab_size - 1)
                asked = np.take_along_axis(dense_TV, drawn, axis=1)
                candidates.append((drawn.astype(np.int32), asked.astype(np.float32)))
        time.sleep(self._seconds_per_token * sum(len(row[3]) for row in rows))
        return RolloutBatch(
            prompt_id=tuple(row[0] for row in rows),
            sample_index=np.array([row[1] for row in rows], np.int32),
            prompt_ids=tuple(row[2] for row in rows),
            completion_ids=tuple(row[3] for row in rows),
            behavior_logprobs=tuple(row[4] for row in rows),
            finish_reason=tuple("stop" if row[3][-1] in stop_ids else "length" for row in rows),
            candidate_ids=tuple(ids for ids, _ in candidates) if extra_draws else None,
            candidate_behavior_logprobs=(
                tuple(logprobs for _, logprobs in candidates) if extra_draws else None
            ),
        )

    def extend(
        self,
        rollouts: RolloutBatch,
        *,
        window_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: tuple[int, ...],
    ) -> RolloutBatch:
        """See `Engine.extend`."""
        grown: dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
        for row in unfinished(rollouts, window_tokens):
            before, sample = rollouts.completion_ids[row], int(rollouts.sample_index[row])
            last = int(before[-1] if len(before) else rollouts.prompt_ids[row][-1])
            uniforms = _uniforms(seed, rollouts.prompt_id[row], sample, window_tokens)
            tokens = self._continue(last, uniforms[len(before) :], temperature, stop_ids)
            logprobs = self._rows(last, tokens)[np.arange(len(tokens)), tokens]
            grown[row] = (tokens, logprobs.astype(np.float32))
        time.sleep(self._seconds_per_token * sum(len(ids) for ids, _ in grown.values()))
        return extended(rollouts, grown, stop_ids)

    def score(
        self,
        rollouts: RolloutBatch,
        *,
        top_k: int,
        forced_ids: tuple[int, ...],
        draws: int = 0,
        seed: int = 0,
    ) -> ScoreBatch:
        """See `Engine.score`."""
        if top_k > self._vocab_size:
            raise UserError(
                f"top_k is {top_k} but the vocabulary has {self._vocab_size} tokens; "
                "lower scores.top_k"
            )
        columns: dict[str, list[NDArray[Any]]] = {
            name: [] for name in ("sampled", "ids", "top", "tail", "forced", "candidates")
        }
        for row, (prompt, tokens) in enumerate(
            zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
        ):
            dense_TV = self._rows(int(prompt[-1]), tokens)
            if draws:
                key = f"{seed}/{rollouts.sample_index[row]}/{rollouts.prompt_id[row]}/draws"
                ids, top, tail = _drawn(dense_TV, draws, key)
            else:
                ids, top, tail = _ranked(dense_TV, top_k)
            columns["sampled"].append(dense_TV[np.arange(len(tokens)), tokens].astype(np.float32))
            columns["ids"].append(ids)
            columns["top"].append(top)
            columns["tail"].append(tail)
            columns["forced"].append(dense_TV[:, list(forced_ids)].astype(np.float32))
            if rollouts.candidate_ids is not None:
                asked = np.take_along_axis(dense_TV, rollouts.candidate_ids[row], axis=1)
                columns["candidates"].append(asked.astype(np.float32))
        time.sleep(self._seconds_per_token * rollouts.completion_tokens)
        return ScoreBatch(
            teacher_logprobs=tuple(columns["sampled"]),
            teacher_top_ids=tuple(columns["ids"]),
            teacher_top_logprobs=tuple(columns["top"]),
            teacher_tail_logprobs=tuple(columns["tail"]),
            teacher_forced_logprobs=tuple(columns["forced"]),
            refused={},
            candidate_teacher_logprobs=(
                None if rollouts.candidate_ids is None else tuple(columns["candidates"])
            ),
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

    def _rows(self, last: int, tokens_T: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Log-probabilities [T, V] at every place of a completion."""
        before_T = np.concatenate([[last], tokens_T])[: len(tokens_T)]
        return self._logprobs_VV[before_T % self._vocab_size]


def _key(seed: int, prompt_id: str, sample: int) -> list[int]:
    return list(hashlib.sha256(f"{seed}/{sample}/{prompt_id}".encode()).digest())


def _uniforms(seed: int, prompt_id: str, sample: int, window: int) -> NDArray[np.float64]:
    return np.random.default_rng(_key(seed, prompt_id, sample)).random(window)


Scores = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]  # ids, logprobs, tail


def _ranked(dense_TV: NDArray[np.float64], top_k: int) -> Scores:
    order_TV = np.argsort(-dense_TV, axis=1, kind="stable")
    ranked_TV = np.take_along_axis(dense_TV, order_TV, axis=1)
    with np.errstate(divide="ignore"):
        tail_T = np.log(np.exp(ranked_TV[:, top_k:]).sum(1))
    ids_TK = order_TV[:, :top_k].astype(np.int32)
    return ids_TK, ranked_TV[:, :top_k].astype(np.float32), tail_T.astype(np.float32)


def _drawn(dense_TV: NDArray[np.float64], draws: int, key: str) -> Scores:
    random = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()))
    ids_TD = np.zeros((len(dense_TV), draws), np.int32)
    logprobs_TD = np.full((len(dense_TV), draws), -np.inf, np.float32)
    for place, logprobs_V in enumerate(dense_TV):
        probabilities_V = np.exp(logprobs_V) / np.exp(logprobs_V).sum()
        drawn = random.choice(len(logprobs_V), draws, p=probabilities_V)
        distinct, counts = np.unique(drawn, return_counts=True)
        ids_TD[place, : len(distinct)] = distinct
        logprobs_TD[place, : len(distinct)] = np.log(counts / draws)
    return ids_TD, logprobs_TD, np.full(len(dense_TV), -np.inf, np.float32)
