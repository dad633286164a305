"""Rows of the files that people keep prompts in, each with the place where it stands.

The format is in a file's name: .jsonl, .ndjson and .json (one object a line, or one array of
objects), .csv and .tsv, all of these also with .gz or .zst behind; .parquet. Values of CSV stay
text, so that `007` is not 7.
"""

import csv
import difflib
import json
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from opd_stream.errors import UserError
from opd_stream.section import is_list, is_object
from opd_stream.store.lines import lines_of, parse_json

PlacedRow = tuple[str, dict[str, Any]]  # "file:line" or "file row N", and the row
Format = Literal["json", "csv", "tsv", "parquet"]

FORMATS: dict[str, Format] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
PACKED = (".gz", ".zst")
MAX_CELL = 2**30  # characters of one value of a CSV file


def format_of(path: Path) -> Format | None:
    """The format that a file's name says; None: no known one."""
    name = path.with_suffix("") if path.suffix in PACKED else path
    found = FORMATS.get(name.suffix.lower())
    return None if found == "parquet" and name != path else found


def source_files(path: Path) -> list[Path]:
    """The files of a source, sorted: of a file itself, of a folder with all below, of a pattern.

    In a folder, names with a dot or an underscore in front and unknown formats are left out.

    Raises:
        UserError: there is none, its format is unknown, or files are of several formats.
    """
    expected = f"a name that ends in {', '.join(FORMATS)}, with .gz or .zst behind if packed"
    if path.is_file():
        if format_of(path) is None:
            raise UserError(
                f"{path} is of no known format; expected {expected}; rename it, or set kind=jsonl "
                "for JSON lines of any name"
            )
        return [path]
    if path.is_dir():
        below = [found for found in path.rglob("*") if found.is_file()]
        if any(found.name == "dataset_info.json" for found in below) and not any(
            format_of(found) for found in below if found.name not in _SAVED
        ):
            raise UserError(
                f"{path} is a dataset that save_to_disk wrote; expected files of rows; set "
                "kind=datasets"
            )
        files = [found for found in below if not _is_hidden(found.relative_to(path))]
    else:
        files = [found for found in path.parent.glob(path.name) if found.is_file()]
    known = sorted((found for found in files if format_of(found)), key=str)
    formats = {format_of(found): found for found in known}
    if not known:
        found = "holds no such file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {found}; expected {expected}; check the path")
    if len(formats) > 1:
        one, other = list(formats.values())[:2]
        raise UserError(
            f"{path} holds files of several formats, such as {one.name} and {other.name}; expected "
            f"one; set path to the file, or to a pattern such as {path}/*{one.suffix}"
        )
    return known


_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def rows_of_file(path: Path, kind: Format) -> Iterator[PlacedRow]:
    """The rows of a file.

    Raises:
        UserError: it is damaged, or a row is none (names file and line or row).
    """
    if kind == "parquet":
        from opd_stream.store.parquet import parquet_rows  # loads pyarrow

        yield from ((f"{path} row {n}", row) for n, row in enumerate(parquet_rows(path)))
    elif kind == "json":
        yield from _json_rows(path)
    else:
        yield from _csv_rows(path, delimiter="," if kind == "csv" else "\t")


def count_rows(path: Path, kind: Format) -> int:
    """How many rows a file has; what they hold is not looked at where that can be helped.

    Raises:
        UserError: it is damaged.
    """
    if kind == "parquet":
        from opd_stream.store.parquet import parquet_length  # loads pyarrow

        return parquet_length(path)
    lines = (line for line in lines_of(path) if line.strip())
    first = next(lines, "")
    if kind == "json" and not first.lstrip().startswith("["):
        return bool(first) + sum(1 for _ in lines)
    return sum(1 for _ in rows_of_file(path, kind))


def _json_rows(path: Path) -> Iterator[PlacedRow]:
    numbered = enumerate(lines_of(path), start=1)
    first = next(((number, line) for number, line in numbered if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        text = "\n".join(chain([first[1]], (line for _, line in numbered)))
        for number, row in enumerate(_parsed(text, str(path), first[0])):
            yield _object(row, f"{path} row {number}")
        return
    for number, line in chain([first], numbered):
        if line.strip():
            yield _object(_parsed(line, str(path), number), f"{path}:{number}")


def _parsed(text: str, path: str, line: int) -> Any:
    """The value of a text that begins at a line of a file."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        is_placed = isinstance(error, json.JSONDecodeError)
        place = f"{path}:{line + error.lineno - 1}" if is_placed else f"{path}:{line}"
        reason = f"{error.msg}, column {error.colno}" if is_placed else str(error)
        raise UserError(
            f"{place} is not valid JSON ({reason}); expected one object a line, or one array of "
            "objects; mend or remove it"
        ) from error


def _object(row: Any, place: str) -> PlacedRow:
    if not is_object(row):
        raise UserError(
            f"{place} holds a {type(row).__name__}; expected one JSON object for each prompt; "
            "mend it"
        )
    return place, row


def _csv_rows(path: Path, delimiter: str) -> Iterator[PlacedRow]:
    line = 0

    def lines() -> Iterator[str]:
        nonlocal line
        for text in lines_of(path):
            line += 1
            yield text + "\n"

    csv.field_size_limit(MAX_CELL)
    reader = csv.DictReader(lines(), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(
                f"{path}:1 names the column {twice!r} twice; expected each once; rename one of them"
            )
        for row in reader:
            place = f"{path}:{line}"
            cells = [*row.values()]
            if None in row or None in cells:
                more = "more" if None in row else "fewer"
                raise UserError(
                    f"{place} has {more} values than the first line names ({len(names)}); expected "
                    "as many; quote values that hold a separator"
                )
            yield place, dict(row)
    except csv.Error as error:
        raise UserError(f"{path}:{line} is not valid CSV ({error}); mend the file") from error


def value_of(row: dict[str, Any], name: str, place: str, setting: str) -> Any:
    """The value of a field; `a.b` is field b of the object in field a, if no field has that name.

    A number behind a dot is a place in a list. NaN, which tables have for nothing, is null.

    Args:
        row: of a source.
        name: of the field.
        place: of the row, for the error.
        setting: of the config that names the field, for the error.

    Raises:
        UserError: there is no such field (names those that there are).
    """
    value: Any = row
    steps = [name] if name in row else name.split(".")
    for step in steps:
        if is_object(value) and step in value:
            value = value[step]
        elif is_list(value) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            has = [*value] if is_object(value) else []
            close = difflib.get_close_matches(step, has, n=1, cutoff=0.6)
            what = f"it has {', '.join(map(str, has))}" if has else f"found {_short(value)}"
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"{place} has no field {name!r}; {what}; {hint}set {setting}")
    return None if isinstance(value, float) and math.isnan(value) else value


def _short(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
