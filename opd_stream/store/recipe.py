"""A recipe says everything that changes an artifact's content; its digest is the artifact's name.

Placement (workers, devices, engine batch size, unit size, paths) is never part of a recipe: it may
change between two calls of the same command without making another artifact.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args

from opd_stream.store.files import canonical_json, sha256
from opd_stream.store.sealed import (
    DamagedRecord,
    Sealed,
    load_record,
    publish_record,
    say_mended,
)

FORMAT_VERSION: Literal[1] = 1

Kind = Literal[
    "prompts",
    "policies",
    "rollouts",
    "scores",
    "heads",  # of a teacher, for hidden states
    "bases",  # in which hidden states are rounded
    "hidden",  # a teacher's hidden states on rollouts
    "distances",  # of a policy to them
    "evaluations",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Inputs that are digests of models and tokenizers; all others are fingerprints of artifacts.
MODELS = ("student", "teacher", "base", "tokenizer", "student_tokenizer", "teacher_tokenizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What an artifact is made of.

    Example:
        >>> Recipe(kind="scores", settings={"top_k": 16}, inputs={"rollouts": "3f…", …})
    """

    kind: Kind
    settings: dict[str, Any]  # JSON values: every setting that changes the content
    inputs: dict[str, str]  # role -> fingerprint of an artifact or content digest of a policy

    def as_json(self) -> dict[str, Any]:
        """The canonical JSON value whose digest is the fingerprint."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "settings": self.settings,
            "inputs": self.inputs,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical recipe."""
        return sha256(canonical_json(self.as_json()))


class RecipeRecord(Sealed):
    """A file of an artifact: its recipe, in full, beside what else the file says."""

    NAMED_BY: ClassVar[int] = 3  # KIND/FINGERPRINT/FILE

    format_version: Literal[1]
    kind: Kind
    settings: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str

    @classmethod
    def of(cls, recipe: Recipe, **fields: Any) -> Self:
        """The record of an artifact with this recipe, and the record's other fields."""
        return cls(**recipe.as_json(), fingerprint=recipe.fingerprint, **fields)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the artifact."""
        return Recipe(kind=self.kind, settings=self.settings, inputs=self.inputs)

    def misplaced(self, path: Path) -> str | None:
        """A recipe whose digest is not the name of its folder is not the one written there."""
        found, folder = self.recipe.fingerprint, path.parent
        if found == self.fingerprint and (self.kind, found[:16]) == (
            folder.parent.name,
            folder.name,
        ):
            return None
        return f"its recipe belongs to {self.kind}/{found[:16]}"


def mend_recipe(folder: Path, record: RecipeRecord) -> None:
    """Write the recipe.json of a started artifact again where it is damaged, with a line."""
    path = folder / "recipe.json"
    try:
        load_record(RecipeRecord, path)
        return
    except DamagedRecord as damaged:
        reason = damaged.reason
    except FileNotFoundError:
        if not (folder / "manifest.json").exists():
            return
        reason = "is missing"
    say_mended(path, reason)
    publish_record(path, record)


def differing_fields(left: Any, right: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (left value, right value) for every leaf in which two JSON values differ."""
    if not (isinstance(left, dict) and isinstance(right, dict)):
        return {} if left == right else {prefix: (left, right)}
    one, other = cast(dict[str, Any], left), cast(dict[str, Any], right)
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*one, *other}):
        path = f"{prefix}.{key}" if prefix else str(key)
        found |= differing_fields(one.get(key), other.get(key), path)
    return found
