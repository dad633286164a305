"""Blocks of the pages: what is fenced, what is indented, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd_stream.config import Config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "opd-stream",
    "make",
    "pip",
    "python",
    "ray",
    "hf",
    "uv",
    "for",
    "jq",
    "docker",
    "git",
    "cd",
}
_FENCE = re.compile(r"^( *)```(\w*)\s*$")
_NEEDS = re.compile(r"^<!-- needs: (.+) -->$")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of a page.

    Example:
        >>> Block(page="README.md", line=12, kind="bash", text="make test\\n", needs=None)
    """

    page: str
    line: int  # of its first line, from 1
    kind: str  # bash, python, yaml, text (of a fence without a language), or indented text
    text: str
    needs: str | None  # from `<!-- needs: … -->` above it

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced and indented blocks of a page, in order."""
    lines = page.read_text().splitlines()
    needs, here = None, 0
    while here < len(lines):
        start, line = here, lines[here]
        if fence := _FENCE.match(line):
            here += 1
            while lines[here].strip() != "```":
                here += 1
            text = "\n".join(one.removeprefix(fence[1]) for one in lines[start + 1 : here])
            kind = fence[2] or "text"
            yield Block(page=page.name, line=start + 2, kind=kind, text=text + "\n", needs=needs)
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while here + 1 < len(lines) and (lines[here + 1].startswith("    ")):
                here += 1
            text = "\n".join(one[4:] for one in lines[start : here + 1]) + "\n"
            kind = _kind_of(text)
            yield Block(page=page.name, line=start + 1, kind=kind, text=text, needs=needs)
        if line.strip():
            found = _NEEDS.match(line)
            needs = found[1] if found else None
        here += 1


def _kind_of(text: str) -> str:
    """Of an indented block: commands, a piece of a config, or something drawn."""
    if program_of(next(commands_of(text), [])) in PROGRAMS:
        return "bash"
    try:
        found: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        return "indented"
    is_config = isinstance(found, dict) and set(found) <= set(Config.model_fields)
    return "yaml" if is_config else "indented"


def commands_of(text: str) -> Iterator[list[str]]:
    """The simple commands of shell lines; those of a `for` once for each of its words."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        words = words_of(line.removeprefix("$ "))
        values: list[str] = [""]
        name = None
        command: list[str] = []
        body: list[list[str]] = []
        for word in [*words, ";"]:
            if word not in {";", "&&", "|", "&"}:
                command.append(word)
                continue
            if command[:1] == ["for"]:
                name, values = command[1], command[3:]
            elif command and command != ["done"]:
                body.append([part for part in command if part != "do"])
            command = []
        for value in values:
            for found in body:
                yield [word.replace(f"${name}", value) if name else word for word in found]


def words_of(line: str) -> list[str]:
    """Words of a shell line, `;`, `|` and `&&` among them, without its comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # an apostrophe in a drawing
        return []


def program_of(words: list[str]) -> str:
    """The program that a command calls, without its folder and without `NAME=value` before it."""
    called = [word for word in words if not _ASSIGNMENT.fullmatch(word)]
    return called[0].rpartition("/")[2] if called else ""


def arguments_of(words: list[str]) -> list[str]:
    """What a command is called with; the brackets of optional parts are taken off."""
    place = next(n for n, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word))
    arguments: list[str] = []
    for word in words[place + 1 :]:
        opened = word.removeprefix("[")
        closes = opened.endswith("]") and opened.count("]") > opened.count("[")
        arguments.append(opened.removesuffix("]") if closes else opened)
    return arguments
