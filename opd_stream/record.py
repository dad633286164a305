"""Records that are written as JSON and read back: one definition for writer and reader."""

from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from opd_stream.errors import UserError


class Record(BaseModel):
    """A JSON object, or a part of one: immutable; fields of a later version are left out."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """The JSON value."""
        return self.model_dump(mode="json", by_alias=True)


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a JSON value is a list."""
    return isinstance(value, list)


R = TypeVar("R", bound=Record)


def read_record(kind: type[R], value: object, where: str) -> R:
    """A record from its JSON value.

    Args:
        kind: the record's type.
        value: as it was read.
        where: file or place that the value is from, for the error.

    Raises:
        UserError: another format version wrote it, or it is no such record (says where).
    """
    version = value.get("format_version", 1) if is_object(value) else 1
    if version != 1 and "format_version" in kind.model_fields:
        raise UserError(
            f"{where} has format version {version}; this opd-stream reads version 1; "
            "update opd-stream, or use another store or run folder"
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(
            f"{where} cannot be read ({field}: {first['msg']}); expected what this version of "
            "opd-stream writes; restore the file, or use the version that wrote it"
        ) from error
