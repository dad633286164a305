"""The fast engine: vLLM, token ids in and out.

Log-probabilities are read at temperature 1 over the full vocabulary, before temperature and top-p,
flat and without detokenising. Scoring never reads the prefix cache (vLLM would return memory that
nothing wrote), and every load of weights empties it, so that no old key or value meets new weights;
outputs say which weights wrote them, and that is checked.

vLLM changes the process it runs in (threads, environment, seeds), so it lives in worker processes,
never beside training.
"""

import hashlib
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from opd_stream.engines.base import (
    Drawn,
    Ids,
    RowScores,
    SamplingSettings,
    ScoringSettings,
    VllmOptions,
    check_context,
    check_top_k,
    empty_rollouts,
    extended_rollouts,
    score_batch,
    unfinished_rows,
)
from opd_stream.engines.vllm_scores import (
    asked_ids,
    asked_top_k,
    first_known,
    left_out,
    scores_of_asked,
    scores_of_whole,
    whole_distribution,
)
from opd_stream.errors import UserError
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

MAX_WHOLE_VOCABULARY = 8192  # that is read whole where single ids cannot be asked for


class VllmEngine:
    """A vLLM engine in this process."""

    def __init__(self, folder: Path, *, dtype: str, options: VllmOptions | None = None) -> None:
        """Load a folder.

        Raises:
            UserError: vLLM is not installed or cannot serve the folder.
        """
        _prepare_environment()
        try:
            self._vllm: Any = import_module("vllm")
        except ImportError as error:
            raise UserError(
                "engine vllm needs the library vllm, which is not installed; pip install "
                "vllm (GPU), see docs/deploy.md for a CPU, or use transformers"
            ) from error
        self._options = options or VllmOptions()
        self._dtype, self._version = dtype, 0
        self._llm: Any = self._open(folder)
        engine = self._llm.llm_engine
        self._asks_for_ids = bool(getattr(engine.vllm_config, "use_v2_model_runner", False))
        config = engine.model_config
        self._vocab, self._context = config.get_vocab_size(), config.max_model_len

    def load(self, folder: Path) -> None:
        """See `Engine.load`: in place, and nothing of the old weights is left in the cache."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if self._vllm.platforms.current_platform.is_cpu():
            self._llm.apply_model(_pack_head)
        self._reset_prefix_cache()
        self._version += 1
        self._llm.llm_engine.set_weight_version(str(self._version))

    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingSettings,
        *,
        samples_per_prompt: int = 1,
        extra_draws: int = 0,
    ) -> RolloutBatch:
        """See `Engine.sample`.

        Raises:
            UserError: a prompt plus the window does not fit, or further draws are asked for, or
                fewer tokens exist than are kept.
        """
        if extra_draws:
            raise UserError(
                f"rollouts.extra_draws is {extra_draws}, which engine vllm cannot draw; use "
                "student.engine=transformers, or an objective that needs no further draws"
            )
        kept = settings.student_top_k
        check_top_k(kept, settings.vocabulary or self._vocab, name="rollouts.student_top_k")
        empty = empty_rollouts(prompts, samples_per_prompt, student_top_k=kept)
        return self.extend(empty, settings)

    def extend(self, rollouts: RolloutBatch, settings: SamplingSettings) -> RolloutBatch:
        """See `Engine.extend`.

        The new part has a random stream of its own, so it is a draw from the same distribution but
        not what `sample` with the longer window would have drawn.
        """
        window_tokens, seed = settings.window_tokens, settings.seed
        check_context(rollouts.prompt_id, rollouts.prompt_ids, window_tokens, self._context)
        unfinished = unfinished_rows(rollouts, window_tokens)
        starts = [len(rollouts.completion_ids[row]) for row in unfinished]
        drawn = self._generate(
            [
                np.concatenate([rollouts.prompt_ids[row], rollouts.completion_ids[row]])
                for row in unfinished
            ],
            [window_tokens - start for start in starts],
            [
                _seed(seed, rollouts.prompt_id[row], int(rollouts.sample_index[row]), start)
                for row, start in zip(unfinished, starts, strict=True)
            ],
            settings,
        )
        new = dict(zip(unfinished, drawn, strict=True))
        return extended_rollouts(rollouts, new, settings.stop_ids)

    def score(self, rollouts: RolloutBatch, settings: ScoringSettings) -> ScoreBatch:
        """See `Engine.score`.

        Raises:
            UserError: more candidates than the engine was opened for, draws from the teacher, or
                ids that this runner of vLLM cannot be asked for.
        """
        top_k, forced_ids = settings.top_k, settings.forced_ids
        check_top_k(top_k, settings.vocabulary or self._vocab)
        if settings.draws:
            raise UserError(
                "scores.codec is sampled, which needs draws from the teacher's whole distribution; "
                "engine vllm returns its top candidates only; use teacher.engine=transformers"
            )
        if not self._asks_for_ids and self._vocab > MAX_WHOLE_VOCABULARY:
            raise UserError(
                f"engine vllm cannot be asked for the log-probabilities of {len(forced_ids)} given "
                f"ids on this machine (vocabulary {self._vocab}, model runner V1); terminators "
                "and forced tokens would be lost; use teacher.engine=transformers"
            )
        texts = [
            np.concatenate([prompt, completion])
            for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
        ]
        check_context(rollouts.prompt_id, texts, 1, self._context)  # it always generates a token
        outputs = self._run(
            texts, [self._asking(rollouts, row, settings) for row in range(len(texts))]
        )
        rows: list[RowScores] = []
        own = rollouts.student_top_ids
        for row, output in enumerate(outputs):
            tokens, forced = len(rollouts.completion_ids[row]), len(forced_ids)
            if self._asks_for_ids:
                found = scores_of_asked(
                    output,
                    tokens,
                    top_k=top_k,
                    forced=forced,
                    limit=self._limit(settings),
                    vocabulary=self._vocab,
                    own_TS=None if own is None else own[row].astype(np.int32),
                )
                rows.append(found)
                continue
            dense_TV = whole_distribution(output.prompt_logprobs, tokens, self._vocab)
            asked_TJ = asked_ids(rollouts, row, forced_ids)
            found = scores_of_whole(
                dense_TV,
                asked_TJ,
                top_k=top_k,
                forced=forced,
                limit=settings.vocabulary,
                student_top_k=0 if own is None else own[row].shape[1],
            )
            rows.append(found)
        return score_batch(rows, rollouts)

    def _limit(self, settings: SamplingSettings | ScoringSettings) -> int | None:
        """The first id that does not count, where the head has one."""
        limit = settings.vocabulary
        return limit if limit is not None and limit < self._vocab else None

    def _asking(self, rollouts: RolloutBatch, row: int, settings: ScoringSettings) -> Any:
        """How the prompt scores of a row are asked for: given ids where vLLM can, else all ids."""
        plain: dict[str, Any] = {"max_tokens": 1, "flat_logprobs": True, "detokenize": False}
        if not self._asks_for_ids:
            return self._vllm.SamplingParams(**plain, prompt_logprobs=-1)
        asked_TJ = asked_ids(rollouts, row, settings.forced_ids)
        if not len(asked_TJ):
            return self._vllm.SamplingParams(**plain)
        return self._vllm.SamplingParams(
            **plain,
            prompt_logprobs=asked_top_k(settings.top_k, self._limit(settings), self._vocab),
            prompt_logprob_token_ids=asked_TJ,
            prompt_logprob_start=len(rollouts.prompt_ids[row]) - 1,
        )

    def _generate(
        self,
        texts: Sequence[Ids],
        windows: Sequence[int],
        seeds: Sequence[int],
        settings: SamplingSettings,
    ) -> list[Drawn]:
        """Ids and log-probabilities of what follows each text."""
        limit, kept = self._limit(settings), settings.student_top_k
        asked = asked_top_k(kept, limit, self._vocab) if kept else 0
        shared: Any = self._vllm.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            **left_out(limit, self._vocab, by_bias_only=self._asks_for_ids),
            logprobs=asked,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,  # stop ids say it all
            stop_token_ids=list(settings.stop_ids),
        )
        params: list[Any] = []
        for window, seed in zip(windows, seeds, strict=True):
            own = shared.clone()
            own.max_tokens, own.seed = window, seed
            params.append(own)
        drawn: list[Drawn] = []
        for output in self._run(texts, params):
            (completion,) = output.outputs
            self._check_version(completion)
            ids = np.array(completion.token_ids, np.int32)
            # Entries of a token: itself, then as many as were asked for, by rank.
            found, shape = completion.logprobs, (-1, 1 + asked)
            logprobs = np.array(found.logprobs, np.float32).reshape(shape)[: len(ids), 0]
            top = np.array(found.token_ids, np.int32).reshape(shape)[: len(ids), 1:]
            drawn.append(Drawn(ids, logprobs, first_known(top, kept, limit) if kept else None))
        return drawn

    def _run(self, texts: Sequence[Ids], params: Sequence[Any]) -> list[Any]:
        prompts = [{"prompt_token_ids": [int(token) for token in text]} for text in texts]
        return self._llm.generate(prompts, list(params), use_tqdm=False)

    def _check_version(self, completion: Any) -> None:
        versions = {span.version for span in completion.weight_versions or ()}
        expected = str(self._version) if self._version else "default"
        if versions - {expected}:
            raise RuntimeError(
                f"vLLM sampled with weights {sorted(versions)}; {expected} were loaded"
            )

    def _reset_prefix_cache(self) -> None:
        self._llm.reset_prefix_cache()

    def _open(self, folder: Path) -> Any:
        options = self._options
        settings: dict[str, Any] = {
            "model": str(folder),
            "dtype": self._dtype,
            "seed": 0,
            "tensor_parallel_size": options.tensor_parallel,
            "gpu_memory_utilization": options.memory_share,
            "max_num_batched_tokens": options.batched_tokens,
            "enforce_eager": not options.compiled,
            "max_logprobs": -1,
            "logprobs_mode": "raw_logprobs",
            "disable_log_stats": True,
            "trust_remote_code": False,
        }
        if options.kv_cache_bytes is not None:
            settings["kv_cache_memory_bytes"] = options.kv_cache_bytes
        if options.max_context is not None:
            settings["max_model_len"] = options.max_context
        try:
            return self._vllm.LLM(**settings)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"vLLM cannot serve {folder} ({reason}); check the folder and the vllm options of "
                "the role, or use engine transformers"
            ) from error


def _pack_head(model: Any) -> None:
    """Refresh the output head's packed copy of its weights.

    vLLM 0.32 packs it for a CPU when it is first loaded and forgets it when tied embeddings are
    reloaded: without this, new hidden states meet the old head.
    """
    head = model.lm_head
    if model.config.tie_word_embeddings:
        head.weight = model.model.embed_tokens.weight
    head.quant_method.process_weights_after_loading(head)


def _seed(seed: int, prompt_id: str, sample: int, start: int) -> int:
    """A random stream for each rollout, whatever else is in the batch."""
    digest = hashlib.sha256(f"{seed}/{sample}/{start}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _prepare_environment() -> None:
    """Set what vLLM reads while it is imported; what the user has set stays."""
    import torch

    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not torch.cuda.is_available():
        defaults |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its processes start slowly
            "TORCH_COMPILE_DISABLE": "1",  # it would compile one small function for seconds
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
