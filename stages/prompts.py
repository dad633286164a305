"""Prompts artifacts, and which of their prompts a rollouts artifact covers.

The selection stands in the recipe as parameters, not as a list, so that two runs which would draw
the same prompts name the same artifact.
"""

import json
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, tee
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.errors import UserError, named
from opd_stream.prompts import (
    ROWS_AT_ONCE,
    TokenisedPrompts,
    lost_rows,
    rendered_parts,
    shuffled_rows,
    tokenised_parts,
)
from opd_stream.rendering import Rendering
from opd_stream.sources import Prompts, source_settings
from opd_stream.store.artifact import Artifact, Commit, DamagedUnit
from opd_stream.store.files import canonical_json, explained, is_remote
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import (
    COMPLETIONS,
    PROMPTS,
    ROWS_PER_PART,
    prompts_batch,
    rollouts_batch,
)
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch
from stages.checkpoints import Checkpoint

Ids = NDArray[np.integer[Any]]

# How rows become ids, here and in opd_stream: raised when any prompt would come out otherwise, so
# that artifacts of older rules are not taken for it (tests/test_messages.py).
RULES = 1
ROWS_PER_SHARD = 16_384
BYTES_IN_MEMORY = 2**26  # of prompts that are being made
BYTES_REMEMBERED = 2**25  # of prompts that were read


def prompts_artifact(
    store: Store, source: Prompts, student: Checkpoint, *, field: str = "prompts"
) -> Artifact:
    """The prompts artifact of a source, whether it exists or not.

    `field` of the config is named where it is refused.

    Raises:
        UserError: a file of the source does not exist.
    """
    with named(field):
        settings = source_settings(source)
    recipe = Recipe(
        kind="prompts",
        settings={
            **settings,
            "rendering": student.identity.rendering_sha256,
            **_rules(),
        },
        inputs={"tokenizer": student.identity.tokenizer_sha256},
    )
    return store.artifact(recipe)


def _rules() -> dict[str, int]:
    """What a recipe says of them; nothing of the first ones."""
    return {} if RULES == 1 else {"rules": RULES}


def make_prompts(
    store: Store, source: Prompts, student: Checkpoint, *, field: str = "prompts"
) -> Artifact:
    """The prompts artifact of a source under the student's tokenizer, made if it is missing.

    `field` of the config is named where it is refused.

    Raises:
        UserError: the source cannot be read or a prompt does not fit.
    """
    artifact = prompts_artifact(store, source, student, field=field)
    artifact.mend()
    if is_sound(artifact):
        return artifact
    with named(field):
        _publish(artifact, tokenised_parts(source, student.tokenizer()))
    return artifact


def teacher_prompts_artifact(
    store: Store, rendering: Rendering, prompts: Artifact, teacher: Checkpoint
) -> Artifact:
    """The prompts of a run as its teacher reads them, row for row, whether it exists or not.

    Those that go to another teacher are there without ids.

    Raises:
        UserError: the template's file cannot be read.
    """
    digest = teacher.identity.rendering_sha256
    recipe = Recipe(
        kind="prompts",
        settings={**rendering.settings(), "rendering": digest, **_rules()},
        inputs={"prompts": prompts.fingerprint, "tokenizer": teacher.identity.tokenizer_sha256},
    )
    return store.artifact(recipe)


def make_teacher_prompts(
    store: Store,
    source: Prompts,
    rendering: Rendering,
    prompts: Artifact,
    teacher: Checkpoint,
) -> Artifact:
    """As `teacher_prompts_artifact`, made if it is missing; `prompts` are complete.

    Raises:
        UserError: the source cannot be read, or the template or the view does not take a prompt.
    """
    artifact = teacher_prompts_artifact(store, rendering, prompts, teacher)
    artifact.mend()
    if is_sound(artifact):
        return artifact
    _publish(artifact, _rendered(source, rendering, prompts, teacher))
    return artifact


def _rendered(
    source: Prompts, rendering: Rendering, prompts: Artifact, teacher: Checkpoint
) -> Iterator[TokenisedPrompts]:
    """The prompts of a student as a teacher reads them, some at a time."""
    parts, again = tee(
        table.slice(start, ROWS_AT_ONCE)
        for table in prompts.tables()
        for start in range(0, table.num_rows, ROWS_AT_ONCE)
    )
    chosen = 0
    for own in rendered_parts(source, rendering, teacher.tokenizer(), parts):
        chosen += own.num_rows
        names = next(again)["prompt_id"]
        yield TokenisedPrompts(table=_with_others(names, own) if rendering.when else own, lost={})
    check_chosen(rendering, chosen)


def _with_others(names: pa.ChunkedArray, own: pa.Table) -> pa.Table:
    """Some prompts in their places among all names; the others are empty."""
    place_of = {name: place for place, name in enumerate(own["prompt_id"].to_pylist())}
    places = [place_of.get(name) for name in names.to_pylist()]
    lengths = own["prompt_ids"].combine_chunks().value_lengths().to_pylist()
    ends = accumulate((0 if place is None else lengths[place] for place in places), initial=0)
    offsets = pa.array(ends, pa.int32())
    ids = pa.ListArray.from_arrays(offsets, own["prompt_ids"].combine_chunks().flatten())
    texts = own.select(["text", "answer"]).take(pa.array(places, pa.int64()))
    columns = [
        names,
        ids,
        texts["text"].fill_null(""),
        texts["answer"],
    ]
    return pa.Table.from_arrays(columns, schema=PROMPTS)


def own_prompts(teachers: Artifact) -> pa.Table:
    """Of a complete artifact of prompts, those that have ids: none goes to another teacher."""
    table = teachers.read_all()
    return table.filter(pa.array([length > 0 for length in table_lengths(table)]))


def is_sound(artifact: Artifact) -> bool:
    """Whether a prompts artifact is complete, and every shard of it what was committed."""
    return artifact.is_complete() and all(
        artifact.damage(unit) is None for unit in artifact.units()
    )


def check_chosen(rendering: Rendering, rows: int) -> None:
    """Refuse a teacher that no prompt goes to; `rows` do."""
    if not rows:
        wanted = "; ".join(f"{name}: {', '.join(v)}" for name, v in rendering.when.items())
        raise UserError(
            f"when is {{{wanted}}}, and no prompt has that; expected a value that some row has; "
            "correct it, or leave the teacher out"
        )


def _publish(artifact: Artifact, parts: Iterable[TokenisedPrompts]) -> None:
    """Publish a prompts artifact; damaged units of an earlier one are made again.

    How many rows there are is known at the end, so what memory does not hold waits in a file.

    Raises:
        UserError: the artifact is there, and of another number of rows.
    """
    rows, lost = 0, Counter[str]()
    with tempfile.SpooledTemporaryFile(max_size=BYTES_IN_MEMORY) as file:
        writer: Any = None
        for part in parts:
            rows += part.table.num_rows
            lost.update(part.lost)
            writer = writer or pa.ipc.new_stream(file, part.table.schema)
            with explained(Path(tempfile.gettempdir())):
                writer.write_table(part.table)
        with explained(Path(tempfile.gettempdir())):
            writer.close()
            file.seek(0)
        artifact.create(rows=rows, rows_per_unit=min(rows, ROWS_PER_SHARD))
        layout = artifact.layout()  # of an earlier writer, where there was one
        if layout.rows != rows:
            raise UserError(
                f"{artifact.name} was made of {layout.rows:,} prompts, and now there are {rows:,}; "
                "expected the same rows as before; restore them, or name another revision"
            )
        for unit, table in enumerate(_shards(pa.ipc.open_stream(file), layout.rows_per_unit)):
            if not artifact.has_sound(unit):
                counts = {"rows": table.num_rows, **({} if unit else lost)}
                artifact.commit(unit, table, counts=counts)
    artifact.finish()


def _shards(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many, as many as a shard has."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        table = pa.Table.from_batches([*waiting, batch])
        while table.num_rows >= rows:
            yield table.slice(0, rows)
            table = table.slice(rows)
        waiting = table.to_batches()
    if waiting:
        yield pa.Table.from_batches(waiting)


class PromptRows:
    """The rows of a complete prompts artifact, read with the 64 rows of their record batch.

    Shards of an object store are copied to this machine as they are needed, each by one request.

    Example:
        >>> PromptRows(store, "9f1c…").read([70_001, 3])
    """

    def __init__(self, store: Store, fingerprint: str) -> None:
        self._artifact = store.by_fingerprint("prompts", fingerprint)
        self._layout = self._artifact.layout()
        self._units: dict[int, tuple[Commit, pa.Schema]] = {}
        self._parts: OrderedDict[tuple[int, int], pa.RecordBatch] = OrderedDict()  # last read last
        self._bytes = 0  # of them
        is_far = is_remote(self._artifact.folder)
        self._near = Artifact(store.local, self._artifact.recipe) if is_far else self._artifact

    def __len__(self) -> int:
        return self._layout.rows

    def read(self, rows: Sequence[int]) -> pa.Table:
        """Verified rows, in the order of their numbers.

        Raises:
            DamagedUnit: a shard is not what was committed.
        """
        places = [divmod(row, self._layout.rows_per_unit) for row in rows]
        parts = sorted({(unit, row // ROWS_PER_PART) for unit, row in places})
        batches = [self._part(*part) for part in parts]
        ends = accumulate((batch.num_rows for batch in batches), initial=0)
        starts = dict(zip(parts, ends, strict=False))
        table = pa.Table.from_batches(batches, schema=self._unit(0)[1])
        numbers = [starts[unit, row // ROWS_PER_PART] + row % ROWS_PER_PART for unit, row in places]
        return table.take(pa.array(numbers, pa.int64()))

    def answered(self, rows: Sequence[int]) -> list[bool] | None:
        """As `answered_rows`, of some rows."""
        is_given = COMPLETIONS in self._unit(0)[1].names
        return answered_rows(self.read(rows)) if is_given else None

    @property
    def is_rendered(self) -> bool:
        """Whether they are those of a student, row for row, as a teacher reads them."""
        return "prompts" in self._artifact.recipe.inputs

    def _part(self, unit: int, number: int) -> pa.RecordBatch:
        """A record batch; the latest are remembered, because units draw from all of them."""
        if (unit, number) in self._parts:
            self._parts.move_to_end((unit, number))
            return self._parts[unit, number]
        commit, schema = self._unit(unit)
        try:
            part = self._near.read_part(commit, number, schema)
        except DamagedUnit:
            if self._near is self._artifact:
                raise
            self._near.fetch(commit, self._artifact)
            part = self._near.read_part(commit, number, schema)
        self._parts[unit, number] = part
        self._bytes += part.nbytes
        while self._bytes > BYTES_REMEMBERED and len(self._parts) > 1:
            self._bytes -= self._parts.popitem(last=False)[1].nbytes
        return part

    def _unit(self, unit: int) -> tuple[Commit, pa.Schema]:
        if unit not in self._units:
            commit = self._artifact.commit_record(unit)
            if commit is None:
                raise DamagedUnit(self._artifact, unit, "its commit record is missing")
            if self._near is not self._artifact:
                self._near.fetch(commit, self._artifact)
            self._units[unit] = commit, self._near.read_schema(commit)
        return self._units[unit]


def prompt_ids_of(store: Store, fingerprint: str) -> dict[str, Ids]:
    """Prompt id -> token ids [P], of a complete prompts artifact."""
    return ids_by_name(store.by_fingerprint("prompts", fingerprint).read_all())


def ids_by_name(prompts: pa.Table) -> dict[str, Ids]:
    """Prompt id -> token ids [P]; those of another teacher are left out."""
    read = prompts_batch(prompts)
    pairs = zip(read.prompt_id, read.prompt_ids, strict=True)
    return {name: ids for name, ids in pairs if len(ids)}


def prompts_in_turn(store: Store, fingerprint: str) -> Iterator[Ids]:
    """Token ids [P] of each prompt of a complete artifact, a shard in memory at a time."""
    artifact = store.by_fingerprint("prompts", fingerprint)
    for unit in artifact.units():
        yield from ids_by_name(artifact.read_unit(unit)).values()


def with_prompts(
    batch: RolloutBatch, prompt_ids: Mapping[str, NDArray[np.integer[Any]]]
) -> RolloutBatch:
    """Rollouts behind other prompts of the same names."""
    return replace(batch, prompt_ids=tuple(prompt_ids[name] for name in batch.prompt_id))


def prompt_lengths(prompts: Artifact) -> list[int]:
    """Tokens of each prompt of a complete artifact."""
    return [length for table in prompts.tables() for length in table_lengths(table)]


def table_lengths(prompts: pa.Table) -> list[int]:
    """Tokens of each prompt of a table; `to_numpy` would load pandas, which takes long."""
    return prompts["prompt_ids"].combine_chunks().value_lengths().to_pylist()


def rows_left_out(prompts: Artifact, field: str) -> Iterator[str]:
    """A line for every reason why rows of the source are not in a complete artifact."""
    record = prompts.commit_record(0)
    if record is not None:
        yield from lost_rows(field, prompts.layout().rows, record.counts)


def every_prompt() -> dict[str, Any]:
    """The selection of all prompts, in order (evaluation)."""
    return {"order": "all"}


def held_out_prompts(*, seed: int, rows: int) -> dict[str, Any]:
    """The selection of the prompts that the first pass of the rounds would read last."""
    return {"order": "held_out", "seed": seed, "rows": rows}


def chosen_selection(rows: Sequence[int]) -> dict[str, Any]:
    """The selection of prompts that a curriculum chose, by their numbers."""
    return {"order": "chosen", "rows": list(rows)}


def round_prompts(
    *,
    seed: int,
    round_index: int,
    per_round: int,
    ranges: Sequence[tuple[int, int]] | None = None,
    given: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The selection of a round's prompts; `ranges` (first, last) leave out what is kept.

    `given` parts the prompts: `rows` of them have given completions (`by` the teacher, else of the
    prompts' rows: the first that have one), and `part` says which of the two parts is selected.
    """
    selection: dict[str, Any] = {"order": "shuffled", "seed": seed, "round": round_index}
    selection |= {"per_round": per_round} | ({} if given is None else {"given": given})
    return selection if ranges is None else {**selection, "ranges": [list(r) for r in ranges]}


Answered = Callable[[Sequence[int]], Sequence[bool] | None]
"""Which of some rows have a completion; None: it is not known, as if all had."""


def selected_rows(
    selection: dict[str, Any], rows: int, answered: Answered = lambda rows: None
) -> list[int]:
    """Row numbers in a prompts artifact of so many rows; `answered` of them."""
    if selection["order"] == "chosen":
        return selection["rows"]
    if selection["order"] == "all":
        return list(range(rows))
    if selection["order"] == "held_out":
        whole = shuffled_rows(rows=rows, seed=selection["seed"], round_index=0, per_round=rows)
        return whole[-selection["rows"] :]
    drawn = shuffled_rows(
        rows=rows,
        seed=selection["seed"],
        round_index=selection["round"],
        per_round=selection["per_round"],
    )
    if (given := selection.get("given")) is not None:
        known = None if given["by"] == "teacher" else answered(drawn)
        pairs = zip(drawn, known or [True] * len(drawn), strict=True)
        able = [row for row, is_able in pairs if is_able][: given["rows"]]
        left = set(drawn) - set(able)
        drawn = able if given["part"] == "given" else [row for row in drawn if row in left]
    ranges = selection.get("ranges", [[0, len(drawn)]])
    return [row for first, last in ranges for row in drawn[first:last]]


def prompts_of(store: Store, rollouts: Recipe, part: range | None = None) -> pa.Table:
    """The prompts a rollouts recipe covers, in its order; all, or a part of them by place."""
    rows, selected = _selected_prompts(store, rollouts)
    return rows.read(selected if part is None else selected[part.start : part.stop])


def unit_prompts(
    store: Store, rollouts: Artifact, unit: int, fingerprint: str | None = None
) -> pa.Table:
    """The prompts that a unit of rollouts is of, whatever it continues; of a probe, all it may be.

    Only what holds them is read, so that it costs the same of any number of prompts.

    Args:
        store: of the rollouts.
        rollouts: that were made of prompts of the store.
        unit: of them.
        fingerprint: of the prompts as another model reads them, row for row; None: as the author.
    """
    while "extends" in rollouts.recipe.settings:
        unit = rollouts.recipe.settings["extends"][unit]
        rollouts = store.by_fingerprint("rollouts", rollouts.recipe.inputs["rollouts"])
    prompts, selected = _selected_prompts(store, rollouts.recipe)
    if "probe" not in rollouts.recipe.settings:
        part = rollouts.unit_rows(unit)
        selected = selected[part.start : part.stop]
    return (prompts if fingerprint is None else _prompt_rows(store, fingerprint)).read(selected)


def is_rendered(store: Store, fingerprint: str) -> bool:
    """Whether prompts are those of a student, row for row, as a teacher reads them."""
    return _prompt_rows(store, fingerprint).is_rendered


def prompt_count(store: Store, rollouts: Recipe) -> int:
    """How many prompts a rollouts recipe covers."""
    return len(_selected_prompts(store, rollouts)[1])


def _selected_prompts(store: Store, rollouts: Recipe) -> tuple[PromptRows, list[int]]:
    """The prompts of a rollouts recipe, and the numbers of the rows that it covers."""
    prompts = _prompt_rows(store, rollouts.inputs["prompts"])
    selection = canonical_json(rollouts.settings["selection"])
    return prompts, _rows_of_selection(selection, prompts)


# A worker asks for both once a unit.
_prompt_rows = lru_cache(maxsize=32)(PromptRows)


@lru_cache(maxsize=4)
def _rows_of_selection(selection: bytes, prompts: PromptRows) -> list[int]:
    return selected_rows(json.loads(selection), len(prompts), prompts.answered)


def answered_rows(prompts: pa.Table) -> list[bool] | None:
    """Which prompts of a table have a given completion; None: the table has no such column."""
    if COMPLETIONS not in prompts.column_names:
        return None
    return [
        bool(length) for length in prompts[COMPLETIONS].combine_chunks().value_lengths().to_pylist()
    ]


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
