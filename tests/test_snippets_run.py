"""The tutorial and the page on ablations run as they stand, on the shipped models.

What trains again (replays, ablations, stages on machines of their own) is a slow test.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from tests.page_blocks import PAGES, ROOT, blocks_of, commands_of

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN_PAGES = ("tutorial.md", "ablations.md")  # the second goes on where the first ends
STORE_RUNS = ("cache ls", "cache verify", "cache gc")  # on the store of the tutorial


def lines_of(page: str) -> list[tuple[str, ...]]:
    """The commands of a page that need nothing, but those that set up an environment."""
    return [
        tuple(words)
        for block in BLOCKS
        if (block.page, block.kind, block.needs) == (page, "bash", None)
        for words in commands_of(block.text)
        if words[0] not in {"pip", "uv"}
    ]


STORE_LINES = [
    words
    for words in lines_of("store.md")
    if " ".join(words[1:]).startswith(STORE_RUNS) and "…" not in words[-1]
]
LINES = list(
    dict.fromkeys([*(line for page in RUN_PAGES for line in lines_of(page)), *STORE_LINES])
)
AGAIN = re.compile(r"replay|runs/(two|teacher|k2|forward)\b")
SLOW_LINES = [words for words in LINES if AGAIN.search(" ".join(words))]


def invoke(arguments: list[str]) -> tuple[int, str]:
    """Exit code and all that a command says; a user's mistake is 2."""
    done = CliRunner().invoke(app, arguments)
    problem = "" if done.exception is None else f"{type(done.exception).__name__}: {done.exception}"
    return done.exit_code, f"{done.output}\n{problem}"


class Done(dict[tuple[str, ...], Any]):
    """What lines of LINES said; a line is run when it is asked for, after those before it."""

    def __missing__(self, words: tuple[str, ...]) -> Any:
        for earlier in LINES[: LINES.index(words)]:
            if words in SLOW_LINES or earlier not in SLOW_LINES:
                self[earlier]
        found = re.findall(r"--prompt (\S+)", str(self))
        self[words] = invoke([found[0] if word == "ID" else word for word in words[1:]])
        return self[words]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """What the lines said, in a folder as the tutorial wants it, where `runs/my` is finished."""
    folder, before = tmp_path_factory.mktemp("pages"), Path.cwd()
    (folder / "configs").symlink_to(ROOT / "configs")
    for block in BLOCKS:
        if (block.page, block.kind, block.needs) == ("tutorial.md", "yaml", None):
            text = (ROOT / "docs" / block.page).read_text().splitlines()[: block.line]
            (folder / re.findall(r"`(\w+\.yaml)`", "\n".join(text))[-1]).write_text(block.text)
    os.chdir(folder)
    try:
        said = Done()
        assert said[("opd-stream", "run", "my.yaml")]
        yield said
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=[pytest.mark.slow] if words in SLOW_LINES else [])
        for words in LINES
    ],
    ids=" ".join,
)
def test_a_line_runs(words: tuple[str, ...], done: Done) -> None:
    code, said = done[words]
    assert code == 0, said
    if words[1] == "run":
        is_replay = "replay" in " ".join(words)
        assert ("teacher-scored tokens: 0" in said) is is_replay
    if words[1] == "doctor":
        assert "the run may start" in said


def test_accuracy_rises_in_the_run_of_the_tutorial(done: Done) -> None:
    _, said = done[("opd-stream", "compare", "runs/my@0", "runs/my")]
    (gain,) = re.findall(r"pass@1 .* ([+-]\d\.\d+)   \[", said)
    assert float(gain) > 0.1


@pytest.mark.slow
def test_machines_that_share_a_store_make_the_policies_of_one(done: Done) -> None:
    _, run = done[("opd-stream", "run", "my.yaml")]
    ((_, train),) = [
        done[words]
        for words in LINES
        if words[1] == "train" and words[words.index("--round") + 1] == "1"
    ]
    (alone,) = re.findall(r"final policy: store/(policies/\w+)", run)
    (shared,) = re.findall(r"(policies/\w+) is complete", train)
    assert alone == shared


ROW = re.compile(r"^\| `([a-z_.]+=.+?)` \| (\w+) \| (\w+) \| (\w+) \|$", re.MULTILINE)
REUSE = ROW.findall((ROOT / "docs" / "ablations.md").read_text())


@pytest.mark.parametrize(("change", "rollouts", "scores", "policy"), REUSE)
def test_what_is_reused_is_what_the_table_says(
    change: str, rollouts: str, scores: str, policy: str, done: Done
) -> None:
    code, said = invoke(["status", "runs/my", "--set", change])
    assert code == 0, said
    (line,) = re.findall(r"^round 0: .*$", said, re.MULTILINE)
    found = [part.split()[1] == "complete" for part in line.split("; ")[1:]]
    assert found == [word == "found" for word in (rollouts, scores, policy)], line


def test_what_a_replay_cannot_serve_is_refused(done: Done) -> None:
    assert len(REUSE) >= 12
    for change, words in (("train.top_k=9", "holds 8 candidates"), ("rounds=3", "lower rounds")):
        asked = ["run", "my.yaml", "--set", "replay.run=runs/my", "--set", change]
        code, said = invoke([*asked, "--run-dir", f"runs/{words[:5]}"])
        assert code == 1  # main() tells a UserError with 2
        assert "UserError" in said
        assert words in said


def test_the_filters_of_the_pages_find_something(done: Done) -> None:
    filters = {
        words[1]
        for block in BLOCKS
        if block.kind == "bash"
        for words in commands_of(block.text)
        if words[0] == "jq"
    }
    assert filters
    code, said = invoke(["plan", "my.yaml", "--json"])
    assert code == 0
    for found in filters:
        value: Any = json.loads(said)
        for part in found.strip(".").split("."):
            value = value[part]
        assert value is not None
