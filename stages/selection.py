"""Which prompts a rollouts artifact covers: a pure function of its recipe.

The selection stands in the recipe as parameters, not as a list, so that two runs which would draw
the same prompts name the same artifact.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opd_stream.prompts import shuffled_rows
from opd_stream.store.recipe import Recipe
from opd_stream.store.schema import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch


def every_prompt() -> dict[str, Any]:
    """All prompts, in order (evaluation)."""
    return {"order": "all"}


def round_prompts(
    *, seed: int, round_index: int, per_round: int, ranges: Sequence[tuple[int, int]] | None = None
) -> dict[str, Any]:
    """The prompts of a round; `ranges` are those (first, last) for which nothing is kept."""
    selection = {"order": "shuffled", "seed": seed, "round": round_index, "per_round": per_round}
    return selection if ranges is None else {**selection, "ranges": [list(r) for r in ranges]}


def selected_rows(selection: dict[str, Any], rows: int) -> list[int]:
    """Row numbers in the prompts artifact."""
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
