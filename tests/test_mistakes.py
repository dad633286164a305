"""Mistakes of tests/mistakes.yaml: each is one line that names the field and what to do."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_stream.config_file import load_config
from opd_stream.errors import UserError
from pipeline.console import visible
from tests.conftest import Command

TABLE: dict[str, list[list[Any]]] = yaml.load(
    (Path(__file__).parent / "mistakes.yaml").read_text(), yaml.CSafeLoader
)
SMALL = """
rounds: 1
student: {path: student}
teacher: {path: teacher}
prompts: {kind: ledger, count: 8, seed: 0}
rollouts: {prompts_per_round: 4, window: {kind: fixed, tokens: 8}}
train: {objective: {kind: lsm}, learning_rate: 0.001}
"""
BESIDE = {"small.yaml": SMALL, "loop.yaml": "base: run.yaml"}
WRITTEN_OUT = {  # what the table only names
    "LONG": "folder/" * 600,
    "DEEP": "f" * 300,
    "LEDGER": "{kind: ledger, count: 4, seed: 1}",
    "BOMB": "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh")),
    "NESTED": "[" * 5000,
    "INNER": "a: " + "{a: " * 80 + "1" + "}" * 80,
    "HEX": "0x" + "f" * 9000,
    "DOTS": "a." * 5000 + "b",
    "HUGE": "# \n" * 500_000,
}


def written_out(text: str) -> str:
    for name, stands_for in WRITTEN_OUT.items():
        text = text.replace(name, stands_for)
    return text


def check(line: str, field: str, words: str) -> None:
    assert "\n" not in line, line
    assert len(line) < 600, line
    assert field in line, line
    assert words in line, line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("sets", "field", "words"), TABLE["config"], ids=str)
def test_of_a_config(sets: str | list[str], field: str, words: str, folder: Path) -> None:
    overrides = [sets] if isinstance(sets, str) else sets
    with pytest.raises(UserError) as caught:
        load_config(folder / "small.yaml", list(map(written_out, overrides)))
    check(str(caught.value), field, words)


@pytest.mark.parametrize(("text", "field", "words"), TABLE["files"], ids=str)
def test_of_a_file(text: str, field: str, words: str, folder: Path) -> None:
    (folder / "run.yaml").write_text(written_out(text))
    with pytest.raises(UserError) as caught:
        load_config(folder / "run.yaml", [])
    check(str(caught.value), field, words)


@pytest.mark.parametrize(("words", "field", "remedy"), TABLE["commands"], ids=str)
def test_of_a_command(
    words: str,
    field: str,
    remedy: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opd_stream: Command,
) -> None:
    """Refused at once: in the folder stands what stood there before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no rows")
    (tmp_path / "store" / "scores").mkdir(parents=True)
    places = {"CONFIG": str(folder / "small.yaml"), "FILE": "file", "STORE": "store", "EMPTY": ""}
    code, _, said = opd_stream(*(places.get(word, written_out(word)) for word in words.split()))
    assert code == 2, said
    line = said.removesuffix("\n")
    assert line.startswith("opd-stream: "), said
    check(line, field, remedy)
    assert not list((tmp_path / "store").glob("rollouts/*"))


def test_help_and_json_lines_of_a_wrong_command(opd_stream: Command) -> None:
    code, out, said = opd_stream("--help")
    assert code == 0
    assert "Run: before, and while models work" in out
    assert not said
    code, out, said = opd_stream("--log-json", "nope")
    assert code == 2
    assert json.loads(said)["message"] == "No such command 'nope'; see opd-stream --help"
    code, out, said = opd_stream()
    assert code == 2
    assert "Run: before, and while models work" in out + said


def test_what_would_command_a_terminal_is_escaped() -> None:
    assert visible("a\x1b[31mb\x9bc\u202ed\re\tf\x00") == (r"a\x1b[31mb\x9bc\u202ed\re\tf\x00")
    assert visible("naïve 漢字 🙂\nnext") == "naïve 漢字 🙂\nnext"
