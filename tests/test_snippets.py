"""The blocks of the pages do what they say: run, validated or parsed; none is left out.

- Commands of RUN_PAGES run (tests/test_snippets_run.py), as do some of STORE_PAGES.
- Every command is parsed by the command line's own parser, its `--set` fields by the schema.
- Every block of YAML is a config, or a piece of one.
- Every block of Python runs, here or in the test that RUN_ELSEWHERE names.
- What needs hardware or a service says so above itself, and stands in MARKED.
"""

import atexit
import contextlib
import importlib
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from benchmarks.methods_rows import read_rows
from opd_stream.config import Config
from opd_stream.config_file import json_schema, load_config
from pipeline.cli import app
from tests.conftest import SMALL_RUN
from tests.page_blocks import (
    PAGES,
    PROGRAMS,
    ROOT,
    Block,
    arguments_of,
    blocks_of,
    commands_of,
    program_of,
)

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN_ELSEWHERE = {
    "cache-format.md": "test_cache.py",
    "objectives.md": "test_training.py",
    "python.md": "test_api.py",
    "README.md": "test_api.py",
    "trainers.md": "test_trainers.py",
    "tutorial.md": "test_real_models.py",
}
MARKED = {
    ("clusters.md", "docker"),
    ("clusters.md", "kubernetes"),
    ("clusters.md", "skypilot"),
    ("clusters.md", "slurm"),
    ("deploy.md", "ray cluster"),
    ("tutorial.md", "gpu"),
    ("tutorial.md", "network"),
}
DRAWINGS = {  # indented text that is neither a command nor a config, by its first line
    ("alignment.md", "student   | On|"),
    ("cache-format.md", "STORE/KIND/FP16/recipe.json"),
    ("staleness.md", "all epochs done:"),
    ("tutorial.md", "store/ "),
}
NUMBERS = {"--round": "0", "--worst": "3", "--sample": "0"}  # for the letters in usage lines


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


# Every block is one of these


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_kind_that_is_checked(block: Block) -> None:
    if block.kind == "indented":
        first = [start for page, start in DRAWINGS if page == block.page]
        assert block.text.startswith(tuple(first)), "neither command nor config: see DRAWINGS"
    assert block.kind in {"bash", "python", "yaml", "toml", "text", "indented"}
    if block.kind == "toml":
        tomllib.loads(block.text)


def test_what_needs_something_is_what_is_listed() -> None:
    assert {(block.page, block.needs) for block in BLOCKS if block.needs} == MARKED


@pytest.mark.parametrize("block", [*of_kind("text"), *of_kind("indented")], ids=str)
def test_no_command_hides_in_what_is_shown(block: Block) -> None:
    for line in block.text.splitlines():
        if not line.startswith("$ "):
            assert line.split(" ")[0] not in PROGRAMS, line


# Commands


def parse(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of arguments, without doing it, where there is a run."""
    command: Any = typer.main.get_command(app)
    with contextlib.chdir(place_with_a_run()):
        context = command.make_context("opd-stream", list(arguments))
        while hasattr(command, "resolve_command"):
            left = [*context._protected_args, *context.args]
            name, command, rest = command.resolve_command(context, left)
            context = command.make_context(name, list(rest), parent=context)
    return context.params


@cache
def place_with_a_run() -> Path:
    """A folder with what commands take where no run and no store is named."""
    folder = Path(tempfile.mkdtemp(prefix="opd-stream-snippets-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "store").mkdir()
    (folder / "runs" / "my").mkdir(parents=True)
    for name in ("config.json", "run.json"):
        (folder / "runs" / "my" / name).touch()
    return folder


def places(node: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects that a node of a JSON schema may be."""
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]]
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from places(choice, definitions)
    yield node


@cache
def schema() -> dict[str, Any]:
    return json_schema()


def has_field(path: str) -> bool:
    """Whether a config may have the field that `--set` names."""
    here = [schema()]
    for part in path.split("."):
        here = [
            place
            for node in here
            for found in (node.get("properties", {}).get(part), node.get("additionalProperties"))
            if isinstance(found, dict)
            for place in places(found, schema()["$defs"])
        ]
    return bool(here)


def test_a_field_that_no_config_has_is_noticed() -> None:
    assert has_field("rollouts.window.h0")
    assert has_field("evaluation.benchmarks.mine.seed")
    assert not has_field("rollouts.window.h1")
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "x.yaml", "--no-such-option"])


def check_opd_stream(arguments: list[str]) -> None:
    numbered = list(arguments)
    for place, word in enumerate(arguments[:-1]):
        if word in NUMBERS and arguments[place + 1] in {"R", "N", "S"}:
            numbered[place + 1] = NUMBERS[word]
    if numbered[-1] == "…":  # arguments are left out
        command: Any = typer.main.get_command(app)
        for word in numbered[:-1]:
            command = command.commands[word]
        return
    overrides = parse(numbered).get("overrides") or []
    for override in overrides:
        field, equals, _ = override.partition("=")
        assert equals
        assert field in {"a.b", "FIELD"} or has_field(field), field
    shipped = [word for word in arguments if word.startswith("configs/")]
    for config in shipped:
        load_config(ROOT / config, overrides)


def check_command(words: list[str], *, needs: str | None) -> None:
    arguments = arguments_of(words)
    match program_of(words):
        case "opd-stream":
            check_opd_stream(arguments)
        case "make":
            makefile = (ROOT / "Makefile").read_text()
            assert f"\n{arguments[0].rstrip('…')}" in makefile
        case "pip" | "uv":
            named = re.findall(r"-e \.\[([a-z0-9,]+)\]", " ".join(arguments))
            known = (ROOT / "pyproject.toml").read_text()
            assert "install" in arguments[:2]
            assert named
            assert all(f"\n{extra} = [" in known for one in named for extra in one.split(","))
        case "python" if arguments[0] == "-m":
            assert (ROOT / f"{arguments[1].replace('.', '/')}.py").exists()
        case "python":
            assert (ROOT / arguments[0]).exists()
        case "jq":
            assert re.fullmatch(r"(\.[a-z_]+)+", arguments[0]), "see the test of the filters"
        case program:
            assert needs is not None, f"{program}: mark what it needs"


COMMANDS = [
    pytest.param(words, block.needs, id=f"{block} {' '.join(words)}"[:90])
    for block in BLOCKS
    if block.kind in {"bash", "text"}
    for words in commands_of(
        block.text
        if block.kind == "bash"
        else "\n".join(line for line in block.text.splitlines() if line.startswith("$ "))
    )
]


@pytest.mark.parametrize(("words", "needs"), COMMANDS)
def test_a_command_is_one_that_exists(words: list[str], needs: str | None) -> None:
    check_command(words, needs=needs)


INLINE = [
    pytest.param(words, id=f"{page.name} {' '.join(words)}"[:90])
    for page in PAGES
    for code in re.findall(r"`(opd-stream [^`]+)`", page.read_text())
    for words in commands_of(code.replace("\n", " "))
    if not words[1].endswith(":")  # a message
]


@pytest.mark.parametrize("words", INLINE)
def test_a_command_in_a_sentence_exists(words: list[str]) -> None:
    try:
        check_command(words, needs=None)
    except Exception as error:  # of the parser: a sentence may leave arguments out
        if type(error).__name__ != "MissingParameter":
            raise


# Configs

REQUIRED = {
    name: value for name, value in SMALL_RUN.items() if name not in {"evaluation", "executor"}
}
JUDGED = {"evaluation": {**SMALL_RUN["evaluation"], "judge": None}}


def whole(found: dict[str, Any]) -> dict[str, Any]:
    """A config with a piece of one in it; a piece of a section goes to the section that has it."""
    if set(found) <= set(Config.model_fields):
        return found
    for section in ("train", "evaluation", "rollouts"):
        if all(has_field(f"{section}.{name}") for name in found):
            return {section: found}
    raise AssertionError(f"no section has {sorted(found)}")


def write_modules(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that a page's Python is, in a folder on the path; gone after the test."""
    names: list[str] = []
    for block in of_kind("python"):
        named = re.match(r"# (\w+)\.py\n", block.text)
        if block.page == page and named:
            (folder / f"{named[1]}.py").write_text(block.text)
            monkeypatch.setitem(sys.modules, named[1], sys)  # so that the test's own goes with it
            monkeypatch.delitem(sys.modules, named[1])
            names.append(named[1])
    monkeypatch.syspath_prepend(folder)
    return names


@pytest.mark.parametrize("block", of_kind("yaml"), ids=str)
def test_yaml_is_a_config_or_a_piece_of_one(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_modules(block.page, tmp_path, monkeypatch)
    found = yaml.safe_load(block.text)
    if "rows" in found:  # of the comparison of methods
        (tmp_path / "rows.yaml").write_text(block.text)
        assert read_rows(tmp_path / "rows.yaml").rows
        return
    if "rounds" not in found:
        found = whole({name: value for name, value in found.items() if name != "base"})
        base = {**REQUIRED, **(JUDGED if "judge" in found.get("evaluation", ()) else {})}
        if "teachers" in found:  # stand in place of one
            del base["teacher"]
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        found["base"] = "base.yaml"
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(found))
    load_config(tmp_path / "it.yaml", [])


# Python


@pytest.mark.parametrize("page", sorted({block.page for block in of_kind("python")}))
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in of_kind("python") if block.page == page]
    if page in RUN_ELSEWHERE:
        source = (ROOT / "tests" / RUN_ELSEWHERE[page]).read_text()
        assert f'"{page}"' in source
        assert "exec(" in source
        return
    names = write_modules(page, tmp_path, monkeypatch)
    assert len(names) == len(blocks), "a block's first line names no file"
    ran = 0
    for name in names:
        for test, function in vars(importlib.import_module(name)).items():
            if test.startswith("test_"):
                function()
                ran += 1
    assert ran >= len(blocks) // 2
