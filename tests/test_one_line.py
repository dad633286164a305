"""What a user can meet is one line and exit code 2, in every command that reads."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from opd_stream.store.store import Store
from pipeline.console import print_lines
from pipeline.tables import result_table
from tests.conftest import Command, SmallRuns, rewrite, small_config

PROGRESS = ("export:", "residual:")


@pytest.fixture(scope="module")
def finished(small_runs: SmallRuns) -> Path:
    return small_runs("rounds=1", "evaluation=null")


def only_line(said: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    code, _, error = said
    assert code == 2, error
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if not line.startswith(PROGRESS)]
    assert line.startswith("opd-stream: ")
    return line


@pytest.mark.parametrize("command", ["export", "residual"])
def test_a_damaged_shard(command: str, finished: Path, tmp_path: Path, opd_stream: Command) -> None:
    shutil.copytree(finished / "store", tmp_path / "store")
    (recipe,) = Store(tmp_path / "store").recipes("scores")
    scores = Store(tmp_path / "store").artifact(recipe)
    commit = scores.commit_record(1)
    assert commit is not None
    shard = scores.folder / commit.file
    shard.write_bytes(shard.read_bytes()[:-9] + bytes(9))
    out = [str(tmp_path / "out")] if command == "export" else []
    line = only_line(opd_stream("cache", command, str(tmp_path / "store"), scores.name, *out))
    assert f"unit 1 of {scores.name} is damaged" in line
    assert "then continue the run that made it" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [("status", "RUN"), ("inspect", "RUN", "--worst", "1"), ("compare", "RUN", "RUN")],
    ids=lambda words: words[0],
)
def test_a_run_of_another_version(
    words: tuple[str, ...], finished: Path, tmp_path: Path, opd_stream: Command
) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    rewrite(path, train=config["train"] | {"momentum_of_a_later_version": 0.5})
    folder = str(tmp_path / "run")
    line = only_line(opd_stream(*(folder if word == "RUN" else word for word in words)))
    assert f"{path} was made by another version" in line
    assert "train.momentum_of_a_later_version" in line


def test_a_config_that_is_not_utf_8(tmp_path: Path, opd_stream: Command) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("# Größe\nrounds: 1\n".encode("latin-1"))
    line = only_line(opd_stream("run", str(path)))
    assert f"{path} is not UTF-8 text (byte 0xf6 at 4)" in line
    small_config(tmp_path)
    above = tmp_path / "above.yaml"
    above.write_text("base: latin.yaml\n")
    assert f"{path} is not UTF-8 text" in only_line(opd_stream("plan", str(above)))


@pytest.mark.parametrize(
    ("file", "content", "command"),
    [
        ("run.json", b"{}", "run"),
        ("metrics.jsonl", b'{"round": 0, "step": \xff}\n', "status"),
        ("metrics.jsonl", b'{"round": 0, "step": \xff}\n', "report"),
        ("metrics.jsonl", b'{"rounx": 0}\n', "status"),
        ("rounds/0000/plan.json", b"{}", "status"),
    ],
)
def test_a_damaged_file_of_a_run(
    file: str,
    content: bytes,
    command: str,
    small_runs: SmallRuns,
    tmp_path: Path,
    opd_stream: Command,
) -> None:
    folder = small_runs.copy(tmp_path, "rounds=1", "evaluation=null")
    damaged = next((folder / "run").glob(file))
    damaged.write_bytes(content)
    sets = ["--set", "rounds=1", "--set", "evaluation=null", "--run-dir", str(folder / "run")]
    words = {
        "run": [str(folder / "small.yaml"), *sets],
        "status": [str(folder / "run")],
        "report": [str(folder / "run"), "--out", str(tmp_path / "report.html")],
    }
    assert damaged.name in only_line(opd_stream(command, *words[command]))


@pytest.mark.parametrize(
    "words",
    [
        ("run", "CONFIG", "--run-dir", "FILE"),
        ("plan", "CONFIG", "--run-dir", "FILE"),
        ("schema", "--out", "FOLDER"),
        ("evaluate", "CONFIG", "--policy-version", "0", "--out", "FOLDER", "--run-dir", "FOLDER"),
        ("cache", "ls", "FILE"),
    ],
    ids=lambda words: words[0],
)
def test_a_file_for_a_folder_and_a_folder_for_a_file(
    words: tuple[str, ...], tmp_path: Path, opd_stream: Command
) -> None:
    small_config(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    places = {"CONFIG": "small.yaml", "FILE": "file", "FOLDER": "folder"}
    said = opd_stream(*(str(tmp_path / places[w]) if w in places else w for w in words))
    only_line(said)
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(
    "value", ["a\\nb", "a\\tb", "a\\e[2Jb", "a\\u202eb"], ids=lambda value: value[1:-1]
)
def test_nothing_in_a_value_begins_another_line_or_commands_the_terminal(
    value: str, tmp_path: Path, opd_stream: Command
) -> None:
    small_config(tmp_path)
    config = str(tmp_path / "small.yaml")
    line = only_line(opd_stream("run", config, "--set", f'student.path="{value}"'))
    assert "is no checkpoint" in line
    assert line.isprintable()


def test_what_a_shell_passes_raw_is_refused(tmp_path: Path, opd_stream: Command) -> None:
    small_config(tmp_path)
    words = ("run", str(tmp_path / "small.yaml"), "--set", "student.path=a\x1b[2J")
    assert "the value is not valid YAML (unacceptable character" in only_line(opd_stream(*words))


def test_mistakes_told_at_once_are_a_line_each(tmp_path: Path, opd_stream: Command) -> None:
    small_config(tmp_path)
    words = ("run", str(tmp_path / "small.yaml"), "--set", "rounds=0", "--set", 'seed="a\\nb"')
    code, _, error = opd_stream(*words)
    head, *lines = error.splitlines()
    assert (code, head.split()[:2], len(lines)) == (2, ["opd-stream:", "2"], 2)


def test_a_table_shows_text_as_it_is() -> None:
    table = result_table(["name"], left=["name"])
    table.add_row("[bold]a\x1b[2J\nb")
    shown = io.StringIO()
    page = Console(file=shown, width=80)
    page.print(table)
    print_lines(page, ["c\nd"])
    assert "[bold]a\\x1b[2J\\nb" in shown.getvalue()
    assert "c\\nd" in shown.getvalue()


@pytest.mark.parametrize(
    "words",
    [
        ("report", "LONG"),
        ("compare", "LONG", "LONG"),
        ("status", "LONG"),
        ("cache", "ls", "LONG"),
        ("cache", "verify", "LONG"),
        ("schema", "--out", "LONG"),
        ("run", "CONFIG", "--run-dir", "LONG"),
        ("run", "CONFIG", "--run-dir", "PROC"),
        ("run", "CONFIG", "--set", "store=PROC"),
        ("schema", "--out", "PROC"),
        ("cache", "import", "PROC", "CONFIG"),
        ("cache", "ls", "LOOP"),
        ("status", "LOOP"),
        ("run", "CONFIG", "--run-dir", "LOOP"),
        ("run", "CONFIG", "--set", "store=LOOP"),
        ("run", "CONFIG", "--set", "student.path=LOOP"),
    ],
    ids=" ".join,
)
def test_a_place_that_no_file_system_has(
    words: tuple[str, ...], tmp_path: Path, opd_stream: Command
) -> None:
    small_config(tmp_path)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    places = {"LONG": "/x" * 2500, "CONFIG": str(tmp_path / "small.yaml")}
    given = (places.get(w, w).replace("PROC", "/proc/x").replace("LOOP", str(loop)) for w in words)
    assert len(only_line(opd_stream(*given))) < 400
