"""Ray Data runs the very same stages: same weights, killed or not, with any number of workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import MODELS, SMALL_RUN, START, SmallRuns, clash, run, small_config


def ray_command(folder: Path, *overrides: str) -> list[str]:
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump({**SMALL_RUN, "executor": "ray", "store": str(folder / "store")})
    )
    command = [sys.executable, "-c", START, "run", str(path), "--run-dir", str(folder / "run")]
    return command + [part for field in overrides for part in ("--set", field)]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


def test_ray_ends_where_the_local_loop_does(small_runs: SmallRuns, tmp_path: Path) -> None:
    settings = ("rounds=1", "evaluation=null")
    local = summary_of(small_runs(*settings))
    run(small_config(tmp_path, *settings, "executor=ray"), RunFolder(tmp_path / "run"), Silent())
    ray = summary_of(tmp_path)
    for name in ("policies", "caches", "tokens"):
        assert ray[name] == local[name]


@pytest.mark.slow
def test_ray_killed_in_the_middle_ends_where_the_local_loop_does(
    finished_run: Path, tmp_path: Path
) -> None:
    local, ray = finished_run, tmp_path / "ray"
    ray.mkdir()
    command = ray_command(ray)
    first = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for_unit(ray / "store" / "scores", first)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert summary_of(ray)["policies"] == summary_of(local)["policies"]
    assert summary_of(ray)["evaluations"] == summary_of(local)["evaluations"]
    assert summary_of(ray)["tokens"] == summary_of(local)["tokens"]


@pytest.mark.slow
def test_a_teacher_that_a_ray_worker_refuses_is_one_line_before_the_student_samples(
    tmp_path: Path,
) -> None:
    """Also in a folder with modules named as ours, which Ray puts first on its workers' path."""
    teacher = tmp_path / "teacher"
    shutil.copytree(MODELS / "ledger-teacher", teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": float("nan")}))
    changes = (f"teacher.path={teacher}", "evaluation=null", "pools.student.workers=2")
    command = ray_command(tmp_path, *changes)
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clash(tmp_path)
    )
    assert found.returncode == 2, found.stderr
    assert "not finite on plain texts" in found.stderr.splitlines()[-1], found.stderr
    assert "Traceback" not in found.stderr
    assert not list((tmp_path / "store" / "rollouts").glob("*/units/*"))


def wait_for_unit(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a first unit below the folder is committed."""
    while not list(folder.glob("*/units/*.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_pool_that_no_node_can_run_ends_the_run_with_what_is_missing(tmp_path: Path) -> None:
    pool = "{labels: {pool: nowhere}, resources: {slot: 1}, start_seconds: 8}"
    command = ray_command(tmp_path, f"pools.teacher={pool}", "evaluation=null")
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    last = found.stderr.strip().splitlines()[-1]
    assert "no node has the label pool=nowhere" in last
    assert "a worker asks for 1 slot, the largest node has 0" in last
