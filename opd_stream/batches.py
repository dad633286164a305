"""Scored rows to tensors: right-padded inputs, and everything per completion token flat."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from opd_stream.logprobs import completion_rows
from opd_stream.store.reader import ScoredRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one micro-batch with the completion tokens that train.

    B rows, L padded length, N completion tokens inside the window and the loss mask, K the most
    teacher candidates of a position (fewer: id 0, log-probability -inf). `tokens_of_step` counts
    the completion tokens of the whole optimizer step, so that the token mean is one mean whatever
    the number of micro-batches.
    """

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    hidden_rows_N: torch.Tensor  # rows of the flattened [B * L] hidden states that predict a token
    completion_ids_N: torch.Tensor
    behavior_logprobs_N: torch.Tensor
    teacher_logprobs_N: torch.Tensor
    teacher_top_ids_NK: torch.Tensor
    teacher_top_logprobs_NK: torch.Tensor
    teacher_tail_logprobs_N: torch.Tensor
    window_tokens: int
    tokens_of_step: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in Batch.__slots__}
        tensors = {k: v.to(device) for k, v in fields.items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


def trained_tokens(row: ScoredRow, window_tokens: int) -> int:
    """Completion tokens of a row that train under a window."""
    if row.loss_mask is None:
        return min(len(row.completion_ids), window_tokens)
    return int(row.loss_mask[:window_tokens].sum())


def collate(rows: Sequence[ScoredRow], *, window_tokens: int, tokens_of_step: int) -> Batch:
    """One micro-batch of rows, each used up to the window."""
    lengths = [(len(row.prompt_ids), min(len(row.completion_ids), window_tokens)) for row in rows]
    padded = max(prompt + completion for prompt, completion in lengths)
    input_ids = np.zeros((len(rows), padded), np.int64)  # padding is masked, never read
    attention = np.zeros((len(rows), padded), np.int64)
    for place, (row, (prompt, completion)) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[place, :prompt] = row.prompt_ids
        input_ids[place, prompt : prompt + completion] = row.completion_ids[:completion]
        attention[place, : prompt + completion] = 1
    masks = [
        slice(completion) if row.loss_mask is None else np.flatnonzero(row.loss_mask[:completion])
        for row, (_, completion) in zip(rows, lengths, strict=True)
    ]

    def flat(name: str, dtype: Any) -> torch.Tensor:
        parts = [getattr(row, name)[mask] for row, mask in zip(rows, masks, strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(dtype, copy=False))

    def wide(name: str, dtype: Any, fill: float) -> torch.Tensor:
        """As `flat`, rows with fewer candidates filled up."""
        parts = [getattr(row, name)[mask] for row, mask in zip(rows, masks, strict=True)]
        widths = {part.shape[1] for part in parts}
        if len(widths) == 1:
            return torch.from_numpy(np.concatenate(parts).astype(dtype, copy=False))
        whole = np.full((sum(len(part) for part in parts), max(widths)), fill, dtype)
        start = 0
        for part in parts:
            whole[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return torch.from_numpy(whole)

    prompts, completions = (torch.tensor(column) for column in zip(*lengths, strict=True))
    hidden_rows = completion_rows(prompts, completions, padded_length=padded)
    if any(row.loss_mask is not None for row in rows):
        starts = np.cumsum([0, *(completion for _, completion in lengths)])
        kept = [
            start + np.arange(completion)[mask]
            for start, (_, completion), mask in zip(starts, lengths, masks, strict=False)
        ]
        hidden_rows = hidden_rows[torch.from_numpy(np.concatenate(kept))]
    return Batch(
        input_ids_BL=torch.from_numpy(input_ids),
        attention_mask_BL=torch.from_numpy(attention),
        hidden_rows_N=hidden_rows,
        completion_ids_N=flat("completion_ids", np.int64),
        behavior_logprobs_N=flat("behavior_logprobs", np.float32),
        teacher_logprobs_N=flat("teacher_logprobs", np.float32),
        teacher_top_ids_NK=wide("teacher_top_ids", np.int64, 0),
        teacher_top_logprobs_NK=wide("teacher_top_logprobs", np.float32, -np.inf),
        teacher_tail_logprobs_N=flat("teacher_tail_logprobs", np.float32),
        window_tokens=window_tokens,
        tokens_of_step=tokens_of_step,
    )
