"""Scored rows to training batches, in an order that any restart continues exactly.

The order of an epoch is a function of (seed, first step of the round, epoch, number of rows). The
position is kept in the DataModule's state, the one place from which Lightning restores it whatever
the optimizer set-up asks of the trainer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import lightning
import numpy as np
import torch

from opd_stream.logprobs import completion_rows
from opd_stream.store.reader import ScoredRow, ScoredRows
from opd_stream.windows import Window, window_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one micro-batch, right-padded, with the completion tokens inside the window flat.

    B rows, L padded length, N completion tokens, K teacher top-k. `tokens_of_step` counts the
    completion tokens of the whole optimizer step, so that the token mean is one mean whatever the
    number of micro-batches.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Everything that decides which rows meet in which step.

    Example:
        >>> BatchPlan(rows_per_step=16, rows_per_microbatch=16, seed=0, first_step=48,
        ...           window=FixedWindow(tokens=208))
    """

    rows_per_step: int
    rows_per_microbatch: int
    seed: int
    first_step: int  # optimizer steps done before this round
    window: Window

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a full optimizer step."""
        return -(-self.rows_per_step // self.rows_per_microbatch)

    def epoch_steps(self, rows: int, epoch: int) -> list[list[int]]:
        """Row numbers of each optimizer step of an epoch; the last step may be smaller."""
        random = np.random.default_rng([self.seed, self.first_step, epoch])
        order = random.permutation(rows).tolist()
        size = self.rows_per_step
        return [order[start : start + size] for start in range(0, rows, size)]


def microbatches(rows: ScoredRows, plan: BatchPlan, step_rows: list[int], step: int) -> list[Batch]:
    """The micro-batches of one optimizer step; `step` counts from the start of the run."""
    window = window_tokens(plan.window, step)
    chosen = [rows[row] for row in step_rows]
    tokens = sum(min(len(row.completion_ids), window) for row in chosen)
    size = plan.rows_per_microbatch
    return [
        _collate(chosen[start : start + size], window, tokens)
        for start in range(0, len(chosen), size)
    ]


class CacheDataModule(lightning.LightningDataModule):
    """One round's scored rows; a new loader for each epoch."""

    def __init__(self, rows: ScoredRows, plan: BatchPlan) -> None:
        super().__init__()
        self.rows, self.plan = rows, plan
        self._loader: _EpochLoader | None = None
        self._restored: dict[str, int] = {}

    def train_dataloader(self) -> "_EpochLoader":
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        done = self._restored.get("done", 0) if self._restored.get("epoch") == epoch else 0
        self._loader = _EpochLoader(self.rows, self.plan, epoch, done)
        return self._loader

    def state_dict(self) -> dict[str, int]:
        assert self._loader is not None
        return {"epoch": self._loader.epoch, "done": self._loader.done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._restored = state_dict

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return batch.to(device)


class _EpochLoader:
    """The micro-batches of an epoch from a position on; its length is that of the whole epoch."""

    def __init__(self, rows: ScoredRows, plan: BatchPlan, epoch: int, done: int) -> None:
        self.rows, self.plan, self.epoch, self.done = rows, plan, epoch, done
        self.steps = plan.epoch_steps(len(rows), epoch)
        self.sizes = [-(-len(step) // plan.rows_per_microbatch) for step in self.steps]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        first_step = self.plan.first_step + self.epoch * len(self.steps)
        for number, (step_rows, size) in enumerate(zip(self.steps, self.sizes, strict=True)):
            if start + size > self.done:
                batches = microbatches(self.rows, self.plan, step_rows, first_step + number)
                for batch in batches[max(0, self.done - start) :]:
                    self.done += 1
                    yield batch
            start += size


def _collate(rows: list[ScoredRow], window: int, tokens_of_step: int) -> Batch:
    lengths = [(len(row.prompt_ids), min(len(row.completion_ids), window)) for row in rows]
    padded = max(prompt + completion for prompt, completion in lengths)
    input_ids = np.zeros((len(rows), padded), np.int64)  # padding is masked, never read
    attention = np.zeros((len(rows), padded), np.int64)
    for place, (row, (prompt, completion)) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[place, :prompt] = row.prompt_ids
        input_ids[place, prompt : prompt + completion] = row.completion_ids[:completion]
        attention[place, : prompt + completion] = 1

    def flat(name: str, dtype: type) -> torch.Tensor:
        parts = [
            getattr(row, name)[:completion]
            for row, (_, completion) in zip(rows, lengths, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts).astype(dtype))

    prompts, completions = (torch.tensor(column) for column in zip(*lengths, strict=True))
    return Batch(
        input_ids_BL=torch.from_numpy(input_ids),
        attention_mask_BL=torch.from_numpy(attention),
        hidden_rows_N=completion_rows(prompts, completions, padded_length=padded),
        completion_ids_N=flat("completion_ids", np.int64),
        behavior_logprobs_N=flat("behavior_logprobs", np.float32),
        teacher_logprobs_N=flat("teacher_logprobs", np.float32),
        teacher_top_ids_NK=flat("teacher_top_ids", np.int64),
        teacher_top_logprobs_NK=flat("teacher_top_logprobs", np.float32),
        teacher_tail_logprobs_N=flat("teacher_tail_logprobs", np.float32),
        window_tokens=window,
        tokens_of_step=tokens_of_step,
    )
