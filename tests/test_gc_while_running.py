"""`cache gc` at any moment of a run leaves what that run has read, reads and will read."""

import json
import shutil
from pathlib import Path

from opd_stream.store.garbage import garbage, remove_garbage
from opd_stream.store.store import Store
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import SmallRuns, run, small_config, summary_of


class Collecting(Silent):
    """Collects garbage of any age whenever a stage begins, and keeps what was found."""

    def __init__(self, folder: Path) -> None:
        self._store = Store(folder / "store")
        self.stages: list[str] = []
        self.removed: list[str] = []

    def start(self, stage: str, total: int, done: int = 0) -> None:
        found = garbage(self._store, grace_seconds=0.0, run_seconds=0.0)
        self.stages.append(stage)
        self.removed += [f"{path.parent.name}/{path.name}" for path in found]
        for path in found:
            remove_garbage(path)


def collected(folder: Path, name: str, *overrides: str) -> Collecting:
    """What was removed while a run went on."""
    progress = Collecting(folder)
    run(small_config(folder, *overrides), RunFolder(folder / name), progress)
    assert "train" in progress.stages
    return progress


def test_nothing_that_a_run_works_on_is_garbage(tmp_path: Path) -> None:
    assert collected(tmp_path, "run").removed == []
    assert garbage(Store(tmp_path / "store"), grace_seconds=0.0) == []


def test_scores_of_a_run_that_is_gone_stay_while_they_are_replayed(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    small_runs.copy(tmp_path, "evaluation=null")
    caches = json.loads((tmp_path / "run" / "summary.json").read_text())["caches"]
    names = [f"scores/{cache['scores'][:16]}" for (cache,) in caches]
    shutil.rmtree(tmp_path / "run")
    replay = (f"replay.scores=[{','.join(names)}]", "evaluation=null", "teacher=null")
    removed = collected(tmp_path, "new", *replay, "train.objective={kind: lsm}").removed
    assert {name.partition("/")[0] for name in removed} == {"policies"}  # of the run that is gone
    assert {f"scores/{path.name}" for path in (tmp_path / "store" / "scores").iterdir()} == {*names}


def test_a_run_that_goes_on_keeps_the_rounds_it_comes_to(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    small_runs.copy(tmp_path)
    summary = summary_of(RunFolder(tmp_path / "run"))
    for path in (tmp_path / "store" / "policies").iterdir():
        if (path / Path(summary["final_policy"]).name).exists():
            shutil.rmtree(path)
    assert collected(tmp_path, "run").removed == []
    assert summary_of(RunFolder(tmp_path / "run"))["policies"] == summary["policies"]
