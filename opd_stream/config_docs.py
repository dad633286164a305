"""docs/config.md from the config's own descriptions: `python -m opd_stream.config_docs`."""

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from opd_stream.config import PLACEMENT, Config
from opd_stream.section import LARGEST_INTEGER, Kinds


def config_markdown() -> str:
    """Every section of the config as a table of fields."""
    parts = [
        "# Configuration",
        "One YAML file is one run. `--set a.b=c` overrides a field on the command line; "
        "`base: OTHER.yaml` starts from another file's fields. A path in a file is relative to "
        "the file, a path on the command line to where the command is called. Unknown keys, and "
        "keys that stand twice, are refused; numbers are finite, and integers without bounds "
        f"below lie within {LARGEST_INTEGER:,} of 0.",
        "A `kind` chooses between forms of a section. These fields are placement: they may change "
        "between two calls of a run and name no other artifact: "
        + ", ".join(f"`{name}`" for name in PLACEMENT)
        + ".",
        "An editor with a YAML language server completes fields and shows mistakes, if "
        "`opd-stream schema --out opd-stream.schema.json` writes the schema, and the first line of "
        "a config names it: `# yaml-language-server: $schema=opd-stream.schema.json`.",
        "This page is written by `python -m opd_stream.config_docs > docs/config.md`.",
    ]
    waiting: list[type[BaseModel]] = [Config]
    seen: set[type[BaseModel]] = set()
    while waiting:
        section = waiting.pop(0)
        if section in seen:
            continue
        seen.add(section)
        parts.append(_section(section))
        for field in section.model_fields.values():
            waiting += _sections(_whole(field))
    return "\n\n".join(parts) + "\n"


def _section(section: type[BaseModel]) -> str:
    doc = (section.__doc__ or "").splitlines()[0]
    lines = [f"## {section.__name__}", "", doc, "", "| field | type | default | meaning |"]
    lines.append("|---|---|---|---|")
    for name, field in section.model_fields.items():
        chooses = name == "kind" and field.exclude_if is None  # of several sections
        is_required = field.default is PydanticUndefined or chooses
        default = "required" if is_required else f"`{field.default}`"
        if isinstance(field.default, BaseModel):
            default = "see there"
        meaning = field.description or ""
        kind = _type(_whole(field)) + _bounds(field.metadata)
        lines.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines)


def _bounds(metadata: Sequence[Any]) -> str:
    """The bounds that a field states, in words."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found: list[str] = []
    for each in (part for whole in metadata for part in getattr(whole, "metadata", (whole,))):
        for name, word in words.items():
            if (limit := getattr(each, name, None)) is not None:
                found.append(f", {word} {limit:,}")
    return "".join(found)


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        kinds = _kinds(annotation)
        inner, *metadata = get_args(annotation)
        return " or ".join(map(_type, kinds)) if kinds else _type(inner) + _bounds(metadata)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(annotation))
    if origin is tuple:
        return "list of " + _type(get_args(annotation)[0])
    if origin is dict:
        return "mapping of name to " + _type(get_args(annotation)[1])
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "Path": "path",
        "bool": "yes or no",
        "date": "date",
        "JsonValue": "any value",
    }
    name: str = getattr(annotation, "__name__", "")  # pyright: ignore[reportUnknownArgumentType]
    return names.get(name, str(annotation))  # pyright: ignore[reportUnknownArgumentType]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = _kinds(annotation) or get_args(annotation)
    return [section for part in parts for section in _sections(part)]


def _whole(field: FieldInfo) -> Any:
    """The annotation with its kinds, which pydantic keeps apart."""
    kinds = next((found for found in field.metadata if isinstance(found, Kinds)), None)
    return field.annotation if kinds is None else Annotated[field.annotation, kinds]


def _kinds(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The built-in kinds of a part."""
    found = [value for value in get_args(annotation) if isinstance(value, Kinds)]
    return found[0].sections if found else ()


if __name__ == "__main__":
    print(config_markdown(), end="")
