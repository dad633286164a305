"""The order of an epoch: a function of the number of rows and a key, and of nothing else.

Not of the number of workers or ranks, and not of how the rows were cut into shards. Where all rows
fit into one shuffle window the order is a plain permutation. Otherwise blocks of consecutive rows
are permuted and rows are mixed inside windows of blocks, so that reading stays near in time what
lies near on the disk, and a bounded memory serves a cache of any size.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 64
WINDOW_ROWS = 512


def epoch_order(
    rows: int, key: Sequence[int], *, window_rows: int = WINDOW_ROWS
) -> NDArray[np.int64]:
    """Row numbers of an epoch [rows]; `key` is (seed, ..., epoch)."""
    random = np.random.default_rng(list(key))
    if rows <= window_rows:
        return random.permutation(rows)
    order = np.empty(rows, np.int64)
    blocks = random.permutation(-(-rows // BLOCK_ROWS))
    done = 0
    for start in range(0, len(blocks), window_rows // BLOCK_ROWS):
        window = blocks[start : start + window_rows // BLOCK_ROWS, None] * BLOCK_ROWS
        chosen = (window + np.arange(BLOCK_ROWS)).reshape(-1)
        chosen = random.permutation(chosen[chosen < rows])
        order[done : done + len(chosen)] = chosen
        done += len(chosen)
    return order
