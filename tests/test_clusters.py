"""Stages on machines of their own, which share nothing but the store."""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_stream.config import Pool
from opd_stream.store.store import Store
from pipeline.run_folder import RunFolder
from pipeline.single_stage import run_stage
from stages.ray_stream import lacking
from stages.step import Silent
from tests.conftest import reports_of, run, small_config

SETTINGS = (
    "evaluation=null",
    "prompts_per_unit=2",
    "rollouts.window={kind: adaptive, candidates: [16, 32], max_window_tokens: 48, start: 16}",
)


def machine(work: Callable[[], Any]) -> int:
    """Do something in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def stages(folder: Path, name: str, *which: str) -> Callable[[], None]:
    """Both rounds of some stages, following the others."""

    def work() -> None:
        config = small_config(folder, *SETTINGS)
        for round_index in range(config.rounds):
            for stage in which:
                run_stage(
                    stage,
                    config,
                    RunFolder(folder / name),
                    round_index=round_index,
                    progress=Silent(),
                    follow=True,
                )

    return work


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_three_machines_that_follow_each_other_make_the_policies_of_one(tmp_path: Path) -> None:
    config = small_config(tmp_path / "alone", *SETTINGS)
    alone = run(config, RunFolder(tmp_path / "alone" / "run"), Silent())
    small_config(tmp_path / "apart", *SETTINGS)
    children = [
        machine(stages(tmp_path / "apart", name, name)) for name in ("train", "score", "generate")
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    together = run(
        small_config(tmp_path / "apart", *SETTINGS),
        RunFolder(tmp_path / "apart" / "r"),
        Silent(),
    )
    assert together["policies"] == alone["policies"]
    audits = [r["window_decision"] for r in reports_of(RunFolder(tmp_path / "apart" / "r"))]
    assert audits[0]["probe_rows"] == 2  # the probe crossed machines, too
    assert together["tokens"]["generated"] == together["tokens"]["trained"] == 0


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.slow
def test_two_machines_on_one_stage_share_its_units(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, "evaluation=null", "prompts_per_unit=1", "rollouts.window.tokens=160"
    )

    barrier = multiprocessing.get_context("fork").Barrier(2)

    class Together(Silent):
        """Waits after its first unit until the other machine has made one."""

        def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
            if count and not self.has_met:
                self.has_met = True
                barrier.wait()

        has_met = False

    def generate(name: str) -> Callable[[], None]:
        def work() -> None:
            directory = RunFolder(tmp_path / name)
            run_stage("generate", config, directory, round_index=0, progress=Together())

        return work

    children = [machine(generate(name)) for name in ("one", "two")]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    store = Store(tmp_path / "store")
    (recipe,) = store.recipes("rollouts")
    commits = store.artifact(recipe).commits().values()
    shares = Counter(commit.made_by for commit in commits)
    assert sum(shares.values()) == 8
    assert len(shares) == 2, shares  # each made some
    ids = {json.loads((tmp_path / n / "run.json").read_text())["id"] for n in ("one", "two")}
    assert set(shares) == ids


NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}, "Labels": {"pool": "student"}},
    {"Alive": True, "Resources": {"CPU": 64.0, "memory_tier": 2.0}, "Labels": {}},
]


@pytest.mark.parametrize(
    ("pool", "lacks"),
    [
        (Pool(cpus=64, gpus=1), []),  # each on some node; together nowhere, which Ray reports
        (Pool(cpus=65), ["a worker asks for 65 CPU, the largest node has 64"]),
        (Pool(gpus=2), ["a worker asks for 2 GPU, the largest node has 1"]),
        (Pool(accelerator="H100"), ["accelerator_type:H100"]),
        (Pool(resources={"memory_tier": 3}), ["3 memory_tier, the largest node has 2"]),
        (Pool(labels={"pool": "teacher"}), ["no node has the label pool=teacher"]),
    ],
)
def test_a_pool_says_what_no_node_has(pool: Pool, lacks: list[str]) -> None:
    found = lacking(pool, NODES)
    assert len(found) == len(lacks)
    for sentence, part in zip(found, lacks, strict=True):
        assert part in sentence
