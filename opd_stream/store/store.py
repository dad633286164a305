"""The store: one place full of artifacts, shared by any number of runs and machines."""

import contextlib
import os
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.files import (
    RETRY_TIMEOUT,
    canonical_json,
    check_there,
    explained,
    is_of_client,
    is_remote,
    load_record,
    place,
    publish,
    read_json,
    sha256,
    unreachable,
)
from opd_stream.store.policy import Identity, PolicyArtifact, identify
from opd_stream.store.recipe import Kind, Recipe, RecipeRecord, differing_fields


class Store:
    """Artifacts by recipe, in a folder or at an address like s3://BUCKET/PATH.

    `local` is a folder on this machine for what cannot live in an object store: checkpoints while
    they are read or written, and remembered digests. `retry_timeout` is how many seconds an object
    store is asked again that does not answer.
    """

    def __init__(self, location: str | Path, *, retry_timeout: float = RETRY_TIMEOUT) -> None:
        self.location = str(location)
        self.root = place(self.location, retry_timeout)
        self.local = _local_folder(self.location) if is_remote(self.root) else self.root
        # The same place for a process that works in another folder.
        self.address = self.location if is_remote(self.root) else str(self.root.resolve())
        self.digests = self.local / "digests"  # of files that did not change since

    def check_writable(self) -> None:
        """Refuse a store that cannot be written, before any work.

        Raises:
            UserError: says why.
        """
        if is_remote(self.root):
            probe = self.root / f".probe.{uuid.uuid4().hex}.tmp"
            publish(probe, b"")
            probe.unlink()
            return
        with explained(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise UserError(
                    f"store {self.root} is a file; expected a folder; set store=DIR"
                ) from error
            probe = self.root / f".probe.{uuid.uuid4().hex}.tmp"
            probe.touch()
            probe.unlink()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what breaks inside because the store went away into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if is_remote(self.root) and is_of_client(error):
                raise UserError(unreachable(self.root, error)) from error
            check_there(self.root)
            raise

    def artifact(self, recipe: Recipe) -> Artifact:
        """The artifact of a recipe, whether it exists or not."""
        return Artifact(self.root, recipe)

    def policy(self, recipe: Recipe) -> PolicyArtifact:
        """The trained policy of a recipe, whether it exists or not."""
        return PolicyArtifact(self.root, recipe, local=self.local)

    def by_fingerprint(self, kind: Kind, fingerprint: str) -> Artifact:
        """An artifact that was created before.

        Raises:
            UserError: the store has none with this fingerprint.
        """
        return self.artifact(self._recipe_of(kind, fingerprint))

    def policy_by_fingerprint(self, fingerprint: str) -> PolicyArtifact:
        """A trained policy that was started before.

        Raises:
            UserError: as `by_fingerprint`.
        """
        return self.policy(self._recipe_of("policies", fingerprint))

    def _recipe_of(self, kind: Kind, fingerprint: str) -> Recipe:
        path = self.root / kind / fingerprint[:16] / "recipe.json"
        if not path.exists():
            check_there(self.root)
            raise UserError(
                f"the store {self.root} has no {kind}/{fingerprint[:16]}; "
                "run the stage that makes it, or set store to the folder that has it"
            )
        return load_record(RecipeRecord, path).recipe

    def identify(self, checkpoint: Path) -> Identity:
        """The identity of a checkpoint folder, remembering digests of unchanged files."""
        return identify(checkpoint, cache=self.digests)

    def recipes(self, kind: Kind) -> Iterator[Recipe]:
        """The recipes of a kind for which a folder was started."""
        for folder in self.folders(kind):
            path = folder / "recipe.json"
            if path.exists():
                yield load_record(RecipeRecord, path).recipe

    def folders(self, kind: Kind) -> list[Path]:
        """The folders of a kind, whether an artifact was started in them or not."""
        parent = self.root / kind
        return sorted(parent.iterdir(), key=str) if parent.exists() else []

    def record_run(
        self, run_id: str, folder: Path, artifacts: set[str], shared: str | None = None
    ) -> None:
        """Say what a run reaches, so that `gc` leaves it.

        Args:
            run_id: id of the run.
            folder: its folder; where that is gone, the record counts no more.
            artifacts: names as KIND/FINGERPRINT, the fingerprint's first 16 characters.
            shared: what this folder works on together with the folders of other machines; None
                leaves what was recorded before.
        """
        path = self.root / "runs" / f"{run_id}.json"
        before = read_json(path) if path.exists() else {}
        record = {
            "id": run_id,
            "host": platform.node(),
            "folder": str(folder.resolve()),
            "artifacts": sorted(artifacts),
            "shared": shared or before.get("shared"),
        }
        check_there(self.root)
        if before != record:
            publish(path, canonical_json(record))

    def add_to_run(
        self, run_id: str, folder: Path, artifacts: set[str], shared: str | None = None
    ) -> None:
        """As `record_run`, keeping what was recorded under this id before."""
        path = self.root / "runs" / f"{run_id}.json"
        before = read_json(path)["artifacts"] if path.exists() else []
        self.record_run(run_id, folder, {*before, *artifacts}, shared)

    def ids_of_run(self, run_id: str) -> frozenset[str]:
        """The id, and those of the folders of other machines that work on the same run."""
        own = self.root / "runs" / f"{run_id}.json"
        shared = read_json(own).get("shared") if own.exists() else None
        if shared is None:
            return frozenset({run_id})
        records = [read_json(path) for path in own.parent.iterdir() if path.suffix == ".json"]
        return frozenset(record["id"] for record in records if record.get("shared") == shared)

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
