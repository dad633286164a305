"""Prompts of a round by the pass rate of their level in the rounds before."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opd_stream.curriculum import Select, chosen_prompts, levels_text, measured_levels
from opd_stream.errors import UserError
from opd_stream.outcome import LevelRate
from pipeline.estimate import estimate
from pipeline.rounds import Round, named_checkpoint, rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from pipeline.single_stage import run_stage
from stages.levels import prompt_levels
from stages.prompts import selected_rows
from stages.step import Silent, Stage
from tests.conftest import SmallRuns, run, small_config

RATES = (
    LevelRate(level="easy", right=9, judged=10),
    LevelRate(level="hard", right=0, judged=10),
    LevelRate(level="medium", right=5, judged=10),
)


def right_if_easy(completion: str, reference: str) -> bool:
    """A judge that finds every easy prompt answered, and no other."""
    return reference == "easy"


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("levels") / "rows.jsonl"
    kinds = ["easy", "hard", "hard"]
    found = [
        {
            "prompt": f"Ken has {n + 20} cards. How many?",
            "level": kinds[n % 3],
            "gold": kinds[n % 3],
        }
        for n in range(36)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def settings(rows: Path, *more: str, select: str = "max_pass: 0.9") -> tuple[str, ...]:
    return (
        f"prompts={{kind: files, path: {rows}, answer_field: gold, level_field: level}}",
        f"rollouts.select={{judge: {{kind: 'tests.test_curriculum:right_if_easy'}}, {select}}}",
        "evaluation=null",
        "rollouts.window.tokens=8",
        "staleness.max_epochs=1",
        "rounds=3",
        *more,
    )


def read(folder: Path, *overrides: str) -> tuple[Any, list[Round]]:
    setup = open_setup(small_config(folder, *overrides), make=False)
    return setup, list(rounds(setup, opened=named_checkpoint))


def drawn(folder: Path, rows: Path) -> list[list[int]]:
    """Numbers of the prompts of each round."""
    setup, found = read(folder, *settings(rows))
    selections = [each.caches[0].rollouts.artifact.recipe.settings["selection"] for each in found]
    return [selected_rows(selection, setup.prompts.layout().rows) for selection in selections]


def test_prompts_are_of_levels_in_the_band_then_of_the_nearest() -> None:
    select = Select.model_validate({"judge": {"kind": "exact"}, "min_pass": 0.2, "max_pass": 0.8})
    levels = ["easy", "hard", "medium", "new"] * 5

    def counts(per_round: int, index: int = 1) -> Counter[str]:
        settings = {"seed": 3, "round_index": index, "per_round": per_round}
        chosen = chosen_prompts(select, levels, RATES, **settings)
        assert len(set(chosen)) == per_round
        return Counter(levels[row] for row in chosen)

    assert counts(10) == {"medium": 5, "new": 5}
    assert counts(13) == {"medium": 5, "new": 5, "easy": 3}  # 0.9 is nearer to the band than 0
    assert counts(20) == dict.fromkeys(("easy", "hard", "medium", "new"), 5)
    assert len({counts(5, index)["new"] for index in range(8)}) > 1  # each round draws anew
    text = levels_text(select, RATES)
    assert text.endswith("20% to 80%: medium 50% of 10; after them easy 90% of 10, hard 0% of 10")


def test_a_level_keeps_its_rate_until_it_is_measured_again() -> None:
    found = measured_levels(RATES, [("hard", True), ("hard", False), ("new", False)])
    assert [(each.level, each.rate) for each in found] == [
        ("easy", 0.9),
        ("hard", 0.5),
        ("medium", 0.5),
        ("new", 0.0),
    ]


def test_what_is_mastered_is_drawn_no_longer(small_runs: SmallRuns, rows: Path) -> None:
    folder = small_runs(*settings(rows))
    setup, found = read(folder, *settings(rows))
    levels = prompt_levels(setup.prompts)
    first, *later = drawn(folder, rows)
    assert {levels[row] for row in first} == {"easy", "hard"}
    assert all({levels[row] for row in chosen} == {"hard"} for chosen in later)
    assert len({frozenset(chosen) for chosen in later}) == 2
    easy, hard = found[1].policy.manifest().outcome.levels
    assert (easy.rate, hard.rate) == (1.0, 0.0)
    assert hard.judged == 8
    assert easy.judged == sum(levels[row] == "easy" for row in first)  # of round 0, the last of it
    plain = settings(rows)[:1] + settings(rows)[2:]
    _, others = read(folder, *plain)
    same = [each.caches[0].rollouts.artifact.name for each in (found[0], others[0])]
    assert same[0] == same[1]  # nothing is measured yet


def test_a_run_without_its_last_policies_chooses_the_same_again(
    small_runs: SmallRuns, rows: Path, tmp_path: Path
) -> None:
    folder = small_runs.copy(tmp_path / "copy", *settings(rows))
    _, found = read(folder, *settings(rows))
    config, names = small_config(folder, *settings(rows)), [each.names() for each in found]
    for each in found[1:]:
        shutil.rmtree(each.policy.folder().parent)
        shutil.rmtree(each.caches[0].rollouts.shards.folder)
        shutil.rmtree(each.caches[0].scores.shards.folder)
    planned = estimate(config, RunFolder(folder / "run"))
    assert [each.index for each in planned.rounds] == [0, 1, 2]
    assert [step.prompts for step in planned.rounds[2].steps] == [8, 8, 8]
    for index in (1, 2):  # stage by stage, as machines of their own would
        stages: tuple[Stage, ...] = ("generate", "score", "train")
        for stage in stages:
            other = RunFolder(folder / "other")
            run_stage(stage, config, other, round_index=index, progress=Silent())
    assert [each.names() for each in read(folder, *settings(rows))[1]] == names


@pytest.mark.slow
def test_ray_chooses_the_same(small_runs: SmallRuns, rows: Path, tmp_path: Path) -> None:
    local = json.loads((small_runs(*settings(rows)) / "run" / "summary.json").read_text())
    config = small_config(tmp_path, *settings(rows, "executor=ray"))
    found = run(config, RunFolder(tmp_path / "run"), Silent())
    assert found["caches"] == local["caches"]
    assert found["policies"] == local["policies"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("rollouts.select.min_pass=0.95",), r"min_pass 0.95 is above max_pass 0.9"),
        (("rollouts.select.max_pass=1",), r"neither min_pass nor max_pass"),
        (("prompts.level_field=null",), r"the prompts name no level; .*set prompts.level_field"),
        (("prompts={kind: ledger, count: 9, seed: 0}",), r"the prompts name no level"),
        (("rollouts.ahead=yes",), r"select is set with rollouts.ahead, whose rollouts do not"),
        (("replay.run=x",), r"select is set with replay"),
        (("staleness.max_policies=2",), r"select is set with staleness.max_policies"),
        (("rollouts.given_share=0.5", "rollouts.given_by=teacher"), r"set with rollouts.given_sh"),
    ],
)
def test_what_a_choice_cannot_be_is_refused_with_the_config(
    tmp_path: Path, rows: Path, more: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        small_config(tmp_path, *settings(rows, *more))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("prompts.level_field=grade",), r"rows.jsonl:1 has no field 'grade'; .*set level_field"),
        (("prompts.answer_field=null",), r"none of 36 prompts has a reference answer"),
        (("rollouts.prompts_per_round=37",), r"prompts_per_round is 37 but there are 36"),
    ],
)
def test_rows_that_serve_no_choice_are_refused_before_work(
    tmp_path: Path, rows: Path, more: tuple[str, ...], said: str
) -> None:
    config = small_config(tmp_path, *settings(rows, *more))
    with pytest.raises(UserError, match=said):
        estimate(config, RunFolder(tmp_path / "run"))
    with pytest.raises(UserError, match=said):
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert not list((tmp_path / "store").glob("rollouts/*"))
