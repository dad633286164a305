"""What in a store is not what was written: every record and every byte is read, no memory believed.

A finding never ends the reading, and nothing is written. A deleted file leaves no bytes to read: it
is found by what names it (a manifest, a recipe, the record of a run), and where a kill leaves the
same, that is a note and no damage. `repair` takes damage out of the store, so that the run that
made it makes it again, alone.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from opd_stream.errors import Unreachable, UserError
from opd_stream.store.artifact import Artifact, ArtifactRecord, Commit, DamagedUnit, Manifest
from opd_stream.store.files import (
    inside,
    is_remote,
    is_there,
    json_files,
    remove_file,
    verified_bytes,
)
from opd_stream.store.garbage import RUN_SECONDS, Pin, is_gone
from opd_stream.store.inventory import SHARDED
from opd_stream.store.policy import (
    FileDigest,
    PolicyArtifact,
    PolicyManifest,
    unpublished_files,
)
from opd_stream.store.reader import broken_law
from opd_stream.store.recipe import KINDS, MODELS, Kind, Recipe, RecipeRecord, mend_recipe
from opd_stream.store.sealed import DamagedRecord, S, Sealed, load_record
from opd_stream.store.served import FOLDER, ServedTeacher, served_fingerprints
from opd_stream.store.store import MARKER, RunRecord, Store, StoreRecord

BESIDE: dict[str, type[Sealed]] = {
    "runs": RunRecord,
    "pins": Pin,
    FOLDER: ServedTeacher,
    "digests": FileDigest,
}
SOURCES: dict[str, Kind] = {
    "scores": "rollouts",
    "hidden": "rollouts",
    "distances": "hidden",
}  # unit by unit
SHOWN = 3  # names in one finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something in the store that is not what was written, or that nothing says so of."""

    name: str  # KIND/FINGERPRINT, or what stands beside the artifacts
    unit: int | None  # None: not one of its shards
    reason: str
    is_damage: bool = True  # False: a note of what is not there, not read, or cannot be checked

    def __str__(self) -> str:
        unit = "" if self.unit is None else f"unit {self.unit} is damaged: "
        return f"{self.name}: {unit}{self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What one artifact of a store may name."""

    artifacts: frozenset[str]  # names of those that are there, KIND/FINGERPRINT
    runs: frozenset[str]  # ids of those with a record
    served: frozenset[str]  # fingerprints of served teachers with a record

    @classmethod
    def of(cls, store: Store) -> "Surroundings":
        """What there is, by its names alone."""
        runs = frozenset(path.stem for path in json_files(store.root / "runs"))
        served = frozenset(served_fingerprints(store))
        return cls(artifacts=frozenset(store.there()), runs=runs, served=served)


def names(store: Store) -> list[str]:
    """What `examine` is asked of: the store itself, artifacts, and the records beside them."""
    artifacts = [
        f"{kind}/{folder.name}"
        for kind in KINDS
        for folder in store.folders(kind)
        if not folder.name.startswith(".") and (not folder.is_dir() or any(_files(folder)))
    ]
    other = [name for name in (*KINDS, *BESIDE) if is_there(_beside(store, name))]
    odd = [name for name in other if name in BESIDE or not _beside(store, name).is_dir()]
    return [MARKER, *artifacts, *odd]


def damages(store: Store, *, deep: bool = False) -> Iterator[Finding]:
    """Everything in the store that is not what was written."""
    around = Surroundings.of(store)
    for name in names(store):
        found = examine(store, name, around, deep=deep)
        yield from (finding for finding in found if finding.is_damage)


def examine(store: Store, name: str, around: Surroundings, *, deep: bool = False) -> list[Finding]:
    """What is found in one of `names`; deep: also rows that no reader takes, as they were written.

    Raises:
        Unreachable: an object store does not answer.
    """
    examined = _Examination(store, name, around)
    try:
        examined.read()
        if deep and name.startswith(("rollouts/", "scores/")) and not examined.damaged():
            examined.check_rows()
    except Unreachable:
        raise
    except Exception as error:  # what a damaged file does to its reader is a finding, too
        examined.add(f"cannot be read ({' '.join(f'{type(error).__name__}: {error}'.split())})")
    if examined.old and name != "digests":  # those are not believed
        examined.note(
            f"{examined.old} of its records were written before records had digests, and cannot "
            "be checked"
        )
    return examined.found


class _Examination:
    """The reading of one artifact, of the records beside them, or of what the store is."""

    def __init__(self, store: Store, name: str, around: Surroundings) -> None:
        self.store, self.name, self.around = store, name, around
        self.folder = _beside(store, name)
        self.found: list[Finding] = []
        self.old = 0  # records without a digest
        self.listed: set[str] = set()  # files of the artifact that a record has, by their names

    def add(self, reason: str, *, unit: int | None = None) -> None:
        self.found.append(Finding(name=self.name, unit=unit, reason=reason))

    def note(self, reason: str) -> None:
        self.found.append(Finding(name=self.name, unit=None, reason=reason, is_damage=False))

    def damaged(self) -> list[Finding]:
        return [finding for finding in self.found if finding.is_damage]

    def load(self, kind: type[S], path: Path, *, unit: int | None = None) -> S | None:
        """A record; None, with a finding, where it is not what was written."""
        what = path.name if unit is None else "its commit record"
        try:
            record = load_record(kind, path)
        except FileNotFoundError:
            return self.add(f"{what} is missing", unit=unit)
        except DamagedRecord as damaged:
            return self.add(f"{what} {damaged.reason}", unit=unit)
        except Unreachable:
            raise
        except (UserError, OSError) as error:
            return self.add(" ".join(str(error).split()), unit=unit)
        self.old += record.digest is None
        return record

    def read(self) -> None:
        kind, slash, _ = self.name.partition("/")
        if self.name == MARKER:
            self.read_store()
        elif not self.folder.is_dir():
            self.add("is no folder; a run that needs it refuses: move it away, or restore it")
        elif not slash:
            self.read_beside()
        elif kind in SHARDED:
            self.read_units()
        else:
            self.read_figures(kind)

    def read_store(self) -> None:
        """What the folder holds beside artifacts, and what all of them need."""
        if is_there(self.folder):
            self.load(StoreRecord, self.folder)
        else:
            self.note("is missing: `cache gc` refuses until a run has written it again")
        known = {MARKER, *KINDS, *BESIDE}
        for path in sorted(self.store.root.iterdir(), key=str):
            if path.name not in known and not path.name.startswith("."):
                self.note(
                    f"{path.name} beside it is nothing that opd-stream wrote; nothing reads it"
                )
        if self.around.artifacts and not self.around.runs:
            self.note(
                "no record of a run is in runs: `cache gc` keeps nothing for one; each run writes "
                "its own when it is called"
            )

    def read_beside(self) -> None:
        for path in json_files(self.folder):
            record = self.load(BESIDE[self.name], path)
            if isinstance(record, RunRecord) and not is_gone(path, record, RUN_SECONDS):
                self.find_lost(
                    f"run {record.id}",
                    record.artifacts,
                    "not made yet, or removed; the run makes them when it needs them",
                )
            elif isinstance(record, Pin):
                self.find_lost(path.stem, [record.name], "`cache gc` refuses until it is unpinned")

    def find_lost(self, who: str, named: Iterable[str], then: str) -> None:
        """Note the artifacts that a record names and that are not there."""
        lost = sorted({*named} - self.around.artifacts)
        if lost:
            shown = ", ".join(lost[:SHOWN]) + f" and {len(lost) - SHOWN} more" * (len(lost) > SHOWN)
            self.note(f"{who} names what is not there ({shown}): {then}")

    def read_figures(self, kind: str) -> None:
        """A policy or an evaluation."""
        manifest = self.folder / "manifest.json"
        record = self.load(RecipeRecord, self.folder / "recipe.json")
        self.listed |= {"recipe.json", "manifest.json"}
        if record is not None:
            self.find_inputs(record.recipe)
        if not is_there(manifest):
            again = "trains its round" if kind == "policies" else "judges the answers"
            self.note(f"has no manifest.json: cut short, or lost; the run {again} again")
        elif kind != "policies":
            self.load(RecipeRecord, manifest)
        elif (found := self.load(PolicyManifest, manifest)) is not None:
            self.read_policy(found)
        self.find_unread()

    def read_policy(self, manifest: PolicyManifest) -> None:
        policy = PolicyArtifact(self.store.root, manifest.recipe, local=self.store.local)
        for reason in policy.stored_damages():
            self.add(reason)
        folder = inside(self.folder, manifest.folder)
        names = unpublished_files(folder, manifest)
        for name in names:
            self.add(
                f"{manifest.folder}/{name} was not published, and a run that loads the policy "
                "refuses: move it away"
            )
        known = {*manifest.files, *manifest.dropped, *names}
        self.listed |= {f"{manifest.folder}/{name}" for name in known}
        self.find_maker(manifest.outcome.made_by)

    def read_units(self) -> None:
        recipe = self.load(ArtifactRecord, self.folder / "recipe.json")
        path, manifest = self.folder / "manifest.json", None
        if is_there(path):
            manifest = self.load(Manifest, path)
        record = recipe or manifest
        if record is None:
            return
        artifact = Artifact(self.store.root, record.recipe)
        listed = {} if manifest is None else {each.unit: each for each in manifest.units}
        sources = self.sources(record.recipe)
        committed = {*artifact.committed(), *listed}
        self.listed |= {"recipe.json", "manifest.json", *map(_record_name, committed)}
        for unit in sorted(committed):
            commit = self.load(Commit, self.folder / _record_name(unit), unit=unit)
            if commit is None:
                continue
            self.listed.add(commit.file)
            if manifest is not None and _differ(listed.get(unit), commit):
                self.add("its commit record is not the one in the manifest", unit=unit)
            if recipe is not None and commit.layout not in (None, recipe.layout):
                self.add("its commit record is of units of another size", unit=unit)
            if unit in sources and sources[unit].sha256 != commit.source_sha256:
                source = SOURCES[record.kind]
                self.add(f"it was made of other {source} than those that are there", unit=unit)
            self.find_maker(commit.made_by)
            self.read_shard(commit)
        if not is_there(path) and recipe is not None:
            there, all_ = len(committed), len(artifact.units())
            then = "the run writes it" if there == all_ else "the run makes the rest"
            self.note(f"has no manifest.json, and {there} of {all_} units: {then} when it needs it")
        self.find_inputs(record.recipe)
        self.find_unread()

    def sources(self, recipe: Recipe) -> dict[int, Commit]:
        """The units that those of the artifact were made of, as far as their records are sound."""
        role = SOURCES.get(recipe.kind)
        if role is None:
            return {}
        with contextlib.suppress(UserError, DamagedUnit, OSError):  # findings of that artifact
            return self.store.by_fingerprint(role, recipe.inputs[role]).commits()
        return {}

    def find_inputs(self, recipe: Recipe) -> None:
        """Note what the artifact was made of and that is not there."""
        there = {name.partition("/")[2] for name in self.around.artifacts}
        for role, fingerprint in sorted(recipe.inputs.items()):
            if role not in MODELS and fingerprint[:16] not in there:
                self.note(
                    f"it was made of {role.partition('.')[0]} {fingerprint[:16]}, which is not "
                    "there: removed, freed, or in another store; a run that reads both makes it "
                    "again, an export refuses"
                )
        teacher = recipe.inputs.get("teacher")
        if recipe.settings.get("engine") == "server" and teacher not in self.around.served:
            self.note(
                f"no record in {FOLDER} is of its teacher {str(teacher)[:16]}: lost, or in another "
                "store; a run asks the server anew and does not find these scores: restore it"
            )

    def find_maker(self, run: str) -> None:
        """Note a run of which there is no record."""
        reason = f"run {run} made it and has no record in runs: `cache gc` keeps nothing for it"
        is_lost = bool(run and self.around.runs) and run not in self.around.runs
        if is_lost and all(each.reason != reason for each in self.found):
            self.note(reason)

    def find_unread(self) -> None:
        """Note the files of the artifact that no record has."""
        lost = {each.unit for each in self.found if each.unit is not None}
        attempts = {name.partition("/")[0] for name in self.listed}
        unread = {
            name
            if name.partition("/")[0] in attempts or "/" not in name
            else name.partition("/")[0]
            for name in {*_files(self.folder)} - self.listed
            if not any(name.startswith(f"units/{unit:05d}-") for unit in lost)
        }
        for name in sorted(unread):
            self.note(
                f"{name} is in none of its records: a writer that was killed left it, or its "
                "record is lost; nothing reads it"
            )

    def check_rows(self) -> None:
        artifact = Artifact(
            self.store.root, load_record(ArtifactRecord, self.folder / "recipe.json").recipe
        )
        for unit in artifact.commits():
            if (reason := broken_law(self.store, artifact, unit)) is not None:
                self.add(reason, unit=unit)

    def read_shard(self, commit: Commit) -> None:
        try:
            verified_bytes(inside(self.folder, commit.file), commit.sha256)
        except Unreachable:
            raise
        except (ValueError, OSError) as error:
            self.add(" ".join(str(error).split()), unit=commit.unit)


def _differ(listed: Commit | None, commit: Commit) -> bool:
    return listed is None or listed.as_json() != commit.as_json()


def _record_name(unit: int) -> str:
    return f"units/{unit:05d}.json"


def _beside(store: Store, name: str) -> Path:
    return store.digests if name == "digests" else store.root / name


def _files(folder: Path) -> Iterator[str]:
    """The names of files and links below a folder, without those of writers at work."""
    if is_remote(folder):  # one listing, of files alone
        remote = cast(Any, folder)
        found = [name.removeprefix(f"{remote.path}/") for name in remote.fs.find(remote.path)]
    else:
        paths = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
        found = [path.relative_to(folder).as_posix() for path in paths]
    yield from sorted(name for name in found if not name.endswith(".tmp"))


def repair(store: Store, name: str, around: Surroundings, *, deep: bool = False) -> list[Finding]:
    """Take damage out of one of `names`; what other records say is written again.

    Returns what is still damaged: records of runs and pins, because what they keep is not to go;
    units of an artifact of which no record says what it is; and whatever is no file of ours.
    """
    with contextlib.suppress(UserError, OSError):
        if name == MARKER:
            store.mark()
        elif name == "digests":
            for path in json_files(store.digests):
                remove_file(path)
        elif name not in BESIDE:
            _repair_artifact(store, name, around, deep=deep)
    return [each for each in examine(store, name, around, deep=deep) if each.is_damage]


def _repair_artifact(store: Store, name: str, around: Surroundings, *, deep: bool) -> None:
    folder, kind = store.root / name, name.partition("/")[0]
    recipe = next(
        filter(None, (_recipe(folder / n) for n in ("recipe.json", "manifest.json"))), None
    )
    if recipe is not None and kind not in SHARDED:
        mend_recipe(folder, RecipeRecord.of(recipe.recipe))
    if kind not in SHARDED:
        if not _is_sound(store, folder / "manifest.json"):
            remove_file(folder / "manifest.json")
    elif recipe is not None:
        artifact = Artifact(store.root, recipe.recipe)
        with contextlib.suppress(UserError):
            artifact.mend()
        for attempt in (_restore, Artifact.invalidate):  # the second where the first did not help
            found = examine(store, name, around, deep=deep)
            for unit in {each.unit for each in found if each.unit is not None}:
                with contextlib.suppress(UserError):
                    attempt(artifact, unit)


def _restore(artifact: Artifact, unit: int) -> None:
    if artifact.record_damage(unit) is not None:
        artifact.restore_record(unit)


def _is_sound(store: Store, path: Path) -> bool:
    """Whether the manifest of a policy or an evaluation, and the files it names, can be used."""
    try:
        if path.parent.parent.name != "policies":
            return not is_there(path) or bool(load_record(RecipeRecord, path))
        manifest = load_record(PolicyManifest, path) if is_there(path) else None
        policy = manifest and PolicyArtifact(store.root, manifest.recipe, local=store.local)
        return policy is None or not any(policy.stored_damages())
    except (UserError, OSError):
        return False


def _recipe(path: Path) -> RecipeRecord | None:
    with contextlib.suppress(UserError, OSError):
        return load_record(RecipeRecord, path)
    return None
