"""Scored rows to training steps, in an order that any restart continues exactly.

The order of an epoch is a function of (seed, first step of the round, epoch, number of rows), and a
step is the same rows whatever the number of processes: its micro-batches are dealt out to them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch

from opd_stream.batches import Batch, collate
from opd_stream.store.reader import ScoredRow, ScoredRows, epoch_order
from opd_stream.weighting import Segment, own_tokens, trained_mask
from opd_stream.windows import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Everything that decides which rows meet in which step, and how a step is cut.

    Example:
        >>> BatchPlan(rows_per_step=16, tokens_per_microbatch=16384, seed=0, first_step=48,
        ...           window=FixedWindow(tokens=208))
    """

    rows_per_step: int
    tokens_per_microbatch: int
    seed: int
    first_step: int  # optimizer steps done before this round
    window: Window
    top_k: int | None = None  # teacher candidates to use; None: all that are cached
    masked_ids: tuple[int, ...] = ()  # ids whose first occurrence does not train
    segment: Segment | None = None  # places of a completion that train; None: all
    blocks: int | Literal["spans"] = 64  # of the drift gate
    newline_ids: tuple[int, ...] = ()
    staleness: tuple[int, ...] = ()  # of each cache: policies since it was written; none: 0
    same_tokens_only: bool = False  # of a teacher with another tokenizer
    given: tuple[bool, ...] = ()  # of each cache: whether its rows are not the student's; none: no
    weights: tuple[float, ...] = ()  # of the terms of each cache in the loss; none: 1
    held_out: frozenset[int] = frozenset()  # positions of rows that do not train

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps of an epoch over so many rows, of which some may be held out."""
        return -(-(rows - len(self.held_out)) // self.rows_per_step)

    def is_given(self, row: ScoredRow) -> bool:
        """Whether the student did not write a row."""
        return bool(self.given) and self.given[row.cache]

    def used(self, row: ScoredRow) -> ScoredRow:
        """What of a row trains, of its candidates and tokens."""
        cut = row if self.top_k is None else row.first_candidates(self.top_k)
        return cut.same_tokens_only() if self.same_tokens_only else cut

    def epoch_steps(self, rows: int, epoch: int) -> list[list[int]]:
        """Row numbers of each optimizer step of an epoch; the last step may be smaller."""
        whole = epoch_order(rows, (self.seed, self.first_step, epoch)).tolist()
        order, size = [row for row in whole if row not in self.held_out], self.rows_per_step
        return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatches:
    """What one process does in one optimizer step."""

    number: int  # from the start of the run
    window_tokens: int
    batches: list[Batch]
    rows: int  # that the student wrote, for all processes
    cached_tokens: int  # their completion tokens
    cut_tokens: int  # of these, behind the window


def bucketed(lengths: Sequence[int], *, budget: int, multiple: int = 1) -> list[list[int]]:
    """Rows in groups of similar length whose padded size stays within a budget of tokens.

    Args:
        lengths: tokens of each row.
        budget: tokens of a group, padding included; a longer row is a group of its own.
        multiple: the number of groups is a multiple of it, some perhaps empty.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        if not groups or (len(groups[-1]) + 1) * lengths[row] > budget:
            groups.append([])
        groups[-1].append(row)
    while len(groups) % multiple:
        largest = max(range(len(groups)), key=lambda group: (len(groups[group]), group))
        whole = groups[largest]
        half = (len(whole) + 1) // 2
        groups[largest : largest + 1] = [whole[:half], whole[half:]]
    return groups


def step_batches(
    rows: Sequence[ScoredRow], plan: BatchPlan, step: int, *, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """The micro-batches that one of `world_size` processes does of an optimizer step."""
    window = plan.window.tokens_at(step)
    masked = plan.masked_ids
    tokens = sum(int(trained_mask(row, window, masked, plan.segment).sum()) for row in rows)
    lengths = [len(row.prompt_ids) + min(len(row.completion_ids), window) for row in rows]
    groups: list[list[int]] = []
    for is_given in {plan.is_given(row): None for row in rows}:  # a batch has one objective
        alike = [number for number, row in enumerate(rows) if plan.is_given(row) == is_given]
        found = bucketed(
            [lengths[number] for number in alike],
            budget=plan.tokens_per_microbatch,
            multiple=world_size,
        )
        groups += [[alike[place] for place in group] for group in found]
    batches: list[Batch] = []
    for group in groups[rank::world_size]:
        # A process without rows takes part with one of no weight.
        chosen = [rows[row] for row in group] or [rows[0]]
        batch = collate(
            chosen,
            window_tokens=window,
            tokens_of_step=tokens,
            masked_ids=masked,
            segment=plan.segment,
            blocks=plan.blocks,
            newline_ids=plan.newline_ids,
            staleness=plan.staleness,
            given=plan.given,
            cache_weights=plan.weights,
        )
        if not group:
            batch = replace(batch, weights_N=torch.zeros_like(batch.weights_N))
        batches.append(batch)
    return batches


def read_epoch(
    rows: ScoredRows,
    plan: BatchPlan,
    epoch: int,
    *,
    skipped: int = 0,
    rank: int = 0,
    world_size: int = 1,
    decided: Callable[[], Window | None] = lambda: None,
) -> Iterator[StepBatches]:
    """The steps of an epoch, without the first ones, as one of `world_size` processes does them.

    `decided` is asked before each step for its window; None: that of the plan.
    """
    steps = plan.epoch_steps(len(rows), epoch)
    first = plan.first_step + epoch * len(steps) + skipped
    ahead = rows.ahead([position for step in steps[skipped:] for position in step])
    for number, step in enumerate(steps[skipped:], start=first):
        plan = replace(plan, window=decided() or plan.window)
        whole, window = list(islice(ahead, len(step))), plan.window.tokens_at(number)
        masks = [own_tokens(row) for row in whole if not plan.is_given(row)]
        chosen = [plan.used(row) for row in whole]
        yield StepBatches(
            number=number,
            window_tokens=window,
            rows=len(masks),
            cached_tokens=sum(int(mask.sum()) for mask in masks),
            cut_tokens=sum(int(mask[window:].sum()) for mask in masks),
            batches=step_batches(chosen, plan, number, rank=rank, world_size=world_size),
        )
