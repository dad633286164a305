"""Nothing of a finished round stays in memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder import RunFolder
from stages import train as train_stage
from stages.step import Silent
from tests.conftest import run, small_config

JUMPS = "train.extrapolation={rows: 4, candidates: 1}"


@pytest.mark.parametrize(
    "method",
    [
        ("train.gradient_checkpointing=true", JUMPS),
        pytest.param(("train.lora={}",), marks=pytest.mark.slow),
    ],
)
def test_student_and_optimizer_of_a_round_are_gone_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tuple[str, ...]
) -> None:
    """Without the garbage collector, which may come long after the next round has begun."""
    opened, held, alive = train_stage.open_learner, list[Any](), list[int]()

    def noted(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in held))
        learner = opened(*arguments)
        weights = next(learner.student.parameters())
        held.extend(map(weakref.ref, (learner.student, learner.optimizer, weights)))
        return learner

    monkeypatch.setattr(train_stage, "open_learner", noted)
    gc.disable()
    try:
        settings = ("rounds=3", "evaluation=null", "train.learning_rate=1e-6", *method)
        run(small_config(tmp_path, *settings), RunFolder(tmp_path / "run"), Silent())
        alive.append(sum(reference() is not None for reference in held))
    finally:
        gc.enable()
    assert len(held) == 9
    assert alive == [0, 0, 0, 0]
