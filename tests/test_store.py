"""The store: shards, commits, recipes and trees."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.files import inside, publish_new
from opd_stream.store.recipe import Recipe, differing_fields
from opd_stream.store.shards import rollouts_batch, rollouts_table, shard_bytes, table_of
from opd_stream.store.store import Store
from opd_stream.store.tree import load_tree, save_tree
from opd_stream.types import RolloutBatch
from stages.train_state import TrainCheckpoint, TrainState, save_checkpoint
from tests.conftest import rewrite


def batch_of(lengths: list[int], seed: int = 0) -> RolloutBatch:
    """A rollout batch with given completion lengths."""
    random = np.random.default_rng(seed)
    rows = range(len(lengths))
    return RolloutBatch(
        prompt_id=tuple(f"p{row}" for row in rows),
        sample_index=np.zeros(len(lengths), np.int32),
        prompt_ids=tuple(random.integers(0, 99, 5).astype(np.int32) for _ in rows),
        completion_ids=tuple(random.integers(0, 2**32, n) for n in lengths),
        behavior_logprobs=tuple(random.normal(size=n).astype(np.float32) for n in lengths),
        finish_reason=tuple("stop" if n % 2 else "length" for n in lengths),
    )


def rollouts_artifact(root: Path, *, rows: int = 6, rows_per_unit: int = 2) -> Artifact:
    """An artifact with all its units committed."""
    artifact = Artifact(root, Recipe(kind="rollouts", settings={"n": rows}, inputs={}))
    artifact.create(rows=rows, rows_per_unit=rows_per_unit)
    for unit in artifact.units():
        table = rollouts_table(batch_of([3, 0], seed=unit))
        artifact.commit(unit, table, counts={"rows": 2})
    artifact.finish()
    return artifact


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(0, 99))
@settings(max_examples=40)
def test_a_rollouts_shard_round_trips_ragged_rows(lengths: list[int], seed: int) -> None:
    batch = batch_of(lengths, seed)
    data, parts = shard_bytes(rollouts_table(batch))
    assert sum(part.rows for part in parts) == len(lengths)
    found = rollouts_batch(table_of(data))
    assert found.prompt_id == batch.prompt_id
    assert found.finish_reason == batch.finish_reason
    for name in ("prompt_ids", "completion_ids", "behavior_logprobs"):
        for mine, other in zip(getattr(found, name), getattr(batch, name), strict=True):
            np.testing.assert_array_equal(mine, other)


def test_every_single_bit_flip_is_found(tmp_path: Path) -> None:
    artifact = rollouts_artifact(tmp_path)
    record = artifact.commit_record(1)
    assert record is not None
    path = artifact.folder / record.file
    healthy = path.read_bytes()
    random = np.random.default_rng(0)
    for bit in random.integers(0, len(healthy) * 8, 200):
        damaged = bytearray(healthy)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(DamagedUnit, match="unit 1 of rollouts/"):
            artifact.read_unit(1)
        assert artifact.damage(1) is not None
    path.write_bytes(healthy)
    assert artifact.damage(1) is None


def test_a_torn_shard_and_a_missing_shard_are_damaged_units(tmp_path: Path) -> None:
    artifact = rollouts_artifact(tmp_path)
    record = artifact.commit_record(0)
    assert record is not None
    path = artifact.folder / record.file
    path.write_bytes(path.read_bytes()[:100])
    assert "SHA-256" in (artifact.damage(0) or "")
    path.unlink()
    assert artifact.damage(0) == "its shard is missing"


def test_an_invalidated_unit_is_missing_alone_and_the_manifest_is_gone(tmp_path: Path) -> None:
    artifact = rollouts_artifact(tmp_path)
    assert artifact.is_complete()
    artifact.invalidate(2)
    assert not artifact.is_complete()
    assert sorted(artifact.commits()) == [0, 1]


def test_the_first_of_two_writers_of_a_unit_wins(tmp_path: Path) -> None:
    artifact = rollouts_artifact(tmp_path)
    first = artifact.commit_record(0)
    again = artifact.commit(0, rollouts_table(batch_of([7, 7], seed=9)), counts={"rows": 2})
    assert again == first
    assert len(list((artifact.folder / "units").glob("00000-*.arrow"))) == 1
    assert artifact.damage(0) is None


def test_a_manifest_exists_only_when_every_unit_is_committed(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, Recipe(kind="rollouts", settings={}, inputs={}))
    artifact.create(rows=3, rows_per_unit=2)
    artifact.commit(0, rollouts_table(batch_of([1, 1])), counts={"rows": 2})
    artifact.finish()
    assert not artifact.is_complete()
    artifact.commit(1, rollouts_table(batch_of([1])), counts={"rows": 1})
    artifact.finish()
    assert artifact.manifest().counts == {"rows": 3}


def test_the_unit_size_of_the_first_caller_stands(tmp_path: Path) -> None:
    artifact = rollouts_artifact(tmp_path, rows=6, rows_per_unit=2)
    artifact.create(rows=6, rows_per_unit=3)
    assert len(artifact.units()) == 3


def test_a_newer_format_version_is_refused_by_name(tmp_path: Path) -> None:
    artifact = rollouts_artifact(tmp_path)
    for name in ("manifest.json", "recipe.json"):
        path = artifact.folder / name
        rewrite(path, format_version=99)
    with pytest.raises(
        UserError, match=r"manifest\.json has format version 99; .* reads version 1"
    ):
        artifact.manifest()
    with pytest.raises(UserError, match="format version 99"):
        Artifact(tmp_path, artifact.recipe).units()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_name_that_leads_out_of_the_store_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="expected a name inside that folder"):
        inside(tmp_path / "artifact", name)


def test_a_recipe_differs_by_named_fields() -> None:
    left = Recipe(
        kind="scores", settings={"top_k": 16, "dtype": "float32"}, inputs={"teacher": "a"}
    )
    right = Recipe(
        kind="scores", settings={"top_k": 32, "dtype": "float32"}, inputs={"teacher": "a"}
    )
    assert left.fingerprint != right.fingerprint
    assert differing_fields(left.as_json(), right.as_json()) == {"settings.top_k": (16, 32)}


def test_the_store_names_the_nearest_artifact(tmp_path: Path) -> None:
    artifact = rollouts_artifact(tmp_path)
    asked = Recipe(kind="rollouts", settings={"n": 7}, inputs={})
    found = Store(tmp_path).nearest(asked)
    assert found is not None
    assert found[0] == artifact.recipe
    assert found[1] == {"settings.n": (6, 7)}


def test_publish_new_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert publish_new(path, b"first")
    assert not publish_new(path, b"second")
    assert path.read_bytes() == b"first"
    assert [item.name for item in tmp_path.iterdir()] == ["record.json"]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    artifact = Artifact(tmp_path, Recipe(kind="rollouts", settings={}, inputs={}))
    with pytest.raises(UserError, match="no space left while writing"):
        artifact.create(rows=1, rows_per_unit=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_small_file_system_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        artifact = Artifact(small, Recipe(kind="rollouts", settings={}, inputs={}))
        artifact.create(rows=2, rows_per_unit=1)
        artifact.commit(0, rollouts_table(batch_of([9])), counts={"rows": 1})
        with pytest.raises(UserError, match="no space left"):
            artifact.commit(1, rollouts_table(batch_of([90_000])), counts={"rows": 1})
        assert sorted(artifact.commits()) == [0]
        assert artifact.damage(0) is None
        assert not list(small.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_checkpoint_that_does_not_fit_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    weights = {"a": torch.zeros(10_000)}
    checkpoint = TrainCheckpoint(
        state=TrainState(steps=1), weights=weights, optimizer={}, base=None
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match="no space left while writing"):
            save_checkpoint(tmp_path, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_round_trips_optimizer_state_exactly(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    save_tree({"optimizer": state, "loops": {"a": (1, None, [True, 2.5])}}, tmp_path / "tree")
    found = load_tree(tmp_path / "tree")
    assert found["loops"] == {"a": (1, None, [True, 2.5])}
    assert found["optimizer"]["param_groups"] == state["param_groups"]
    for key, value in state["state"][0].items():
        assert torch.equal(found["optimizer"]["state"][0][key], value)


def test_a_tree_with_an_unknown_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot save a PosixPath at \.a"):
        save_tree({"a": Path("x")}, tmp_path / "tree")
