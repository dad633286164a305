"""Policies of a store that is not a folder: every machine has copies of what it needs."""

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("upath", reason="pip install 'opd-stream[s3]' brings remote stores")

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.policy import PolicyArtifact
from opd_stream.store.store import Store
from opd_stream.store.verification import Surroundings, damages, examine, names
from pipeline.rounds import Round, checkpoint_of, named_checkpoint, rounds
from pipeline.run import Session, check_loaded, is_trained, make_shards
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from pipeline.single_stage import run_stage
from stages.executors import LocalExecutor
from stages.generate import GenerateWorker
from stages.step import Silent
from stages.workers import Task, TaskResult, WorkerSettings, results_of
from tests.conftest import reports_of, small_config


def spoil(path: Path) -> None:
    """Other bytes in a file of the same length."""
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(9) + data[109:])


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two rounds, of which the first is done, in a store in memory; on a machine of their own."""
    on_machine(tmp_path, "first", monkeypatch)
    store = f"memory://{uuid.uuid4().hex}"
    done = small_config(tmp_path, f"store={store}", "rounds=2", "evaluation=null")
    for stage in ("generate", "score", "train"):
        run_stage(stage, done, RunFolder(tmp_path / "run"), round_index=0, progress=Silent())
    return done


def on_machine(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From now on local copies go to a folder of this machine's own."""
    monkeypatch.setenv("OPD_STREAM_CACHE", str(folder / "copies" / name))
    return folder / "copies" / name


class Recorded(Exception):
    """Nothing is to be done with the tasks."""


class Recorder(LocalExecutor):
    """Takes tasks, and stops there."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tasks: list[Task] = []

    def submit(self, tasks: Iterable[Task]) -> None:
        self.tasks += tasks
        raise Recorded


def tasks_of(config: Config, folder: Path, round_index: int) -> list[Task]:
    """What the workers of a round are told."""
    setup = open_setup(config)
    here = next(here for here in rounds(setup) if here.index == round_index)
    executor = Recorder(config)
    session = Session(
        config=config,
        store=setup.store,
        folder=RunFolder(folder / "run"),
        run_id="test",
        executor=executor,
        progress=Silent(),
    )
    with pytest.raises(Recorded):
        make_shards(session, here)
    return executor.tasks


def test_a_worker_on_another_node_fetches_the_policy_it_samples_from(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_) = tasks_of(trained, tmp_path, 1)
    on_machine(tmp_path, "first", monkeypatch).rename(tmp_path / "out of reach")
    copies = on_machine(tmp_path, "second", monkeypatch)
    worker = GenerateWorker(WorkerSettings(store=trained.store))
    (result,) = results_of(worker(TaskResult(task=first).as_table()))
    assert result.problem is None
    assert result.generated_tokens > 0
    assert list(copies.rglob("model.safetensors"))


def first_round(config: Config, folder: Path) -> tuple[Session, Round]:
    """The round that is done, and a call that looks at it."""
    setup = open_setup(config)
    session = Session(
        config=config,
        store=setup.store,
        folder=RunFolder(folder / "run"),
        run_id="test",
        executor=LocalExecutor(config),
        progress=Silent(),
    )
    return session, next(rounds(setup))


def test_a_damaged_copy_is_fetched_again_and_the_policy_stays(
    trained: Config, tmp_path: Path
) -> None:
    session, here = first_round(trained, tmp_path)
    for name in ("model.safetensors", "optimizer/tensors.safetensors"):
        copy = here.policy.folder("name") / name
        good = copy.read_bytes()
        spoil(copy)
        assert list(damages(session.store)) == []  # what is here is no part of the store
        assert is_trained(session, here, cache=session.store.digests)
        assert copy.read_bytes() == good
        times = copy.stat()
        spoil(copy)
        os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
        check_loaded(session, checkpoint_of(here.policy, "name"), "training")
        assert copy.read_bytes() == good
        session.checked.clear()
    (here.policy.folder("name") / "model.safetensors").unlink()
    assert is_trained(session, here, cache=session.store.digests)


def test_every_file_of_a_remote_store_is_in_some_record(trained: Config) -> None:
    store = Store(trained.store)
    around = Surroundings.of(store)
    found = [each for name in names(store) for each in examine(store, name, around)]
    assert not [str(each) for each in found if "in none of its records" in each.reason]
    (policy,) = store.folders("policies")
    (policy / "lost.bin").write_bytes(b"a")
    (lost,) = (each for each in examine(store, f"policies/{policy.name}", around))
    assert lost.reason.startswith("lost.bin is in none of its records")


def test_a_policy_damaged_in_the_store_is_taken_out(trained: Config, tmp_path: Path) -> None:
    session, here = first_round(trained, tmp_path)
    folder = here.policy.folder("name")
    spoil(here.policy.artifact_folder / folder.name / "model.safetensors")
    assert is_trained(session, here, cache=None)  # this machine's copy is whole
    (problem,) = damages(session.store)
    assert "model.safetensors" in problem.reason
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is damaged in the store \(model.safetensors"):
        here.policy.folder()
    assert not is_trained(session, here, cache=session.store.digests)
    assert not here.policy.is_complete()


def copied(copies: Path, policy: PolicyArtifact) -> set[str]:
    """What of a policy's weights and training state is on a machine."""
    found = {path.relative_to(copies) for path in copies.rglob("*.safetensors")}
    own = [path for path in found if policy.name in path.as_posix()]
    return {path.as_posix().partition("/attempt-")[2].partition("/")[2] for path in own}


@pytest.mark.slow
def test_a_stage_copies_the_policy_it_loads_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"memory://{uuid.uuid4().hex}"
    config = small_config(tmp_path, f"store={store}", "rounds=3", "evaluation=null")
    seen: dict[tuple[str, int], list[set[str]]] = {}
    for number in range(3):
        for stage in ("generate", "score", "train"):
            copies = on_machine(tmp_path, f"{stage}-{number}", monkeypatch)
            directory = RunFolder(tmp_path / f"run-{stage}-{number}")
            run_stage(stage, config, directory, round_index=number, progress=Silent())
            policies = [here.policy for here in rounds(open_setup(config), opened=named_checkpoint)]
            seen[stage, number] = [copied(copies, policy) for policy in policies]
    nothing, loaded = set[str](), {"model.safetensors"}
    trains = {"model.safetensors", "optimizer/tensors.safetensors"}
    assert seen["generate", 2] == [nothing, loaded, nothing]
    assert seen["score", 2] == [nothing, nothing, nothing]
    assert seen["train", 2] == [nothing, loaded, trains]  # the state that was read may go
    assert len(reports_of(RunFolder(tmp_path / "run-train-2"))) == 3
