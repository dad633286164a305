"""A language model of a page, for tests of everything around a model: numpy only, no weights read.

The distribution of the next token is a function of (identity of the folder, last token), so
sampling and scoring agree with each other and two folders differ as two models would.
"""

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opd_stream.engines.base import (
    Drawn,
    Ids,
    RowScores,
    SamplingSettings,
    ScoringSettings,
    check_context,
    check_top_k,
    empty_rollouts,
    extended_rollouts,
    ranked_union,
    score_batch,
    unfinished_rows,
)
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
        settings: SamplingSettings,
        *,
        samples_per_prompt: int = 1,
        extra_draws: int = 0,
    ) -> RolloutBatch:
        """See `Engine.sample`."""
        window = settings.window_tokens
        check_context(prompts.prompt_id, prompts.prompt_ids, window, CONTEXT_TOKENS)
        kept = settings.student_top_k
        check_top_k(kept, self._vocab_size, name="rollouts.student_top_k")
        empty = empty_rollouts(prompts, samples_per_prompt, student_top_k=kept)
        rollouts = self.extend(empty, settings)
        if not extra_draws:
            return rollouts
        drawn: list[Drawn] = []
        for row, tokens in enumerate(rollouts.completion_ids):
            dense_TV = self._dense(int(rollouts.prompt_ids[row][-1]), tokens)
            random = np.random.default_rng([*_key(rollouts, row, settings.seed), 1])
            uniforms = random.random((len(tokens), extra_draws, 1))
            cumulative_TV = np.exp(dense_TV).cumsum(1)
            ids = (uniforms > cumulative_TV[:, None]).sum(2).clip(max=self._vocab_size - 1)
            drawn.append(Drawn(ids.astype(np.int32), _at(dense_TV, ids)))
        return replace(
            rollouts,
            candidate_ids=tuple(each.ids for each in drawn),
            candidate_behavior_logprobs=tuple(each.logprobs for each in drawn),
        )

    def extend(self, rollouts: RolloutBatch, settings: SamplingSettings) -> RolloutBatch:
        """See `Engine.extend`."""
        new: dict[int, Drawn] = {}
        for row in unfinished_rows(rollouts, settings.window_tokens):
            before = rollouts.completion_ids[row]
            last = int(before[-1] if len(before) else rollouts.prompt_ids[row][-1])
            random = np.random.default_rng(_key(rollouts, row, settings.seed))
            uniforms = random.random(settings.window_tokens)[len(before) :]
            tokens = self._continue(last, uniforms, settings)
            dense_TV = self._dense(last, tokens)
            kept = _ranked(dense_TV, settings.student_top_k)[0] if settings.student_top_k else None
            new[row] = Drawn(tokens, _at(dense_TV, tokens[:, None])[:, 0], kept)
        time.sleep(self._seconds_per_token * sum(len(each.ids) for each in new.values()))
        return extended_rollouts(rollouts, new, settings.stop_ids)

    def score(self, rollouts: RolloutBatch, settings: ScoringSettings) -> ScoreBatch:
        """See `Engine.score`."""
        check_top_k(settings.top_k, self._vocab_size)
        candidates = rollouts.candidate_ids
        rows: list[RowScores] = []
        for row, tokens in enumerate(rollouts.completion_ids):
            dense_TV = self._dense(int(rollouts.prompt_ids[row][-1]), tokens)
            if settings.draws:
                key = _key(rollouts, row, settings.seed, "/draws")
                ids, top, tail = _drawn(dense_TV, settings.draws, key)
            else:
                own = rollouts.student_top_ids
                own_TS = None if own is None else own[row]
                ids, top, tail = _ranked(dense_TV, settings.top_k, own_TS)
            asked = tokens[:, None]
            if candidates is not None:
                asked = np.concatenate([asked, candidates[row]], axis=1)
            forced = dense_TV[:, list(settings.forced_ids)].astype(np.float32)
            rows.append(RowScores(_at(dense_TV, asked), ids, top, tail, forced))
        time.sleep(self._seconds_per_token * rollouts.completion_tokens)
        return score_batch(rows, rollouts)

    def _continue(
        self,
        last: int,
        uniforms_T: NDArray[np.float64],
        settings: SamplingSettings,
    ) -> NDArray[np.int32]:
        tokens: list[int] = []
        for uniform in uniforms_T:
            logprobs_V = self._logprobs_VV[last % self._vocab_size]
            if settings.temperature == 0:
                last = int(np.argmax(logprobs_V))
            else:
                cumulative_V = np.exp(logprobs_V / settings.temperature).cumsum()
                reached = uniform * cumulative_V[-1]
                last = int(cast(Any, np.searchsorted(cumulative_V, reached, side="right")))
            tokens.append(last)
            if last in settings.stop_ids:
                break
        return np.array(tokens, np.int32)

    def _dense(self, last: int, tokens_T: Ids) -> NDArray[np.float64]:
        """Log-probabilities [T, V] at every place of a completion."""
        before_T = np.concatenate([[last], tokens_T])[: len(tokens_T)]
        return self._logprobs_VV[before_T % self._vocab_size]


def _key(rollouts: RolloutBatch, row: int, seed: int, purpose: str = "") -> list[int]:
    """The seed of a rollout's own random numbers."""
    text = f"{seed}/{rollouts.sample_index[row]}/{rollouts.prompt_id[row]}{purpose}"
    return list(hashlib.sha256(text.encode()).digest())


def _at(dense_TV: NDArray[np.float64], ids_TJ: Ids) -> NDArray[np.float32]:
    return np.take_along_axis(dense_TV, ids_TJ.astype(np.int64), axis=1).astype(np.float32)


Ranked = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]  # ids, logprobs, tail


def _ranked(dense_TV: NDArray[np.float64], top_k: int, own_TS: Ids | None = None) -> Ranked:
    order_TV = np.argsort(-dense_TV, axis=1, kind="stable")
    return ranked_union(dense_TV, order_TV[:, :top_k], own_TS)


def _drawn(dense_TV: NDArray[np.float64], draws: int, key: list[int]) -> Ranked:
    random = np.random.default_rng(key)
    ids_TD = np.zeros((len(dense_TV), draws), np.int32)
    logprobs_TD = np.full((len(dense_TV), draws), -np.inf, np.float32)
    for place, logprobs_V in enumerate(dense_TV):
        probabilities_V = np.exp(logprobs_V) / np.exp(logprobs_V).sum()
        drawn = random.choice(len(logprobs_V), draws, p=probabilities_V)
        distinct, counts = np.unique(drawn, return_counts=True)
        ids_TD[place, : len(distinct)] = distinct
        logprobs_TD[place, : len(distinct)] = np.log(counts / draws)
    return ids_TD, logprobs_TD, np.full(len(dense_TV), -np.inf, np.float32)
