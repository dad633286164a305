"""Levels of prompts, and verdicts on what a student wrote to each (rollouts.select)."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from opd_stream.store.artifact import Artifact
from opd_stream.store.shards import LEVEL, rollouts_batch
from opd_stream.store.store import Store
from opd_stream.tasks.judges import AnyJudge, open_judge
from stages.filtering import completion_texts, readable_answers
from stages.prompts import unit_prompts


@lru_cache(maxsize=4)
def prompt_levels(prompts: Artifact) -> tuple[str, ...]:
    """The level of each prompt of a complete artifact, in order."""
    return tuple(level for table in prompts.tables() for level in table[LEVEL].to_pylist())


def level_verdicts(
    store: Store, rollouts: Artifact, judge: AnyJudge, tokenizer: Any
) -> Iterator[tuple[str, bool]]:
    """Level and verdict of each rollout whose reference the judge can read.

    Raises:
        DamagedUnit: a shard is not what was committed.
    """
    opened = open_judge(judge)
    for unit in rollouts.units():
        batch = rollouts_batch(rollouts.read_unit(unit))
        prompts = unit_prompts(store, rollouts, unit)
        pairs = zip(prompts["prompt_id"].to_pylist(), prompts[LEVEL].to_pylist(), strict=True)
        level_of, answers = dict(pairs), readable_answers(opened, prompts)
        rows = [row for row, name in enumerate(batch.prompt_id) if name in answers]
        if not rows:
            continue
        names = [batch.prompt_id[row] for row in rows]
        texts = completion_texts(tokenizer, [batch.answer_ids(row) for row in rows])
        asked = list(zip(texts, (answers[name] for name in names), strict=True))
        yield from zip((level_of[name] for name in names), opened.verdicts(asked), strict=True)
