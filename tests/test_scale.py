"""What a command costs on a finished run grows with its rounds, and no faster."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.scale_store import build
from opd_stream.store.store import Store
from pipeline.estimate import estimate, result
from pipeline.run_folder import RunFolder
from pipeline.setup import open_to_look
from pipeline.status import StatusReader
from stages.step import Silent
from tests.conftest import run, small_config

ROUNDS = 8


def test_many_finished_rounds_are_found_without_looking_at_all_of_them_for_each(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(copied_run, "evaluation=null", f"rounds={ROUNDS}")
    made = copied_run / "store" / "rollouts"
    before = len(list(made.iterdir()))
    build(open_to_look(config))
    folder = RunFolder(copied_run / "many")
    summary = run(config, folder, Silent())
    assert summary["finished"]
    assert summary["tokens"]["trained"] == 0
    assert len(list(made.iterdir())) == before + ROUNDS - 2
    calls: Counter[str] = Counter()

    def counted(kind: type, name: str) -> None:
        asked: Callable[..., Any] = getattr(kind, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return asked(*arguments, **named)

        monkeypatch.setattr(kind, name, call)

    for kind, name in (
        (Store, "record_run"),
        (Store, "runs"),
        (RunFolder, "write_summary"),
        (RunFolder, "training_lines"),
    ):
        counted(kind, name)
    assert run(config, folder, Silent()) == summary
    status = StatusReader(open_to_look(config), folder).read()
    assert status.is_finished
    assert len(status.rounds) == ROUNDS
    assert [each.stages["train"].done for each in status.rounds] == [
        line.steps for line in folder.reports()
    ]
    assert all(count <= 2 for count in calls.values()), calls


def test_a_printed_table_has_the_latest_rounds_and_says_how_many_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, "evaluation=null", f"rounds={ROUNDS}")
    monkeypatch.setattr(result, "ROUNDS_SHOWN", 3)
    console = Console(record=True, width=200)
    result.print_plan(estimate(config, RunFolder(tmp_path / "run")), console=console)
    said = console.export_text()
    assert f"the {ROUNDS - 3} earliest rounds" in said
    assert sum("generate" in line.split()[:4] for line in said.splitlines()) == 3
