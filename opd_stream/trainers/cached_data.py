"""Rows of caches as a trainer takes them: a dataset, its collator, and the order of an epoch."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from opd_stream.batches import collate
from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from opd_stream.store.reader import MEMORY_BYTES, ScoredRow, ScoredRows, epoch_order, open_cache

Locations = str | Path | Sequence[str | Path]
UNCUT = 2**31  # a window that cuts nothing
IGNORED = -100  # label of what does not train


class CachedDataset(Dataset[dict[str, Any]]):
    """The trainable rows of one or several scores artifacts, as examples of a trainer.

    An example holds `input_ids`, the whole text, and `scored_row`. It can travel to the workers of
    a data loader.

    Example:
        >>> CachedDataset("store/scores/3f0c5d1a2b3c4d5e")[0]["scored_row"].teacher_top_ids.shape
        (151, 16)
    """

    column_names = ("input_ids", "scored_row")

    def __init__(self, scores: Locations, *, memory_bytes: int = MEMORY_BYTES) -> None:
        """Open caches, each as `open_scores` names it.

        Raises:
            UserError: there is no complete scores artifact, or no row to train on.
        """
        self.scores = [scores] if isinstance(scores, str | Path) else list(scores)
        self._memory_bytes = memory_bytes
        self.caches = [open_cache(location) for location in self.scores]
        self._rows = self._opened()
        if not len(self._rows):
            raise UserError(f"{self.scores} hold no row that can be trained on; score others")

    def _opened(self) -> ScoredRows:
        try:
            return ScoredRows(self.caches, memory_bytes=self._memory_bytes)
        except DamagedUnit as error:
            raise _damaged(error) from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """One row.

        Raises:
            UserError: its shard is damaged.
        """
        try:
            row = self._rows[position]
        except DamagedUnit as error:
            raise _damaged(error) from error
        return {"input_ids": [*row.prompt_ids, *row.completion_ids], "scored_row": row}

    def as_datasets(self) -> Any:
        """The same as a `datasets.Dataset`, which trl asks for; rows are read when used."""
        datasets: Any = importlib.import_module("datasets")  # not typed

        def read(places: dict[str, list[int]]) -> dict[str, list[Any]]:
            found = [self[place] for place in places["place"]]
            return {name: [row[name] for row in found] for name in self.column_names}

        return datasets.Dataset.from_dict({"place": range(len(self))}).with_transform(read)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rows = self._opened()


def _damaged(error: DamagedUnit) -> UserError:
    return UserError(
        f"{error}; `opd-stream cache verify STORE --repair` takes it out; then continue the run "
        "that made it: only that unit is made again"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedCollator:
    """Examples of a `CachedDataset` to the inputs of `CachedLoss`.

    They are `input_ids` and `attention_mask` [B, L], `labels` [B, L] (`IGNORED` where a token does
    not train, so that a trainer counts the others), and `cached`, the `Batch`.
    """

    window_tokens: int = UNCUT  # completion tokens used of each row
    top_k: int | None = None  # teacher candidates to use; None: all that are cached
    masked_ids: tuple[int, ...] = ()  # ids whose first occurrence does not train
    same_tokens_only: bool = False  # of a teacher with another tokenizer
    is_given: bool = False  # the rows are not the student's

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [self._used(example["scored_row"]) for example in examples]
        batch = collate(
            rows,
            window_tokens=self.window_tokens,
            masked_ids=self.masked_ids,
            given=[self.is_given] * (1 + max(row.cache for row in rows)),
        )
        labels = torch.full_like(batch.input_ids_BL, IGNORED)
        labels.view(-1)[batch.hidden_rows_N + 1] = batch.completion_ids_N
        return {
            "input_ids": batch.input_ids_BL,
            "attention_mask": batch.attention_mask_BL,
            "labels": labels,
            "cached": batch,
        }

    def _used(self, row: ScoredRow) -> ScoredRow:
        cut = row if self.top_k is None else row.first_candidates(self.top_k)
        return cut.same_tokens_only() if self.same_tokens_only else cut


class CacheOrder(Sampler[int]):
    """The order of an epoch that opd-stream's own training has: shuffled in windows of shards.

    So a cache larger than memory is decoded once an epoch. A trainer calls `set_epoch`.
    """

    def __init__(self, rows: int, *, seed: int) -> None:
        self._rows, self._seed, self._epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, from 0: each has an order of its own."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        yield from epoch_order(self._rows, (self._seed, 0, self._epoch)).tolist()
