"""The store: one place full of artifacts, shared by any number of runs and machines."""

import contextlib
import os
import platform
import sys
import time
import uuid
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import ClassVar, Literal

from opd_stream.errors import Unreachable, UserError, unreachable
from opd_stream.store.artifact import Artifact
from opd_stream.store.files import (
    RETRY_TIMEOUT,
    check_there,
    explained,
    is_of_client,
    is_remote,
    is_there,
    json_files,
    make_folder,
    place,
    publish,
    real,
    refuse_full,
    sha256,
)
from opd_stream.store.policy import Identity, PolicyArtifact, identify, known_identity
from opd_stream.store.recipe import KINDS, Kind, Recipe, RecipeRecord, differing_fields
from opd_stream.store.sealed import (
    DamagedRecord,
    Sealed,
    load_record,
    publish_new_record,
    publish_record,
    say_mended,
)

MARKER = "store.json"
REFRESH_SECONDS = 3600.0  # a run that goes on writes its record again after so long


NAME_LENGTH = 16  # characters of a fingerprint that name the folder of its artifact


class StoreRecord(Sealed):
    """`store.json`: this folder is a store, so `gc` may remove what is in it."""

    format_version: Literal[1] = 1
    kind: Literal["opd-stream store"] = "opd-stream store"


class RunRecord(Sealed):
    """`runs/ID.json`: the artifacts that a run reaches."""

    NAMED_BY: ClassVar[int] = 2
    format_version: Literal[1] = 1
    id: str
    host: str
    folder: str
    artifacts: tuple[str, ...]  # names, KIND/FINGERPRINT
    shared: str | None = None  # the same for all folders of a run on several machines


class Store:
    """Artifacts by recipe, in a folder or at an address like s3://BUCKET/PATH.

    `local` is a folder on this machine for what cannot live in an object store: checkpoints while
    they are read or written, and remembered digests. `retry_timeout` is how many seconds an object
    store is asked again that does not answer. Unless it `remembers`, new digests are not kept.
    What an earlier run made is also looked for in the store `replayed`, which is only read.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        retry_timeout: float = RETRY_TIMEOUT,
        remembers: bool = True,
        replayed: str | None = None,
    ) -> None:
        self.remembers = remembers
        self.location = str(location)
        self.root = place(self.location, retry_timeout)
        self.local = _local_folder(self.location) if is_remote(self.root) else self.root
        # The same place for a process that works in another folder.
        self.address = self.location if is_remote(self.root) else str(real(self.root))
        self.digests = self.local / "digests"  # of files that did not change since
        self.replayed = (
            None
            if replayed is None
            else Store(replayed, retry_timeout=retry_timeout, remembers=False)
        )

    def is_marked(self) -> bool:
        """Whether somebody wrote here as to a store."""
        return (self.root / MARKER).exists()

    def check_writable(self) -> None:
        """Mark this place as a store, and refuse one that cannot be written, before any work.

        Raises:
            UserError: says why.
        """
        probe = self.root / f".probe.{uuid.uuid4().hex}.tmp"
        if is_remote(self.root):
            publish(probe, b"")
            probe.unlink()
            self.mark()
            return
        if self.root.is_file():
            raise UserError(f"store {self.root} is a file; expected a folder; set store=DIR")
        make_folder(self.root)
        with explained(self.root):
            probe.touch()
            probe.unlink()
        self.mark()

    def mark(self) -> None:
        """Write store.json unless it is there, and again where it is damaged."""
        path = self.root / MARKER
        try:
            load_record(StoreRecord, path)
        except FileNotFoundError:
            publish_new_record(path, StoreRecord())
        except DamagedRecord as damaged:
            say_mended(path, damaged.reason)
            publish_record(path, StoreRecord())

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Turn what breaks inside because the store went away into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if is_remote(self.root) and is_of_client(error):
                raise Unreachable(unreachable(self.root, error)) from error
            check_there(self.root)
            refuse_full(self.root, error)
            raise

    def artifact(self, recipe: Recipe) -> Artifact:
        """The artifact of a recipe, whether it exists or not."""
        return Artifact(self.root, recipe)

    def policy(self, recipe: Recipe) -> PolicyArtifact:
        """The trained policy of a recipe, whether it exists or not."""
        return PolicyArtifact(self.root, recipe, local=self.local)

    def by_fingerprint(self, kind: Kind, fingerprint: str) -> Artifact:
        """An artifact that was created before, by its fingerprint or a beginning that no other has.

        Raises:
            UserError: the store has none with this fingerprint, or several.
        """
        fingerprint = self._whole(kind, fingerprint)
        folder = self.root / kind / fingerprint[:16]
        files = ("recipe.json", "manifest.json")
        if self.replayed is not None and not any(is_there(folder / name) for name in files):
            return self.replayed.by_fingerprint(kind, fingerprint)
        return self.artifact(self._recipe_of(kind, fingerprint))

    def _whole(self, kind: Kind, beginning: str) -> str:
        """The name of the one folder that begins so; what begins no folder stays as it is."""
        if len(beginning) >= NAME_LENGTH:
            return beginning
        names = [path.name for path in self.folders(kind) if path.name.startswith(beginning)]
        if len(names) > 1:
            raise UserError(
                f"{kind}/{beginning} is the beginning of {', '.join(names[:3])}; expected that of "
                "one; give more of it"
            )
        return names[0] if names else beginning

    def policy_by_fingerprint(self, fingerprint: str) -> PolicyArtifact:
        """A trained policy that was started before.

        Raises:
            UserError: as `by_fingerprint`.
        """
        return self.policy(self._recipe_of("policies", fingerprint))

    def scored_rollouts(self, scores: Artifact) -> Artifact:
        """The rollouts of a complete scores artifact.

        Raises:
            UserError: it is not complete, or holds no scores.
        """
        if scores.recipe.kind != "scores":
            raise UserError(f"{scores.name} holds no scores; expected scores/FINGERPRINT")
        if not scores.is_complete():
            raise UserError(f"{scores.name} is not complete; run its score stage again")
        return self.by_fingerprint("rollouts", scores.recipe.inputs["rollouts"])

    def prompts_of(self, rollouts: Artifact) -> Artifact | None:
        """The prompts that rollouts were drawn for; None: they are not known here."""
        fingerprint = rollouts.recipe.inputs.get("prompts")
        if fingerprint is None:
            return None
        name = f"prompts/{fingerprint[:16]}"
        is_known = any(name in store.there() for store in (self, self.replayed) if store)
        return self.by_fingerprint("prompts", fingerprint) if is_known else None

    def tokenizer_of(self, rollouts: Artifact) -> str | None:
        """The identity of the tokenizer that gave rollouts their ids; None: it is not known."""
        prompts = self.prompts_of(rollouts)
        return None if prompts is None else prompts.recipe.inputs.get("tokenizer")

    def _recipe_of(self, kind: Kind, fingerprint: str) -> Recipe:
        path = self.root / kind / fingerprint[:16] / "recipe.json"
        manifest = path.with_name("manifest.json")  # has it, too
        with contextlib.suppress(DamagedRecord, FileNotFoundError):
            return load_record(RecipeRecord, path).recipe
        if manifest.exists():
            return load_record(RecipeRecord, manifest).recipe
        if not path.exists():
            check_there(self.root)
            raise UserError(
                f"the store {self.root} has no {kind}/{fingerprint[:16]}; "
                "run the stage that makes it, or set store to the folder that has it"
            )
        return load_record(RecipeRecord, path).recipe

    def identify(self, checkpoint: Path) -> Identity:
        """The identity of a checkpoint folder, by remembered digests of unchanged files."""
        if self.remembers:
            return identify(checkpoint, cache=self.digests)
        return known_identity(checkpoint, cache=self.digests, most_bytes=sys.maxsize)

    def recipes(self, kind: Kind) -> Iterator[Recipe]:
        """The recipes of a kind for which a folder was started; a damaged one is none."""
        for folder in self.folders(kind):
            path = folder / "recipe.json"
            with contextlib.suppress(DamagedRecord, FileNotFoundError):
                yield load_record(RecipeRecord, path).recipe

    def folders(self, kind: Kind) -> list[Path]:
        """The folders of a kind, whether an artifact was started in them or not."""
        parent = self.root / kind
        return sorted(parent.iterdir(), key=str) if parent.is_dir() else []

    def there(self) -> set[str]:
        """The names of all artifacts for which a folder was started, KIND/FINGERPRINT."""
        return {f"{kind}/{folder.name}" for kind in KINDS for folder in self.folders(kind)}

    def record_run(
        self,
        run_id: str,
        folder: Path,
        artifacts: Collection[str],
        shared: str | None = None,
        *,
        keeps: bool = False,
    ) -> frozenset[str]:
        """Say what a run reaches, so that `gc` leaves it; returns all names of the record.

        Args:
            run_id: id of the run.
            folder: of the run.
            artifacts: names as KIND/FINGERPRINT, the fingerprint's first 16 characters.
            shared: what this folder works on together with the folders of other machines; None
                leaves what was recorded before.
            keeps: what was recorded before counts, too.
        """
        path = self._run_path(run_id)
        try:
            before = self.run(run_id)
        except DamagedRecord as damaged:
            say_mended(path, damaged.reason)
            before = None
        artifacts = {*artifacts, *(before.artifacts if keeps and before else ())}
        record = RunRecord(
            id=run_id,
            host=platform.node(),
            folder=str(real(folder)),
            artifacts=tuple(sorted(artifacts)),
            shared=shared or (before and before.shared),
        )
        check_there(self.root)
        is_new = before is None or before.as_json() != record.as_json()
        if is_new or time.time() - path.stat().st_mtime > REFRESH_SECONDS:
            publish_record(path, record)
        return frozenset(artifacts)

    def add_to_run(
        self, run_id: str, folder: Path, artifacts: Collection[str], shared: str | None = None
    ) -> frozenset[str]:
        """As `record_run`, keeping what was recorded under this id before."""
        return self.record_run(run_id, folder, artifacts, shared, keeps=True)

    def run(self, run_id: str) -> RunRecord | None:
        """What a run reaches, if it was recorded."""
        path = self._run_path(run_id)
        return load_record(RunRecord, path) if path.exists() else None

    def runs(self) -> dict[Path, RunRecord]:
        """Every recorded run, by the file that says so."""
        return {path: load_record(RunRecord, path) for path in json_files(self.root / "runs")}

    def ids_of_run(self, run_id: str) -> frozenset[str]:
        """The id, and those of the folders of other machines that work on the same run."""
        own = self.run(run_id)
        if own is None or own.shared is None:
            return frozenset({run_id})
        return frozenset(each.id for each in self.runs().values() if each.shared == own.shared)

    def _run_path(self, run_id: str) -> Path:
        return self.root / "runs" / f"{run_id}.json"

    def nearest(self, recipe: Recipe) -> tuple[Recipe, dict[str, tuple[object, object]]] | None:
        """The started artifact of the same kind with the fewest other fields, and those fields."""
        candidates = [other for other in self.recipes(recipe.kind) if other != recipe]
        if not candidates:
            return None
        fields = {
            other.fingerprint: differing_fields(other.as_json(), recipe.as_json())
            for other in candidates
        }
        nearest = min(candidates, key=lambda other: len(fields[other.fingerprint]))
        return nearest, fields[nearest.fingerprint]


def _local_folder(location: str) -> Path:
    """Where files of a remote store are kept on this machine."""
    chosen = os.environ.get("OPD_STREAM_CACHE")
    parent = Path(chosen) if chosen else Path.home() / ".cache" / "opd-stream"
    return parent / sha256(location.encode())[:16]
