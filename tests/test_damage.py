"""Nothing silently wrong: each kind of file, damaged in each way, is found or harmless."""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_stream.errors import UserError
from opd_stream.store import open_scores
from opd_stream.store.artifact import Commit
from opd_stream.store.policy import PolicyArtifact
from opd_stream.store.sealed import DamagedRecord, load_record, publish_record
from opd_stream.store.store import Store
from pipeline.run import check_loaded
from pipeline.run_folder import RunFolder
from stages.checkpoints import open_checkpoint
from stages.step import Silent
from stages.train_state import latest_checkpoint
from tests.conftest import MODELS, Command, SmallRuns, run, small_config
from tests.damage import KINDS, WAYS, Case, cases, pinned, try_all

RETRAINED = ("manifest of a policy", "weights of a policy", "optimizer", "text of a policy")
CHEAP = [kind for kind in KINDS if kind not in RETRAINED]
TRIED = 60
UNFINISHED = ("rounds=1", "evaluation=null")


class Stopped(Exception):
    """A run that is broken off."""


class Stopping(Silent):
    """Breaks a run off after some steps of training."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        self._steps -= count * (stage == "train")
        if not self._steps:
            raise Stopped


@pytest.fixture
def finished(small_runs: SmallRuns, tmp_path: Path) -> Path:
    """A finished run with a pin, in a folder of one's own."""
    return pinned(small_runs.copy(tmp_path / "run"))


def test_damage_is_found_or_harmless(finished: Path) -> None:
    ends: Counter[str] = Counter()
    for found in try_all(finished, cases(CHEAP, TRIED)):
        assert found.ends != "silent", found
        ends[found.ends] += 1
    assert sum(ends.values()) > 0.8 * TRIED  # some files have no sibling
    assert ends["healed"] > ends["refused"] > 0


@pytest.mark.slow
def test_a_thousand_damages_are_found_or_harmless(finished: Path) -> None:
    tried = 0
    for found in try_all(finished, cases(list(KINDS), 1200, seed=10_000)):
        assert found.ends != "silent", found
        tried += 1
    assert tried >= 1000


@pytest.mark.parametrize("kind", RETRAINED)
def test_damage_of_a_policy_is_found_and_the_round_is_trained_again(
    kind: str, finished: Path
) -> None:
    case = Case(kind=kind, way="bit", seed=1, keeps_times=True)
    (found,) = try_all(finished, iter([case]))
    assert (found.ends, found.finder) == ("healed", "verify")


def broken_off(folder: Path, steps: int) -> Path:
    """A run that stopped in training; its checkpoints' folder."""
    config = small_config(folder, *UNFINISHED)
    with pytest.raises(Stopped):
        run(config, RunFolder(folder / "run"), Stopping(steps))
    (scratch,) = (folder / "run" / "training").iterdir()
    return scratch


@pytest.mark.parametrize("way", WAYS)
def test_the_newest_sound_checkpoint_is_resumed_from(
    way: str, small_runs: SmallRuns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scratch = broken_off(tmp_path / "run", 4)
    assert [path.name for path in sorted(scratch.glob("[0-9]*"))] == ["00000002", "00000003"]
    for path in sorted((scratch / "00000003").iterdir()):
        kept = path.read_bytes()
        sibling = (scratch / "00000002" / path.name).read_bytes()
        changed = WAYS[way](sibling if way == "sibling" else kept, random.Random(3))
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        found = latest_checkpoint(scratch)
        assert found is not None
        assert found.state.steps == 2
        path.write_bytes(kept)
    assert caplog.text.count("00000003 is damaged") == 3
    assert "the one before is used" in caplog.text


def test_a_round_without_a_sound_checkpoint_is_trained_from_its_start(
    small_runs: SmallRuns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scratch = broken_off(tmp_path / "run", 4)
    for path in scratch.rglob("tree.json"):
        path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    config = small_config(tmp_path / "run", *UNFINISHED)
    summary = run(config, RunFolder(tmp_path / "run" / "run"), Silent())
    assert caplog.text.count("tree.json is not what was written") == 2
    assert "the round is trained from its start" in caplog.text
    expected = json.loads((small_runs(*UNFINISHED) / "run" / "summary.json").read_text())
    assert summary["policies"] == expected["policies"]


def test_a_store_without_digests_is_read_and_said_to_be_unchecked(
    finished: Path, opd_stream: Command
) -> None:
    store = finished / "store"
    for path in [*store.glob("*/*/*.json"), *store.glob("*/*/units/*.json")]:
        value = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: v for k, v in value.items() if k not in ("record", "digest")})
        )
    code, said, _ = opd_stream("cache", "verify", str(store))
    assert code == 0
    assert "were written before records had digests, and cannot be checked" in said
    assert "as far as it can be checked" in said
    (folder, *_) = (store / "scores").iterdir()
    (folder / "manifest.json").unlink()
    artifact = Store(store).by_fingerprint("scores", folder.name)
    artifact.finish()
    assert artifact.manifest().digest is None  # what repeats them cannot be checked either


def test_a_record_that_loses_only_its_digest_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "3f" / "units" / "00002.json"
    commit = Commit(unit=2, file="units/a.arrow", sha256="9a", bytes=1, counts={"rows": 3})
    publish_record(path, commit)
    assert load_record(Commit, path).as_json() == commit.as_json()
    for field in ("record", "digest"):
        value = json.loads(path.read_text())
        value.pop(field)
        (path.parent / "00002.json").write_text(json.dumps(value))
        with pytest.raises(DamagedRecord, match="its digest is that of another content"):
            load_record(Commit, path)
        publish_record(path, commit)
    shutil.copy(path, path.with_name("00003.json"))
    with pytest.raises(DamagedRecord, match="it is 'rollouts/3f/units/00002\\.json'"):
        load_record(Commit, path.with_name("00003.json"))


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, opd_stream: Command) -> None:
    code, _, error = opd_stream("cache", "verify", str(tmp_path))
    assert code == 2
    assert f"{tmp_path} is no store" in error


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below a folder, folders too."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_what_only_looks_writes_nothing(finished: Path, opd_stream: Command) -> None:
    store, folder = str(finished / "store"), str(finished / "run")
    shutil.rmtree(finished / "store" / "digests")
    before = state_of(finished)
    (scores, *_) = (finished / "store" / "scores").iterdir()
    for words in (
        ("status", folder),
        ("plan", str(finished / "small.yaml"), "--run-dir", folder),
        ("inspect", folder, "--round", "1", "--worst", "1"),
        ("cache", "ls", store),
        ("cache", "show", store, f"scores/{scores.name}"),
        ("cache", "verify", store),
    ):
        code, _, error = opd_stream(*words)
        assert code == 0, (words, error)
        now = state_of(finished)
        assert now == before, (words, [p for p in {*now, *before} if now.get(p) != before.get(p)])
    assert len(open_scores(scores)) > 0
    assert state_of(finished) == before


def test_published_files_have_the_permissions_of_any_file(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in (finished / "store").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_a_models_own_files_are_read_whole_before_they_are_loaded(tmp_path: Path) -> None:
    folder, store = tmp_path / "student", Store(tmp_path / "store")
    shutil.copytree(MODELS / "ledger-student", folder)
    known, weights = open_checkpoint(store, folder), folder / "model.safetensors"
    times, data = weights.stat(), bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(bytes(data))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_checkpoint(store, folder) == known  # by what is remembered, as a listing has it
    session: Any = SimpleNamespace(store=store, checked=set())
    with pytest.raises(UserError, match="changed since they were first read"):
        check_loaded(session, known)


def test_a_policy_that_stays_damaged_ends_the_run_with_a_line(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk does that does not return what is written to it."""
    shutil.rmtree(finished / "store" / "evaluations")
    for path in (finished / "store" / "rollouts").glob("*/recipe.json"):
        if json.loads(path.read_text())["layout"]["rows"] == 4:  # answers of an evaluation
            shutil.rmtree(path.parent)
    last = RunFolder(finished / "run").plan(1).policy[:16]
    monkeypatch.setattr("opd_stream.store.policy.PolicyArtifact.damage", rotten(last))
    config = small_config(finished)
    with pytest.raises(UserError, match="right after it was trained again; the store does not"):
        run(config, RunFolder(finished / "run"), Silent())


def rotten(name: str) -> Callable[..., str | None]:
    """A policy of that name whose files are never what was written."""

    def damage(self: PolicyArtifact, *, cache: Path | None, part: str = "") -> str | None:
        return "it is rotten" if part == "model" and self.name.endswith(name) else None

    return damage
