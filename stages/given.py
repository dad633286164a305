"""Rollouts that the student did not write: given completions of the prompts, as rows like its own.

They stand in an artifact of rollouts with `origin: given` in its recipe. Nobody drew their tokens,
so there are no behavior log-probabilities: the column holds 0, and no reader of such rows uses it.
"""

from zlib import crc32

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import COMPLETIONS, prompts_batch
from opd_stream.types import FinishReason, RolloutBatch

Ids = NDArray[np.int64]


def given_batch(prompts: pa.Table, recipe: Recipe) -> RolloutBatch:
    """One given completion of each prompt of a table; of several, the one that the seed names."""
    settings, batch = recipe.settings, prompts_batch(prompts)
    chosen: list[tuple[Ids, FinishReason]] = []
    for name, choices in zip(batch.prompt_id, prompts[COMPLETIONS].to_pylist(), strict=True):
        number = crc32(f"{settings['seed']}/{name}".encode()) % len(choices)
        ids = ended(
            np.array(choices[number], np.int64), settings["stop_ids"], settings["terminator"]
        )
        window = settings["window_tokens"]
        chosen.append((ids[:window], "stop" if len(ids) <= window else "length"))
    return RolloutBatch(
        prompt_id=batch.prompt_id,
        sample_index=np.zeros(len(chosen), np.int32),
        prompt_ids=batch.prompt_ids,
        completion_ids=tuple(ids for ids, _ in chosen),
        behavior_logprobs=tuple(np.zeros(len(ids), np.float32) for ids, _ in chosen),
        finish_reason=tuple(reason for _, reason in chosen),
    )


def ended(ids: Ids, stop_ids: list[int], terminator: int) -> Ids:
    """A completion up to its first terminator; with one behind it where it has none."""
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: stops[0] + 1] if len(stops) else np.append(ids, terminator)
