"""Training on workers of Ray Train: on several nodes, and when a worker dies."""

import contextlib
import os
import signal
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
from tests.test_faults import workers
from tests.test_ray import ray_command
from tests.test_training import collected, column, train  # noqa: F401

TWO = ("executor=ray", "pools.trainer.devices=2", "pools.trainer.start_seconds=300")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three nodes on this machine: a head, and two that have room for one process of training."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for _ in range(2):
        nodes.add_node(num_cpus=1, labels={"pool": "training"})
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    try:
        yield nodes
    finally:
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nodes_take_the_steps_of_one_process(
    collected: Path,  # noqa: F811
    cluster: Any,
    strategy: str,
) -> None:
    own = f"train.betas=[0.9,{0.94 if strategy == 'ddp' else 0.941}]"
    train(collected, f"here-{strategy}", own)
    placed = ("pools.trainer.labels={pool: training}", f"pools.trainer.strategy={strategy}")
    again = f"train.betas=[0.9,{0.9400001 if strategy == 'ddp' else 0.9410001}]"
    train(collected, f"there-{strategy}", again, *TWO, *placed)
    (report,) = RunFolder(collected / f"there-{strategy}").reports()
    assert report["processes"] == 2
    np.testing.assert_allclose(
        column(collected, f"there-{strategy}"),
        column(collected, f"here-{strategy}"),
        rtol=1e-3,
        atol=1e-6,
    )


class Killer(Silent):
    """Kills a worker of training after the first step."""

    def __init__(self) -> None:
        self.killed = 0

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        if stage == "train" and not self.killed:
            for worker in sorted(workers("RayTrainWorker", os.getpid()))[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                    self.killed += 1


@pytest.mark.slow
def test_a_training_worker_that_dies_is_one_line_and_the_next_call_resumes(tmp_path: Path) -> None:
    config = small_config(tmp_path, "rounds=1", "evaluation=null", "staleness.max_epochs=20", *TWO)
    killer, directory = Killer(), RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"a training worker died.*before is intact") as error:
        run(config, directory, killer)
    assert "\n" not in str(error.value)
    assert killer.killed == 1
    assert not directory.reports()
    assert run(config, directory, Silent())["finished"]
    steps = [int(value) for value in column(tmp_path, "run", "step")]
    assert steps == list(range(40))


@pytest.mark.slow
def test_workers_find_our_packages_in_a_folder_with_modules_named_as_ours(tmp_path: Path) -> None:
    command = ray_command(tmp_path, "rounds=1", "evaluation=null", *TWO)
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=clash(tmp_path)
    )
    assert found.returncode == 0, found.stderr
    assert len(reports_of(RunFolder(tmp_path / "run"))) == 1


@pytest.mark.slow
def test_a_place_that_no_node_has_is_one_line(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        "rounds=1",
        "evaluation=null",
        "executor=ray",
        "pools.trainer={labels: {pool: none}, start_seconds: 3}",
    )
    with pytest.raises(UserError, match=r"no node has the label pool=none.*start_seconds"):
        run(config, RunFolder(tmp_path / "run"), Silent())


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
