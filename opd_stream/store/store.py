"""The store: one folder of artifacts, shared by any number of runs and machines."""

import uuid
from collections.abc import Iterator
from pathlib import Path

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.files import explained, read_json
from opd_stream.store.policy import Identity, PolicyArtifact, identify
from opd_stream.store.recipe import Kind, Recipe, differing_fields, recipe_from_json


class Store:
    """Artifacts by recipe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.digests = root / "digests"  # of files that did not change since

    def check_writable(self) -> None:
        """Refuse a store that cannot be written, before any work.

        Raises:
            UserError: says why.
        """
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

    def artifact(self, recipe: Recipe) -> Artifact:
        """The artifact of a recipe, whether it exists or not."""
        return Artifact(self.root, recipe)

    def policy(self, recipe: Recipe) -> PolicyArtifact:
        """The trained policy of a recipe, whether it exists or not."""
        return PolicyArtifact(self.root, recipe)

    def by_fingerprint(self, kind: Kind, fingerprint: str) -> Artifact:
        """An artifact that was created before.

        Raises:
            UserError: the store has none with this fingerprint.
        """
        path = self.root / kind / fingerprint[:16] / "recipe.json"
        if not path.exists():
            raise UserError(
                f"the store {self.root} has no {kind}/{fingerprint[:16]}; "
                "run the stage that makes it, or set store to the folder that has it"
            )
        return Artifact(self.root, recipe_from_json(read_json(path), str(path)))

    def identify(self, checkpoint: Path) -> Identity:
        """The identity of a checkpoint folder, remembering digests of unchanged files."""
        return identify(checkpoint, cache=self.digests)

    def recipes(self, kind: Kind) -> Iterator[Recipe]:
        """The recipes of a kind for which a folder was started."""
        for path in sorted((self.root / kind).glob("*/recipe.json")):
            yield recipe_from_json(read_json(path), str(path))

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
