"""The comparison of methods: rows are files, and a line counts for what it was measured with."""

import json
from pathlib import Path

import pytest

from benchmarks import methods, methods_tables
from benchmarks.methods_rows import ROWS, TASKS, Row, read_rows, settings_of
from opd_stream.config_file import load_config
from opd_stream.errors import UserError

ROOT = Path(__file__).parent.parent
OWN = """
task: ledger
rows:
  - name: mine
    replay: true
    settings: {train.objective: {kind: lsm}, staleness.policy_drift: 1.0e-6}
"""


def test_every_row_is_a_config_of_its_task() -> None:
    for task, rows in ROWS.items():
        assert len({row.name for row in rows}) == len(rows) > 0
        for row in rows:
            settings = [text.replace("SEED", "0") for text in row.overrides]
            load_config(ROOT / "benchmarks" / f"methods_{task}.yaml", settings)


def test_stored_lines_count_for_the_rows_they_were_measured_with() -> None:
    lines = methods.read_results()
    rows = {(task, row.name): row for task, found in ROWS.items() for row in found}
    assert len(lines) > 200
    assert all(rows[line["task"], line["row"]].is_of(line) for line in lines)


def test_a_line_of_other_settings_does_not_count() -> None:
    row = Row(name="ESR 16", settings={"rollouts.window": {"kind": "fixed", "tokens": 16}})
    line = {"row": "ESR 16", "overrides": ["rollouts.window={kind: fixed, tokens: 16}"]}
    assert row.is_of(line)
    assert not row.is_of(line | {"overrides": ["rollouts.window={kind: fixed, tokens: 17}"]})
    assert not row.is_of(line | {"replay": True})
    assert row.is_of({"row": "ESR 16", "overrides": row.overrides})


def test_numbers_that_yaml_takes_for_texts_are_numbers() -> None:
    assert settings_of(["staleness.diverged=1e6"]) == {"staleness.diverged": 1e6}


def test_rows_of_a_file_are_chosen_without_those_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "row.yaml").write_text(OWN)
    ((task, row),) = methods.chosen_rows([str(tmp_path / "row.yaml")], None, [])
    assert (task, row.name, row.replay) == ("ledger", "mine", True)
    assert methods.chosen_rows([str(tmp_path / "row.yaml")], "routine", []) == []
    both = methods.chosen_rows([str(tmp_path / "row.yaml"), "full"], "ledger", [])
    assert [row.name for _, row in both] == ["mine", "full"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("name: mine", "nam: mine"), "rows.0.name"),
        (OWN.replace("ledger", "chess"), "task"),
        ("[]", "expected a mapping with task and rows"),
        (OWN + "  - name: mine\n", "has two rows 'mine'"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "row.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "row.yaml")


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="no row 'nothing'"):
        methods.chosen_rows(["nothing"], None, [])


def test_a_public_cache_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 0 scores; expected one"):
        methods.cached_scores(tmp_path)


def test_the_interval_of_a_mean_over_seeds_is_students() -> None:
    assert methods_tables.spread([0.91, 0.94, 0.95]) == "0.933 ± 0.052 (0.910 to 0.950)"
    assert methods_tables.spread([0.9, 0.94]) == "0.920 (0.900 to 0.940)"


def test_a_table_has_the_rows_that_were_measured() -> None:
    lines = methods.read_results()
    found = methods_tables.table("ledger", ROWS["ledger"][:1], lines)
    assert len(found) == 4
    assert found[3].startswith("| full | 5 | 0.938 ± 0.017 (0.914 to 0.948) |  | 0.994 |")
    found = methods_tables.table("ledger", ROWS["ledger"][1:2], lines)
    assert found[3].startswith("| ESR 16 | 3 | 0.329 ± 0.064 (0.299 to 0.345) | -0.604 ± 0.099 |")


@pytest.mark.slow
def test_a_row_that_replays_needs_no_teacher(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(methods, "PUBLIC", (*methods.PUBLIC[:1], *_TINY, *methods.PUBLIC[3:]))
    monkeypatch.setattr(methods, "ONE_ROUND", ("rounds=1", *_TINY))
    monkeypatch.setattr(methods, "public_cache", lambda _: tmp_path / "public")
    name = methods.make_public_cache("ledger", tmp_path / "public")
    assert name == methods.make_public_cache("ledger", tmp_path / "public")
    row = Row(name="mine", replay=True, settings={"train.objective": {"kind": "lsm"}})
    (round_,) = methods.distil("ledger", row, 3, [], tmp_path / "run")
    assert round_["tokens"]["teacher_scored"] == round_["tokens"]["generated"] == 0
    assert round_["tokens"]["trained"] > 0
    assert json.dumps(round_["origins"]) == '["replayed"]'


_TINY = ("rollouts.prompts_per_round=8", "prompts_per_unit=4", "rollouts.window.tokens=16")


def test_every_task_has_rows_and_a_config() -> None:
    assert set(ROWS) == set(TASKS)
