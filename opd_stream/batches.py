"""Scored rows to tensors: right-padded inputs, and everything per completion token flat."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from opd_stream.logprobs import completion_rows
from opd_stream.masks import trained_mask
from opd_stream.store.reader import ScoredRow
from opd_stream.weighting import fixed_blocks, newline_spans


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentDraws:
    """M further ids a token, drawn from the student with replacement."""

    ids_NM: torch.Tensor
    behavior_logprobs_NM: torch.Tensor
    teacher_logprobs_NM: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one micro-batch with the completion tokens that train.

    B rows, L padded length, N completion tokens inside the window and the masks, K the most teacher
    candidates of a position (fewer: id 0, log-probability -inf), T terminators, M further draws.
    """

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    hidden_rows_N: torch.Tensor  # rows of the flattened [B * L] hidden states that predict a token
    positions_N: torch.Tensor  # place of the token in its completion, from 0
    row_N: torch.Tensor  # row of the batch the token belongs to
    block_N: torch.Tensor  # block of the drift gate, numbered through the batch
    staleness_N: torch.Tensor  # policies between that of the row and the current one
    weights_N: torch.Tensor  # of each token in the loss; they sum to 1 over an optimizer step
    completion_ids_N: torch.Tensor
    behavior_logprobs_N: torch.Tensor
    teacher_logprobs_N: torch.Tensor
    teacher_top_ids_NK: torch.Tensor
    teacher_top_logprobs_NK: torch.Tensor
    teacher_tail_logprobs_N: torch.Tensor
    terminator_ids_T: torch.Tensor
    teacher_terminator_logprobs_NT: torch.Tensor
    draws: StudentDraws | None
    chunk_N: torch.Tensor | None  # chunk of an aligned teacher, numbered through the batch
    window_tokens: int
    largest_id: int
    names: tuple[str, ...]  # of the rows, for messages

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return _moved(self, device)


def collate(
    rows: Sequence[ScoredRow],
    *,
    window_tokens: int,
    tokens_of_step: int | None = None,
    masked_ids: Collection[int] = (),
    blocks: int | Literal["spans"] = 64,
    newline_ids: Collection[int] = (),
    staleness: Sequence[int] = (),
) -> Batch:
    """One micro-batch of rows, each used up to the window.

    Args:
        rows: from `open_scores`.
        window_tokens: completion tokens used of each row.
        tokens_of_step: completion tokens of the whole optimizer step, so that the token mean is one
            mean whatever the number of micro-batches; None: the batch is the step.
        masked_ids: ids whose first occurrence in a completion does not train.
        blocks: tokens of a block of the drift gate, or spans between newlines.
        newline_ids: ids of tokens that hold a newline.
        staleness: policies between that of each cache and the current one; none: 0.
    """
    masks = [trained_mask(row, window_tokens, masked_ids) for row in rows]
    lengths = [(len(row.prompt_ids), len(mask)) for row, mask in zip(rows, masks, strict=True)]
    padded = max(prompt + completion for prompt, completion in lengths)
    input_ids = np.zeros((len(rows), padded), np.int64)  # padding is masked, never read
    attention = np.zeros((len(rows), padded), np.int64)
    for place, (row, (prompt, completion)) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[place, :prompt] = row.prompt_ids
        input_ids[place, prompt : prompt + completion] = row.completion_ids[:completion]
        attention[place, : prompt + completion] = 1
    kept = [slice(None) if mask.all() else mask for mask in masks]

    def flat(name: str, dtype: Any) -> torch.Tensor:
        parts = [
            getattr(row, name)[: len(mask)][keep]
            for row, mask, keep in zip(rows, masks, kept, strict=True)
        ]
        return torch.as_tensor(np.concatenate(parts).astype(dtype, copy=False))

    def wide(name: str, dtype: Any, fill: float) -> torch.Tensor:
        """As `flat`, rows with fewer candidates filled up."""
        parts = [
            getattr(row, name)[: len(mask)][keep]
            for row, mask, keep in zip(rows, masks, kept, strict=True)
        ]
        widths = {part.shape[1] for part in parts}
        if len(widths) == 1:
            return torch.as_tensor(np.concatenate(parts).astype(dtype, copy=False))
        whole = np.full((sum(len(part) for part in parts), max(widths)), fill, dtype)
        start = 0
        for part in parts:
            whole[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return torch.as_tensor(whole)

    prompts, completions = (torch.tensor(column) for column in zip(*lengths, strict=True))
    everything = torch.as_tensor(np.concatenate(masks))
    hidden_rows = completion_rows(prompts, completions, padded_length=padded)[everything]
    row_N = torch.repeat_interleave(torch.arange(len(rows)), completions)[everything]
    parts = [
        _blocks(row, len(mask), blocks, newline_ids) for row, mask in zip(rows, masks, strict=True)
    ]
    starts = np.cumsum([0, *(int(part[-1]) + 1 if len(part) else 0 for part in parts)])
    block_N = np.concatenate([part + start for part, start in zip(parts, starts, strict=False)])
    ages = torch.tensor([staleness[row.cache] if staleness else 0 for row in rows])
    tokens = int(everything.sum()) if tokens_of_step is None else tokens_of_step
    top_ids = wide("teacher_top_ids", np.int64, 0)
    terminators, columns = rows[0].terminators
    draws = None
    if rows[0].candidate_ids is not None:
        draws = StudentDraws(
            ids_NM=flat("candidate_ids", np.int64),
            behavior_logprobs_NM=flat("candidate_behavior_logprobs", np.float32),
            teacher_logprobs_NM=flat("candidate_teacher_logprobs", np.float32),
        )
    return Batch(
        input_ids_BL=torch.as_tensor(input_ids),
        attention_mask_BL=torch.as_tensor(attention),
        hidden_rows_N=hidden_rows,
        positions_N=hidden_rows - row_N * padded - prompts[row_N] + 1,
        row_N=row_N,
        block_N=torch.as_tensor(block_N)[everything],
        staleness_N=ages[row_N],
        weights_N=torch.full((len(row_N),), 1 / max(tokens, 1)),
        completion_ids_N=flat("completion_ids", np.int64),
        behavior_logprobs_N=flat("behavior_logprobs", np.float32),
        teacher_logprobs_N=flat("teacher_logprobs", np.float32),
        teacher_top_ids_NK=top_ids,
        teacher_top_logprobs_NK=wide("teacher_top_logprobs", np.float32, -np.inf),
        teacher_tail_logprobs_N=flat("teacher_tail_logprobs", np.float32),
        terminator_ids_T=torch.tensor(terminators, dtype=torch.long),
        teacher_terminator_logprobs_NT=flat("teacher_forced_logprobs", np.float32)[
            :, list(columns)
        ],
        draws=draws,
        chunk_N=_chunks(rows, masks),
        window_tokens=window_tokens,
        largest_id=max(int(input_ids.max()), int(top_ids.max()) if top_ids.numel() else 0),
        names=tuple(f"{row.prompt_id}/{row.sample_index}" for row in rows),
    )


def _chunks(rows: Sequence[ScoredRow], masks: Sequence[NDArray[np.bool_]]) -> torch.Tensor | None:
    """Chunk of each token; None where every token is a chunk of its own."""
    if all(row.chunk_ids is None for row in rows):
        return None
    parts: list[NDArray[np.int64]] = []
    start = 0
    for row, mask in zip(rows, masks, strict=True):
        whole = np.arange(len(mask)) if row.chunk_ids is None else row.chunk_ids[: len(mask)]
        parts.append(whole[mask].astype(np.int64) + start)
        start += len(mask)
    chunk_N = np.concatenate(parts)
    return torch.as_tensor(chunk_N) if len(np.unique(chunk_N)) < len(chunk_N) else None


def _blocks(
    row: ScoredRow, tokens: int, blocks: int | Literal["spans"], newline_ids: Collection[int]
) -> NDArray[np.int64]:
    if blocks != "spans":
        return fixed_blocks(tokens, blocks)
    return newline_spans(np.isin(row.completion_ids[:tokens], list(newline_ids)))


def _moved(value: Any, device: torch.device) -> Any:
    changes: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, torch.Tensor):
            changes[field.name] = item.to(device, non_blocking=True)
        elif isinstance(item, StudentDraws):
            changes[field.name] = _moved(item, device)
    return replace(value, **changes)
