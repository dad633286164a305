"""The reference engine: any Hugging Face causal language model, CPU or one GPU.

Sampling is a loop of its own: no logits processors, the head only at the last position, ended rows
taken out, prompts read once for all their samples. Scoring reads them once, too (`prefill`), and
runs the head only over completion tokens, in chunks, so no [B, T, V] tensor ever exists.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from opd_stream.engines.base import extended, unfinished
from opd_stream.engines.chunks import logit_rows
from opd_stream.engines.decoding import LibraryDecoder, open_decoder
from opd_stream.engines.head import logits_head
from opd_stream.engines.prefill import completion_hidden, padded
from opd_stream.engines.sampling import draw, draw_uniforms, uniforms
from opd_stream.errors import UserError
from opd_stream.logprobs import HeadScores, head_scores
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

LIVE_SHARE = 0.75  # ended rows are taken out when fewer than this share is still running


class TransformersEngine:
    """One set of weights that samples and scores."""

    def __init__(self, folder: Path, *, dtype: str, batch_rows: int, device: str = "cpu") -> None:
        self._dtype, self._device = getattr(torch, dtype), torch.device(device)
        self._batch_rows = batch_rows
        self._open_decoder = open_decoder
        self._model: Any = self._read(folder)

    @classmethod
    def over(cls, model: Any, *, batch_rows: int = 64) -> Self:
        """An engine over a model in memory, which stays as it is (it may be in training)."""
        engine = cls.__new__(cls)
        engine._dtype, engine._device = model.dtype, model.device
        engine._batch_rows, engine._model = batch_rows, model
        engine._open_decoder = LibraryDecoder  # the fast one lays weights out anew
        return engine

    def load(self, folder: Path) -> None:
        """Other weights of the same architecture, in place."""
        self._model.load_state_dict(self._read(folder).state_dict())

    @torch.inference_mode()
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
        self._check_context(prompts, window_tokens)
        lengths = [len(ids) for ids in prompts.prompt_ids]
        order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
        per_batch = max(1, self._batch_rows // samples_per_prompt)
        tokens: dict[int, NDArray[np.int32]] = {}  # rollout -> [T, 1 + M], the sampled first
        logprobs: dict[int, NDArray[np.float32]] = {}
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            numbers = np.stack(
                [
                    draw_uniforms(seed, prompts.prompt_id[row], sample, window_tokens, extra_draws)
                    for row in chosen
                    for sample in range(samples_per_prompt)
                ]
            )
            ids = [prompts.prompt_ids[row] for row in chosen]
            done = self._decode(ids, numbers, temperature, stop_ids)
            for place, (row_tokens, row_logprobs) in enumerate(done):
                prompt, sample = divmod(place, samples_per_prompt)
                rollout = chosen[prompt] * samples_per_prompt + sample
                tokens[rollout], logprobs[rollout] = row_tokens, row_logprobs
        rollouts = range(len(lengths) * samples_per_prompt)
        stops = set(stop_ids)
        return RolloutBatch(
            prompt_id=tuple(prompts.prompt_id[row // samples_per_prompt] for row in rollouts),
            sample_index=np.tile(np.arange(samples_per_prompt, dtype=np.int32), len(lengths)),
            prompt_ids=tuple(prompts.prompt_ids[row // samples_per_prompt] for row in rollouts),
            completion_ids=tuple(tokens[row][:, 0] for row in rollouts),
            behavior_logprobs=tuple(logprobs[row][:, 0] for row in rollouts),
            finish_reason=tuple(
                "stop" if int(tokens[row][-1, 0]) in stops else "length" for row in rollouts
            ),
            candidate_ids=tuple(tokens[row][:, 1:] for row in rollouts) if extra_draws else None,
            candidate_behavior_logprobs=(
                tuple(logprobs[row][:, 1:] for row in rollouts) if extra_draws else None
            ),
        )

    @torch.inference_mode()
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
        self._check_context(
            PromptBatch(prompt_id=rollouts.prompt_id, prompt_ids=rollouts.prompt_ids), window_tokens
        )
        todo = unfinished(rollouts, window_tokens)
        texts = {
            row: np.concatenate([rollouts.prompt_ids[row], rollouts.completion_ids[row]])
            for row in todo
        }
        grown: dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]] = {}
        order = sorted(todo, key=lambda row: (len(texts[row]), row))
        for start in range(0, len(order), self._batch_rows):
            chosen = order[start : start + self._batch_rows]
            starts = {row: len(rollouts.completion_ids[row]) for row in chosen}
            most = window_tokens - min(starts.values())
            numbers = np.zeros((len(chosen), most, 1))
            for place, row in enumerate(chosen):
                sample = int(rollouts.sample_index[row])
                stream = uniforms(seed, rollouts.prompt_id[row], sample, window_tokens)
                numbers[place, : window_tokens - starts[row], 0] = stream[starts[row] :]
            done = self._decode([texts[row] for row in chosen], numbers, temperature, stop_ids)
            for row, (ids, logprobs) in zip(chosen, done, strict=True):
                room = window_tokens - starts[row]
                grown[row] = (ids[:room, 0], logprobs[:room, 0])
        return extended(rollouts, grown, stop_ids)

    @torch.inference_mode()
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
        vocab = self._model.config.get_text_config().vocab_size
        if top_k > vocab:
            raise UserError(
                f"top_k is {top_k} but the vocabulary has {vocab} tokens; lower scores.top_k"
            )
        columns: dict[str, list[Any]] = {
            name: [None] * len(rollouts) for name in HeadScores.__slots__
        }
        refused: dict[int, str] = {}
        lengths = [
            len(prompt) + len(completion)
            for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
        ]
        self._check_lengths(rollouts, lengths)
        prompts = [ids.tobytes() for ids in rollouts.prompt_ids]
        longest: dict[bytes, int] = {}
        for prompt, length in zip(prompts, lengths, strict=True):
            longest[prompt] = max(length, longest.get(prompt, 0))
        # Similar lengths together, and rows of one prompt, which is then read once.
        order = sorted(range(len(lengths)), key=lambda r: (longest[prompts[r]], prompts[r], r))
        for start in range(0, len(order), self._batch_rows):
            chosen = order[start : start + self._batch_rows]
            for row, scores in zip(
                chosen,
                self._score_rows(rollouts, chosen, top_k, forced_ids, draws, seed),
                strict=True,
            ):
                if np.isnan(scores["asked_NJ"]).any() or np.isnan(scores["top_NK"]).any():
                    refused[row] = "the teacher's log-probabilities are not finite"
                    scores = {name: value[:0] for name, value in scores.items()}
                for name, value in scores.items():
                    columns[name][row] = value
        return ScoreBatch(
            teacher_logprobs=tuple(asked[:, 0] for asked in columns["asked_NJ"]),
            teacher_top_ids=tuple(columns["top_ids_NK"]),
            teacher_top_logprobs=tuple(columns["top_NK"]),
            teacher_tail_logprobs=tuple(columns["tail_N"]),
            teacher_forced_logprobs=tuple(columns["forced_NF"]),
            refused=refused,
            candidate_teacher_logprobs=(
                None
                if rollouts.candidate_ids is None
                else tuple(asked[:, 1:] for asked in columns["asked_NJ"])
            ),
        )

    def _decode(
        self,
        prompt_ids: Sequence[NDArray[np.integer[Any]]],
        uniforms_RTM: NDArray[np.float64],
        temperature: float,
        stop_ids: tuple[int, ...],
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Drawn ids and behavior log-probabilities of R rows [T, M], R a multiple of the prompts.

        Column 0 is what is sampled.
        """
        head = logits_head(self._model)
        rows, window, columns = uniforms_RTM.shape
        numbers = torch.from_numpy(uniforms_RTM).to(self._device)
        stops = torch.tensor(stop_ids, dtype=torch.long, device=self._device)
        ids, mask = padded(prompt_ids, self._device, side="left")
        decoder = self._open_decoder(self._model)
        hidden = decoder.prefill(ids, mask.bool())
        samples = rows // len(prompt_ids)
        if samples > 1:
            spread = torch.arange(len(prompt_ids), device=self._device).repeat_interleave(samples)
            decoder.select(spread)
            hidden = hidden[spread]
        tokens = torch.zeros(rows, window, columns, dtype=torch.long, device=self._device)
        logprobs = torch.zeros(rows, window, columns, device=self._device)
        lengths = torch.full((rows,), window, device=self._device)
        live = torch.arange(rows, device=self._device)  # rows the decoder still holds
        running = torch.ones(rows, dtype=torch.bool, device=self._device)  # of them, not ended
        for place in range(window):
            all_drawn, drawn_logprobs = draw(head(hidden), numbers[live, place], temperature)
            tokens[live, place], logprobs[live, place] = all_drawn, drawn_logprobs
            drawn = all_drawn[:, 0]
            ended = running & torch.isin(drawn, stops)
            lengths[live[ended]] = place + 1
            running = running & ~ended
            count = int(running.sum())
            if count == 0 or place + 1 == window:
                break
            if count < LIVE_SHARE * len(live):
                kept = running.nonzero()[:, 0]
                decoder.select(kept)
                live, drawn, running = live[kept], drawn[kept], running[kept]
            hidden = decoder.step(drawn)
        all_tokens, all_logprobs = tokens.int().cpu().numpy(), logprobs.cpu().numpy()
        for row, length in enumerate(lengths.tolist()):
            yield all_tokens[row, :length].copy(), all_logprobs[row, :length].copy()

    def _score_rows(
        self,
        rollouts: RolloutBatch,
        chosen: list[int],
        top_k: int,
        forced_ids: tuple[int, ...],
        draws: int,
        seed: int,
    ) -> Iterator[dict[str, NDArray[Any]]]:
        prompts = [rollouts.prompt_ids[row] for row in chosen]
        completions = [rollouts.completion_ids[row] for row in chosen]
        hidden = completion_hidden(self._model.get_decoder(), prompts, completions, self._device)
        lengths = torch.tensor([len(completion) for completion in completions])
        asked = np.concatenate(completions).astype(np.int64)[:, None]
        if rollouts.candidate_ids is not None:
            candidates = [rollouts.candidate_ids[row] for row in chosen]
            asked = np.concatenate([asked, np.concatenate(candidates).astype(np.int64)], axis=1)
        drawn = None
        if draws:
            numbers = [
                uniforms(
                    seed,
                    f"{rollouts.prompt_id[row]}/draws",
                    int(rollouts.sample_index[row]),
                    draws * len(rollouts.completion_ids[row]),
                ).reshape(-1, draws)
                for row in chosen
            ]
            drawn = torch.from_numpy(np.concatenate(numbers)).to(self._device)
        scores = head_scores(
            hidden,
            logits_head(self._model),
            asked_ids_NJ=torch.from_numpy(asked).to(self._device),
            forced_ids_F=torch.tensor(forced_ids, dtype=torch.long, device=self._device),
            top_k=top_k,
            chunk_rows=self.head_rows_per_chunk(),
            draws_ND=drawn,
        )
        split: dict[str, list[NDArray[Any]]] = {}
        for name in HeadScores.__slots__:
            column = getattr(scores, name).cpu().numpy()
            column = column.astype(np.int32) if name == "top_ids_NK" else column
            split[name] = np.split(column, np.cumsum(lengths.numpy())[:-1])
        for place in range(len(chosen)):
            yield {name: parts[place] for name, parts in split.items()}

    def head_rows_per_chunk(self) -> int:
        """Completion tokens whose logits exist at one time: few enough for a CPU's caches."""
        vocabulary = self._model.config.get_text_config().vocab_size
        return logit_rows(vocabulary, self._device.type)

    def _read(self, folder: Path) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar per load of a policy would bury the stages' own
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=self._dtype, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder} cannot be loaded as a causal language model ({reason}); expected "
                "config.json and safetensors; check the folder"
            ) from error
        return model.to(self._device).eval()

    @property
    def _context(self) -> int | None:
        """Tokens that the model reads at once; None: its config names no limit."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def _check_lengths(self, rollouts: RolloutBatch, lengths: Sequence[int]) -> None:
        context = self._context
        for prompt_id, length in zip(rollouts.prompt_id, lengths, strict=True):
            if context is not None and length > context:
                raise UserError(
                    f"prompt {prompt_id!r} has {length} tokens with its completion; the model "
                    f"reads {context}; lower the window or max_prompt_tokens"
                )

    def _check_context(self, prompts: PromptBatch, window_tokens: int) -> None:
        context = self._context
        if context is None:
            return
        for prompt_id, ids in zip(prompts.prompt_id, prompts.prompt_ids, strict=True):
            if len(ids) + window_tokens > context:
                raise UserError(
                    f"prompt {prompt_id!r} has {len(ids)} tokens and the window {window_tokens}; "
                    f"the model reads {context}; lower the window or max_prompt_tokens"
                )
