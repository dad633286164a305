"""Prompts artifacts, and which of their prompts a rollouts artifact covers.

The selection stands in the recipe as parameters, not as a list, so that two runs which would draw
the same prompts name the same artifact.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opd_stream.prompts import lost_rows, shuffled_rows, tokenised_prompts
from opd_stream.sources import Prompts, source_settings
from opd_stream.store.artifact import Artifact
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch
from stages.checkpoints import Checkpoint


def prompts_artifact(store: Store, source: Prompts, student: Checkpoint) -> Artifact:
    """The prompts artifact of a source, whether it exists or not.

    Raises:
        UserError: a file of the source does not exist.
    """
    recipe = Recipe(
        kind="prompts",
        settings={**source_settings(source), "rendering": student.identity.rendering_sha256},
        inputs={"tokenizer": student.identity.tokenizer_sha256},
    )
    return store.artifact(recipe)


def make_prompts(store: Store, source: Prompts, student: Checkpoint) -> Artifact:
    """The prompts artifact of a source under the student's tokenizer, made if it is missing.

    Raises:
        UserError: the source cannot be read or a prompt does not fit.
    """
    artifact = prompts_artifact(store, source, student)
    if artifact.is_complete() and artifact.damage(0) is None:
        return artifact
    prompts = tokenised_prompts(source, student.tokenizer())
    table = prompts.table
    artifact.create(rows=table.num_rows, rows_per_unit=table.num_rows)
    if artifact.commit_record(0) is not None and artifact.damage(0) is not None:
        artifact.invalidate(0)
    artifact.commit(0, table, counts={"rows": table.num_rows, **prompts.lost})
    artifact.finish()
    return artifact


def rows_left_out(prompts: Artifact, field: str) -> Iterator[str]:
    """A line for every reason why rows of the source are not in a complete artifact."""
    record = prompts.commit_record(0)
    if record is not None:
        yield from lost_rows(field, int(record.counts["rows"]), record.counts)


def every_prompt() -> dict[str, Any]:
    """The selection of all prompts, in order (evaluation)."""
    return {"order": "all"}


def round_prompts(
    *, seed: int, round_index: int, per_round: int, ranges: Sequence[tuple[int, int]] | None = None
) -> dict[str, Any]:
    """The selection of a round's prompts; `ranges` (first, last) leave out what is kept."""
    selection = {"order": "shuffled", "seed": seed, "round": round_index, "per_round": per_round}
    return selection if ranges is None else {**selection, "ranges": [list(r) for r in ranges]}


def selected_rows(selection: dict[str, Any], rows: int) -> list[int]:
    """Row numbers in a prompts artifact of so many rows."""
    if selection["order"] == "all":
        return list(range(rows))
    drawn = shuffled_rows(
        rows=rows,
        seed=selection["seed"],
        round_index=selection["round"],
        per_round=selection["per_round"],
    )
    ranges = selection.get("ranges", [[0, len(drawn)]])
    return [row for first, last in ranges for row in drawn[first:last]]


def prompts_of(store: Store, rollouts: Recipe) -> pa.Table:
    """The prompts a rollouts recipe covers, in its order."""
    prompts = store.by_fingerprint("prompts", rollouts.inputs["prompts"]).read_unit(0)
    return prompts.take(selected_rows(rollouts.settings["selection"], prompts.num_rows))


def probe_size(rows: int, probe: dict[str, Any], unfinished: int) -> int:
    """Rows of a probe: a share of the round's, within its bounds and what is unfinished."""
    return min(unfinished, probe["rows"], max(2, round(probe["share"] * rows)))


def probe_rows(store: Store, probe: Recipe) -> RolloutBatch:
    """The unfinished rollouts that a probe continues, drawn by the seed of the sampling."""
    source = store.by_fingerprint("rollouts", probe.inputs["rollouts"])
    table = pa.concat_tables([source.read_unit(unit) for unit in source.units()])
    unfinished = np.flatnonzero(np.array(table["finish_reason"].to_pylist()) == "length")
    size = probe_size(table.num_rows, probe.settings["probe"], len(unfinished))
    random = np.random.default_rng([probe.settings["seed"], len(unfinished)])
    chosen = np.sort(random.permutation(unfinished)[:size])
    return rollouts_batch(table.take(chosen))
