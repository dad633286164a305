"""A stage that follows another asks for what is new, and does not read again what it has read."""

from collections import Counter
from pathlib import Path

import pytest

from opd_stream.store.artifact import Artifact
from pipeline import single_stage
from pipeline.rounds import rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from pipeline.single_stage import run_stage
from stages.collect import start_rollouts
from stages.generate import GenerateWorker
from stages.step import Silent
from stages.workers import Task, TaskResult, WorkerSettings
from tests.conftest import small_config


def test_scoring_reads_a_shard_once_however_often_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, "evaluation=null", "prompts_per_unit=2")
    setup = open_setup(config)
    (cache,) = next(rounds(setup)).caches
    rollouts = start_rollouts(setup.store, cache.rollouts.artifact.recipe, prompts_per_unit=2)
    waiting = list(rollouts.units())
    student = GenerateWorker(WorkerSettings(store=setup.store.address))
    read: Counter[tuple[str, int]] = Counter()
    damage = Artifact.damage

    def one_more(_: float) -> None:
        task = Task(
            unit=waiting.pop(0),
            rollouts=rollouts.fingerprint,
            scores=None,
            student=str(setup.student.folder),
            teacher=None,
            made_by="another machine",
        )
        student.run(TaskResult(task=task))
        rollouts.finish()

    def counted(self: Artifact, unit: int) -> str | None:
        read[self.recipe.kind, unit] += 1
        return damage(self, unit)

    monkeypatch.setattr(single_stage.time, "sleep", one_more)
    monkeypatch.setattr(Artifact, "damage", counted)
    directory = RunFolder(tmp_path / "run")
    run_stage("score", config, directory, round_index=0, progress=Silent(), follow=True)
    assert not waiting
    assert cache.is_complete()
    assert max((count for (kind, _), count in read.items() if kind == "scores"), default=0) <= 1
    monkeypatch.undo()
    assert [cache.scores.shards.damage(unit) for unit in cache.scores.shards.units()] == [None] * 4
