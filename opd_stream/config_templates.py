"""Configs to begin with: what `opd-stream init` writes, each field with its meaning.

A template is a file of `configs`: the quickstart, one of `templates`, or a published method. Its
first comment heads what is written; the meanings are the descriptions of the config's own fields.
"""

import difflib
import json
import textwrap
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from opd_stream.config_file import json_schema, merged_fields
from opd_stream.embedded import ORGANISATION, embedded, embedded_model
from opd_stream.errors import UserError, shortened
from opd_stream.section import is_object
from opd_stream.yaml_text import parse_yaml

QUICKSTART = "quickstart"
_WIDTH = 100
_MODELS = ("path", "taught_by")  # fields that may name an embedded model


def template_names() -> list[str]:
    """Every template: the quickstart, those for a purpose, then the published methods."""
    folders = [embedded("templates"), embedded("methods")]
    return [QUICKSTART, *(path.stem for each in folders for path in sorted(each.glob("*.yaml")))]


def template_text(name: str, file: str) -> str:
    """A template as a config of its own, with comments.

    Args:
        name: of the template.
        file: where it will be written, for the commands at its top.

    Raises:
        UserError: there is no such template.
    """
    names = template_names()
    if name not in names:
        longer = [each for each in names if name and each.startswith(name)]
        close = longer or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names)}"
        raise UserError(f"there is no template {shortened(name)}; {hint}")
    places = [embedded(f"{place}{name}.yaml") for place in ("templates/", "methods/", "")]
    path = next(each for each in places if each.is_file())
    rows = path.read_text().replace(f"{name}.yaml", file).splitlines()
    lines = [*takewhile(lambda row: row.startswith("#"), rows), "#"]
    lines += [f"#   opd-stream plan {file}    what it costs; starts nothing"]
    lines += [f"#   opd-stream run {file}     again: it goes on where it was", ""]
    schema = json_schema()
    lines += _lines(_fields(path), schema, schema["$defs"], "")
    return "\n".join(lines) + "\n"


def _fields(path: Path) -> dict[str, Any]:
    """Fields of a shipped config over those of its base, with embedded models by their names."""
    raw: dict[str, Any] = _renamed(parse_yaml(path.read_text()))
    base = raw.get("base")
    if base is None or not (path.parent / base).is_file():
        return raw  # or its base is a config of the user's
    del raw["base"]
    return merged_fields(_fields(path.parent / base), raw)


def _renamed(section: dict[str, Any]) -> dict[str, Any]:
    renamed = dict(section)
    for key, value in section.items():
        if is_object(value):
            renamed[key] = _renamed(value)
        elif key in _MODELS and isinstance(value, str):
            name = f"{ORGANISATION}/{Path(value).name}"
            renamed[key] = name if "models" in Path(value).parts and embedded_model(name) else value
    return renamed


def _lines(
    section: dict[str, Any], node: dict[str, Any], known: dict[str, Any], indent: str
) -> Iterator[str]:
    """A section in YAML; `node` is its JSON schema, `known` the schemas that have names."""
    for key, value in section.items():
        field: dict[str, Any] = node.get("properties", {}).get(key, {})
        inner = _schema_of(value, field, known)
        about = str(inner.get("description") or field.get("description", "")).split("\n")[0]
        if is_object(value) and value:
            yield from _commented(f"{indent}{key}:", about, indent)
            yield from _lines(value, inner, known, f"{indent}  ")
        else:
            yield from _commented(f"{indent}{key}: {_value(value)}", about, indent)


def _value(value: Any) -> str:
    """A plain value, or a list, in one line of YAML."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _commented(line: str, about: str, indent: str) -> Iterator[str]:
    """A line with its meaning behind it, or above it where it is too long."""
    beside = f"{line}  # {about}"
    if not about or len(beside) <= _WIDTH:
        yield beside if about else line
        return
    for part in textwrap.wrap(about, _WIDTH - len(indent) - 2, break_on_hyphens=False):
        yield f"{indent}# {part}"
    yield line


def _schema_of(value: Any, node: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The schema of a section among those that a field may hold; empty: it is a plain value."""
    if not is_object(value):
        return {}
    for place in _places(node, known):
        kind: dict[str, Any] = place.get("properties", {}).get("kind", {})
        kinds = [kind["const"]] if "const" in kind else kind.get("enum", [value.get("kind")])
        if value.get("kind", kind.get("default")) in kinds and "properties" in place:
            return place
    return {}


def _places(node: dict[str, Any], known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas that a field's schema leads to."""
    if "$ref" in node:
        node = known[node["$ref"].rpartition("/")[2]]
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _places(choice, known)
    yield node
