"""The rollouts of a round with the largest mean of a figure."""

import heapq
import math
import shlex
from dataclasses import dataclass

from opd_stream.store.reader import ScoredRow
from opd_stream.token_figures import FIGURES
from pipeline.inspect.source import Found, RoundCache, whole_shards
from pipeline.inspect.view import Reading, RolloutView, check_figure, mean_of, view_of

DEFAULT_FIGURE = next(iter(FIGURES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """A rollout of the list."""

    view: RolloutView
    command: str  # that opens it


def worst_rollouts(reading: Reading, count: int, by: str) -> list[Worst]:
    """The `count` rollouts with the largest mean over the tokens that train, the largest first.

    Rows are read in order and let go, so memory does not grow with the round. Of equal means the
    earlier row comes first; a row of which no token trains is left out.

    Raises:
        UserError: the scores do not tell the figure, or a shard is damaged.
    """
    kept: list[tuple[float, int, RoundCache, ScoredRow]] = []
    number = 0
    with whole_shards():
        for cache in reading.source.caches:
            rows = cache.rows()
            for position in range(len(rows)):
                row = rows[position]
                figures = reading.figures(cache, row)
                check_figure(by, figures, cache)
                mean = mean_of(figures[by], reading.trains(row))
                number -= 1
                if math.isnan(mean):
                    continue
                push = heapq.heappush if len(kept) < count else heapq.heappushpop
                push(kept, (mean, number, cache, row))
    return [
        _worst(reading, Found(cache=cache, row=row, others=()), by)
        for _, _, cache, row in sorted(kept, key=lambda entry: entry[:2], reverse=True)
    ]


def _worst(reading: Reading, found: Found, by: str) -> Worst:
    source, row = reading.source, found.row
    words = ["opd-stream", "inspect", str(source.run), "--round", str(source.round_index)]
    words += ["--prompt", row.prompt_id, "--sample", str(row.sample_index)]
    if len(source.caches) > 1:
        words += ["--cache", str(found.cache.number)]
    if by != DEFAULT_FIGURE:
        words += ["--by", by]
    return Worst(view=view_of(reading, found, by), command=shlex.join(words))
