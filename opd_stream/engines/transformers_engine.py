"""The reference engine: any Hugging Face causal language model, CPU or one GPU.

Sampling is a loop of its own: no logits processors, the head only at the last position, ended rows
taken out, prompts read once for all their samples, and what all of them begin with once. Scoring
reads both once, too, and runs the head only over completion tokens, in chunks, so no [B, T, V]
tensor ever exists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from opd_stream.engines.base import (
    Drawn,
    HiddenStates,
    Ids,
    RowScores,
    SamplingSettings,
    ScoringSettings,
    check_context,
    check_top_k,
    empty_rollouts,
    extended_rollouts,
    rows_per_chunk,
    score_batch,
    unfinished_rows,
)
from opd_stream.engines.decoding import (
    draw,
    draw_uniforms,
    library_decoder,
    open_decoder,
    uniforms,
)
from opd_stream.engines.head import (
    completion_hidden,
    from_numpy,
    logits_head,
    output_head,
    padded,
)
from opd_stream.engines.loading import check_engine, load_model
from opd_stream.engines.reading import decoder_of
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.logprobs import HeadScores, head_scores, largest, sampled_logprobs
from opd_stream.model_config import context_of
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

MIN_RUNNING_SHARE = 0.75  # ended rows are taken out when a smaller share is still running


class TransformersEngine:
    """One set of weights that samples and scores."""

    def __init__(self, folder: Path, *, dtype: str, batch_rows: int, device: str = "cpu") -> None:
        self._dtype, self._device = getattr(torch, dtype), torch.device(device)
        self._batch_rows = batch_rows
        self._open_decoder = open_decoder
        self._model: Any = self._read(folder)
        check_engine(self._model, folder)

    @classmethod
    def over(cls, model: Any, *, batch_rows: int = 64) -> Self:
        """An engine over a model in memory, which stays as it is (it may be in training)."""
        engine = cls.__new__(cls)
        engine._dtype, engine._device = model.dtype, model.device
        engine._batch_rows, engine._model = batch_rows, model
        engine._open_decoder = library_decoder  # the fast one lays weights out anew
        return engine

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        self._model = None  # two models do not fit where one does
        self._model = self._read(folder)

    @torch.inference_mode()
    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingSettings,
        *,
        samples_per_prompt: int = 1,
        extra_draws: int = 0,
    ) -> RolloutBatch:
        """See `Engine.sample`."""
        window_tokens, seed = settings.window_tokens, settings.seed
        check_context(prompts.prompt_id, prompts.prompt_ids, window_tokens, self._context)
        kept = settings.student_top_k
        known = settings.vocabulary or self._vocabulary
        check_top_k(kept, known, name="rollouts.student_top_k")
        order = sorted(range(len(prompts.prompt_id)), key=lambda row: len(prompts.prompt_ids[row]))
        per_batch = max(1, self._batch_rows // samples_per_prompt)
        drawn: dict[tuple[int, int], Drawn] = {}  # of a prompt and a sample of it
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            rows = [(row, sample) for row in chosen for sample in range(samples_per_prompt)]
            numbers = [
                draw_uniforms(seed, prompts.prompt_id[row], sample, window_tokens, extra_draws)
                for row, sample in rows
            ]
            ids = [prompts.prompt_ids[row] for row in chosen]
            new = self._decode(ids, np.stack(numbers), settings)
            drawn.update(zip(rows, new, strict=True))
        in_order = [drawn[row] for row in sorted(drawn)]
        new = {
            row: Drawn(ids[:, 0], logprobs[:, 0], top)
            for row, (ids, logprobs, top) in enumerate(in_order)
        }
        empty = empty_rollouts(prompts, samples_per_prompt, student_top_k=kept)
        rollouts = extended_rollouts(empty, new, settings.stop_ids)
        if not extra_draws:
            return rollouts
        return replace(
            rollouts,
            candidate_ids=tuple(each.ids[:, 1:] for each in in_order),
            candidate_behavior_logprobs=tuple(each.logprobs[:, 1:] for each in in_order),
        )

    @torch.inference_mode()
    def extend(self, rollouts: RolloutBatch, settings: SamplingSettings) -> RolloutBatch:
        """See `Engine.extend`."""
        window_tokens, seed = settings.window_tokens, settings.seed
        check_context(rollouts.prompt_id, rollouts.prompt_ids, window_tokens, self._context)
        unfinished = unfinished_rows(rollouts, window_tokens)
        texts = {
            row: np.concatenate([rollouts.prompt_ids[row], rollouts.completion_ids[row]])
            for row in unfinished
        }
        new: dict[int, Drawn] = {}
        order = sorted(unfinished, key=lambda row: len(texts[row]))
        for start in range(0, len(order), self._batch_rows):
            chosen = order[start : start + self._batch_rows]
            before = [len(rollouts.completion_ids[row]) for row in chosen]
            numbers = np.zeros((len(chosen), window_tokens - min(before), 1))
            for place, (row, tokens) in enumerate(zip(chosen, before, strict=True)):
                sample = int(rollouts.sample_index[row])
                stream = uniforms(seed, rollouts.prompt_id[row], sample, window_tokens)
                numbers[place, : window_tokens - tokens, 0] = stream[tokens:]
            drawn = self._decode([texts[row] for row in chosen], numbers, settings)
            for row, tokens, (ids, logprobs, top) in zip(chosen, before, drawn, strict=True):
                room = window_tokens - tokens
                kept = None if top is None else top[:room]
                new[row] = Drawn(ids[:room, 0], logprobs[:room, 0], kept)
        return extended_rollouts(rollouts, new, settings.stop_ids)

    @torch.inference_mode()
    def score(self, rollouts: RolloutBatch, settings: ScoringSettings) -> ScoreBatch:
        """See `Engine.score`."""
        check_top_k(settings.top_k, settings.vocabulary or self._vocabulary)
        scored: dict[int, RowScores] = {}
        for chosen in self._read_together(rollouts):
            rows = self._score_rows(rollouts, chosen, settings)
            scored.update(zip(chosen, rows, strict=True))
        return score_batch((scored[row] for row in range(len(rollouts))), rollouts)

    @torch.inference_mode()
    def hidden(self, rollouts: RolloutBatch) -> HiddenStates:
        """See `HiddenEngine.hidden`."""
        chunk_rows = rows_per_chunk(self._vocabulary, self._device.type)
        found: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for chosen in self._read_together(rollouts):
            completions = [rollouts.completion_ids[row] for row in chosen]
            hidden_NH = self._hidden_of(rollouts, chosen)
            ids_N = from_numpy(np.concatenate(completions).astype(np.int64), self._device)
            logprobs_N = sampled_logprobs(
                hidden_NH, logits_head(self._model), ids_N, chunk_rows=chunk_rows
            )
            ends = np.cumsum([len(completion) for completion in completions])[:-1]
            columns = (hidden_NH.float().cpu().numpy(), logprobs_N.float().cpu().numpy())
            parts = zip(*(np.split(column, ends) for column in columns), strict=True)
            found.update(zip(chosen, parts, strict=True))
        rows = [found[row] for row in range(len(rollouts))]
        return HiddenStates(tuple(row[0] for row in rows), tuple(row[1] for row in rows))

    def head(self) -> OutputHead:
        """See `HiddenEngine.head`."""
        module = self._model.get_output_embeddings()
        if not isinstance(module, torch.nn.Linear):
            raise UserError(
                f"the output head of {self._model.config.model_type} is a {type(module).__name__}; "
                "expected a linear layer, which hidden states are stored with; use a checkpoint "
                "whose head is not quantised"
            )
        return output_head(self._model)

    def _read_together(self, rollouts: RolloutBatch) -> Iterator[list[int]]:
        """Rows of each forward pass.

        Similar lengths stand together, and rows of one prompt, which is then read once.
        """
        texts = [
            np.concatenate(pair)
            for pair in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
        ]
        check_context(rollouts.prompt_id, texts, 0, self._context)
        prompts = [ids.tobytes() for ids in rollouts.prompt_ids]
        longest: dict[bytes, int] = {}
        for prompt, text in zip(prompts, texts, strict=True):
            longest[prompt] = max(len(text), longest.get(prompt, 0))
        order = sorted(range(len(texts)), key=lambda r: (longest[prompts[r]], prompts[r], r))
        for start in range(0, len(order), self._batch_rows):
            yield order[start : start + self._batch_rows]

    def _hidden_of(self, rollouts: RolloutBatch, chosen: list[int]) -> torch.Tensor:
        """Hidden states that predict the completion tokens of some rows [N, H]."""
        return completion_hidden(
            decoder_of(self._model),
            [rollouts.prompt_ids[row] for row in chosen],
            [rollouts.completion_ids[row] for row in chosen],
            self._device,
        )

    def _decode(
        self,
        prompt_ids: Sequence[Ids],
        uniforms_RTM: NDArray[np.float64],
        settings: SamplingSettings,
    ) -> Iterator[Drawn]:
        """Drawn ids and behavior log-probabilities of R rows [T, M], R a multiple of the prompts.

        Column 0 is what is sampled. The most probable ids are there where settings ask for them.
        """
        head = logits_head(self._model)
        rows, window, columns = uniforms_RTM.shape
        numbers = from_numpy(uniforms_RTM, self._device)
        stops = torch.tensor(settings.stop_ids, dtype=torch.long, device=self._device)
        decoder = self._open_decoder(self._model)
        hidden = decoder.prefill(*padded(prompt_ids, self._device, side="left"))
        samples = rows // len(prompt_ids)
        if samples > 1:
            spread = torch.arange(len(prompt_ids), device=self._device).repeat_interleave(samples)
            decoder.select(spread)
            hidden = hidden[spread]
        tokens = torch.zeros(rows, window, columns, dtype=torch.long, device=self._device)
        logprobs = torch.zeros(rows, window, columns, device=self._device)
        kept_RTS = torch.zeros(rows, window, settings.student_top_k, dtype=torch.int32)
        lengths = torch.full((rows,), window, device=self._device)
        held = torch.arange(rows, device=self._device)  # rows that the decoder still holds
        running = torch.ones(rows, dtype=torch.bool, device=self._device)  # of them, not ended
        for place in range(window):
            logits = head(hidden)
            all_drawn, drawn_logprobs = draw(logits, numbers[held, place], settings)
            if settings.student_top_k:
                known = logits[:, : settings.vocabulary].contiguous()
                kept_RTS[held.cpu(), place] = largest(known, settings.student_top_k)[1].int().cpu()
            tokens[held, place], logprobs[held, place] = all_drawn, drawn_logprobs
            drawn = all_drawn[:, 0]
            ended = running & torch.isin(drawn, stops)
            lengths[held[ended]] = place + 1
            running = running & ~ended
            count = int(running.sum())
            if count == 0 or place + 1 == window:
                break
            if count < MIN_RUNNING_SHARE * len(held):
                kept = running.nonzero()[:, 0]
                decoder.select(kept)
                held, drawn, running = held[kept], drawn[kept], running[kept]
            hidden = decoder.step(drawn)
        all_tokens, all_logprobs = tokens.int().cpu().numpy(), logprobs.cpu().numpy()
        for row, length in enumerate(lengths.cpu().numpy()):
            kept = kept_RTS[row, :length].numpy().copy() if settings.student_top_k else None
            yield Drawn(all_tokens[row, :length].copy(), all_logprobs[row, :length].copy(), kept)

    def _score_rows(
        self,
        rollouts: RolloutBatch,
        chosen: list[int],
        settings: ScoringSettings,
    ) -> Iterator[RowScores]:
        draws = settings.draws
        completions = [rollouts.completion_ids[row] for row in chosen]
        hidden = self._hidden_of(rollouts, chosen)
        asked = np.concatenate(completions).astype(np.int64)[:, None]
        if rollouts.candidate_ids is not None:
            candidates = [rollouts.candidate_ids[row] for row in chosen]
            asked = np.concatenate([asked, np.concatenate(candidates).astype(np.int64)], axis=1)
        student_ids = None
        if rollouts.student_top_ids is not None:
            kept = [rollouts.student_top_ids[row] for row in chosen]
            student_ids = from_numpy(np.concatenate(kept).astype(np.int64), self._device)
        drawn = None
        if draws:
            numbers = [
                uniforms(
                    settings.seed,
                    f"{rollouts.prompt_id[row]}/draws",
                    int(rollouts.sample_index[row]),
                    draws * len(rollouts.completion_ids[row]),
                ).reshape(-1, draws)
                for row in chosen
            ]
            drawn = from_numpy(np.concatenate(numbers), self._device)
        scores = head_scores(
            hidden,
            logits_head(self._model),
            asked_ids_NJ=from_numpy(asked, self._device),
            forced_ids_F=torch.tensor(settings.forced_ids, dtype=torch.long, device=self._device),
            top_k=settings.top_k,
            vocabulary=settings.vocabulary,
            chunk_rows=rows_per_chunk(self._vocabulary, self._device.type),
            draws_ND=drawn,
            student_ids_NM=student_ids,
        )
        ends = np.cumsum([len(completion) for completion in completions])
        columns = [getattr(scores, name).cpu().numpy() for name in HeadScores.__slots__]
        for parts in zip(*(np.split(column, ends[:-1]) for column in columns), strict=True):
            row = RowScores(*parts)  # the fields of the two stand in the same order
            yield row._replace(top_ids=row.top_ids.astype(np.int32))

    def _read(self, folder: Path) -> Any:
        return load_model(folder, dtype=self._dtype, device=self._device)

    @property
    def _vocabulary(self) -> int:
        return self._model.config.get_text_config().vocab_size

    @property
    def _context(self) -> int | None:
        """Tokens that the model reads at once; None: its config names no limit."""
        return context_of(self._model.config.get_text_config().to_dict())
