"""From a YAML file and `--set a.b=c` to a `Config`, with every problem told at once."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from opd_stream.config import Config
from opd_stream.errors import UserError, shortened
from opd_stream.fetching import is_hub_id
from opd_stream.section import Section, is_list, is_object, path_flaw
from opd_stream.store.lines import opened
from opd_stream.yaml_text import MOST_CHARACTERS, MOST_DEPTH, parse_yaml

Place = tuple[str, ...]  # keys of a config, from the outermost

_PATHS = {  # section -> its fields that hold a path; "" is the file itself
    "": ("base", "store"),
    "student": ("path", "taught_by"),
    "teacher": ("path",),
    "template": ("file",),
    "prompts": ("path", "data_files"),
    "replay": ("run", "store"),
}

_NAMED = ("path", "taught_by")  # of them those that may hold a name of the hub instead


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply `a.b=c` overrides and validate.

    A file with `base: OTHER.yaml` starts from the other file's fields.

    Raises:
        UserError: one line for each problem, with a suggestion for a misspelt key.
    """
    return _validated(_read(Path(path)), overrides, str(path))


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


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a config file over those of its base; `above` are the files that led here."""
    if (flaw := path_flaw(str(path))) is not None:
        raise UserError(f"config {shortened(path)}: {flaw}; check the path")
    if not path.is_file():
        raise UserError(f"config {path} does not exist; expected a YAML file; check the path")
    if path.resolve() in above:
        raise UserError(f"{path} is the base of itself; expected other fields; leave base out")
    try:
        with opened(path) as file:
            raw: Any = parse_yaml(file.read(4 * MOST_CHARACTERS + 1).decode()) or {}
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise UserError(
            f"{path} is not UTF-8 text ({found}); expected a YAML file; save it as UTF-8"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}; mend the file") from error
    if not is_object(raw):
        raise UserError(f"{path} holds a {type(raw).__name__}; expected a mapping of fields")
    base = raw.pop("base", None)
    if not isinstance(base, str | None):
        raise UserError(f"'base' is {shortened(base)}; expected the path of a config; change it")
    below = {} if base is None else _read(path.parent / base, (*above, path.resolve()))
    return merged_fields(below, _anchored(raw, below, path.parent))


def make_config(fields: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A config from the fields of a file, and `a.b=c` overrides; paths are as they stand.

    Raises:
        UserError: one line for each problem.
    """
    return _validated(deepcopy(dict(fields)), overrides, "the config")


def override_config(config: Config, overrides: list[str]) -> Config:
    """A config with other values in some fields.

    Raises:
        UserError: one line for each problem.
    """
    return _validated(config.model_dump(mode="json"), overrides, "the config with --set")


def _validated(raw: dict[str, Any], overrides: Sequence[str], where: str) -> Config:
    problems: list[str] = []
    for override in overrides:
        try:
            _override(raw, override)
        except UserError as error:
            problems.append(str(error))
    found = _checked(raw, problems)
    if found is None or problems:
        head = (f"{len(problems)} problems in {where}:",) if len(problems) > 1 else ()
        raise UserError(*head, *problems)
    return found


# What stands in for a field that is missing or wrong, so that the others can be held against each
# other.
_STAND_INS: dict[str, Any] = {
    "rounds": 1,
    "student": {"path": "."},
    "teacher": {"path": "."},
    "prompts": {"kind": "ledger", "count": 1, "seed": 0},
    "rollouts": {"prompts_per_round": 1, "window": {"kind": "fixed", "tokens": 1}},
    "train": {"objective": {"kind": "bucket"}, "learning_rate": 1.0},
}


def _checked(raw: dict[str, Any], problems: list[str]) -> Config | None:
    """The config, or None; its problems are added, and those between fields that are right."""
    replaced: set[Place] = set()
    while True:
        try:
            return Config.model_validate(raw)
        except ValidationError as error:
            found = _problems(error, raw)
        told = (line for place, line in found if not _follows(place, line, replaced))
        problems += dict.fromkeys(line for line in told if line not in problems)
        before, raw = len(replaced), deepcopy(raw)
        for place, _ in found:
            if place:
                replaced.add(_replace(raw, place, replaced))
        if len(replaced) == before:
            return None


def _place(details: ErrorDetails, raw: dict[str, Any]) -> Place:
    """The keys of a config that lead to an error, as far as there are keys."""
    here: Any = raw
    keys: list[str] = []
    *parents, last = details["loc"] or ("",)
    for part in parents:
        if is_object(here) and part in here:
            here = here[part]
            keys.append(str(part))
    is_key = is_object(here) and (last in here or details["type"] == "missing")
    return (*keys, str(last)) if is_key and details["loc"] else tuple(keys)


def _follows(place: Place, line: str, replaced: set[Place]) -> bool:
    """Whether a problem may be there only because others were replaced."""
    if place:
        return any(place[: len(each)] == each[: len(place)] for each in replaced)
    sections = (each[: max(2, len(each) - 1)] for each in replaced)
    names = "|".join(re.escape(".".join(each)) for each in sections)
    return bool(replaced) and re.search(rf"(?<![\w.])({names})(?!\w)", line) is not None


def _replace(raw: dict[str, Any], place: Place, replaced: set[Place]) -> Place:
    """Put what stands in for a field there, or leave the field or its section out; says which."""
    for depth in range(len(place), 0, -1):
        here, stand_in, last = raw, _STAND_INS, place[depth - 1]
        for key in place[: depth - 1]:
            here, stand_in = here.get(key, {}), stand_in.get(key, {})  # its section may be gone
        if place[: depth - 1] == ("teachers",):
            stand_in = {last: _STAND_INS["teacher"]}
        if place[:depth] in replaced or not (last in stand_in or last in here):
            continue  # that was not enough, or there is nothing to leave out
        here.pop(last, None)
        here |= {last: deepcopy(stand_in[last])} if last in stand_in else {}
        return place[:depth]
    return place


def problems_of(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """One line for each problem of a config: what was found, what was expected, what to do."""
    return list(dict.fromkeys(line for _, line in _problems(error, raw)))


def _problems(error: ValidationError, raw: dict[str, Any]) -> list[tuple[Place, str]]:
    """Where the problems of a config are, and a line for each."""
    found: dict[str, tuple[Place, str, list[str]]] = {}
    told: list[tuple[Place, str]] = []
    for details in error.errors():
        place, parts = _place(details, raw), details["loc"]
        location = [each for at, each in enumerate(parts) if _is_field(at, raw, parts)]
        field = shortened(".".join(map(str, location)))
        if (line := _line(details, field, location)) is not None:
            told.append((place, line))
            continue
        start = f"{field} is {shortened(details['input'])}; "
        reasons = found.setdefault(start, (place, start, []))[2]  # of several types
        reasons += [] if (reason := _reason(details)) in reasons else [reason]
    for place, start, reasons in found.values():
        first, *others = reasons
        either = "".join(f" or {other.removeprefix('expected ')}" for other in others)
        told.append((place, f"{start}{first}{either}; change it"))
    return told


def merged_fields(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Fields of `above` over those of `below`; a section of another kind replaces the whole one."""
    merged = dict(below)
    for key, value in above.items():
        there = merged.get(key)
        if is_object(value) and is_object(there):
            same_kind = value.get("kind", there.get("kind")) == there.get("kind")
            merged[key] = merged_fields(there, value) if same_kind else value
        else:
            merged[key] = value
    return merged


def _override(raw: dict[str, Any], override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise UserError(
            f"--set {shortened(override)} has no '='; expected --set field.subfield=value"
        )
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(
            f"--set {shortened(override)}: the value is not valid YAML ({str(error)[:160]}); "
            "quote it"
        ) from error
    *parents, last = field.split(".")
    if "" in (*parents, last):
        raise UserError(
            f"--set {shortened(override)} has an empty name; expected --set field.subfield=value"
        )
    if len(parents) > MOST_DEPTH:
        raise UserError(
            f"--set {shortened(override)} names {len(parents):,} sections in one another; expected "
            "--set field.subfield=value"
        )
    here = raw
    for parent in parents:
        section = here.setdefault(parent, {})
        if not is_object(section):
            raise UserError(
                f"--set {shortened(override)}: {parent} is a value, not a section with fields; "
                "name a field of a section"
            )
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
            kind = "teacher" if name == "teachers" else key  # each has a name of its own
            anchored[key] = _anchored(item, known.get(key), folder, kind)
        elif key in _PATHS.get(name, ()) and isinstance(item, str) and _is_relative(item):
            may_be_name = is_dataset or (name in ("student", "teacher") and is_hub_id(item))
            is_name = may_be_name and key in _NAMED and not (folder / item).exists()
            anchored[key] = item if is_name else str(folder / item)
        else:
            anchored[key] = item
    return anchored


_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def _is_relative(path: str) -> bool:
    """Whether a text is a path that can be one; others are told as they are."""
    return "://" not in path and path_flaw(path) is None


def _line(details: ErrorDetails, field: str, location: list[int | str]) -> str | None:
    """The line of an error that is not about a value's type or bounds; None: it is."""
    match details["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"unknown key {field}; {_hint(str(location[-1]))}"
        case "missing":
            return f"{field} is missing; expected a value; add it to the config or use --set"
        case "value_error" | "conflict":
            return details["msg"].removeprefix("Value error, ")
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = details.get("ctx", {}).get("expected_tags", "one of docs/config.md")
            kind = details["input"].get("kind") if is_object(details["input"]) else None
            name = shortened(".".join([*map(str, location), "kind"]))
            return f"{name} is {shortened(kind)}; expected {kinds}; change it"
        case _:
            return None


def _reason(details: ErrorDetails) -> str:
    """What was expected of a value."""
    if (bound := _BOUNDS.get(details["type"])) is not None:
        (limit,) = details.get("ctx", {}).values()
        return f"expected {bound} {int(limit) if limit == int(limit) else limit:,}"
    if details["type"] == "too_short":
        least = details.get("ctx", {})["min_length"]
        return f"expected at least {least} item{'s' if least > 1 else ''}"
    if details["type"] in ("model_type", "model_attributes_type"):
        return "expected a section with fields"
    if details["type"] == "dict_type":
        return "expected names, each with a value"
    if details["type"] == "tuple_type":
        return "expected a list"
    reason = details["msg"][:1].lower() + details["msg"][1:]
    return reason.replace("input should be ", "expected ", 1)


def _is_field(at: int, raw: dict[str, Any], loc: tuple[int | str, ...]) -> bool:
    """Whether a part of an error's place stands in the file (the kind of a union does not)."""
    here: Any = raw
    for step in loc[:at]:
        try:
            here = here[step]
        except (KeyError, IndexError, TypeError):
            continue  # the kind of a union, or the place of a value that a list was made of
    part = loc[at]
    if is_object(here):
        return part in here or (at == len(loc) - 1 and part != "[key]")
    return is_list(here) and isinstance(part, int)


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
