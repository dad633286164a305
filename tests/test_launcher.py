"""The project's packages are found first, whatever a user's folders and packages are called."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import SMALL_RUN, START, clash

ROOT = Path(__file__).parent.parent
FAKES = ("evaluation=null", "student.engine=fake", "teacher.engine=fake", "rounds=1")


def run_in(
    folder: Path, executor: str, start: str, *, command: str = "run"
) -> subprocess.CompletedProcess[str]:
    """A tiny run in a folder with a user's `stages` and `pipeline`, which is first on the path."""
    config = {**SMALL_RUN, "executor": executor, "store": "store"}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    settings = [part for field in FAKES for part in ("--set", field)]
    words = [sys.executable, "-c", start, command, "run.yaml", "--run-dir", "out", *settings]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=folder, env=clash(folder)
    )


def test_a_plan_leaves_a_users_stages_and_pipeline_alone(tmp_path: Path) -> None:
    found = run_in(tmp_path, "local", START, command="plan")
    assert found.returncode == 0, found.stderr
    assert "teacher" in found.stdout


@pytest.mark.slow
def test_a_local_run_needs_no_ray_and_leaves_a_users_stages_and_pipeline_alone(
    tmp_path: Path,
) -> None:
    no_ray = "import sys; sys.modules['ray'] = None; "  # an import of it fails
    found = run_in(tmp_path, "local", no_ray + START)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_workers_of_ray_leave_a_users_stages_and_pipeline_alone(tmp_path: Path) -> None:
    """That they start is also what test_ray's user's mistake needs."""
    found = run_in(tmp_path, "ray", START)
    assert found.returncode == 0, found.stderr


def test_the_console_script_starts_in_the_package_that_nobody_else_has() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"opd-stream": "opd_stream.launcher:main"}


def test_without_a_clash_the_path_stays_as_it_is(tmp_path: Path) -> None:
    code = "import sys; before = list(sys.path); import opd_stream.launcher as found\n"
    code += "found.find_own_packages(); assert sys.path == before"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
