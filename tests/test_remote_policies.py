"""Policies of a store that is not a folder: every machine has copies of what it needs."""

import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("upath", reason="pip install 'opd-stream[s3]' brings remote stores")

from opd_stream.config import Config
from pipeline.rounds import Session, make_caches
from pipeline.run_directory import RunDirectory
from pipeline.setup import open_setup
from pipeline.stage_commands import run_stage
from pipeline.walk import walk
from stages.executors import LocalExecutor
from stages.orders import Order, Worked, worked_of
from stages.progress import Silent
from stages.units import GenerateUnits
from tests.conftest import small_config


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two rounds, of which the first is done, in a store in memory; on a machine of their own."""
    on_machine(tmp_path, "first", monkeypatch)
    store = f"memory://{uuid.uuid4().hex}"
    done = small_config(tmp_path, f"store={store}", "rounds=2", "evaluation=null")
    for stage in ("generate", "score", "train"):
        run_stage(stage, done, RunDirectory(tmp_path / "run"), round_index=0, progress=Silent())
    return done


def on_machine(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From now on local copies go to a folder of this machine's own."""
    monkeypatch.setenv("OPD_STREAM_CACHE", str(folder / "copies" / name))
    return folder / "copies" / name


class Recorded(Exception):
    """Nothing is to be done with the orders."""


class Recorder(LocalExecutor):
    """Takes orders, and stops there."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.orders: list[Order] = []

    def submit(self, orders: Iterable[Order]) -> None:
        self.orders += orders
        raise Recorded


def orders_of(config: Config, folder: Path, round_index: int) -> list[Order]:
    """What the workers of a round are told."""
    setup = open_setup(config)
    here = next(here for here in walk(setup) if here.index == round_index)
    executor = Recorder(config)
    session = Session(
        setup=setup,
        directory=RunDirectory(folder / "run"),
        run_id="test",
        executor=executor,
        progress=Silent(),
    )
    with pytest.raises(Recorded):
        make_caches(session, here)
    return executor.orders


def test_a_worker_on_another_node_fetches_the_policy_it_samples_from(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_) = orders_of(trained, tmp_path, 1)
    on_machine(tmp_path, "first", monkeypatch).rename(tmp_path / "out of reach")
    copies = on_machine(tmp_path, "second", monkeypatch)
    worker = GenerateUnits(trained.store, 8, 1, {})
    (worked,) = worked_of(worker(Worked(order=first).as_table()))
    assert worked.problem is None
    assert worked.generated_tokens > 0
    assert list(copies.rglob("model.safetensors"))
