"""A round that was stopped and went on tells the seconds of all its calls."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.rounds import run
from pipeline.run_directory import RunDirectory
from stages import clock, keeper
from stages.progress import Silent
from tests.conftest import small_config


def test_seconds_up_to_the_checkpoint_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, "rounds=1", "evaluation=null")
    directory = RunDirectory(tmp_path / "run")
    saved, spent = keeper.Keeper._checkpoint, clock.Clock.spent

    def stop(self: Any, trainer: Any, module: Any) -> None:
        saved(self, trainer, module)
        raise KeyboardInterrupt

    def late(self: clock.Clock) -> dict[str, float]:
        return {name: seconds + 1000 for name, seconds in spent(self).items()}

    monkeypatch.setattr(keeper.Keeper, "_checkpoint", stop)
    monkeypatch.setattr(clock.Clock, "spent", late)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(config, directory, Silent())
    monkeypatch.undo()
    run(config, directory, Silent())
    report = json.loads((directory.path / "rounds" / "0000" / "report.json").read_text())
    assert 1000 < report["seconds"]["train"] < 1200
    assert 1000 < report["cpu_seconds"]["train"] < 1200
