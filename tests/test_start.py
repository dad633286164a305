"""What a user touches first: help, version, completion, what may be left out, and `init`."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from opd_stream import __version__
from opd_stream.config_file import load_config
from opd_stream.config_templates import template_names
from opd_stream.embedded import embedded, embedded_model
from opd_stream.fetching import local_folder
from pipeline.cli import app
from pipeline.cli.options import PAGES
from pipeline.runs import run_folders
from tests.conftest import MODELS, Command, loaded_by
from tests.page_blocks import ROOT
from tests.test_snippets import parse

COMMANDS: dict[str, Any] = {}


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group, with its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


ALL = dict(commands(typer.main.get_command(app)))


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run at `runs/small` and its store at `store`."""
    shutil.copytree(finished_run / "run", tmp_path / "runs" / "small")
    (tmp_path / "store").symlink_to(finished_run / "store")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_has_an_example_that_parses_and_a_page_that_exists(words: tuple[str, ...]) -> None:
    example, page = re.findall(r"Example: opd-stream (.+)\n\nMore: (\S+)", ALL[words].epilog)[0]
    assert example.split()[: len(words)] == list(words)
    parse(example.split())
    assert (ROOT / "docs" / page.removeprefix(f"{PAGES}/")).exists()


def test_help_is_in_panels(opd_stream: Command) -> None:
    code, said, _ = opd_stream("-h")
    assert code == 0
    places = [said.index(name) for name in ("Run:", "quickstart", "Look:", "status", "Store:")]
    assert places == sorted(places)
    assert said == opd_stream("--help")[1]


def test_the_version_is_said(opd_stream: Command) -> None:
    assert opd_stream("--version")[:2] == (0, f"opd-stream {__version__}\n")


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "opd_stream", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"opd-stream {__version__}\n"


@pytest.mark.parametrize("words", [("--version",), ("run", "-h"), ("init", "x.yaml")], ids=" ".join)
def test_no_heavy_library_is_loaded(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert loaded_by(*words)[1] == set()


def completed(line: str) -> list[str]:
    """What bash would offer at the end of a line."""
    words = line.split(" ")
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    environment = {**os.environ, **asked, "_OPD_STREAM_COMPLETE": "complete_bash"}
    code = "from pipeline.cli import main; main()"
    environment["PYTHONPATH"] = str(ROOT)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    return found.stdout.split()


def test_a_shell_completes_commands_and_runs(folder: Path) -> None:
    assert completed("opd-stream qui") == ["quickstart"]
    assert completed("opd-stream status ru") == ["runs/small"]
    assert "topd" in completed("opd-stream init --template to")


# What may be left out


def test_a_setting_needs_no_set() -> None:
    found = parse(["run", "my.yaml", "a.b=c", "--run-dir", "x=y", "--set", "d=e", "f={kind: g}"])
    assert found["overrides"] == ["a.b=c", "d=e", "f={kind: g}"]
    assert found["run_dir"] == "x=y"
    assert not parse(["status", "runs/a=b"])["overrides"]
    assert parse(["run", "--", "-x.yaml", "a.b=c"])["overrides"] == ["a.b=c"]


def test_a_setting_without_set_does_the_same(folder: Path, opd_stream: Command) -> None:
    alone = opd_stream("status", "train.learning_rate=0.5")
    assert "learning_rate" in alone[1]
    assert alone == opd_stream("status", "runs/small", "--set", "train.learning_rate=0.5")
    code, _, error = opd_stream("status", "seeed=1")
    assert (code, "did you mean 'seed'" in error) == (2, True)


def test_the_latest_run_is_meant_where_none_is_named(folder: Path, opd_stream: Command) -> None:
    shutil.copytree(folder / "runs" / "small", folder / "runs" / "group" / "later")
    os.utime(folder / "runs" / "group" / "later" / "summary.json", (2e9, 2e9))
    assert run_folders(Path("runs")) == [Path("runs/group/later"), Path("runs/small")]
    code, said, _ = opd_stream("inspect", "--worst", "1")
    assert code == 0
    assert said == opd_stream("inspect", "runs/group/later", "--worst", "1")[1]


def test_the_store_of_the_folder_is_meant_where_none_is_named(
    folder: Path, opd_stream: Command
) -> None:
    (name, *_) = [
        line.split()[0] for line in opd_stream("cache", "ls")[1].splitlines() if "scores/" in line
    ]
    shown = opd_stream("cache", "show", name)
    assert shown[0] == 0
    assert shown == opd_stream("cache", "show", "store", name)
    (folder / "store").unlink()
    assert opd_stream("cache", "show", name)[0] == 0  # of the latest run's config
    code, _, error = opd_stream("cache", "show", str(folder / "runs"))
    assert (code, "Missing argument" in error) == (2, True)


@pytest.mark.parametrize("words", [("status",), ("report",), ("cache", "ls"), ("export", "out")])
def test_nothing_to_mean_is_one_line(
    words: tuple[str, ...], opd_stream: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = opd_stream(*words)
    assert (code, error.count("\n")) == (2, 1)
    assert "name its folder" in error


# Configs to begin with


@pytest.mark.parametrize("name", template_names())
def test_a_template_is_a_config_whose_fields_say_what_they_mean(
    name: str, opd_stream: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert opd_stream("init")[0] == 0
    code, said, _ = opd_stream("init", "it.yaml", "--template", name)
    assert code == 0
    assert "opd-stream run it.yaml" in said
    text = (tmp_path / "it.yaml").read_text()
    assert max(map(len, text.partition("\n\n")[2].splitlines())) <= 100
    assert text.count("# ") >= len(yaml.safe_load(text))
    found = load_config(tmp_path / "it.yaml", [])
    method = embedded(f"methods/{name}.yaml")
    if method.exists():
        own = {"student", "teacher", "store"}
        shipped = load_config(method, []).model_dump(mode="json", exclude=own)
        assert found.model_dump(mode="json", exclude=own) == shipped


def test_init_leaves_a_file_alone_and_knows_what_was_meant(
    opd_stream: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("mine")
    for words, reason in (
        ((), "my.yaml exists"),
        (("--template", "qwen"), "did you mean 'qwen-gsm8k'"),
        (("--template", "../quickstart"), "there is no template"),
        (("none/x.yaml",), "none is no folder"),
        (("a\nb.yaml",), "printable characters"),
        (("\udcff.yaml",), "printable characters"),
    ):
        code, _, error = opd_stream("init", *words)
        assert (code, error.count("\n"), reason in error) == (2, 1, True), error
    assert (tmp_path / "my.yaml").read_text() == "mine"
    assert opd_stream("init", "--template", "topd")[0] == 0
    assert (tmp_path / "topd.yaml").exists()


def test_embedded_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_folder(Path("opd-stream/ledger-student"))
    assert folder.samefile(MODELS / "ledger-student")
    for other in ("opd-stream/none", "opd-stream/../x", "other/ledger-student", "opd-stream"):
        assert embedded_model(other) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opd-stream" / "ledger-student").mkdir(parents=True)
    own = Path("opd-stream/ledger-student")
    assert local_folder(own) == own  # a folder of the user's comes first
