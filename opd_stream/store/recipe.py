"""A recipe says everything that changes an artifact's content; its digest is the artifact's name.

Placement (workers, devices, engine batch size, unit size, paths) is never part of a recipe: it may
change between two calls of the same command without making another artifact.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from opd_stream.errors import UserError
from opd_stream.store.files import canonical_json, read_json, sha256

FORMAT_VERSION = 1

Kind = Literal["prompts", "policies", "rollouts", "scores", "evaluations"]
KINDS: tuple[Kind, ...] = get_args(Kind)


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


class Record(BaseModel):
    """A JSON file of the store, by one definition for its writer and its reader.

    Fields that a later opd-stream adds are left out when they are read.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            UserError: another format version wrote it, or it is no such record (says why).
        """
        value = read_json(path)
        is_mapping = isinstance(value, dict)
        version: Any = value.get("format_version", FORMAT_VERSION) if is_mapping else None
        if is_mapping and version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}; this opd-stream reads version "
                f"{FORMAT_VERSION}; update opd-stream or use another store"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            raise UserError(
                f"{path} is not what opd-stream writes ({field}: {first['msg']}); expected a "
                f"{cls.__name__}; move its folder away and run the same command again"
            ) from error

    def as_bytes(self) -> bytes:
        """The bytes of the file."""
        return canonical_json(self.model_dump(mode="json"))


class RecipeRecord(Record):
    """A file of an artifact: its recipe, in full, beside what else the file says."""

    format_version: int
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


def differing_fields(left: Any, right: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (left value, right value) for every leaf in which two JSON values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*left, *right}):
            path = f"{prefix}.{key}" if prefix else str(key)
            found |= differing_fields(left.get(key), right.get(key), path)
        return found
    return {} if left == right else {prefix: (left, right)}
