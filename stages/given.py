"""Rollouts that the student did not write: given completions of the prompts, as rows like its own.

They stand in an artifact of rollouts with `origin: given` in its recipe. Nobody drew their tokens,
so there are no behavior log-probabilities: the column holds 0, and no reader of such rows uses it.

Or the student's rollouts begin with some tokens of such a completion, which its loss mask leaves
out.
"""

from dataclasses import replace
from zlib import crc32

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.engines.base import Engine, SamplingSettings
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import COMPLETIONS, prompts_batch
from opd_stream.types import FinishReason, RolloutBatch

Ids = NDArray[np.int64]


def given_batch(prompts: pa.Table, recipe: Recipe) -> RolloutBatch:
    """One given completion of each prompt of a table; of several, the one that the seed names."""
    settings, batch = recipe.settings, prompts_batch(prompts)
    chosen: list[tuple[Ids, FinishReason]] = []
    for name, choices in zip(batch.prompt_id, prompts[COMPLETIONS].to_pylist(), strict=True):
        ids = ended(_chosen(choices, name, recipe), settings["stop_ids"], settings["terminator"])
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


def begun_batch(prompts: pa.Table, recipe: Recipe) -> RolloutBatch:
    """`prefix_tokens` of each prompt's given completion, to be continued; none where it has none.

    Never its terminator. The student's own candidates there are nobody's, as of others' turns.
    """
    settings, batch = recipe.settings, prompts_batch(prompts)
    samples, own = settings["samples_per_prompt"], settings.get("student_top_k", 0)
    begun: list[Ids] = []
    for name, choices in zip(batch.prompt_id, prompts[COMPLETIONS].to_pylist(), strict=True):
        ids = _chosen(choices, name, recipe) if choices else np.zeros(0, np.int64)
        is_end = np.isin(ids, settings["stop_ids"])
        text = ids[: int(is_end.argmax())] if is_end.any() else ids
        begun += [text[: settings["prefix_tokens"]]] * samples
    return RolloutBatch(
        prompt_id=tuple(name for name in batch.prompt_id for _ in range(samples)),
        sample_index=np.tile(np.arange(samples, dtype=np.int32), len(batch.prompt_id)),
        prompt_ids=tuple(ids for ids in batch.prompt_ids for _ in range(samples)),
        completion_ids=tuple(begun),
        behavior_logprobs=tuple(np.zeros(len(ids), np.float32) for ids in begun),
        finish_reason=("length",) * len(begun),
        student_top_ids=tuple(np.tile(np.arange(own), (len(ids), 1)) for ids in begun)
        if own
        else None,
    )


def continued(engine: Engine, begun: RolloutBatch, settings: SamplingSettings) -> RolloutBatch:
    """What the student makes of the beginnings of others; only what it wrote may train."""
    batch = engine.extend(begun, settings)
    pairs = zip(batch.completion_ids, begun.completion_ids, strict=True)
    masks = tuple(np.arange(len(ids)) >= len(before) for ids, before in pairs)
    return replace(batch, loss_mask=masks)


def _chosen(choices: list[list[int]], name: str, recipe: Recipe) -> Ids:
    """Of several given completions of a prompt, the one that the seed names."""
    number = crc32(f"{recipe.settings['seed']}/{name}".encode()) % len(choices)
    return np.array(choices[number], np.int64)


def ended(ids: Ids, stop_ids: list[int], terminator: int) -> Ids:
    """A completion up to its first terminator; with one behind it where it has none."""
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    return ids[: stops[0] + 1] if len(stops) else np.append(ids, terminator)
