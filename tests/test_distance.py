"""The distance of a policy to its teacher, against dense float64 and its own laws."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from opd_stream.divergence import token_distances
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.store.artifact import Artifact
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_batch, rows_of
from opd_stream.store.store import Store
from opd_stream.tasks.distance import (
    EDGES,
    FIGURES,
    Bootstrap,
    MeasuredRow,
    distance_differences,
    ratio_intervals,
    text_distance,
)
from pipeline.cli.run_commands import print_run
from pipeline.comparison import compare
from pipeline.doctor.examination import examine
from pipeline.estimate import estimate
from pipeline.report.page import page as page_of
from pipeline.report.read import read_runs
from pipeline.run_folder import RunFolder
from pipeline.single_stage import run_evaluation
from stages.prompts import prompt_ids_of
from stages.step import Silent
from tests.conftest import MODELS, Command, SmallRuns, rewrite, run, small_config, summary_of

PARTS = (
    "evaluation={kind: distance, prompts: {kind: ledger, count: 6, seed: 12}, "
    "max_new_tokens: 40, samples_per_prompt: 2}",
)


@pytest.fixture(scope="module")
def measured(small_runs: SmallRuns) -> Path:
    return small_runs(*PARTS)


def distances_of(folder: Path, version: int) -> dict[str, Any]:
    summary = summary_of(RunFolder(folder / "run"))
    found = next(e for e in summary["evaluations"] if e["policy_version"] == version)
    return found["distances"]["ledger"]


def manifest_of(folder: Path, version: int) -> dict[str, Any]:
    path = folder / "store" / distances_of(folder, version)["artifact"] / "manifest.json"
    return json.loads(path.read_text())


def dense_rows(model: Any, prompt: Any, completion: Any) -> torch.Tensor:
    ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))[None]
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(1)


def figures_of(p: torch.Tensor, q: torch.Tensor) -> dict[str, torch.Tensor]:
    """By definition, of the teacher's and the student's log-probabilities [T, V]."""
    return {
        "reverse_kl": (q.exp() * (q - p)).sum(1),
        "forward_kl": (p.exp() * (p - q)).sum(1),
        "agreement": (p.argmax(1) == q.argmax(1)).double(),
        "cross_entropy": -(p.exp() * q).sum(1),
    }


def test_every_figure_of_every_token_is_that_of_plain_transformers_in_float64(
    measured: Path,
) -> None:
    store = Store(measured / "store")
    policy = summary_of(RunFolder(measured / "run"))["final_policy"]
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for folder in (MODELS / "ledger-teacher", policy)
    )
    result = manifest_of(measured, 2)
    for text, fingerprint in result["inputs"].items():
        distances = store.by_fingerprint("distances", fingerprint)
        rollouts = store.by_fingerprint("rollouts", distances.recipe.inputs["rollouts"])
        found = {name: list[float]() for name in FIGURES}
        for unit in distances.units():
            batch, table = rollouts_batch(rollouts.read_unit(unit)), distances.read_unit(unit)
            columns = {name: rows_of(table[name], np.float32) for name in FIGURES}
            for row, completion in enumerate(batch.completion_ids):
                p, q = (
                    dense_rows(m, batch.prompt_ids[row], completion) for m in (teacher, student)
                )
                for name, expected in figures_of(p, q).items():
                    np.testing.assert_allclose(columns[name][row], expected, 1e-4, 2e-5)
                    found[name] += expected.tolist()
        for name, values in found.items():
            assert result["result"]["texts"][text][name] == pytest.approx(np.mean(values), abs=1e-5)


def test_the_texts_are_the_policys_samples_and_the_teachers(measured: Path) -> None:
    store, inputs = Store(measured / "store"), manifest_of(measured, 2)["inputs"]
    authors: dict[str, str] = {}
    for text, fingerprint in inputs.items():
        recipe = store.by_fingerprint("distances", fingerprint).recipe
        rollouts = store.by_fingerprint("rollouts", recipe.inputs["rollouts"]).recipe
        assert rollouts.settings["temperature"] == 1.0
        authors[text] = rollouts.inputs["student"]
    teachers = {recipe.inputs["teacher"] for recipe in store.recipes("hidden")}
    assert authors["teacher_text"] in teachers
    assert authors["samples"] not in teachers
    # The teacher's text is made once, its side of it too; its side of the samples for each policy.
    assert len(list(store.recipes("hidden"))) == 3
    assert len(list(store.recipes("heads"))) == 1
    assert len(list(store.recipes("distances"))) == 4


def test_the_positions_add_up_to_the_total(measured: Path) -> None:
    for text in distances_of(measured, 2)["texts"].values():
        positions = text["positions"]
        assert [each["first"] for each in positions] == list(EDGES[: len(positions)])
        assert len(positions) == 3
        assert sum(each["tokens"] for each in positions) == text["tokens"]
        for name in FIGURES:
            whole = sum(each["tokens"] * each[name] for each in positions) / text["tokens"]
            assert whole == pytest.approx(text[name], rel=1e-9, abs=1e-12)


def test_a_second_call_does_nothing(measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(measured, folder)
    config = small_config(folder, *PARTS)

    def stamps() -> dict[Path, int]:
        files = (folder / "store").rglob("*")
        return {
            path: path.stat().st_mtime_ns
            for path in files
            if path.is_file() and path.parent.name not in ("runs", "digests")
        }

    before = stamps()
    run(config, RunFolder(folder / "run2"), Silent())
    assert stamps() == before
    assert distances_of(measured, 2) == next(
        e["distances"]["ledger"]
        for e in summary_of(RunFolder(folder / "run2"))["evaluations"]
        if e["policy_version"] == 2
    )


def test_a_teacher_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    same = f"student.path={MODELS / 'ledger-teacher'}"
    config = small_config(tmp_path, *PARTS, same)
    run_evaluation(config, RunFolder(tmp_path / "run"), policy_version=0, progress=Silent())
    store = Store(tmp_path / "store")
    (found,) = (tmp_path / "store" / "evaluations").iterdir()
    for text in json.loads((found / "manifest.json").read_text())["result"]["texts"].values():
        assert abs(text["reverse_kl"]) < 1e-6
        assert abs(text["forward_kl"]) < 1e-6
        assert text["agreement"] == 1.0
        assert text["cross_entropy"] > 0
    assert len(list(store.recipes("rollouts"))) == 1  # it writes its own text once


class Killed(BaseException):
    """Ends a call as a signal would: nothing catches it."""


@pytest.mark.parametrize(
    "commits",
    [5, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 3, 7, 9, 11))],
)
def test_a_killed_evaluation_resumes_to_the_same_figures(
    commits: int, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two units: of text, of the teacher's side and head, of the student's."""
    commit, left = Artifact.commit, commits

    def counted(self: Artifact, *args: Any, **options: Any) -> Any:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return commit(self, *args, **options)

    config = small_config(tmp_path, *PARTS)
    monkeypatch.setattr(Artifact, "commit", counted)
    with pytest.raises(Killed):
        run_evaluation(config, RunFolder(tmp_path / "run"), policy_version=0, progress=Silent())
    monkeypatch.undo()
    assert not (tmp_path / "store" / "evaluations").exists()
    assert len(list((tmp_path / "store").rglob("units/*.arrow"))) == commits
    run_evaluation(config, RunFolder(tmp_path / "run"), policy_version=0, progress=Silent())
    (found,) = (tmp_path / "store" / "evaluations").iterdir()
    assert json.loads((found / "manifest.json").read_text()) == manifest_of(measured, 0)


@pytest.mark.parametrize("kind", ["rollouts", "hidden", "heads"])
def test_what_is_damaged_before_the_policy_is_measured_is_made_again(
    kind: str, measured: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(measured, folder)
    for lost in ("evaluations", "distances"):
        shutil.rmtree(folder / "store" / lost)
    for shard in list((folder / "store" / kind).rglob("*.arrow")):
        shard.write_bytes(shard.read_bytes()[:-3])
    config = small_config(folder, *PARTS)
    run_evaluation(config, RunFolder(folder / "other"), policy_version=0, progress=Silent())
    artifact = manifest_of(measured, 0)
    path = folder / "store" / "evaluations" / artifact["fingerprint"][:16] / "manifest.json"
    assert json.loads(path.read_text()) == artifact


def test_a_teacher_with_a_template_of_its_own_reads_and_writes_behind_its_prompts(
    tmp_path: Path,
) -> None:
    template = "teacher.template={kind: raw, text: '= {prompt}\\n', bos: always}"
    config = small_config(tmp_path, *PARTS, template)
    run_evaluation(config, RunFolder(tmp_path / "run"), policy_version=0, progress=Silent())
    store = Store(tmp_path / "store")
    (evaluation,) = store.recipes("evaluations")
    models = {
        role: AutoModelForCausalLM.from_pretrained(
            MODELS / f"ledger-{role}", dtype=torch.float64
        ).eval()
        for role in ("teacher", "student")
    }
    for text, fingerprint in evaluation.inputs.items():
        distances = store.by_fingerprint("distances", fingerprint)
        rollouts = store.by_fingerprint("rollouts", distances.recipe.inputs["rollouts"])
        hidden = store.by_fingerprint("hidden", distances.recipe.inputs["hidden"])
        own = rollouts.recipe.inputs["prompts"]
        other = (distances if text == "teacher_text" else hidden).recipe.inputs["prompts"]
        sides = (own, other) if text == "teacher_text" else (other, own)
        theirs, students = (prompt_ids_of(store, side) for side in sides)
        batch, table = rollouts_batch(rollouts.read_unit(0)), distances.read_unit(0)
        for row, completion in enumerate(batch.completion_ids):
            name = batch.prompt_id[row]
            assert len(theirs[name]) > len(students[name])
            p = dense_rows(models["teacher"], theirs[name], completion)
            q = dense_rows(models["student"], students[name], completion)
            found = rows_of(table["forward_kl"], np.float32)[row]
            np.testing.assert_allclose(found, figures_of(p, q)["forward_kl"], 1e-4, 2e-5)


def test_gc_leaves_what_a_runs_distances_are_made_of(
    tmp_path: Path, opd_stream: Command, small_runs: SmallRuns
) -> None:
    folder = tmp_path / "copy"
    small_runs.copy(folder, *PARTS)

    def names() -> set[str]:
        kinds = ("heads", "hidden", "distances", "evaluations", "rollouts")
        return {
            f"{kind}/{path.name}" for kind in kinds for path in (folder / "store" / kind).iterdir()
        }

    before = names()
    code, said, _ = opd_stream("cache", "gc", str(folder / "store"), "--delete", "--hours=0")
    assert (code, said[:7]) == (0, "0 paths")
    assert names() == before


def test_one_evaluation_may_have_a_judge_and_a_distance(tmp_path: Path) -> None:
    held_out = {"kind": "ledger", "count": 4, "seed": 12}
    parts = {
        "right": {"prompts": held_out, "judge": {"kind": "ledger"}},
        "near": {"kind": "distance", "prompts": held_out, "max_new_tokens": 24},
    }
    sampling = "samples_per_prompt: 2, max_new_tokens: 16, temperature: 0.7, top_p: 0.9"
    text = f"evaluation={{{sampling}, benchmarks: {json.dumps(parts)}}}"
    config = small_config(tmp_path, text)
    lines = run_evaluation(config, RunFolder(tmp_path / "run"), policy_version=0, progress=Silent())
    assert lines.count("\n") == 2
    assert lines.startswith("near, on own samples: reverse KL ")
    assert "right: pass@1 " in lines
    assert "4 rows, " in lines  # samples_per_prompt of a distance is its own: 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("evaluation={kind: distance}",), r"'evaluation\.prompts' is missing; expected prompts"),
        ((*PARTS, "evaluation.temperature=0.5"), r"evaluation\.temperature is 0\.5 with kind dist"),
        ((*PARTS, "evaluation.top_p=0.9"), r"evaluation\.top_p is 0\.9 with kind distance"),
        ((*PARTS, "evaluation.judge={kind: ledger}"), r"evaluation has a judge with kind distance"),
        ((*PARTS, "evaluation.judge={kind: ledger}", "evaluation.kind=near"), r"evaluation\.kind"),
        ((*PARTS, "teacher.engine=fake"), r"hidden states, which teacher\.engine fake does not"),
        ((*PARTS, "student.engine=fake"), r"hidden states, which student\.engine fake does not"),
        (
            (*PARTS, "scores.alignment={kind: bytes}"),
            r"distance with scores\.alignment, whose teacher has another",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        run(small_config(tmp_path, *overrides), RunFolder(tmp_path / "run"), Silent())
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "store" / "rollouts").exists()


def test_a_policy_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(MODELS / "ledger-student", folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="token by token, and their tokenizers differ"):
        run_evaluation(
            small_config(tmp_path, *PARTS),
            RunFolder(tmp_path / "run"),
            policy=folder,
            progress=Silent(),
        )


def test_plan_and_run_agree_on_what_a_distance_takes(measured: Path, tmp_path: Path) -> None:
    done = estimate(small_config(measured, *PARTS), RunFolder(measured / "run"))
    assert done.sum(left=True).tokens == 0
    first = [step.kind.name for step in done.rounds[0].steps]
    sides = ["teacher's side", "distance"]
    assert first == ["evaluate", "teacher's text", *sides, *sides]
    assert [s.kind.name for s in done.rounds[2].steps[3:]] == ["evaluate", *sides, "distance"]
    before = estimate(small_config(tmp_path, *PARTS), RunFolder(tmp_path / "run"))
    for one, other in zip(before.rounds, done.rounds, strict=True):
        assert [step.kind for step in one.steps] == [step.kind for step in other.steps]
        for expected, measured_ in zip(one.steps, other.steps, strict=True):
            assert expected.left.tokens >= measured_.done.tokens > 0
            assert expected.left.bytes >= measured_.done.bytes


def test_table_compare_and_report_show_it(
    measured: Path, opd_stream: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(measured, folder)
    directory, store = folder / "run", folder / "store"
    config = small_config(folder, *PARTS)
    page = Console(record=True, width=250, file=io.StringIO())
    summary = RunFolder(directory).summary()
    assert summary is not None
    print_run(RunFolder(directory).reports(), summary, "x", console=page)
    said = page.export_text()
    found = distances_of(folder, 2)["texts"]
    assert "KL own" in said
    assert "pass@1" not in said
    for text, figure in (("samples", "reverse_kl"), ("teacher_text", "forward_kl")):
        low, high = found[text]["intervals"][figure]
        assert f"{found[text][figure]:.3f} [{low:.3f}, {high:.3f}]" in said
    rewrite(directory / "config.json", store=str(store))
    code, said, _ = opd_stream("compare", f"{directory}@0", str(directory))
    assert code == 0
    before = distances_of(folder, 0)["texts"]["samples"]["reverse_kl"]
    after = found["samples"]["reverse_kl"]
    assert f"{before:.3f}" in said
    assert f"{after - before:+.3f}" in said
    assert "ledger, the teacher's text" in said
    html = page_of(read_runs([directory]))
    assert "Distance to the teacher" in html
    assert f"{after:.3f} [" in html
    assert "No curve is drawn: no policy has been judged." in html
    assert config.evaluation is not None


def test_distances_to_other_teachers_or_prompts_are_not_compared(
    measured: Path, tmp_path: Path
) -> None:
    def evaluated(name: str, *overrides: str) -> str:
        out, config = tmp_path / f"{name}.json", small_config(tmp_path, *PARTS, *overrides)
        folder = RunFolder(tmp_path / name)
        run_evaluation(config, folder, policy_version=0, progress=Silent(), out=out)
        return str(out)

    one = evaluated("one", "evaluation.max_new_tokens=6")
    longer = evaluated("longer", "evaluation.max_new_tokens=7")
    other = evaluated(
        "other", "evaluation.max_new_tokens=6", f"teacher.path={MODELS / 'ledger-student'}"
    )
    with pytest.raises(UserError, match=r"differ in sampling\.window_tokens: 6 and 7"):
        list(compare(one, longer, Bootstrap()))
    with pytest.raises(UserError, match=r"differ in teacher\.identity"):
        list(compare(one, other, Bootstrap()))
    assert any("+0.000" in line for line in compare(one, one, Bootstrap(resamples=50)))


def test_loggers_are_told_at_the_policys_step(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[dict[str, float], int]] = []

    class Recorder:
        def log_hyperparams(self, params: dict[str, Any]) -> None:
            pass

        def log_metrics(self, figures: dict[str, float], step: int) -> None:
            if any(name.startswith("evaluation/") for name in figures):
                told.append((figures, step))

        def finalize(self, status: str) -> None:
            assert status == "success"

    monkeypatch.setattr("stages.loggers.open_loggers", lambda *arguments: [Recorder()])
    folder = tmp_path / "copy"
    shutil.copytree(measured, folder)
    shutil.rmtree(folder / "store" / "evaluations")
    shutil.rmtree(folder / "store" / "distances")
    config = small_config(folder, *PARTS, "train.loggers=[tensorboard]")
    for _ in range(2):  # the second call has nothing to tell
        run(config, RunFolder(folder / "other"), Silent())
    steps = summary_of(RunFolder(folder / "other"))["steps"]
    assert [step for _, step in told] == [0, steps]
    for (figures, _), version in zip(told, (0, 2), strict=True):
        for text, found in distances_of(measured, version)["texts"].items():
            for name in FIGURES:
                assert figures[f"evaluation/ledger/{text}/{name}"] == found[name]


def test_doctor_finds_nothing_wrong_with_a_distance(tmp_path: Path) -> None:
    found = examine(small_config(tmp_path, *PARTS), quick=True).findings
    assert not [finding.found for finding in found if finding.level == "error"]
    assert any(finding.found == "nothing is judged" for finding in found)


def test_two_heads_are_compared_over_the_ids_that_both_have() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = [torch.randn(700, width, generator=random) for width in (5, 7)]
    student = OutputHead(weight_VH=torch.randn(40, 5, generator=random), cap=3.0)
    bias = torch.randn(48, generator=random)
    teacher = OutputHead(weight_VH=torch.randn(48, 7, generator=random), bias_V=bias, scale=0.5)
    ids = torch.randint(40, (700,), generator=random)
    found = token_distances(hidden[0], student, hidden[1], teacher, ids)
    q = student(hidden[0]).double().log_softmax(1)
    whole = teacher(hidden[1]).double().log_softmax(1)
    for name, expected in figures_of(whole[:, :40].log_softmax(1), q).items():
        torch.testing.assert_close(getattr(found, name).double(), expected, atol=1e-5, rtol=1e-5)
    own = whole.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(found.teacher_logprobs.double(), own, atol=1e-5, rtol=0)


def made_rows(prompts: int, random: np.random.Generator) -> Iterator[MeasuredRow]:
    """Rows whose tokens share their prompt's level, of unequal lengths."""
    for prompt in range(prompts):
        level, tokens = random.exponential(), int(random.integers(5, 60))
        yield MeasuredRow(
            f"p{prompt}", random.exponential(level, (len(FIGURES), tokens)).astype(np.float32)
        )


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        text, _ = text_distance(made_rows(48, random), Bootstrap(resamples=500))
        low, high = text.intervals["reverse_kl"]
        held += low <= 1.0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_intervals_resample_prompts_and_not_tokens() -> None:
    rows = list(made_rows(24, np.random.default_rng(0)))
    longer = [MeasuredRow(row.prompt_id, np.tile(row.figures_MT, 9)) for row in rows]
    few, many = text_distance(rows)[0], text_distance(longer)[0]
    assert many.tokens == 9 * few.tokens
    for name in FIGURES:  # the same tokens again tell nothing new
        assert many.intervals[name] == pytest.approx(few.intervals[name], rel=1e-9)


def test_a_difference_is_paired_by_prompt() -> None:
    random = np.random.default_rng(1)
    rows = list(made_rows(24, random))
    nearer = [MeasuredRow(row.prompt_id, row.figures_MT - 0.25) for row in rows]
    (_, left), (_, right) = text_distance(rows), text_distance(nearer)
    found = distance_differences(left, right)
    for name in FIGURES:
        assert found[name].difference == pytest.approx(-0.25, abs=1e-6)
        assert found[name].interval == pytest.approx((-0.25, -0.25), abs=1e-6)
    with pytest.raises(ValueError, match="24 prompts beside 23"):
        distance_differences(left, {name: right[name] for name in sorted(right)[1:]})


def test_a_row_that_is_not_finite_is_left_out_and_counted() -> None:
    rows = list(made_rows(6, np.random.default_rng(2)))
    lost = MeasuredRow("p0", np.full((len(FIGURES), 3), np.nan, np.float32))
    whole, _ = text_distance(rows)
    found, _ = text_distance([*rows, lost])
    assert found.left_out == 1
    assert found.model_copy(update={"left_out": 0}) == whole
    with pytest.raises(ValueError, match="no completion has a token"):
        text_distance([lost])


def test_one_prompt_has_an_interval_of_no_width() -> None:
    ((low, high),) = ratio_intervals([np.array([[4.0, 2.0]])])
    assert low == high == 0.5


def test_the_policys_side_is_no_part_of_the_teachers_recipe(measured: Path) -> None:
    store = Store(measured / "store")
    students = {recipe.inputs["student"] for recipe in store.recipes("distances")}
    assert len(students) == 2

    def of_teacher(recipe: Recipe) -> bool:
        return not students & set(recipe.inputs.values())

    assert all(map(of_teacher, store.recipes("hidden")))


UNASKED = ("evaluation=null", "rounds=1", "prompts.count=20", "held_out_prompts=6")


def test_a_run_without_evaluation_measures_it_on_prompts_that_no_round_reads(
    tmp_path: Path,
) -> None:
    config, folder = small_config(tmp_path, *UNASKED), RunFolder(tmp_path / "run")
    (line,) = [note for note in estimate(config, folder).notes if "held_out" in note]
    assert "on 6 training prompts that no round reads (held_out_prompts=0: not)" in line
    summary = run(config, folder, Silent())
    assert [e["policy_version"] for e in summary["evaluations"]] == [0, 1]
    assert summary["evaluations"][0]["distances"]["held_out"]["prompts"] == 6
    store = Store(tmp_path / "store")
    read: dict[str, set[str]] = {}
    for recipe in store.recipes("rollouts"):
        order, artifact = recipe.settings["selection"]["order"], store.artifact(recipe)
        for unit in artifact.units():
            names = artifact.read_unit(unit)["prompt_id"].to_pylist()
            read.setdefault(order, set()).update(names)
    assert {order: len(names) for order, names in read.items()} == {"shuffled": 8, "held_out": 6}
    assert not read["shuffled"] & read["held_out"]
    assert estimate(config, folder).sum(left=True).tokens == 0
    lines = run_evaluation(config, folder, policy_version=1, progress=Silent())
    assert lines.startswith("held_out, on own samples")
    assert run(config, folder, Silent()) == summary


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("prompts.count=13", "the rounds read 8 of 13 prompts, which leaves fewer than 6"),
        ("teacher.engine=fake", "teacher.engine gives no hidden states"),
        ("held_out_prompts=0", None),
    ],
)
def test_where_it_cannot_be_measured_it_is_left_out_and_plan_says_why(
    override: str, why: str | None, tmp_path: Path
) -> None:
    config = small_config(tmp_path, *UNASKED, override)
    found = estimate(config, RunFolder(tmp_path / "run"))
    said = [note for note in found.notes if "no policy is evaluated" in note]
    expected = f"no policy is evaluated: there is no evaluation section, and {why}"
    assert said == ([] if why is None else [expected])
    assert not [s for each in found.rounds for s in each.steps if s.kind.stage == "evaluate"]
