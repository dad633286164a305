"""From a YAML file and `--set a.b=c` to a `Config`, with every problem told at once."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.fetching import is_hub_id
from opd_stream.section import Section, is_list, is_object

_PATHS = {  # section -> its fields that hold a path; "" is the file itself
    "": ("base", "store"),
    "student": ("path", "taught_by"),
    "teacher": ("path",),
    "template": ("file",),
    "prompts": ("path", "data_files"),
    "replay": ("run",),
}


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read a config file, apply `a.b=c` overrides and validate.

    A file with `base: OTHER.yaml` starts from the other file's fields.

    Raises:
        UserError: one line for each problem, with a suggestion for a misspelt key.
    """
    return _validated(_read(path), overrides, str(path))


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors.

    Nothing is required in it: a file with a `base` has only what differs.
    """
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    about = "another config file, whose fields this one starts from"
    schema["properties"]["base"] = {"type": "string", "description": about}
    return schema


def _read(path: Path) -> dict[str, Any]:
    """The fields of a config file over those of its base."""
    if not path.is_file():
        raise UserError(f"config {path} does not exist; expected a YAML file; check the path")
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise UserError(
            f"{path} is not UTF-8 text ({found}); expected a YAML file; save it as UTF-8"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # as of a 30th of February
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}; mend the file") from error
    if not is_object(raw):
        raise UserError(f"{path} holds a {type(raw).__name__}; expected a mapping of fields")
    base = raw.pop("base", None)
    below = {} if base is None else _read(path.parent / str(base))
    return _merged(below, _anchored(raw, below, path.parent))


def override_config(config: Config, overrides: list[str]) -> Config:
    """A config with other values in some fields.

    Raises:
        UserError: one line for each problem.
    """
    return _validated(config.model_dump(mode="json"), overrides, "the config with --set")


def _validated(raw: dict[str, Any], overrides: list[str], where: str) -> Config:
    for override in overrides:
        _override(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = problems_of(error, raw)
        lines = "\n".join(problems)
        raise UserError(
            lines if len(problems) == 1 else f"{len(problems)} problems in {where}:\n{lines}"
        ) from error


def problems_of(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """One line for each problem of a config: what was found, what was expected, what to do."""
    return list(dict.fromkeys(_problem(details, raw) for details in error.errors()))


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Fields of `above` over those of `below`; a section of another kind replaces the whole one."""
    merged = dict(below)
    for key, value in above.items():
        there = merged.get(key)
        if is_object(value) and is_object(there):
            same_kind = value.get("kind", there.get("kind")) == there.get("kind")
            merged[key] = _merged(there, value) if same_kind else value
        else:
            merged[key] = value
    return merged


def _override(raw: dict[str, Any], override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise UserError(f"--set {override!r} has no '='; expected --set field.subfield=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"--set {override[:80]!r}: the value is not valid YAML; quote it"
        ) from error
    *parents, last = field.split(".")
    here = raw
    for parent in parents:
        section = here.setdefault(parent, {})
        if not is_object(section):
            raise UserError(f"--set {override!r}: {parent} is a value, not a section with fields")
        here = section
    here[last] = value


def _anchored(section: dict[str, Any], below: Any, folder: Path, name: str = "") -> dict[str, Any]:
    """A section whose relative paths are relative to its file's folder.

    `below` is the same section of the base, which may say its kind.
    """
    known: dict[str, Any] = below if is_object(below) else {}
    is_dataset = section.get("kind", known.get("kind")) == "datasets"
    anchored: dict[str, Any] = {}
    for key, item in section.items():
        if is_object(item):
            anchored[key] = _anchored(item, known.get(key), folder, key)
        elif key in _PATHS.get(name, ()) and isinstance(item, str) and "://" not in item:
            may_be_name = is_dataset or (name in ("student", "teacher") and is_hub_id(item))
            is_name = may_be_name and key == "path" and not (folder / item).exists()
            anchored[key] = item if is_name else str(folder / item)
        else:
            anchored[key] = item
    return anchored


def _problem(details: ErrorDetails, raw: dict[str, Any]) -> str:
    """One line for one validation error: what was found, expected, to do."""
    location = [part for part in details["loc"] if _is_field(part, raw, details["loc"])]
    field = ".".join(str(part) for part in location)
    match details["type"]:
        case "extra_forbidden":
            return f"unknown key {field!r}; {_hint(str(location[-1]))}"
        case "missing":
            return f"{field!r} is missing; expected a value; add it to the config or use --set"
        case "value_error" | "conflict":
            return details["msg"].removeprefix("Value error, ")
        case _:
            reason = details["msg"][:1].lower() + details["msg"][1:]
            return f"{field!r} is {details['input']!r}; {reason}; change it"


def _is_field(part: int | str, raw: dict[str, Any], loc: tuple[int | str, ...]) -> bool:
    """Whether a part of an error's place stands in the file (a union's tag does not)."""
    here: Any = raw
    for step in loc:
        if step == part:
            return not is_object(here) or part in here or step == loc[-1]
        if is_object(here) and step in here:
            here = here[step]
        elif is_list(here):
            here = here[int(step)]
    return True


def _hint(name: str) -> str:
    """What to do about an unknown key: the field it most likely stands for, or where it belongs."""
    if name in ("run_dir", "run-dir"):
        return "the run's folder is an option of the command: --run-dir DIR"
    found = [section for section in _sections(Section) if not section.__subclasses__()]
    sections = sorted(found, key=lambda section: section.__name__)
    homes = [section.__name__ for section in sections if name in section.model_fields]
    if homes:
        return f"docs/config.md has that field in {', '.join(dict.fromkeys(homes))}"
    known = sorted({field for section in sections for field in section.model_fields})
    longer = [field for field in known if field.startswith(name)]
    close = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"did you mean {close[0]!r}?" if close else "remove it, or see docs/config.md"


def _sections(base: type[Section]) -> Iterator[type[Section]]:
    for section in base.__subclasses__():
        yield section
        yield from _sections(section)
