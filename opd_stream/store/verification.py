"""What in a store is not what was written: every record and every byte is read, no memory believed.

A finding never ends the reading, and nothing is written. `repair` takes damage out of the store, so
that the run that made it makes it again, alone.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opd_stream.errors import Unreachable, UserError
from opd_stream.store.artifact import Artifact, ArtifactRecord, Commit, Manifest
from opd_stream.store.files import inside, json_files, verified_bytes
from opd_stream.store.garbage import Pin
from opd_stream.store.inventory import SHARDED
from opd_stream.store.policy import FileDigest, PolicyArtifact, PolicyManifest
from opd_stream.store.reader import broken_law
from opd_stream.store.recipe import KINDS, RecipeRecord, mend_recipe
from opd_stream.store.sealed import DamagedRecord, S, Sealed, load_record
from opd_stream.store.served import FOLDER, ServedTeacher
from opd_stream.store.store import RunRecord, Store

BESIDE: dict[str, type[Sealed]] = {
    "runs": RunRecord,
    "pins": Pin,
    FOLDER: ServedTeacher,
    "digests": FileDigest,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something in the store that is not what was written, or that nothing says so of."""

    name: str  # KIND/FINGERPRINT, or a folder of records beside the artifacts
    unit: int | None  # None: not one of its shards
    reason: str
    is_damage: bool = True  # False: records of it have no digest

    def __str__(self) -> str:
        unit = "" if self.unit is None else f"unit {self.unit} is damaged: "
        return f"{self.name}: {unit}{self.reason}"


def names(store: Store) -> list[str]:
    """What `examine` is asked of: artifacts, and the folders of records beside them."""
    artifacts = [
        f"{kind}/{folder.name}"
        for kind in KINDS
        for folder in store.folders(kind)
        if any(not path.name.endswith(".tmp") for path in folder.rglob("*") if path.is_file())
    ]
    files = [kind for kind in KINDS if (store.root / kind).is_file()]  # in place of a folder
    return artifacts + files + [name for name in BESIDE if _beside(store, name).exists()]


def damages(store: Store, *, deep: bool = False) -> Iterator[Finding]:
    """Everything in the store that is not what was written."""
    for name in names(store):
        yield from (finding for finding in examine(store, name, deep=deep) if finding.is_damage)


def examine(store: Store, name: str, *, deep: bool = False) -> list[Finding]:
    """What is found in one of `names`; deep: also rows that no reader takes, as they were written.

    Raises:
        Unreachable: an object store does not answer.
    """
    examined = _Examination(store, name)
    try:
        if name in BESIDE:
            for path in json_files(_beside(store, name)):
                examined.load(BESIDE[name], path)
        else:
            examined.read_artifact()
            if deep and name.startswith(("rollouts/", "scores/")) and not examined.found:
                examined.check_rows()
    except Unreachable:
        raise
    except Exception as error:  # what a damaged file does to its reader is a finding, too
        examined.add(f"cannot be read ({' '.join(f'{type(error).__name__}: {error}'.split())})")
    if examined.old and name != "digests":  # those are not believed
        reason = (
            f"{examined.old} of its records were written before records had digests, and cannot "
            "be checked"
        )
        examined.add(reason, is_damage=False)
    return examined.found


class _Examination:
    """The reading of one artifact, or of the records beside them."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.folder = store.root / name
        self.found: list[Finding] = []
        self.old = 0  # records without a digest

    def add(self, reason: str, *, unit: int | None = None, is_damage: bool = True) -> None:
        self.found.append(Finding(name=self.name, unit=unit, reason=reason, is_damage=is_damage))

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

    def read_artifact(self) -> None:
        kind, manifest = self.name.partition("/")[0], self.folder / "manifest.json"
        if kind in SHARDED:
            self.read_units()
            return
        self.load(RecipeRecord, self.folder / "recipe.json")
        if not manifest.exists():
            return
        if kind != "policies":
            self.load(RecipeRecord, manifest)
        elif (found := self.load(PolicyManifest, manifest)) is not None:
            policy = PolicyArtifact(self.store.root, found.recipe, local=self.store.local)
            for reason in policy.stored_damages():
                self.add(reason)

    def read_units(self) -> None:
        recipe = self.load(ArtifactRecord, self.folder / "recipe.json")
        path, manifest = self.folder / "manifest.json", None
        if path.exists():
            manifest = self.load(Manifest, path)
        listed = {} if manifest is None else {each.unit: each for each in manifest.units}
        committed = {path.stem for path in json_files(self.folder / "units")}
        for stem in sorted(committed | {f"{unit:05d}" for unit in listed}):
            unit = int(stem) if stem.isdigit() else -1
            commit = self.load(Commit, self.folder / "units" / f"{stem}.json", unit=unit)
            if commit is None:
                continue
            if manifest is not None and _differ(listed.get(unit), commit):
                self.add("its commit record is not the one in the manifest", unit=unit)
            if recipe is not None and commit.layout not in (None, recipe.layout):
                self.add("its commit record is of units of another size", unit=unit)
            self.read_shard(commit)

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


def _beside(store: Store, name: str) -> Path:
    return store.digests if name == "digests" else store.root / name


def repair(store: Store, name: str, found: list[Finding]) -> bool:
    """Take what was found damaged out of the store; what other records say is written again.

    False: it stays. Records of runs and pins do, because what they keep is not to go, and units of
    an artifact of which no record says what it is.
    """
    folder, kind = store.root / name, name.partition("/")[0]
    if name in BESIDE:
        for path in json_files(store.digests) if name == "digests" else ():
            path.unlink(missing_ok=True)
        return name == "digests"
    recipe = next(
        filter(None, (_recipe(folder / n) for n in ("recipe.json", "manifest.json"))), None
    )
    if kind in SHARDED and recipe is not None:
        artifact = Artifact(store.root, recipe.recipe)
        artifact.mend()
        for unit in {each.unit for each in found if each.unit is not None}:
            if not artifact.restore_record(unit) or artifact.damage(unit) is not None:
                artifact.invalidate(unit)
        return True
    if kind in SHARDED:
        return False
    if recipe is not None:
        mend_recipe(folder, RecipeRecord.of(recipe.recipe))
    if any(each.is_damage for each in examine(store, name)):
        (folder / "manifest.json").unlink(missing_ok=True)
    return True


def _recipe(path: Path) -> RecipeRecord | None:
    with contextlib.suppress(UserError, FileNotFoundError):
        return load_record(RecipeRecord, path)
    return None
