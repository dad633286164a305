"""An artifact made of units: a fixed slice of prompts each, one shard each.

A worker publishes its shard, then the unit's commit record; the first record wins and is never
replaced, so two workers (or two runs) on one unit are harmless. When every unit is committed the
manifest is written; the artifact exists if and only if its manifest does.

    rollouts/3f0c…/recipe.json          what it is made of, and how many prompts a unit holds
    rollouts/3f0c…/units/00002-9a….arrow  a shard, named by its digest
    rollouts/3f0c…/units/00002.json     its commit record, with the digest of each of its parts
    rollouts/3f0c…/manifest.json        all commit records, written last
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pyarrow as pa
from pydantic import Field, FiniteFloat, model_serializer, model_validator

from opd_stream.errors import UserError
from opd_stream.section import LARGEST_INTEGER, Record, later
from opd_stream.store.codecs.fidelity import Fidelity
from opd_stream.store.files import (
    check_there,
    inside,
    is_there,
    json_files,
    publish,
    remove_file,
    sha256,
    verified_bytes,
)
from opd_stream.store.recipe import Recipe, RecipeRecord, mend_recipe
from opd_stream.store.sealed import (
    DamagedRecord,
    Sealed,
    is_sound,
    load_record,
    publish_new_record,
    publish_record,
    say_mended,
)
from opd_stream.store.shards import Part, batch_of, schema_of, shard_bytes, table_of

LOG = logging.getLogger("opd_stream")


class Layout(Record):
    """How many rows (prompts) an artifact covers, and how many a unit holds."""

    rows: Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
    rows_per_unit: Annotated[int, Field(ge=1)]


Count = int | Annotated[float, Field(allow_inf_nan=False)]


class ArtifactRecord(RecipeRecord):
    """`recipe.json` of an artifact made of units."""

    layout: Layout


class Commit(Sealed):
    """The record that makes a unit exist.

    Example:
        >>> Commit(unit=2, file="units/00002-9a41b0c2.arrow", sha256="9a41…", bytes=81_920,
        ...        counts={"rows": 32, "completion_tokens": 5_310}, made_by="5b0c…", seconds=1.9,
        ...        made_at=1_760_000_000.0, source_sha256="77c0…",
        ...        parts=(Part(offset=8, length=704, rows=0, sha256="1b…"),))
    """

    NAMED_BY: ClassVar[int] = 4  # KIND/FINGERPRINT/units/FILE

    unit: int
    file: str  # relative to the artifact's folder
    sha256: str  # of the shard's bytes
    bytes: Annotated[int, Field(ge=0)]
    counts: dict[str, Count]  # additive: rows, completion_tokens, refused_rows, ...
    made_by: str = ""  # id of the run that made it; every other run reuses it
    seconds: FiniteFloat = 0.0  # it took to make
    made_at: FiniteFloat = (
        0.0  # its end, seconds since the epoch by the maker's clock; 0: not known
    )
    source_sha256: str | None = None  # the shard of the input artifact this one was made from
    parts: tuple[Part, ...] = ()  # the schema, then each record batch
    skipped_rows: tuple[int, ...] = ()  # refused, or without a token that may train; scores only
    dropped_rows: dict[str, tuple[int, ...]] = later(default={})  # reason -> rows that none read
    fidelity: Fidelity | None = None  # of the codec that wrote it; scores only
    layout: Layout | None = later(default=None)  # of the artifact, as recipe.json has it

    def misplaced(self, path: Path) -> str | None:
        """A record of another unit."""
        return None if path.stem == f"{self.unit:05d}" else f"it is of unit {self.unit}"


class Manifest(RecipeRecord):
    """`manifest.json` of an artifact made of units."""

    units: tuple[Commit, ...]
    counts: dict[str, Count]  # of all units together


class EvaluationResult(Record):
    """What a judge found in the answers of a policy; in JSON each pass@k is a field of its own."""

    passes: dict[str, float]  # "pass@1" -> mean over the problems
    standard_error: float  # of pass@1
    problems: int
    samples: int  # of each problem
    completion_tokens: int
    length_rows: int  # answers that the window cut
    correct: dict[str, int]  # prompt_id -> right samples
    judge_seconds: float = 0.0
    left_out: tuple[str, ...] = ()  # prompts without a reference that the judge can read

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if "passes" in value:
            return value
        return {**value, "passes": {name: v for name, v in value.items() if "@" in name}}

    @model_serializer(mode="wrap")
    def _spread(self, dump: Any) -> dict[str, Any]:
        value = dump(self)
        return {**value.pop("passes"), **value}


class EvaluationManifest(RecipeRecord):
    """`manifest.json` of an evaluation, which has no units."""

    result: EvaluationResult


class DamagedUnit(Exception):
    """A committed unit whose shard is missing or not the committed bytes."""

    def __init__(self, artifact: "Artifact", unit: int, reason: str) -> None:
        super().__init__(f"unit {unit} of {artifact.name} is damaged: {reason}")
        self.artifact, self.unit, self.reason = artifact, unit, reason


def shard_name(unit: int, digest: str) -> str:
    """The file of a unit in its artifact's folder; `digest` is the SHA-256 of its bytes."""
    return f"units/{unit:05d}-{digest[:8]}.arrow"


def check_source(scores: "Artifact", commit: Commit, source: Commit | None) -> None:
    """Refuse scores of rollouts that were made again since.

    Raises:
        DamagedUnit: they were made of another shard than the committed one.
    """
    if source is not None and commit.source_sha256 != source.sha256:
        raise DamagedUnit(scores, commit.unit, "it scores other bytes than its rollouts unit")


class Artifact:
    """A folder of units, addressed by the fingerprint of its recipe."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.fingerprint = recipe.fingerprint
        self.name = f"{recipe.kind}/{self.fingerprint[:16]}"
        self.folder = root / self.name
        self._layout: Layout | None = None  # once it was read

    def create(self, *, rows: int, rows_per_unit: int) -> None:
        """Join or start the artifact; the first caller fixes how many rows a unit holds."""
        layout = Layout(rows=rows, rows_per_unit=rows_per_unit)
        record = ArtifactRecord.of(self.recipe, layout=layout)
        publish_new_record(self.folder / "recipe.json", record)
        self._layout = None
        self.layout()

    def units(self) -> range:
        """The numbers of all units."""
        layout = self.layout()
        return range(-(-layout.rows // layout.rows_per_unit))

    def unit_rows(self, unit: int) -> range:
        """Which of the recipe's prompts a unit covers."""
        layout = self.layout()
        start = unit * layout.rows_per_unit
        return range(start, min(start + layout.rows_per_unit, layout.rows))

    def is_started(self) -> bool:
        """Whether somebody created it."""
        return (self.folder / "recipe.json").exists()

    def is_complete(self) -> bool:
        """Whether the manifest is there."""
        return (self.folder / "manifest.json").exists()

    def manifest(self) -> Manifest:
        """The manifest.

        Raises:
            UserError: a newer format version wrote it.
        """
        return load_record(Manifest, self.folder / "manifest.json")

    def commit_record(self, unit: int) -> Commit | None:
        """The commit record of a unit, if it has one.

        Raises:
            DamagedUnit: the record is not what was written.
        """
        try:
            return load_record(Commit, self._commit_path(unit))
        except FileNotFoundError:
            return None
        except DamagedRecord as damaged:
            raise DamagedUnit(self, unit, f"its commit record {damaged.reason}") from damaged

    def has_unit(self, unit: int) -> bool:
        """Whether a unit has a commit record, sound or not."""
        return is_there(self._commit_path(unit))

    def commits(self) -> dict[int, Commit]:
        """Unit -> commit record, for the units that are committed."""
        if not self.is_started():
            return {}
        units = self.units()
        records = ((unit, self.commit_record(unit)) for unit in self.committed() if unit in units)
        return {unit: record for unit, record in records if record is not None}

    def committed(self) -> list[int]:
        """The numbers of the units that have a commit record, sound or not."""
        names = {path.name for path in json_files(self.folder / "units")}
        numbers = (int(name[:-5]) for name in names if name[:-5].isdecimal())
        return sorted(unit for unit in numbers if self._commit_path(unit).name in names)

    def listed_commits(self) -> dict[int, Commit]:
        """The same as `commits`, with one read where the artifact is complete."""
        try:
            listed = self.manifest().units if self.is_complete() else None
        except DamagedRecord:  # `cache verify` names it, and the next run writes it again
            listed = None
        return self.commits() if listed is None else {record.unit: record for record in listed}

    def commit(
        self,
        unit: int,
        table: pa.Table,
        *,
        counts: Mapping[str, float],
        made_by: str = "",
        seconds: float = 0.0,
        source_sha256: str | None = None,
        skipped_rows: Sequence[int] = (),
        dropped_rows: Mapping[str, Sequence[int]] | None = None,
        fidelity: Fidelity | None = None,
    ) -> Commit:
        """Publish a unit and return the record that stands, ours or an earlier writer's.

        Power that goes in between may leave a record without its shard, which readers call damage.
        """
        check_there(self.folder.parent.parent)
        data, parts = shard_bytes(table)
        digest = sha256(data)
        name = shard_name(unit, digest)
        publish(self.folder / name, data, is_last=False)
        commit = Commit(
            unit=unit,
            file=name,
            sha256=digest,
            bytes=len(data),
            counts=dict(counts),
            made_by=made_by,
            seconds=seconds,
            made_at=round(time.time(), 3),
            source_sha256=source_sha256,
            parts=tuple(parts),
            skipped_rows=tuple(skipped_rows),
            dropped_rows={name: tuple(rows) for name, rows in (dropped_rows or {}).items()},
            fidelity=fidelity,
            layout=self.layout(),
        )
        if publish_new_record(self._commit_path(unit), commit):
            return commit
        standing = self.commit_record(unit)
        assert standing is not None
        if standing.sha256 != digest:
            (self.folder / name).unlink(missing_ok=True)
        return standing

    def adopt(self, commit: Commit, data: bytes) -> None:
        """Publish a unit as another store has it, under its record; `data` are its bytes."""
        if self.has_unit(commit.unit):  # and it is damaged
            self.invalidate(commit.unit)
        publish(self.folder / shard_name(commit.unit, commit.sha256), data)
        publish_new_record(self._commit_path(commit.unit), commit)

    def read_unit(self, unit: int, commit: Commit | None = None) -> pa.Table:
        """The verified table of a committed unit, whose commit record may be at hand.

        Raises:
            DamagedUnit: its bytes are not the committed ones.
        """
        return table_of(self._verified(commit or self._committed(unit)))

    def read_all(self) -> pa.Table:
        """The verified tables of all units, one after the other; raises as `read_unit`."""
        return pa.concat_tables(list(self.tables()))

    def tables(self) -> Iterator[pa.Table]:
        """The verified table of each unit, one in memory at a time; raises as `read_unit`."""
        return (self.read_unit(unit) for unit in self.units())

    def read_schema(self, commit: Commit) -> pa.Schema:
        """The verified schema of a committed unit, with the metadata of its codec.

        Raises:
            DamagedUnit: its bytes are not the committed ones.
        """
        return schema_of(self._verified(commit, commit.parts[0]))

    def read_part(self, commit: Commit, number: int, schema: pa.Schema) -> pa.RecordBatch:
        """One verified record batch of a committed unit, without reading the others.

        Raises:
            DamagedUnit: its bytes are not the committed ones.
        """
        return batch_of(self._verified(commit, commit.parts[number + 1]), schema)

    def fetch(self, commit: Commit, source: "Artifact") -> None:
        """Have the shard of a unit here, too, as the same artifact in another place has it.

        Raises:
            DamagedUnit: what it has there are not the committed bytes.
        """
        try:
            self._verified(commit)
        except DamagedUnit:
            publish(inside(self.folder, commit.file), source._verified(commit))

    def damage(self, unit: int) -> str | None:
        """What is wrong with a committed unit, or None."""
        try:
            self._verified(self._committed(unit))
        except DamagedUnit as damaged:
            return damaged.reason
        return None

    def has_sound(self, unit: int) -> bool:
        """Whether a unit is committed and whole; a damaged one is named and taken out."""
        if not self.has_unit(unit):
            return False
        reason = self.damage(unit)
        if reason is not None:
            LOG.warning("unit %d of %s is damaged (%s); it is made again", unit, self.name, reason)
            self.invalidate(unit)
        return reason is None

    def record_damage(self, unit: int) -> str | None:
        """What is wrong with the commit record of a unit, or None."""
        try:
            self._committed(unit)
        except DamagedUnit as damaged:
            return damaged.reason
        return None

    def _committed(self, unit: int) -> Commit:
        commit = self.commit_record(unit)
        if commit is None:
            raise DamagedUnit(self, unit, "its commit record is missing")
        return commit

    def _verified(self, commit: Commit, part: Part | None = None) -> bytes:
        """The bytes of a shard, or of one part of it."""
        path = inside(self.folder, commit.file)
        stretch = None if part is None else (part.offset, part.length)
        try:
            return verified_bytes(path, (part or commit).sha256, stretch)
        except UserError:
            raise
        except ValueError as error:
            raise DamagedUnit(self, commit.unit, str(error)) from error

    def invalidate(self, unit: int) -> None:
        """Take a unit out of the artifact, so that the next stage makes it again, alone."""
        remove_file(self.folder / "manifest.json")
        try:
            commit = self.commit_record(unit)
            shards = [] if commit is None else [inside(self.folder, commit.file)]
        except (DamagedUnit, UserError):  # a name that leads elsewhere is followed nowhere
            shards = list((self.folder / "units").glob(f"{unit:05d}-*.arrow"))
        for path in (*shards, self._commit_path(unit)):
            remove_file(path)

    def restore_record(self, unit: int) -> bool:
        """Write a unit's commit record again as the manifest has it; returns whether it does."""
        try:
            manifest = self.manifest() if self.is_complete() else None
        except DamagedRecord:
            return False
        for commit in () if manifest is None else manifest.units:
            if commit.unit == unit:
                is_checked = manifest is not None and manifest.digest is not None
                publish_record(self._commit_path(unit), commit, is_checked=is_checked)
                return True
        return False

    def mend(self) -> None:
        """Write recipe and manifest again where they are damaged, with a line for each.

        The recipe is known, and how many rows a unit has stands in manifest and commit records.

        Raises:
            UserError: it does not, as in those of older versions.
        """
        recipe, manifest = self.folder / "recipe.json", self.folder / "manifest.json"
        self._layout = None
        reason = self._reason(recipe, ArtifactRecord)
        if reason is not None:
            say_mended(recipe, reason)
            self._restore_recipe()
        reason = self._reason(manifest, Manifest)
        if reason is not None:
            say_mended(manifest, reason)
            remove_file(manifest)
            with contextlib.suppress(DamagedUnit, FileNotFoundError):  # who makes units, finishes
                self.finish()

    def _reason(self, path: Path, kind: type[RecipeRecord]) -> str | None:
        """What is wrong with a record of the artifact, or None."""
        if is_sound(kind, path):
            return None
        try:
            load_record(kind, path)
        except DamagedRecord as damaged:
            return damaged.reason
        except FileNotFoundError:
            is_left = path.name == "recipe.json" and json_files(self.folder / "units")
            return "is missing" if is_left else None
        return None

    def _restore_recipe(self) -> None:
        """Write recipe.json with the layout that other records have; of none, start anew."""
        layout = self._recorded_layout()
        if layout is not None:
            record = ArtifactRecord.of(self.recipe, layout=layout)
            publish_record(self.folder / "recipe.json", record)
        elif json_files(self.folder / "units"):
            raise UserError(
                f"{self.folder / 'recipe.json'} is damaged, and its units were written by a "
                "version whose records do not say how many rows a unit has; restore it, or remove "
                "the folder to have the artifact made again"
            )
        else:
            remove_file(self.folder / "recipe.json")

    def _recorded_layout(self) -> Layout | None:
        """The layout that commit records say, in the manifest or by themselves."""
        with contextlib.suppress(DamagedRecord, FileNotFoundError):
            listed = load_record(Manifest, self.folder / "manifest.json").units
            return next((commit.layout for commit in listed), None)
        for path in json_files(self.folder / "units"):
            with contextlib.suppress(DamagedRecord, FileNotFoundError):
                if (layout := load_record(Commit, path).layout) is not None:
                    return layout
        return None

    def finish(self) -> None:
        """Write the manifest when every unit is committed."""
        if self.is_complete():
            return
        commits = self.commits()
        if len(commits) < len(self.units()):
            return
        manifest = Manifest.of(
            self.recipe,
            units=tuple(commits[unit] for unit in self.units()),
            counts=summed_counts(commits.values()),
        )
        is_checked = all(commit.digest is not None for commit in commits.values())
        publish_record(self.folder / "manifest.json", manifest, is_checked=is_checked)

    def publish_figures(self, manifest: RecipeRecord) -> None:
        """Make an artifact that has no shards."""
        publish_new_record(self.folder / "recipe.json", RecipeRecord.of(self.recipe))
        publish_record(self.folder / "manifest.json", manifest)

    def mend_figures(self, kind: type[RecipeRecord]) -> None:
        """Of an artifact without shards, mend the recipe and remove a damaged manifest."""
        mend_recipe(self.folder, RecipeRecord.of(self.recipe))
        manifest = self.folder / "manifest.json"
        reason = self._reason(manifest, kind)
        if reason is not None:
            say_mended(manifest, reason, "its figures are taken again")
            remove_file(manifest)

    def _commit_path(self, unit: int) -> Path:
        return self.folder / "units" / f"{unit:05d}.json"

    def layout(self) -> Layout:
        """How many rows (prompts) the artifact covers, and how many a unit holds.

        Raises:
            UserError: it is damaged, or a newer format version wrote it.
        """
        if self._layout is None:
            try:
                self._layout = load_record(ArtifactRecord, self.folder / "recipe.json").layout
            except DamagedRecord:
                self._layout = self._recorded_layout()
                if self._layout is None:
                    raise
        return self._layout


def summed_counts(commits: Iterable[Commit]) -> dict[str, float]:
    """The counts of several units together."""
    total: dict[str, float] = {}
    for commit in commits:
        for key, value in commit.counts.items():
            total[key] = total.get(key, 0) + value
    return total
