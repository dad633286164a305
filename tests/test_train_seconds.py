"""A round that was stopped and went on tells the seconds of all its calls."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder import RunFolder
from stages import train
from stages.step import Silent
from tests.conftest import run, small_config


def test_seconds_up_to_the_checkpoint_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, "rounds=1", "evaluation=null")
    directory = RunFolder(tmp_path / "run")
    saved = train.checkpoint

    def stop(training: Any) -> None:
        training.clock.add_earlier(1000, 1000)
        saved(training)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config, directory, Silent())
    monkeypatch.undo()
    run(config, directory, Silent())
    report = json.loads((directory.path / "rounds" / "0000" / "report.json").read_text())
    assert 1000 < report["seconds"]["train"] < 1200
    assert 1000 < report["cpu_seconds"]["train"] < 1200
