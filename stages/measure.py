"""Drift of cached rows before anything trains on them: a small sample of each unit."""

from typing import Any

import torch

from opd_stream.batches import collate
from opd_stream.statistics import NAMES, named
from opd_stream.store.reader import ScoredRow, ScoredRows, epoch_order
from stages.data_module import BatchPlan, bucketed
from stages.student_module import StudentModule

SAMPLE_KEY = 0x5A3B1E  # of the rows of a unit
LEAST_ROWS = 2  # of a unit
WHOLE = 2**31  # a window that cuts nothing


@torch.no_grad()
def measure_units(
    module: StudentModule, rows: ScoredRows, plan: BatchPlan, *, share: float
) -> dict[tuple[int, int], dict[str, float]]:
    """Sums (`opd_stream.statistics.NAMES`) of a sample of each (cache, unit).

    The sample is a function of the plan's seed and of the unit's size, so the rows measured at the
    end of a round are those of the start of the next. All that is stored of a row counts, whatever
    the window. Every process of a sharded model takes part.
    """
    sums: dict[tuple[int, int], dict[str, float]] = {}
    for (cache, unit), positions in rows.positions_by_unit().items():
        order = epoch_order(len(positions), (plan.seed, SAMPLE_KEY + unit))
        size = max(LEAST_ROWS, round(share * len(positions)))
        chosen = [rows[positions[place]] for place in order[:size].tolist()]
        sums[cache, unit] = named(_sums(module, chosen, plan))
    return sums


def _sums(module: StudentModule, rows: list[ScoredRow], plan: BatchPlan) -> torch.Tensor:
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    total = torch.zeros(len(NAMES), dtype=torch.float64, device=module.device)
    for group in bucketed(lengths, budget=plan.tokens_per_microbatch):
        chosen = [plan.used(rows[place]) for place in group]
        batch: Any = collate(chosen, window_tokens=WHOLE, masked_ids=plan.masked_ids)
        total += module.loss(batch.to(module.device)).sums
    return total
