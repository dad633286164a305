"""What an extension continues is made again where it is damaged, by the policy that wrote it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.store import Store
from pipeline.rounds import rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from pipeline.single_stage import run_stage
from stages.step import Silent
from tests.conftest import run, small_config

ROUNDS = 3
GROWING = (
    f"rounds={ROUNDS}",
    "evaluation=null",
    "staleness.max_policies=2",
    "staleness.max_epochs=1",
    "train.learning_rate=1e-4",
    "rollouts.window={kind: linear, h0: 16, delta: 16, every: 2, max_window_tokens: 48}",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds: the second continues the rollouts of the first, the third those of both."""
    folder = tmp_path_factory.mktemp("finished")
    run(small_config(folder, *GROWING), RunFolder(folder / "run"), Silent())
    return folder


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """The same with damage in all that the third round continues; the round itself is gone."""
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy"
    shutil.rmtree(folder / "run")
    reports = reports_of(finished)
    assert [report["caches"][0]["origin"] for report in reports] == [
        "fresh",
        "extended",
        "extended",
    ]
    for kind in ("rollouts", "scores"):
        shutil.rmtree(artifact(folder, kind, reports[2]).folder)
    for recipe in Store(folder / "store").recipes("policies"):
        if recipe.fingerprint == reports[2]["policy"]["fingerprint"]:
            shutil.rmtree(folder / "store" / "policies" / recipe.fingerprint[:16])
    for kind, report, unit in (
        ("rollouts", reports[0], 0),
        ("rollouts", reports[1], 0),
        ("scores", reports[0], 1),
        ("scores", reports[1], 1),
    ):
        spoil(artifact(folder, kind, report), unit)
    return folder


def reports_of(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "run" / "rounds").glob("*/report.json"))
    return [json.loads(path.read_text()) for path in paths]


def artifact(folder: Path, kind: Any, report: dict[str, Any]) -> Artifact:
    return Store(folder / "store").by_fingerprint(kind, report["caches"][0][kind])


def spoil(made: Artifact, unit: int) -> None:
    commit = made.commit_record(unit)
    assert commit is not None
    shard = made.folder / commit.file
    data = shard.read_bytes()
    middle = len(data) // 2
    shard.write_bytes(data[:middle] + bytes(9) + data[middle + 9 :])


def assert_mended(finished: Path, folder: Path, policy: str) -> None:
    reports = reports_of(finished)
    assert policy == reports[2]["policy"]["weights_sha256"]
    for report in reports[:2]:
        for kind in ("rollouts", "scores"):
            old, new = artifact(finished, kind, report), artifact(folder, kind, report)
            assert new.is_complete()
            assert [new.damage(unit) for unit in new.units()] == [None, None]
            shas = [[commit.sha256 for commit in a.commits().values()] for a in (old, new)]
            assert shas[0] == shas[1]


def test_a_unit_that_is_gone_leaves_the_round_what_it_was(finished: Path, damaged: Path) -> None:
    setup = open_setup(small_config(damaged, *GROWING))
    before = [here.policy.name for here in rounds(setup)]
    artifact(damaged, "rollouts", reports_of(finished)[1]).invalidate(0)
    assert [here.policy.name for here in rounds(setup)] == before


def test_a_run_mends_what_it_continues(finished: Path, damaged: Path) -> None:
    summary = run(small_config(damaged, *GROWING), RunFolder(damaged / "run"), Silent())
    assert_mended(finished, damaged, summary["policies"][-1]["weights_sha256"])


@pytest.mark.slow
def test_stages_mend_what_they_continue(finished: Path, damaged: Path) -> None:
    config = small_config(damaged, *GROWING)

    def stage(name: str) -> None:
        directory = RunFolder(damaged / name)
        run_stage(name, config, directory, round_index=ROUNDS - 1, progress=Silent())

    for name in ("generate", "score", "train"):
        stage(name)
    report = json.loads((damaged / "train" / "rounds" / "0002" / "report.json").read_text())
    assert_mended(finished, damaged, report["policy"]["weights_sha256"])
    shutil.rmtree(artifact(damaged, "scores", report).folder)
    spoil(artifact(damaged, "rollouts", reports_of(finished)[1]), 1)
    with pytest.raises(UserError, match=r"units \[1\] .*run generate --round 2 first"):
        stage("score")
    for name in ("generate", "score"):
        stage(name)
    assert_mended(finished, damaged, report["policy"]["weights_sha256"])
    again = artifact(damaged, "rollouts", reports_of(finished)[1])
    (again.folder / "manifest.json").unlink()  # as a kill after its last unit leaves it
    stage("generate")
    assert again.is_complete()


@pytest.mark.slow
def test_scores_of_other_bytes_are_made_again_by_their_stage(tmp_path: Path) -> None:
    config, folder = small_config(tmp_path, "evaluation=null"), RunFolder(tmp_path / "run")

    def stage(name: str) -> None:
        run_stage(name, config, folder, round_index=0, progress=Silent())

    for name in ("generate", "score"):
        stage(name)
    rollouts = next(rounds(open_setup(config))).caches[0].rollouts.shards
    commit, table = rollouts.commit_record(1), rollouts.read_unit(1)
    assert commit is not None
    rollouts.invalidate(1)
    again = table.replace_schema_metadata({"made": "again"})  # as another device samples it
    rollouts.commit(1, again, counts=commit.counts)
    rollouts.finish()
    with pytest.raises(UserError, match="scores other bytes"):
        stage("train")
    stage("score")
    stage("train")
