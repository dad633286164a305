"""What settings, and records that are written as JSON and read back, have in common.

Each is declared once, for writer and reader. A part of the config (an objective, a window, an
engine, a judge) is named by the name of a built-in one, by an import path `package.module:Name` of
the user's own, or by the name of an entry point that stands for such a path; recipes hold the path.
"""

import importlib
import os
import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, TypeGuard, TypeVar, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

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
    check_version(kind, value, where)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(
            f"{where} cannot be read ({field}: {first['msg']}); expected what this version of "
            "opd-stream writes; restore the file, or use the version that wrote it"
        ) from error


def _checked_path(text: str) -> str:
    if (flaw := path_flaw(text)) is not None:
        raise _error(flaw)
    return text


PathText = Annotated[str, AfterValidator(_checked_path)]  # a path, or the address of a store


def check_version(kind: type[Record], value: object, where: str) -> None:
    """Refuse what a later opd-stream wrote.

    Raises:
        UserError: it has another format version.
    """
    version = value.get("format_version", 1) if is_object(value) else 1
    if version != 1 and "format_version" in kind.model_fields:
        raise UserError(
            f"{where} has format version {version}; this opd-stream reads version 1; "
            "update opd-stream, or use another store or run folder"
        )


IMPORT_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


def _checked_import(path: str) -> str:
    if not re.match(IMPORT_PATH, path):
        raise _error("expected the import path package.module:Name")
    return path


ImportPath = Annotated[str, AfterValidator(_checked_import)]


SEEDS = 2**32  # fits 64 bits with a step beside it
LARGEST_INTEGER = 2**31 - 1  # of a field that states no other bound
LARGEST_NUMBER, SMALLEST_NUMBER = 1e30, 1e-30  # a float32 holds them
LEAST_TEMPERATURE = 0.01  # below it float32 has no differences left; vLLM reads less as this
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, of Linux


class Section(BaseModel):
    """A part of the config, and the value that the library computes with: immutable and checked.

    It is declared once, beside the functions that read it. Every field is finite and in range, also
    where it states no bound.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_flaws(cls, raw: Any) -> Any:
        """Refuse values that would become others, or that no file system takes."""
        found: list[InitErrorDetails] = []
        for name, value in raw.items() if is_object(raw) else ():
            if name not in cls.model_fields:
                continue
            kinds = _kinds_in(cls.model_fields[name].annotation)
            flaws = (_flaw(item, kinds) for item in _items(value))
            if (flaw := next(filter(None, flaws), None)) is not None:
                found.append(InitErrorDetails(type=_error(flaw), loc=(name,), input=value))
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found)
        return raw

    @field_validator("*")
    @classmethod
    def _is_bounded(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse numbers that nothing means, of a field without a bound of its own; -0.0 is 0."""
        for number in _items(value):
            if isinstance(number, float) and 0 < abs(number) < SMALLEST_NUMBER:
                raise _error(f"expected 0, or at least {SMALLEST_NUMBER:g}")
        value = 0.0 if isinstance(value, float) and not value else value
        field = cls.model_fields[str(info.field_name)]
        if any(hasattr(each, "le") or hasattr(each, "lt") for each in field.metadata):
            return value
        for number in _items(value):
            largest = LARGEST_NUMBER if isinstance(number, float) else LARGEST_INTEGER
            if isinstance(number, int | float) and abs(number) > largest:
                raise _error(f"expected at most {largest:,}")
        return value


def _checked_temperature(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise _error(f"expected 0 (the most probable token), or at least {LEAST_TEMPERATURE}")
    return value


Temperature = Annotated[float, AfterValidator(_checked_temperature)]


def _items(value: Any) -> Sequence[Any]:
    """What a list or tuple holds; of another value itself."""
    return cast(Sequence[Any], value) if isinstance(value, list | tuple) else (value,)


def _error(flaw: str) -> PydanticCustomError:
    return PydanticCustomError("flaw", "{flaw}", {"flaw": flaw})


def _kinds_in(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    inner = get_args(annotation)
    return {annotation} if not inner else set[Any]().union(*map(_kinds_in, inner))


def _flaw(value: Any, kinds: set[Any]) -> str | None:
    """What is wrong with a value of a field of these types, beside its bounds; None: nothing."""
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        return "expected a number, and yes and no are none"
    if not isinstance(value, str | Path):
        return None
    if Path in kinds:
        return path_flaw(str(value))
    return "expected text without the character NUL" if "\0" in str(value) else None


def path_flaw(path: str) -> str | None:
    """Why a text cannot be the path of a file, in words; None: it can."""
    if "\0" in path:
        return "expected text without the character NUL"
    if not path:
        return "expected a path, and the empty text is none"
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
        return f"expected a path of at most {LONGEST_PATH:,} bytes, {LONGEST_NAME} a name"
    return None


def later(*, default: Any, **options: Any) -> Any:
    """A field that is written only where it differs from its default: other recipes stay the same.

    Takes what `pydantic.Field` takes.
    """
    return Field(default=default, exclude_if=lambda value: value == default, **options)


class Part(Section):
    """A section of one of several kinds; a config may name a class of the user's own."""

    kind: Any  # a name; a built-in kind narrows it to its own

    @model_validator(mode="before")
    @classmethod
    def _own_kind(cls, raw: Any) -> Any:
        """The kind of a class that declares none is its import path."""
        if is_object(raw) and cls.model_fields["kind"].is_required():
            return {**raw, "kind": f"{cls.__module__}:{cls.__qualname__}"}
        return raw

    def recipe(self) -> dict[str, Any]:
        """The settings; of a class of the user's own, also the digest of its file."""
        own = source_sha256(self.kind) if ":" in self.kind else {}
        return self.model_dump(mode="json") | own


class Kinds:
    """In an annotation: the built-in kinds of a part; the user's own are found by import path.

    Example:
        >>> AnyWindow = Annotated[Window, Kinds(FixedWindow, RatioWindow, group="my.windows")]
    """

    def __init__(self, *sections: type[Part], group: str) -> None:
        self.sections, self.group = sections, group
        self.names = [get_args(each.model_fields["kind"].annotation)[0] for each in sections]

    def __get_pydantic_core_schema__(
        self, source: type[Part], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schemas = map(handler.generate_schema, self.sections)
        own = core_schema.no_info_wrap_validator_function(
            lambda raw, _: self._own(source, raw),
            core_schema.typed_dict_schema(  # for editors
                {"kind": core_schema.typed_dict_field(core_schema.str_schema(pattern=IMPORT_PATH))},
                extra_behavior="allow",
            ),
            serialization=core_schema.plain_serializer_function_ser_schema(_dumped, info_arg=True),
        )
        return core_schema.tagged_union_schema(
            {**dict(zip(self.names, schemas, strict=True)), "own": own},
            discriminator=self._tag,
            custom_error_type="unknown_kind",
            custom_error_message=f"expected a kind: {', '.join(self.names)}, or the import path "
            "package.module:Name of your own class",
        )

    def _tag(self, raw: Any) -> str | None:
        kind = raw.get("kind") if is_object(raw) else getattr(raw, "kind", None)
        if not isinstance(kind, str) or kind in self.names:
            return kind
        return "own" if own_path(kind, self.group) is not None else None

    def _own(self, base: type[Part], raw: Any) -> Part:
        if isinstance(raw, base):
            return raw
        path = own_path(raw["kind"], self.group)
        assert path is not None  # the tag says so
        found = import_path(
            path,
            f"{base.__name__.lower()} class",
            lambda found: isinstance(found, type) and issubclass(found, base) and found is not base,
            f"a subclass of {base.__module__}.{base.__name__}",
        )
        return found.model_validate({**raw, "kind": path})


def source_sha256(path: str) -> dict[str, str]:
    """The digest of the file that an import path leads to, for a recipe; empty: it has no file."""
    source = importlib.import_module(path.partition(":")[0]).__file__
    return {} if source is None else {"sha256": sha256(Path(source).read_bytes()).hexdigest()}


def own_path(name: str, group: str) -> str | None:
    """The import path that a config names, itself or by an entry point; None: it names none."""
    if ":" in name:
        return name
    return next((found.value for found in entry_points(group=group, name=name)), None)


def import_path(path: str, what: str, is_expected: Callable[[Any], bool], expected: str) -> Any:
    """What stands at `package.module:Name`; importing runs the module.

    Args:
        path: the import path.
        what: the role it has, such as `judge function`.
        is_expected: whether a value can have the role.
        expected: what can, in words.

    Raises:
        UserError: the module cannot be imported, or has something else under the name.
    """
    module_name, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever the user's module raises while it is imported
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{what} {path} cannot be imported ({type(error).__name__}: {reason}); expected a "
            f"module that python -c 'import {module_name}' finds; install it or set PYTHONPATH"
        ) from error
    if not is_expected(found):
        is_class = isinstance(found, type)
        found_name = f"the class {found.__name__}" if is_class else f"a {type(found).__name__}"
        raise UserError(
            f"{what} {path}: the module has {'nothing' if found is None else found_name} under "
            f"the name {name}; expected {expected}; check the path"
        )
    return found


def _dumped(part: Part, info: SerializationInfo) -> dict[str, Any]:
    return part.model_dump(mode=info.mode)
