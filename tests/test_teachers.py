"""Several teachers: each scores the rollouts of its prompts, and their terms are one sum."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.batches import collate
from opd_stream.config import PLACEMENT
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.reader import ScoredRows
from pipeline.caches import Cache
from pipeline.doctor.examination import examine
from pipeline.estimate import estimate
from pipeline.inspect.command import inspect_rollout
from pipeline.plan import plan_round
from pipeline.rounds import Round, named_checkpoint, rounds
from pipeline.run_folder import RunFolder, is_below
from pipeline.setup import Setup, largest_window, open_setup
from pipeline.single_stage import run_stage
from pipeline.status import StatusReader
from stages.filtering import RolloutFilter
from stages.prompts import own_prompts
from stages.score import ScoreWorker
from stages.step import Silent
from stages.workers import Task, TaskResult
from tests.conftest import (
    MODELS,
    Command,
    SmallRuns,
    reports_of,
    run,
    small_config,
    summary_of,
)
from tests.tiny_tokenizers import byte_level, random_teacher

TEACHER, STUDENT = MODELS / "ledger-teacher", MODELS / "ledger-student"
NAMES = ("Ken", "Ana", "Tom", "Mia")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of two subjects, in turn."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    kinds = ["math", "code"]
    found = [
        {
            "prompt": f"{NAMES[n % 4]} has {n + 20} cards. How many?",
            "subject": kinds[n % 2],
            "tags": ["all", "odd" if n % 2 else "even"],
            "answer": str(n // 2 % 2),
        }
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def settings(rows: Path, *more: str, **teachers: str) -> tuple[str, ...]:
    """Overrides of the small config for these teachers."""
    each = ", ".join(f"{name}: {text}" for name, text in teachers.items())
    template = '{kind: raw, text: "{prompt}\\n", bos: always}'
    return (
        "teacher=null",
        f"teachers={{{each}}}",
        f"prompts={{kind: files, path: {rows}, template: {template}}}",
        "evaluation=null",
        "rollouts.window.tokens=12",
        "staleness.max_epochs=1",
        *more,
    )


MATH = f"{{path: {TEACHER}, when: {{subject: math}}}}"
CODE = f"{{path: {STUDENT}, when: {{subject: [code, sql]}}}}"
ALL = f"{{path: {TEACHER}, weight: 0.5}}"


def routed(rows: Path, *more: str) -> tuple[str, ...]:
    return settings(rows, *more, math=MATH, code=CODE)


def read(folder: Path, *overrides: str) -> tuple[Setup, list[Round]]:
    setup = open_setup(small_config(folder, *overrides), make=False)
    return setup, list(rounds(setup, opened=named_checkpoint))


def rows_of(cache: Cache) -> dict[str, Any]:
    found = ScoredRows([(cache.rollouts.shards, cache.scores.shards)])
    return {found[number].prompt_id: found[number] for number in range(len(found))}


def test_each_rollout_goes_to_the_teacher_of_its_prompt_and_trains_once(
    small_runs: SmallRuns, rows: Path
) -> None:
    folder = small_runs(*routed(rows))
    _, found = read(folder, *routed(rows))
    kinds = {f"row-{n}": ("math", "code")[n % 2] for n in range(16)}
    for round_ in found:
        assert [step.kind.name for step in round_.steps] == ["generate", "score", "score", "train"]
        read_by = {cache.scores.teacher: rows_of(cache) for cache in round_.caches}
        assert {kinds[name] for name in read_by["math"]} == {"math"}
        assert {kinds[name] for name in read_by["code"]} == {"code"}
        everything = ScoredRows([(c.rollouts.shards, c.scores.shards) for c in round_.caches])
        assert len(everything) == 8
        assert round_.policy.manifest().outcome.rows == 8
    code = found[0].caches[1]  # the student itself: what it wrote is what it would write
    for row in rows_of(code).values():
        np.testing.assert_allclose(row.teacher_logprobs, row.behavior_logprobs, atol=2e-5)


def test_a_further_teacher_makes_no_rollout_and_scores_its_own_alone(
    small_runs: SmallRuns, rows: Path, tmp_path: Path
) -> None:
    folder = small_runs.copy(tmp_path / "copy", *routed(rows))
    more = settings(rows, "rounds=1", math=MATH, code=CODE, third=ALL)
    summary = run(small_config(folder, *more), RunFolder(folder / "more"), Silent())
    assert summary["tokens"]["generated"] == 0
    assert summary["reused"] == {"rollout_units": 2, "score_units": 4}
    known = {name: each["teacher_scored"] for name, each in summary["teachers"].items()}
    first = summary_of(RunFolder(folder / "run"))
    assert (known["math"], known["code"]) == (0, 0)
    assert known["third"] == summary["tokens"]["teacher_scored"] > 0
    tokens = reports_of(RunFolder(folder / "run"))[0]["tokens"]
    assert known["third"] == tokens["generated"] == tokens["teacher_scored"]
    assert summary["teachers"]["third"]["rows"] == 8
    assert all(len(each["reverse_kl"]) == 2 for each in first["teachers"].values())


def test_a_teacher_of_all_prompts_has_the_scores_that_it_has_alone(
    rows: Path, tmp_path: Path
) -> None:
    open_setup(small_config(tmp_path, *settings(rows)[2:]))
    alone, several = settings(rows)[2:], settings(rows, all=ALL, math=MATH)
    (_, (one, *_)), (_, (two, *_)) = read(tmp_path, *alone), read(tmp_path, *several)
    assert one.caches[0].scores.artifact.name == two.caches[0].scores.artifact.name
    assert one.policy.name != two.policy.name


def test_weights_multiply_the_terms_of_a_teacher(small_runs: SmallRuns, rows: Path) -> None:
    folder = small_runs(*routed(rows))
    _, (round_, *_) = read(folder, *routed(rows))
    found = ScoredRows([(c.rollouts.shards, c.scores.shards) for c in round_.caches])
    few = [found[0], found[len(found) - 1]]
    assert [row.cache for row in few] == [0, 1]
    plain = collate(few, window_tokens=12)
    weighted = collate(few, window_tokens=12, cache_weights=(1.0, 3.0))
    torch.testing.assert_close(weighted.weights_N, plain.weights_N * (1 + 2 * weighted.row_N))
    torch.testing.assert_close(plain.weights_N.sum(), torch.tensor(1.0))


def test_a_killed_run_scores_again_what_is_lost_of_one_teacher(
    small_runs: SmallRuns, rows: Path, tmp_path: Path
) -> None:
    folder = small_runs.copy(tmp_path / "copy", *routed(rows))
    _, found = read(folder, *routed(rows))
    math, code = (cache.scores.shards for cache in found[1].caches)
    before = code.read_unit(0)
    code.invalidate(0)
    shutil.rmtree(found[1].policy.folder().parent)
    config = small_config(folder, *routed(rows))
    with pytest.raises(UserError, match=r"run score --round 1 first"):
        run_stage("train", config, RunFolder(folder / "x"), round_index=1, progress=Silent())
    line = run_stage("score", config, RunFolder(folder / "x"), round_index=1, progress=Silent())
    assert line == f"{math.name}, {code.name} are complete"
    assert code.read_unit(0) == before
    line = run_stage("train", config, RunFolder(folder / "x"), round_index=1, progress=Silent())
    assert found[1].policy.is_complete()


def test_status_plan_and_inspect_name_each_teacher(small_runs: SmallRuns, rows: Path) -> None:
    folder = small_runs(*routed(rows))
    setup, named = read(folder, *routed(rows))
    first = StatusReader(setup, RunFolder(folder / "run")).read().rounds[0]
    assert [*first.stages] == ["generate", "score", "score math", "score code", "train"]
    assert first.is_complete
    planned = estimate(setup.config, RunFolder(folder / "run"))
    scored = {step.teacher: step for step in planned.rounds[0].steps if step.teacher}
    assert [*scored] == ["math", "code"]
    assert all(step.units_left == 0 for step in scored.values())
    for cache in named[0].caches:
        name = next(iter(rows_of(cache)))
        view = inspect_rollout(
            RunFolder(folder / "run"), setup.config, round_index=0, prompt_id=name
        )
        assert view.located.cache.teacher == cache.scores.teacher


def test_the_report_draws_each_teacher(small_runs: SmallRuns, rows: Path) -> None:
    pytest.importorskip("altair", reason="pip install 'opd-stream[report]' brings what draws")
    from pipeline.report.read import read_run
    from pipeline.report.teachers import teachers_exhibit

    folder = small_runs(*routed(rows))
    found = teachers_exhibit(read_run(folder / "run"), "teachers")
    assert found.chart is not None
    assert '"domain":["math","code"]' in found.json
    (table,) = found.tables
    reports = reports_of(RunFolder(folder / "run"))
    assert len(table.rows) == 2 * len(reports)
    tokens = [each["tokens"] for each in reports[0]["teachers"].values()]
    assert sum(tokens) == reports[0]["tokens"]["generated"]
    assert [row[4] for row in table.rows[:2]] == [f"{each:,}" for each in tokens]


def test_the_plan_of_routed_prompts_counts_each_once(rows: Path, tmp_path: Path) -> None:
    planned = estimate(small_config(tmp_path, *routed(rows)), RunFolder(tmp_path / "run"))
    steps = planned.rounds[0].steps
    tokens = {(s.kind.name, s.teacher): round(s.left.tokens) for s in steps}
    assert tokens["generate", None] == 8 * 12
    assert tokens["score", "math"] == tokens["score", "code"] == 4 * 12
    assert tokens["train", None] == 8 * 12
    assert {s.kind.name: s.prompts for s in steps if not s.teacher} == {"generate": 8, "train": 8}


@pytest.mark.parametrize(
    ("teachers", "said"),
    [
        ({"math": MATH}, "8 of 16 prompts go to no teacher, the first 'row-1'"),
        (
            {"all": ALL, "art": f"{{path: {TEACHER}, when: {{subject: art}}}}"},
            r"teachers.art: when is \{subject: art\}, and no prompt has that",
        ),
        (
            {"all": ALL, "art": f"{{path: {TEACHER}, when: {{topic: art}}}}"},
            r"teachers.art: when: .*rows.jsonl:1 has no field 'topic'; it has prompt, subject",
        ),
        ({"all": "{path: no/such/model}"}, "teachers.all: .*no/such/model"),
    ],
)
def test_a_route_that_leads_nowhere_is_one_line_before_any_work(
    tmp_path: Path, rows: Path, teachers: dict[str, str], said: str
) -> None:
    config = small_config(tmp_path, *settings(rows, **teachers))
    with pytest.raises(UserError, match=said):
        estimate(config, RunFolder(tmp_path / "run"))
    with pytest.raises(UserError, match=said):
        open_setup(config)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((f"teacher={{path: {TEACHER}}}",), "teacher and teachers are both set"),
        (("replay.run=runs/x",), "replay is set with teachers"),
        (("rollouts.ahead=yes",), "rollouts.ahead is set with teachers"),
        (("staleness.max_policies=2",), "staleness.max_policies is set with teachers"),
        (("scores.codec={kind: hidden}",), "codec hidden is set with teachers"),
        (("teachers.a b={path: x}",), "teachers has the name 'a b'"),
        (("teachers.math.route=x",), "unknown key 'teachers.math.route'"),
        (("teachers.math.weight=0",), "'teachers.math.weight' is 0"),
        (("teachers.two=null",), r"'teachers.two' is None; expected a section with fields; change"),
        (("teachers.math.when={tags: []}",), r"'teachers.math.when.tags' is \[\]; expected a val"),
        (("teachers.math.when={tags: [{a: 1}]}",), r"when.tags' is .*; expected a value, or a li"),
    ],
)
def test_what_several_teachers_cannot_be(
    tmp_path: Path, rows: Path, more: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        small_config(tmp_path, *routed(rows, *more))
    assert len(caught.value.args) == 1


def test_a_route_over_a_field_named_like_a_placement_is_none() -> None:
    free = ("teachers.a.vllm", "teachers.a.vllm.memory_share", "teachers.a.server.url")
    assert all(is_below(field, PLACEMENT) for field in (*free, "pools.teacher.gpus"))
    decisive = ("teachers.a.when.vllm", "teachers.a.when.batch_rows", "teachers.a", "teachers.vllm")
    assert not any(is_below(field, PLACEMENT) for field in decisive)


def test_a_replay_of_a_run_with_named_teachers_has_their_weights(
    tmp_path: Path, rows: Path
) -> None:
    several = settings(rows, "staleness.max_epochs=2", all=ALL, math=MATH)
    config = small_config(tmp_path, *several)
    first = run(config, RunFolder(tmp_path / "run"), Silent())
    replay = (several[2], "evaluation=null", f"replay.run={tmp_path / 'run'}", *several[4:])
    again = small_config(tmp_path, "teacher=null", *replay)
    summary = run(again, RunFolder(tmp_path / "again"), Silent())
    assert summary["tokens"]["generated"] == summary["tokens"]["teacher_scored"] == 0
    assert summary["policies"] == first["policies"]
    assert [*summary["teachers"]] == ["all", "math"]
    with pytest.raises(UserError, match=r"scores of teachers all, math, .*; leave `teacher` out"):
        run(small_config(tmp_path, *replay), RunFolder(tmp_path / "other"), Silent())


def test_a_teacher_with_another_tokenizer_is_named(tmp_path: Path, rows: Path) -> None:
    other = random_teacher(tmp_path / "other", byte_level(400), stop="<eos>")
    config = small_config(tmp_path, *settings(rows, all=ALL, other=f"{{path: {other}}}"))
    with pytest.raises(UserError, match=r"^teachers.other: student .* different tokenizers"):
        open_setup(config)
    report = examine(config, quick=True)
    found = [each.found for each in report.findings if each.level == "error"]
    assert any(line.startswith("teachers.other: ") for line in found), found


def test_a_growing_window_is_bounded_as_if_each_route_led_everywhere(
    rows: Path, tmp_path: Path
) -> None:
    window = "rollouts.window={kind: linear, h0: 10, delta: 1, max_window_tokens: 99}"
    odd = f"{{path: {TEACHER}, when: {{tags: odd}}}}"
    both = settings(
        rows, window, "rounds=2", all=f"{{path: {TEACHER}, when: {{tags: all}}}}", odd=odd
    )
    config = small_config(tmp_path, *both)
    assert plan_round(config, round_index=0, first_step=0).planned_steps == 2
    assert largest_window(config) == 10 + 2 * 2 * 2 - 1  # 8 rows, for both, in steps of 4


def test_an_item_of_a_list_is_enough(tmp_path: Path, rows: Path) -> None:
    odd = f"{{path: {TEACHER}, when: {{tags: odd}}}}"
    setup = open_setup(small_config(tmp_path, *settings(rows, all=ALL, odd=odd)))
    own = setup.several[1].teacher_prompts
    assert own is not None
    assert own.layout().rows == 16
    chosen = own_prompts(own)["prompt_id"].to_pylist()
    assert chosen == [f"row-{n}" for n in range(1, 16, 2)]


def judged(completion: str, reference: str) -> bool:
    """A judge that finds half of the prompts answered, and remembers what it was asked."""
    JUDGED.append(completion)
    return reference == "1"


JUDGED: list[str] = []


@pytest.mark.parametrize("all_too", [True, False])
def test_a_judge_is_asked_of_the_rows_that_a_teacher_reads(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, all_too: bool
) -> None:
    opened: list[str] = []

    class Counted(RolloutFilter):
        def __init__(self, *arguments: Any) -> None:
            opened.append("")
            super().__init__(*arguments)

    monkeypatch.setattr("stages.score.RolloutFilter", Counted)
    keep = "rollouts.keep={judge: {kind: 'tests.test_teachers:judged'}}"
    several = {"all": ALL, "math": MATH} if all_too else {"math": MATH, "code": CODE}
    JUDGED.clear()
    more = (keep, "prompts.answer_field=answer")
    config = small_config(tmp_path, *settings(rows, *more, **several))
    run(config, RunFolder(tmp_path / "run"), Silent())
    assert len(JUDGED) == 2 * 8  # a verdict serves every teacher that reads the row
    assert len(opened) == 2 - all_too  # one of each worker that asks, for both rounds
    _, found = read(tmp_path, *settings(rows, *more, **several))
    for round_, report in zip(found, reports_of(RunFolder(tmp_path / "run")), strict=True):
        trained = ScoredRows([(c.rollouts.shards, c.scores.shards) for c in round_.caches])
        names = {trained[number].prompt_id for number in range(len(trained))}
        assert report["dropped_rows"] == {"verdict": 8 - len(names)}


def test_overlapping_routes_count_what_is_left_out_once(tmp_path: Path, rows: Path) -> None:
    """Odd rows are code, too; no teacher reads every prompt."""
    odd = f"{{path: {TEACHER}, when: {{tags: odd}}}}"
    keep = "rollouts.keep={judge: {kind: 'tests.test_teachers:judged'}}"
    more = (keep, "prompts.answer_field=answer", "rounds=1", "rollouts.prompts_per_round=16")
    JUDGED.clear()
    config = small_config(tmp_path, *settings(rows, *more, math=MATH, code=CODE, odd=odd))
    run(config, RunFolder(tmp_path / "run"), Silent())
    (report,) = reports_of(RunFolder(tmp_path / "run"))
    assert len(JUDGED) == 16
    assert report["dropped_rows"] == {"verdict": 8}
    assert report["rows"] == 4 + 4 + 4


def test_a_unit_is_scored_from_the_rows_of_its_own_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many prompts as of few: whole artifacts of them are read by no worker."""
    path, shown = tmp_path / "many.jsonl", r'view: "{prompt}\n{answer}"'
    lines = ({"prompt": f"{n} and {n}?", "subject": "ab"[n % 2], "answer": "1"} for n in range(999))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    each = {name: f"{{path: {TEACHER}, when: {{subject: {name}}}, {shown}}}" for name in "ab"}
    keep = "rollouts.keep={judge: {kind: 'tests.test_teachers:judged'}}"
    more = (keep, "prompts.answer_field=answer", "rounds=1", "rollouts.prompts_per_round=4")
    working: list[Task] = []
    read: list[str] = []
    work, part, whole = ScoreWorker.work, Artifact.read_part, Artifact.read_unit

    def worked(self: ScoreWorker, result: TaskResult) -> TaskResult:
        working.append(result.task)
        found = work(self, result)
        working.clear()
        return found

    def read_part(self: Artifact, *arguments: Any) -> Any:
        read.extend([self.name] if working else [])
        return part(self, *arguments)

    def read_unit(self: Artifact, *arguments: Any) -> Any:
        assert not working or self.recipe.kind != "prompts"
        return whole(self, *arguments)

    monkeypatch.setattr("stages.prompts.ROWS_PER_SHARD", 300)
    monkeypatch.setattr(ScoreWorker, "work", worked)
    monkeypatch.setattr(Artifact, "read_part", read_part)
    monkeypatch.setattr(Artifact, "read_unit", read_unit)
    config = small_config(tmp_path, *settings(path, *more, **each))
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    assert summary["teachers"]["a"]["rows"] + summary["teachers"]["b"]["rows"] == 4
    assert 0 < len(read) <= 4 * 4  # at most a batch a prompt: of two teachers, each with the judge


def test_a_further_teacher_that_does_not_open_costs_no_rollouts(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str | None] = []

    def prepare(self: ScoreWorker, task: Task) -> None:
        if task.only_opens and self.is_asked(task):
            opened.append(task.teacher_name)
            raise UserError("teachers.code does not open")

    monkeypatch.setattr(ScoreWorker, "prepare", prepare)
    with pytest.raises(UserError, match=r"teachers.code does not open"):
        run(small_config(tmp_path, *routed(rows)), RunFolder(tmp_path / "run"), Silent())
    assert opened == ["code"]
    assert not list((tmp_path / "store").glob("rollouts/*/units/*"))


def test_progress_and_the_worst_rollouts_name_each_teacher(
    tmp_path: Path, rows: Path, opd_stream: Command
) -> None:
    heard: list[str] = []

    class Heard(Silent):
        def start(self, stage: str, total: int, done: int = 0) -> None:
            heard.append(stage)

    keep = "rollouts.keep={max_repeated: 0.3, distinct: yes}"
    more = ("rounds=1", "rollouts.samples_per_prompt=3", keep)
    folder = RunFolder(tmp_path / "run")
    run(small_config(tmp_path, *routed(rows, *more)), folder, Heard())
    assert [stage for stage in heard if stage != "generate"] == [
        "score math",
        "score code",
        "train",
    ]
    (report,) = reports_of(folder)
    lost = sum(report["dropped_rows"].values())
    code, output, _ = opd_stream("inspect", str(folder.path), "--round", "0", "--worst", "99")
    assert code == 0
    assert output.count(" math ") + output.count(" code ") == report["rows"]
    told = [line for line in output.splitlines() if line.startswith("left out: ")]
    assert 1 < len(told) == lost
    assert all("rollouts.keep: " in line for line in told)
    _, output, _ = opd_stream("inspect", str(folder.path), "--round", "0", "--worst", "1")
    assert f"left out: {lost - 1} more" in output


@pytest.mark.slow
def test_on_ray_each_teacher_has_a_pool_and_ends_where_the_local_loop_does(
    small_runs: SmallRuns, rows: Path, tmp_path: Path
) -> None:
    more = ("rounds=1", "rollouts.keep={max_repeated: 0.9}")
    local = summary_of(RunFolder(small_runs(*routed(rows, *more)) / "run"))
    config = small_config(tmp_path, *routed(rows, *more, "executor=ray"))
    found = run(config, RunFolder(tmp_path / "run"), Silent())
    assert found["caches"] == local["caches"]
    assert found["policies"] == local["policies"]
