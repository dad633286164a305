"""Scored rows to training batches, in an order that any restart continues exactly.

The order of an epoch is a function of (seed, first step of the round, epoch, number of rows). The
position is kept in the DataModule's state, the one place from which Lightning restores it whatever
the optimizer set-up asks of the trainer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning
import torch

from opd_stream.batches import Batch, collate, trained_tokens
from opd_stream.store.order import epoch_order
from opd_stream.store.reader import ScoredRow, ScoredRows
from opd_stream.windows import Window, window_tokens


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
        order = epoch_order(rows, (self.seed, self.first_step, epoch)).tolist()
        size = self.rows_per_step
        return [order[start : start + size] for start in range(0, rows, size)]


def microbatches(rows: list[ScoredRow], plan: BatchPlan, step: int) -> list[Batch]:
    """The micro-batches of one optimizer step; `step` counts from the start of the run."""
    window = window_tokens(plan.window, step)
    tokens = sum(trained_tokens(row, window) for row in rows)
    size = plan.rows_per_microbatch
    return [
        collate(rows[start : start + size], window_tokens=window, tokens_of_step=tokens)
        for start in range(0, len(rows), size)
    ]


class CacheDataModule(lightning.LightningDataModule):
    """One round's scored rows; a new loader for each epoch."""

    def __init__(self, rows: ScoredRows, plan: BatchPlan) -> None:
        super().__init__()
        self.rows, self.plan = rows, plan
        self._loader: EpochLoader | None = None
        self._restored: dict[str, int] = {}

    def train_dataloader(self) -> "EpochLoader":
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        done = self._restored.get("done", 0) if self._restored.get("epoch") == epoch else 0
        self._loader = EpochLoader(self.rows, self.plan, epoch, done)
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


class EpochLoader:
    """The micro-batches of an epoch from a position on; its length is that of the whole epoch."""

    def __init__(self, rows: ScoredRows, plan: BatchPlan, epoch: int, done: int) -> None:
        self.rows, self.plan, self.epoch, self.done = rows, plan, epoch, done
        self.steps = plan.epoch_steps(len(rows), epoch)
        self.sizes = [-(-len(step) // plan.rows_per_microbatch) for step in self.steps]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        start, todo = 0, []
        for number, size in enumerate(self.sizes):
            if start + size > self.done:
                todo.append((number, max(0, self.done - start)))
            start += size
        first_step = self.plan.first_step + self.epoch * len(self.steps)
        positions = [position for number, _ in todo for position in self.steps[number]]
        rows = self.rows.ahead(positions)
        for number, skipped in todo:
            chosen = list(islice(rows, len(self.steps[number])))
            for batch in microbatches(chosen, self.plan, first_step + number)[skipped:]:
                self.done += 1
                yield batch
