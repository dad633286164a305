"""Parts of the user's own: those of the page run, by import path and by entry point."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_stream.config import Config
from opd_stream.config_file import load_config
from opd_stream.errors import UserError
from opd_stream.store.store import Store
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import SMALL_RUN, run

DOCS = Path(__file__).parent.parent / "docs"
PAGE = "".join((DOCS / name).read_text() for name in ("extend.md", "interfaces.md"))
FILES = {
    block.split("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}
YAML = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
LINES = {name: value for block in YAML for name, value in block.items()}
ENGINE = LINES["student"]["engine"]


@pytest.fixture
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the files of the page."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    (folder / "my_script.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(folder)
    return folder


def config_of(folder: Path, **changes: Any) -> Config:
    """The small run with all four parts of the page, or others in their place."""
    parts = {"engine": ENGINE, **LINES, **changes}
    window = {**parts["window"], "h0": 8} if "h0" in parts["window"] else parts["window"]
    config = {
        **SMALL_RUN,
        "rounds": 1,
        "student": {**SMALL_RUN["student"], "engine": parts["engine"]},
        "rollouts": {**SMALL_RUN["rollouts"], "window": window},
        "train": {**SMALL_RUN["train"], "objective": parts["objective"]},
        "evaluation": {**SMALL_RUN["evaluation"], "judge": parts["judge"]},
        "store": str(folder / "store"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return load_config(folder / "run.yaml", [])


@pytest.mark.slow
def test_the_tests_of_the_page_pass(own_parts: Path) -> None:
    """As a user starts them; `tests/test_snippets.py` calls them, too."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(own_parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=own_parts)
    assert done.returncode == 0, done.stdout


def test_a_run_with_four_parts_of_ones_own_names_them_in_its_recipes(
    own_parts: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    run(config, RunFolder(tmp_path / "run"), Silent())
    store = Store(config.store)
    settings = {
        kind: next(store.recipes(kind)).settings for kind in ("rollouts", "policies", "evaluations")
    }
    assert settings["rollouts"]["engine"] == "my_engine:CountingEngine"
    (objective,) = settings["policies"]["objectives"]
    assert (objective["kind"], objective["share"]) == ("my_objective:Jeffreys", 0.3)
    assert settings["policies"]["window"]["kind"] == "my_window:DoublingWindow"
    assert settings["evaluations"]["judge"]["path"] == "my_judge:last_line"
    digests = [
        settings["rollouts"]["engine_sha256"],
        objective["sha256"],
        settings["policies"]["window"]["sha256"],
        settings["evaluations"]["judge"]["sha256"],
    ]
    assert len(set(digests)) == 4


def test_an_entry_point_stands_for_an_import_path(own_parts: Path, tmp_path: Path) -> None:
    told = own_parts / "mine-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(
        "[opd_stream.objectives]\njeffreys = my_objective:Jeffreys\n"
        "[opd_stream.windows]\ndoubling = my_window:DoublingWindow\n"
        "[opd_stream.engines]\ncounting = my_engine:CountingEngine\n"
        "[opd_stream.judges]\nlast_line = my_judge:last_line\n"
    )
    short = config_of(
        tmp_path,
        engine="counting",
        objective={**LINES["objective"], "kind": "jeffreys"},
        window={**LINES["window"], "kind": "doubling"},
        judge={"kind": "last_line"},
    )
    assert short == config_of(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"objective": {"kind": "my_objective:Jefreys"}}, "has nothing under the name Jefreys"),
        ({"objective": {"kind": "my_window:DoublingWindow"}}, "a subclass of opd_stream.objec"),
        ({"objective": {"kind": "no_such:It"}}, "cannot be imported .*ModuleNotFoundError"),
        ({"objective": {"kind": "my_script:It"}}, r"cannot be imported \(SystemExit: 3\)"),
        ({"objective": {**LINES["objective"], "shar": 1}}, "unknown key 'train.objective.shar'"),
        (
            {"objective": {**LINES["objective"], "share": 2}},
            "'train.objective.share' is 2; expected",
        ),
        ({"objective": {"kind": "jeffrey"}}, "expected a kind: bucket, .*import path"),
        ({"window": {"kind": "my_window:Field"}}, "expected a subclass of opd_stream.windows"),
        ({"window": {"kind": "my_window:DoublingWindow"}}, "h0' is missing"),
        ({"engine": "my_engine:Missing"}, "has nothing under the name Missing"),
        ({"engine": "my_window:DoublingWindow"}, "expected a class with load, sample, extend"),
        ({"engine": "nothing"}, "'student.engine' is 'nothing'; expected transformers, vllm"),
        ({"judge": {"kind": "my_judge:first_line"}}, "has nothing under the name first_line"),
        ({"judge": {"kind": "lines"}}, "'evaluation.judge.kind'"),
    ],
)
def test_a_wrong_part_is_one_line_before_any_work(
    own_parts: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line) as told:
        run(config_of(tmp_path, **changes), RunFolder(tmp_path / "run"), Silent())
    lines = str(told.value).splitlines()
    assert all(" problems in " in one or ";" in one for one in lines)
    assert not list(tmp_path.glob("store/rollouts/*"))


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("return 1 / 0", "own_window:Own raises at tokens_at(0) (ZeroDivisionError: division by"),
        ("return 0", "own_window:Own gives 0 at tokens_at(0); expected new tokens"),
        ("return 8.5", "gives 8.5"),
        ("return 'x'", "gives 'x'"),
    ],
)
def test_a_window_of_ones_own_without_tokens_is_one_line(
    body: str, line: str, own_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "own_window", raising=False)
    (own_parts / "own_window.py").write_text(
        "from opd_stream.windows import Window\n\n\nclass Own(Window):\n"
        f"    def tokens_at(self, step):\n        {body}\n"
    )
    with pytest.raises(UserError) as caught:
        config_of(own_parts, window={"kind": "own_window:Own"})
    (told,) = caught.value.args
    assert line in told
    assert "\n" not in told
