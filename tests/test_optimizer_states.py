"""What only the next round's training reads goes when it was read, and comes back when needed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_stream.store import policy as policy_module
from opd_stream.store.garbage import garbage, pin
from opd_stream.store.policy import STATE, PolicyArtifact
from opd_stream.store.store import Store
from opd_stream.store.tree import load_tree
from opd_stream.store.verification import damages
from pipeline.rounds import rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from stages import train as train_stage
from stages.step import Silent
from tests.conftest import MODELS, SmallRuns, run, small_config

THREE = ("rounds=3", "evaluation=null")


class Lines(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def warn(self, line: str) -> None:
        self.warned.append(line)


def policies(folder: Path, *overrides: str) -> list[PolicyArtifact]:
    """Those of a finished run, in order."""
    return [each.policy for each in rounds(open_setup(small_config(folder, *overrides)))]


def states(found: list[PolicyArtifact]) -> list[bool]:
    """Whether the folder of each policy has a part of the state of training."""
    return [any((policy.folder() / part).exists() for part in STATE) for policy in found]


def train_again(folder: Path, *overrides: str) -> tuple[dict[str, Any], Lines]:
    lines = Lines()
    return run(small_config(folder, *overrides), RunFolder(folder / "run"), lines), lines


def weights(policy: PolicyArtifact) -> bytes:
    return (policy.folder() / "model.safetensors").read_bytes()


def test_only_the_last_policy_keeps_its_state(small_runs: SmallRuns) -> None:
    folder = small_runs(*THREE)
    found, store = policies(folder, *THREE), Store(folder / "store")
    assert states(found) == [False, False, True]
    assert [policy.has_state() for policy in found] == [False, False, True]
    for policy in found:
        manifest = policy.manifest()
        state = {name for name in manifest.files if name.startswith(STATE)} | set(manifest.dropped)
        assert state == {"optimizer/tensors.safetensors", "optimizer/tree.json"}
    assert list(damages(store)) == []
    assert garbage(store, grace_seconds=0) == []
    assert policies(folder, *THREE)[0].folder().joinpath("metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "expected"), [("2", [False, True, True]), ("null", [True] * 3)])
def test_more_are_kept_where_they_are_asked_for(
    keep: str, expected: list[bool], tmp_path: Path
) -> None:
    settings = (*THREE, f"keep_optimizers={keep}")
    train_again(tmp_path, *settings)
    assert states(policies(tmp_path, *settings)) == expected


def test_a_state_that_is_needed_again_is_made_again(small_runs: SmallRuns, tmp_path: Path) -> None:
    small_runs.copy(tmp_path, *THREE)
    found = policies(tmp_path, *THREE)
    good = weights(found[2])
    optimizer = (found[2].folder() / "optimizer" / "tensors.safetensors").read_bytes()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (found[2].folder() / "model.safetensors").write_bytes(good[:-4] + b"oops")
    stopped = False

    def stop(training: train_stage.Training) -> None:
        nonlocal stopped
        saved(training)
        if not stopped:
            stopped = True
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        saved = train_stage.checkpoint
        patch.setattr(train_stage, "checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):  # killed while the first round is trained once more
            train_again(tmp_path, *THREE)
        patch.undo()
    _, lines = train_again(tmp_path, *THREE)
    assert ["is trained once more" in line for line in lines.said].count(True) == 2
    assert lines.warned == []
    assert weights(found[2]) == good
    assert (found[2].folder() / "optimizer" / "tensors.safetensors").read_bytes() == optimizer
    assert states(found) == [False, False, True]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(metrics)
    assert list(damages(Store(tmp_path / "store"))) == []
    assert [len(list(each.artifact_folder.glob("attempt-*"))) for each in found[:2]] == [1, 1]


@pytest.mark.slow
def test_a_kill_while_a_state_goes_leaves_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, *arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(policy_module.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train_again(tmp_path, *THREE)
    assert list(damages(Store(tmp_path / "store"))) == []
    train_again(tmp_path, *THREE)
    assert states(policies(tmp_path, *THREE)) == [False, False, True]


def test_pins_and_other_runs_keep_a_state(small_runs: SmallRuns, tmp_path: Path) -> None:
    one = ("rounds=1", "evaluation=null")
    small_runs.copy(tmp_path, *one)
    first = policies(tmp_path, *one)[0]
    run(small_config(tmp_path, *THREE), RunFolder(tmp_path / "longer"), Silent())
    found = policies(tmp_path, *THREE)
    assert found[0].name == first.name
    assert states(found) == [True, False, True]  # another run ends with the first
    train_again(tmp_path, *THREE)  # goes on, and needs it no more
    assert states(found) == [False, False, True]

    store = Store(tmp_path / "store")
    pin(store, found[2].name)
    run(small_config(tmp_path, "rounds=4", *THREE[1:]), RunFolder(tmp_path / "longer"), Silent())
    assert states(policies(tmp_path, "rounds=4", *THREE[1:])) == [False, False, True, True]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded student in bfloat16, and the same weights in float32."""
    root, found = tmp_path_factory.mktemp("narrow"), dict[str, Path]()
    stored = load_file(MODELS / "ledger-student" / "model.safetensors")
    for name in ("bfloat16", "float32"):
        found[name] = root / name
        shutil.copytree(MODELS / "ledger-student", found[name])
        config = json.loads((found[name] / "config.json").read_text())
        (found[name] / "config.json").write_text(json.dumps(config | {"dtype": name}))
        rounded = {k: v.bfloat16().to(getattr(torch, name)) for k, v in stored.items()}
        save_file(rounded, found[name] / "model.safetensors", {"format": "pt"})
    return found


@pytest.mark.parametrize(
    "method",
    [
        pytest.param((), id="full"),
        pytest.param(("train.lora={rank: 4}",), id="lora", marks=pytest.mark.slow),
    ],
)
def test_policies_of_a_16_bit_base_have_16_bits_and_train_as_float32(
    narrow: dict[str, Path], tmp_path: Path, method: tuple[str, ...]
) -> None:
    """On the same scores; steps so small that most of them are lost in 16 bits."""
    settings = ("rounds=2", "evaluation=null", "train.learning_rate=3e-6", *method)
    wide = (*settings, f"student.path={narrow['float32']}")
    train_again(tmp_path / "wide", *wide)
    again = (*settings, f"student.path={narrow['bfloat16']}")
    again = (*again, f"store={tmp_path / 'wide' / 'store'}", f"replay.run={tmp_path}/wide/run")
    train_again(tmp_path / "narrow", *again)
    of_wide, of_narrow = policies(tmp_path / "wide", *wide), policies(tmp_path / "narrow", *again)
    for whole, rounded in zip(of_wide, of_narrow, strict=True):
        right = load_file(whole.folder() / "model.safetensors")
        found = load_file(rounded.folder() / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        for name, tensor in found.items():
            assert torch.equal(tensor, right[name].bfloat16()), name
    assert of_wide[0].recipe.settings.get("published") is None
    assert of_narrow[0].recipe.settings["published"] == "bfloat16"
    last = of_narrow[-1].folder()
    if method:
        one, other = (
            p.folder() / "adapter" / "adapter_model.safetensors"
            for p in (of_wide[-1], of_narrow[-1])
        )
        assert one.read_bytes() == other.read_bytes()
        return
    exact, base = load_tree(last / "exact"), load_file(narrow["float32"] / "model.safetensors")
    right = load_file(of_wide[-1].folder() / "model.safetensors")
    for name, tensor in right.items():
        assert torch.equal(exact[f"model.{name}"], tensor)
    moved = [(right[name] != base[name]).float().mean() for name in right]
    kept = [(right[name].bfloat16() != base[name].bfloat16()).float().mean() for name in right]
    assert sum(moved) > 2 * sum(kept) > 0


@pytest.mark.slow
def test_a_killed_run_of_a_16_bit_base_ends_in_the_same_weights(
    narrow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("rounds=2", "evaluation=null", f"student.path={narrow['bfloat16']}")
    train_again(tmp_path / "whole", *settings)
    saved, count = train_stage.checkpoint, 0

    def stop(training: train_stage.Training) -> None:
        nonlocal count
        saved(training)
        count += 1
        if count % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_stage, "checkpoint", stop)
    kills = 0
    while True:
        try:
            train_again(tmp_path / "killed", *settings)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 1
    for one, other in zip(
        policies(tmp_path / "whole", *settings),
        policies(tmp_path / "killed", *settings),
        strict=True,
    ):
        assert weights(one) == weights(other)
