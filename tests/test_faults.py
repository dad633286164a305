"""What dies, hangs or goes away: the run finishes, or stops with a reason, and keeps its units."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd_stream.errors import UserError
from opd_stream.store import Store
from opd_stream.store.verification import damages
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import SmallRuns, run, small_config
from tests.test_ray import ray_command, summary_of, wait_for_unit

pytestmark = pytest.mark.slow
SLOW = {"OPD_STREAM_FAKE_SECONDS_PER_TOKEN": "0.004"}
UNITS = "rollouts/*/units/*.json"
FAKES = ("evaluation=null", "student.engine=fake", "teacher.engine=fake", "rounds=1")


def parent_of(process: int) -> int:
    """Of a process that is there; 0 of the first one."""
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


def workers(name: str, below: int) -> set[int]:
    """Ids of the processes with a name in their command line that descend from another."""
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name in (folder / "cmdline").read_bytes().decode(errors="replace"):
                ancestor = process = int(folder.name)
                while ancestor not in (0, below):
                    ancestor = parent_of(ancestor)
                if ancestor:
                    found.add(process)
    return found


def end_while_killing(
    command: list[str], name: str, times: int, store: Path, **env: str
) -> tuple[subprocess.CompletedProcess[str], set[int]]:
    """Run a command and kill its first workers of a name, once its store has a first rollout."""
    killed: set[int] = set()
    with subprocess.Popen(
        command, text=True, stderr=subprocess.PIPE, env={**os.environ, **env}
    ) as going:

        def work() -> None:
            while going.poll() is None and not list(store.glob(UNITS)):
                time.sleep(0.1)
            while going.poll() is None and len(killed) < times:
                for worker in workers(name, going.pid) - killed:
                    time.sleep(1)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
                        killed.add(worker)
                time.sleep(0.1)

        killer = threading.Thread(target=work)
        killer.start()
        said = going.communicate()[1]
        killer.join()
    return subprocess.CompletedProcess(command, going.returncode, stderr=said), killed


def called(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


def test_a_worker_killed_in_its_unit_is_started_again(tmp_path: Path) -> None:
    settings = (*FAKES, "prompts_per_unit=1")
    run(small_config(tmp_path / "local", *settings), RunFolder(tmp_path / "r"), Silent())
    (tmp_path / "ray").mkdir()
    command = ray_command(tmp_path / "ray", *settings)
    found, killed = end_while_killing(
        command, "MapBatches(TeacherWorker)", 1, tmp_path / "ray/store", **SLOW
    )
    assert found.returncode == 0, found.stderr
    assert killed
    local = RunFolder(tmp_path / "r").summary()
    assert local is not None
    assert summary_of(tmp_path / "ray")["policies"] == local.as_json()["policies"]


def test_an_engine_that_always_dies_ends_the_run_with_a_reason(tmp_path: Path) -> None:
    command = ray_command(tmp_path, *FAKES, "prompts_per_unit=1")
    found, killed = end_while_killing(
        command, "MapBatches(TeacherWorker)", 1000, tmp_path / "store", **SLOW
    )
    assert found.returncode == 2, found.stderr
    assert len(killed) >= 4
    assert "a worker died 4 times" in found.stderr.splitlines()[-1]
    assert list((tmp_path / "store").glob(UNITS))  # what is done stays
    assert called(command).returncode == 0


def test_a_worker_that_hangs_is_given_up(tmp_path: Path) -> None:
    command = ray_command(tmp_path, *FAKES, "pools.teacher.unit_seconds=2")
    found = called(command, OPD_STREAM_FAKE_SECONDS_PER_TOKEN="0.1")
    assert found.returncode == 2, found.stderr
    assert "look at the worker's memory and, if it was only slow, at unit_seconds" in found.stderr


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Three nodes on this machine: a head, and two that may run the teacher."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "labels": {"pool": "student"}}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        nodes.add_node(num_cpus=1, labels={"pool": "teacher"})
    try:
        yield nodes
    finally:
        nodes.shutdown()


def test_a_lost_node_costs_a_run_nothing_but_time(tmp_path: Path, cluster: Any) -> None:
    settings = (*FAKES, "prompts_per_unit=1")
    run(small_config(tmp_path / "local", *settings), RunFolder(tmp_path / "r"), Silent())
    (tmp_path / "ray").mkdir()
    # Without a label the student's worker may take the place that the teacher's needs later.
    labels = [f"pools.{role}.labels={{pool: {role}}}" for role in ("student", "teacher")]
    command = ray_command(tmp_path / "ray", *settings, *labels)
    environment = {**os.environ, **SLOW, "RAY_ADDRESS": cluster.address}
    going = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        wait_for_unit(tmp_path / "ray" / "store" / "scores", going)
        (worker,) = workers("MapBatches(TeacherWorker)", os.getpid())
        (lost,) = [
            node
            for node in cluster.worker_nodes
            if node.all_processes["raylet"][0].process.pid == parent_of(worker)
        ]
        cluster.remove_node(lost, allow_graceful=False)
        _, said = going.communicate()
    finally:
        going.kill()
    assert going.returncode == 0, said
    local = RunFolder(tmp_path / "r").summary()
    assert local is not None
    assert summary_of(tmp_path / "ray")["policies"] == local.as_json()["policies"]


@pytest.mark.parametrize("place", ["store", "run"])
def test_a_disk_that_is_full_anywhere_is_one_line_and_loses_nothing(
    place: str, small_runs: SmallRuns, tmp_path: Path
) -> None:
    small, kilobytes = tmp_path / "small", 16
    lines: list[str] = []
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    folder = RunFolder((small if place == "run" else tmp_path) / "run")
    store = (small if place == "store" else tmp_path) / "store"
    try:
        while True:
            try:
                run(small_config(tmp_path, f"store={store}"), folder, Silent())
                break
            except UserError as error:
                lines.append(str(error))
            assert list(small.rglob(".*.tmp")) == []
            kilobytes = int(1.5 * kilobytes)
            resized = f"remount,size={kilobytes}k"
            subprocess.run(["mount", "-o", resized, str(small)], check=True)
        assert len(lines) > 5
        assert all("no space left while writing" in line for line in lines)
        whole = RunFolder(small_runs() / "run")
        assert folder.summary().policies == whole.summary().policies
        assert list(damages(Store(store))) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_on_ray_that_is_ended_leaves_no_worker(number: int, tmp_path: Path) -> None:
    command = ray_command(tmp_path, *FAKES, "prompts_per_unit=1")
    environment = {**os.environ, **SLOW}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as going:
        wait_for_unit(tmp_path / "store" / "rollouts", going)
        started = workers("", going.pid) - {going.pid}
        agents = workers("ray::DashboardAgent", going.pid) | workers("RuntimeEnvAgent", going.pid)
        going.send_signal(number)
        said = going.communicate()[1].decode()
    is_killed = number == signal.SIGKILL
    assert going.returncode == (-number if is_killed else 128 + number)
    assert is_killed or said.endswith("opd-stream: interrupted; the same command resumes\n")
    assert "Traceback" not in said
    left = started - agents if is_killed else started  # Ray's agents end by themselves
    while any(Path(f"/proc/{process}").exists() for process in left):
        time.sleep(0.1)
