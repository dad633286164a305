"""Scored rows to tensors: right-padded inputs, and everything per completion token flat."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from opd_stream.errors import UserError
from opd_stream.logprobs import completion_rows
from opd_stream.store.codecs.hidden import states_of
from opd_stream.store.reader import ScoredRow
from opd_stream.weighting import Segment, fixed_blocks, newline_spans, trained_mask


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
    weights_N: torch.Tensor  # of each token in the loss; of one teacher, their sum over a step is 1
    completion_ids_N: torch.Tensor
    behavior_logprobs_N: torch.Tensor
    teacher_logprobs_N: torch.Tensor
    teacher_top_ids_NK: torch.Tensor
    teacher_top_logprobs_NK: torch.Tensor
    teacher_tail_logprobs_N: torch.Tensor
    terminator_ids_T: torch.Tensor
    teacher_terminator_logprobs_NT: torch.Tensor  # NaN: not known, and in the tail
    draws: StudentDraws | None
    chunk_N: torch.Tensor | None  # chunk of an aligned teacher, numbered through the batch
    teacher_states_NG: torch.Tensor | None  # hidden states of the teacher, of codec hidden
    window_tokens: int
    largest_id: int
    is_given: bool  # the rows are not the student's: nothing of their behavior is known
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
    segment: Segment | None = None,
    blocks: int | Literal["spans"] = 64,
    newline_ids: Collection[int] = (),
    staleness: Sequence[int] = (),
    given: Sequence[bool] = (),
    cache_weights: Sequence[float] = (),
) -> Batch:
    """One micro-batch of rows from `open_scores`, each used up to the window.

    Args:
        rows: of caches with the same terminators.
        window_tokens: completion tokens used of each row.
        tokens_of_step: completion tokens of the whole optimizer step, so that the token mean is one
            mean whatever the number of micro-batches; None: the batch is the step.
        masked_ids, segment: ids whose first occurrence does not train; places that alone do.
        blocks, newline_ids: tokens of a block of the drift gate, or spans between such ids.
        staleness, cache_weights: of each cache, its policies of age and its weight; none: 0, 1.
        given: whether the rows of each cache are not the student's, all alike here; none: no.

    Raises:
        UserError: the rows come from caches with other terminators.
    """
    part = _Part(rows, [trained_mask(row, window_tokens, masked_ids, segment) for row in rows])
    input_ids, attention = _padded(rows, part.lengths, padded := max(map(sum, part.lengths)))
    prompts, completions = (torch.tensor(column) for column in zip(*part.lengths, strict=True))
    trains = torch.as_tensor(np.concatenate(part.masks))
    hidden_rows = completion_rows(prompts, completions, padded_length=padded)[trains]
    row_N = torch.repeat_interleave(torch.arange(len(rows)), completions)[trains]
    top_ids = part.wide("teacher_top_ids", np.int64, 0)
    return Batch(
        input_ids_BL=torch.as_tensor(input_ids),
        attention_mask_BL=torch.as_tensor(attention),
        hidden_rows_N=hidden_rows,
        positions_N=hidden_rows - row_N * padded - prompts[row_N] + 1,
        row_N=row_N,
        block_N=_blocks(part, blocks, newline_ids)[trains],
        staleness_N=_ages(rows, staleness)[row_N],
        weights_N=_weights(rows, row_N, tokens_of_step, cache_weights),
        completion_ids_N=part.flat("completion_ids", np.int64),
        behavior_logprobs_N=part.flat("behavior_logprobs", np.float32),
        teacher_logprobs_N=part.flat("teacher_logprobs", np.float32),
        teacher_top_ids_NK=top_ids,
        teacher_top_logprobs_NK=part.wide("teacher_top_logprobs", np.float32, -np.inf),
        teacher_tail_logprobs_N=part.flat("teacher_tail_logprobs", np.float32),
        terminator_ids_T=torch.tensor(rows[0].terminators[0], dtype=torch.long),
        teacher_terminator_logprobs_NT=_terminator_logprobs(part),
        draws=part.draws(),
        chunk_N=_chunks(part),
        teacher_states_NG=_states(part),
        window_tokens=window_tokens,
        is_given=bool(given) and given[rows[0].cache],
        largest_id=max(int(input_ids.max()), int(top_ids.max()) if top_ids.numel() else 0),
        names=tuple(f"{row.prompt_id}/{row.sample_index}" for row in rows),
    )


def _ages(rows: Sequence[ScoredRow], staleness: Sequence[int]) -> torch.Tensor:
    return torch.tensor([staleness[row.cache] if staleness else 0 for row in rows])


def _weights(
    rows: Sequence[ScoredRow], row_N: torch.Tensor, tokens: int | None, of_caches: Sequence[float]
) -> torch.Tensor:
    """What each token counts in the mean over so many, times the weight of its cache."""
    tokens = len(row_N) if tokens is None else tokens
    weights_N = torch.full((len(row_N),), 1 / max(tokens, 1))
    if not of_caches:
        return weights_N
    return weights_N * torch.tensor([of_caches[row.cache] for row in rows])[row_N]


class _Part:
    """Rows with the mask of their completion tokens that train: columns of these tokens, flat."""

    def __init__(self, rows: Sequence[ScoredRow], masks: list[NDArray[np.bool_]]) -> None:
        self.rows, self.masks = rows, masks
        self.lengths = [(len(r.prompt_ids), len(m)) for r, m in zip(rows, masks, strict=True)]

    def pieces(self, columns: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """The tokens that train of a column of each row."""
        pairs = zip(columns, self.masks, strict=True)
        return [
            each[: len(mask)] if mask.all() else each[: len(mask)][mask] for each, mask in pairs
        ]

    def flat(self, name: str, dtype: DTypeLike) -> torch.Tensor:
        """A column of the rows [N, ...]."""
        pieces = self.pieces([getattr(row, name) for row in self.rows])
        return torch.as_tensor(np.concatenate(pieces).astype(dtype, copy=False))

    def wide(self, name: str, dtype: DTypeLike, fill: float) -> torch.Tensor:
        """As `flat`, rows with fewer candidates filled up [N, K]."""
        pieces = self.pieces([getattr(row, name) for row in self.rows])
        widest = max(piece.shape[1] for piece in pieces)
        if all(piece.shape[1] == widest for piece in pieces):
            return torch.as_tensor(np.concatenate(pieces).astype(dtype, copy=False))
        whole = np.full((sum(map(len, pieces)), widest), fill, dtype)
        start = 0
        for piece in pieces:
            whole[start : start + len(piece), : piece.shape[1]] = piece
            start += len(piece)
        return torch.as_tensor(whole)

    def draws(self) -> StudentDraws | None:
        """The further draws of the rows, if they have any."""
        if self.rows[0].candidate_ids is None:
            return None
        return StudentDraws(
            ids_NM=self.flat("candidate_ids", np.int64),
            behavior_logprobs_NM=self.flat("candidate_behavior_logprobs", np.float32),
            teacher_logprobs_NM=self.flat("candidate_teacher_logprobs", np.float32),
        )


def _padded(
    rows: Sequence[ScoredRow], lengths: Sequence[tuple[int, int]], padded: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and attention mask [B, L]; padding has id 0 and is never read."""
    input_ids = np.zeros((len(rows), padded), np.int64)
    attention = np.zeros((len(rows), padded), np.int64)
    for place, (row, (prompt, completion)) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[place, :prompt] = row.prompt_ids
        input_ids[place, prompt : prompt + completion] = row.completion_ids[:completion]
        attention[place, : prompt + completion] = 1
    return input_ids, attention


def _terminator_logprobs(part: _Part) -> torch.Tensor:
    """The teacher's log-probabilities of the first row's terminators [N, T].

    Caches may hold the same terminators in another order.

    Raises:
        UserError: they hold other terminators.
    """
    expected = part.rows[0].terminators[0]
    columns: list[NDArray[np.float32]] = []
    for row in part.rows:
        place_of = dict(zip(*row.terminators, strict=True))
        if set(place_of) != set(expected):
            first, name = part.rows[0].prompt_id, row.prompt_id
            raise UserError(
                f"rows {first} and {name} come from caches with other terminators, "
                f"{sorted(expected)} and {sorted(place_of)}; expected the same ids in every cache "
                "of a round; train on them apart, or score one of them again"
            )
        found = row.teacher_forced_logprobs[:, [place_of[token] for token in expected]]
        if row.forced_in_tail:
            found = np.where(np.isneginf(found), np.float32(np.nan), found)
        columns.append(found)
    logprobs_NT = np.concatenate(part.pieces(columns)).astype(np.float32, copy=False)
    return torch.as_tensor(logprobs_NT)


def _chunks(part: _Part) -> torch.Tensor | None:
    """Chunk of each token; None where every token is a chunk of its own."""
    if all(row.chunk_ids is None for row in part.rows):
        return None
    pieces: list[NDArray[np.int64]] = []
    start = 0
    for row, mask in zip(part.rows, part.masks, strict=True):
        whole = np.arange(len(mask)) if row.chunk_ids is None else row.chunk_ids[: len(mask)]
        pieces.append(whole[mask].astype(np.int64) + start)
        start += len(mask)
    chunk_N = np.concatenate(pieces)
    return torch.as_tensor(chunk_N) if len(np.unique(chunk_N)) < len(chunk_N) else None


def _states(part: _Part) -> torch.Tensor | None:
    """The teacher's hidden states [N, G], unpacked for these rows alone; None: not cached."""
    stored = [row.teacher_states for row in part.rows if row.teacher_states is not None]
    if len(stored) < len(part.rows):
        return None
    return torch.as_tensor(np.concatenate(part.pieces(states_of(stored))))


def _blocks(
    part: _Part, blocks: int | Literal["spans"], newline_ids: Collection[int]
) -> torch.Tensor:
    """Block of the drift gate of each completion token, numbered through the batch."""
    pieces: list[NDArray[np.int64]] = []
    start = 0
    for row, mask in zip(part.rows, part.masks, strict=True):
        if blocks == "spans":
            is_newline_T = np.isin(row.completion_ids[: len(mask)], list(newline_ids))
            piece = newline_spans(is_newline_T)
        else:
            piece = fixed_blocks(len(mask), blocks)
        pieces.append(piece + start)
        start += int(piece[-1]) + 1 if len(piece) else 0
    return torch.as_tensor(np.concatenate(pieces))


def _moved(value: Any, device: torch.device) -> Any:
    changes: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, torch.Tensor):
            changes[field.name] = item.to(device, non_blocking=True)
        elif isinstance(item, StudentDraws):
            changes[field.name] = _moved(item, device)
    return replace(value, **changes)
