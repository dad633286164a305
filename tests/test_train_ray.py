"""Training on workers of Ray Train: on several nodes, and when a worker dies."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_stream.config import TrainerPool
from opd_stream.errors import UserError
from pipeline.run_folder import RunFolder
from stages.ray_stream import lacking
from stages.step import Silent
from tests.conftest import clash, reports_of, run, small_config
from tests.test_faults import called, end_while_killing
from tests.test_ray import ray_command
from tests.test_training import column

TWO = ("executor=ray", "pools.trainer.devices=2", "pools.trainer.start_seconds=300")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Three nodes on this machine: a head, and two that have room for one process of training."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "labels": {"pool": "roles"}}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        nodes.add_node(num_cpus=1, labels={"pool": "training"})
    try:
        yield nodes
    finally:
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes_take_the_steps_of_one_process(
    tmp_path: Path, cluster: Any, strategy: str
) -> None:
    settings = ("rounds=1", "evaluation=null")
    run(small_config(tmp_path / "here", *settings), RunFolder(tmp_path / "here/run"), Silent())
    (tmp_path / "there").mkdir()
    labels = [f"pools.{role}.labels={{pool: roles}}" for role in ("student", "teacher")]
    placed = ("pools.trainer.labels={pool: training}", f"pools.trainer.strategy={strategy}")
    command = ray_command(tmp_path / "there", *settings, *TWO, *labels, *placed)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (report,) = RunFolder(tmp_path / "there/run").reports()
    assert report.processes == 2
    there, here = (column(tmp_path / name, "run") for name in ("there", "here"))
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_worker_that_dies_is_one_line_and_the_next_call_resumes(tmp_path: Path) -> None:
    more = ("staleness.max_epochs=4", "staleness.policy_drift=10")
    command = ray_command(tmp_path, "rounds=1", "evaluation=null", *more, *TWO)
    ended, killed = end_while_killing(command, "RayTrainWorker", 1)
    assert ended.returncode == 2, ended.stderr
    assert killed
    said = ended.stderr.splitlines()[-1]
    assert "a training worker died" in said
    assert "before is intact" in said
    assert not RunFolder(tmp_path / "run").reports()
    again = called(command)
    assert again.returncode == 0, again.stderr
    assert column(tmp_path, "run", "step") == list(range(8))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_find_our_packages_in_a_folder_with_modules_named_as_ours(tmp_path: Path) -> None:
    command = ray_command(tmp_path, "rounds=1", "evaluation=null", *TWO)
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clash(tmp_path)
    )
    assert found.returncode == 0, found.stderr
    assert len(reports_of(RunFolder(tmp_path / "run"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_place_that_no_node_has_is_one_line(tmp_path: Path) -> None:
    nowhere = "pools.trainer={labels: {pool: none}, start_seconds: 3}"
    found = called(ray_command(tmp_path, "rounds=1", "evaluation=null", nowhere))
    assert found.returncode == 2, found.stderr
    said = found.stderr.splitlines()[-1]
    assert "no node has the label pool=none" in said
    assert "start_seconds" in said


def test_one_process_trains_where_the_run_is_and_others_need_ray(tmp_path: Path) -> None:
    assert not TrainerPool(strategy="fsdp2").is_on_ray
    assert TrainerPool(devices=2).is_on_ray
    assert TrainerPool(labels={"pool": "training"}).is_on_ray
    with pytest.raises(UserError, match=r"2 devices .* with executor local.*set executor=ray"):
        small_config(tmp_path, "executor=local", "pools.trainer.devices=2")


def test_what_training_asks_for_is_held_against_the_nodes() -> None:
    nodes = [{"Resources": {"CPU": 4.0}, "Labels": {}}]
    assert not lacking(TrainerPool(devices=2, cpus=4), nodes)
    assert lacking(TrainerPool(gpus=1), nodes) == [
        "a worker asks for 1 GPU, the largest node has 0"
    ]
