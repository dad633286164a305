"""Evaluation: estimates against enumeration, intervals that cover, generations that stay."""

import io
import json
import shutil
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from opd_stream.errors import UserError
from opd_stream.store.artifact import EvaluationManifest
from opd_stream.store.garbage import garbage
from opd_stream.store.sealed import load_record
from opd_stream.store.store import Store
from opd_stream.tasks.distance import Bootstrap
from opd_stream.tasks.pass_at_k import Counts, Difference, differences, estimates, student_quantile
from pipeline.cli.run_commands import print_run
from pipeline.comparison import compare
from pipeline.run_folder import RunFolder
from pipeline.single_stage import run_evaluation
from stages.step import Silent
from tests.conftest import MODELS, Command, rewrite, run, small_config
from tests.test_judges import function_judge

WHOLE = ("evaluation.max_new_tokens=208", "evaluation.prompts.count=12")


def evaluate(folder: Path, *overrides: str, name: str = "run", **which: Any) -> str:
    config = small_config(folder, *overrides)
    return run_evaluation(config, RunFolder(folder / name), progress=Silent(), **which)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded student and teacher, evaluated on the same problems."""
    folder = tmp_path_factory.mktemp("measured")
    evaluate(folder, *WHOLE, policy_version=0, out=folder / "student.json")
    policy = MODELS / "ledger-teacher"
    evaluate(folder, *WHOLE, policy=policy, out=folder / "teacher.json")
    return folder


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> None:
        raise AssertionError("an engine was asked for")

    monkeypatch.setattr("stages.workers.open_engine", refused)


# Estimates and intervals


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_of_each_problem_is_the_share_of_subsets_with_a_right_sample(k: int) -> None:
    samples = 6
    counts = Counts(correct={f"p{right}": right for right in range(7)}, samples=samples)
    for right, (chance,) in enumerate(counts.columns([k])):
        subsets = list(combinations(range(samples), k))
        assert chance == pytest.approx(sum(min(s) < right for s in subsets) / len(subsets))


def test_avg_is_the_mean_over_all_samples_and_several_sets_count_the_same() -> None:
    one = Counts(correct={"a": 1, "b": 3}, samples=4)
    many = Counts(correct={str(number): 0 for number in range(50)}, samples=4)
    assert estimates([one], (1,))["avg@4"][0] == pytest.approx(0.5)
    assert estimates([one, many], (1,))["pass@1"][0] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples"):
        estimates([one], (5,))


HARD, MIXED, EASY = (0.3, 3.0), (0.5, 0.8), (3.0, 0.3)  # Beta distributions of the chances


def counts_of(right: NDArray[np.int64], samples: int) -> Counts:
    return Counts(correct={f"p{n}": int(c) for n, c in enumerate(right)}, samples=samples)


@pytest.mark.parametrize("samples", [4, 8])
@pytest.mark.parametrize("problems", [15, 30, 100])
@pytest.mark.parametrize("kind", [HARD, MIXED, EASY], ids=["hard", "mixed", "easy"])
def test_intervals_hold_the_truth_as_often_as_they_say(
    kind: tuple[float, float], problems: int, samples: int
) -> None:
    """Of one policy, and of the difference to one that learned; few problems show few values."""
    random, trials = np.random.default_rng([problems, samples]), 600
    chances = random.beta(*kind, size=200_000)
    truth, gain = kind[0] / sum(kind), (chances**0.6 - chances).mean()
    held, paired = 0, 0
    for _ in range(trials):
        before_P = random.beta(*kind, size=problems)
        sides = [
            counts_of(random.binomial(samples, chance_P), samples)
            for chance_P in (before_P, before_P**0.6)
        ]
        _, (low, high) = estimates(sides[:1], (1,))["pass@1"]
        held += low <= truth <= high
        low, high = differences(sides[:1], sides[1:], (1,))["pass@1"].interval
        paired += low <= gain <= high
    # 0.03 is three standard errors of 600 trials; counts of few problems are discrete.
    assert 0.92 <= held / trials <= (0.99 if problems == 15 else 0.98)
    assert 0.92 <= paired / trials <= 0.98


def test_an_interval_depends_on_the_counts_alone_and_never_vanishes() -> None:
    forward = Counts(correct={"a": 0, "b": 2, "c": 1, "d": 2}, samples=2)
    backward = Counts(correct=dict(reversed(forward.correct.items())), samples=2)  # type: ignore[call-overload]
    assert estimates([forward], (1, 2)) == estimates([backward], (1, 2))
    none = counts_of(np.zeros(30, np.int64), 8)
    assert estimates([none], (1,))["pass@1"] == (0, (0, pytest.approx(0.122, abs=1e-3)))
    alone = counts_of(np.array([1]), 2)
    low, high = estimates([alone], (1,))["pass@1"][1]
    assert 0 <= low < 0.5 < high <= 1
    low, high = differences([none], [none], (1,))["pass@1"].interval
    assert low == -high < 0


def test_several_sets_count_the_same_and_narrow_the_interval() -> None:
    random = np.random.default_rng(2)
    sets = [counts_of(random.binomial(4, random.beta(2, 2, size=40)), 4) for _ in range(4)]
    widths = [
        high - low for _, (low, high) in (estimates(s, (1,))["pass@1"] for s in (sets, sets[:1]))
    ]
    assert widths[0] / widths[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("degrees", "value"), [(9, 2.2622), (29, 2.0452), (99, 1.9842)])
def test_quantiles_are_those_of_the_tables(degrees: int, value: float) -> None:
    assert student_quantile(0.95, degrees) == pytest.approx(value, abs=1e-3)
    with pytest.raises(ValueError, match="expected a share"):
        student_quantile(1.0, degrees)


def test_pairing_takes_out_how_hard_the_problems_are() -> None:
    """One policy is right a little more often everywhere; unpaired intervals overlap."""
    random = np.random.default_rng(3)
    base = random.integers(0, 60, size=200)
    left = Counts(correct={f"p{n:03d}": int(c) for n, c in enumerate(base)}, samples=64)
    right = Counts(correct={name: c + 3 for name, c in left.correct.items()}, samples=64)
    found = differences([left], [right], (1,))["pass@1"]
    assert found.difference == pytest.approx(3 / 64)
    assert found.interval == pytest.approx((3 / 64, 3 / 64), abs=2e-3)
    (_, (_, high)), (_, (low, _)) = (estimates([c], (1,))["pass@1"] for c in (left, right))
    assert low < high


def test_a_comparison_under_the_null_excludes_zero_as_often_as_it_says() -> None:
    random = np.random.default_rng(11)

    def found() -> Difference:
        chances = random.beta(0.5, 0.5, size=50)
        left, right = (counts_of(random.binomial(8, chances), 8) for _ in range(2))
        return differences([left], [right], (1,))["pass@1"]

    excluded = sum(not low <= 0 <= high for low, high in (found().interval for _ in range(400)))
    assert 0.02 <= excluded / 400 <= 0.09


def test_a_comparison_of_other_problems_is_refused() -> None:
    left = Counts(correct={"a": 1, "b": 1}, samples=2)
    for other in ({"a": 1, "c": 1}, {"a": 1}):
        with pytest.raises(ValueError, match="expected the same problems"):
            differences([left], [Counts(correct=other, samples=2)], (1,))


# What a command makes, and what it finds


def test_benchmarks_have_settings_of_their_own_and_a_mean(tmp_path: Path) -> None:
    benchmarks = {
        "short": {"prompts": {"kind": "ledger", "count": 3, "seed": 5}, "judge": {"kind": "exact"}},
        "long": {
            "prompts": {"kind": "ledger", "count": 2, "seed": 6},
            "judge": {"kind": "ledger"},
            "samples_per_prompt": 4,
            "max_new_tokens": 208,
        },
    }
    evaluation = {"max_new_tokens": 8, "samples_per_prompt": 2, "benchmarks": benchmarks}
    asked = f"evaluation={json.dumps(evaluation)}"
    lines = evaluate(tmp_path, asked, policy_version=0, out=tmp_path / "out.json").splitlines()
    assert [line.split(":")[0] for line in lines] == ["short", "long", "mean of 2"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert [e["samples"] for e in found["benchmarks"].values()] == [2, 4]
    assert found["benchmarks"]["short"]["mean_tokens"] <= 8 < 16
    assert found["benchmarks"]["long"]["mean_tokens"] > 50
    mean = sum(e["pass@2"] for e in found["benchmarks"].values()) / 2
    assert found["pass@2"] == pytest.approx(mean)
    assert "pass@4" not in found


class Warnings(Silent):
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, line: str) -> None:
        self.lines.append(line)


def test_a_reference_that_no_judge_can_read_costs_its_row_and_is_named(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    references = ["#### 18", None, "see below", "1/2"]
    rows = [{"prompt": f"{n} + 1?", "answer": answer} for n, answer in enumerate(references)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"kind: jsonl, path: {tmp_path / 'rows.jsonl'}"
    asked = ("evaluation.max_new_tokens=4", "evaluation.judge.kind=final_number")
    config = small_config(
        tmp_path, *asked, f"evaluation.prompts={{{source}, answer_field: answer}}"
    )
    told = Warnings()
    out = {"policy_version": 0, "out": tmp_path / "out.json"}
    said = run_evaluation(config, RunFolder(tmp_path / "run"), progress=told, **out)
    assert "2 problems, 2 left out for their references × 2 samples" in said
    assert told.lines == [
        "evaluation (rows): 2 of 4 prompts are left out of the verdicts: they have no reference "
        "answer that judge final_number can read (row-1: none, row-2: 'see below')"
    ]
    entry = json.loads((tmp_path / "out.json").read_text())["benchmarks"]["rows"]
    assert (entry["problems"], entry["left_out"], entry["mean_tokens"]) == (2, 2, 4)
    verdicts = Store(tmp_path / "store").by_fingerprint("evaluations", entry["artifact"][12:])
    result = load_record(EvaluationManifest, verdicts.folder / "manifest.json").result
    assert (list(result.correct), result.left_out) == (["row-0", "row-3"], ("row-1", "row-2"))
    request.getfixturevalue("no_engine")
    with pytest.raises(
        UserError, match=r"none of 4 prompts has a reference .*row-0: none"
    ) as caught:
        evaluate(tmp_path, *asked, f"evaluation.prompts={{{source}}}", policy_version=0)
    assert "\n" not in str(caught.value)


def test_a_run_that_asks_for_math_without_the_library_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_engine: None
) -> None:
    monkeypatch.setattr("opd_stream.tasks.judges.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install math-verify") as caught:
        evaluate(tmp_path, "evaluation.judge.kind=math", policy_version=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_function_of_ones_own_judges_and_its_source_names_the_verdicts(
    tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch, no_engine: None
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    said: list[str] = []
    for body in ("return len(reference) == 2", "return len(reference) == 20 or False"):
        path = function_judge(tmp_path, monkeypatch, body)
        judge = f"evaluation.judge={{kind: function, path: '{path}'}}"
        said.append(evaluate(measured, *WHOLE, judge, policy_version=0))
    assert "pass@1 1.000" in said[0]
    assert "pass@1 0.000" in said[1]
    before = sorted((measured / "store" / "evaluations").iterdir())
    function_judge(tmp_path, monkeypatch, "return 1 / 0")
    with pytest.raises(UserError, match="raised ZeroDivisionError"):
        evaluate(measured, *WHOLE, judge, policy_version=0)
    assert sorted((measured / "store" / "evaluations").iterdir()) == before


def test_judging_again_generates_nothing(measured: Path, no_engine: None) -> None:
    for override in (
        "evaluation.judge.kind=exact",
        "evaluation.judge.kind=final_number",
        "evaluation.pass_at=[2]",
        "evaluation.samples_per_prompt=1",
    ):
        assert "pass@1" in evaluate(measured, *WHOLE, override, policy_version=0)
    lost = garbage(Store(measured / "store"), grace_seconds=0)
    assert not [folder for folder in lost if folder.parent.name in ("rollouts", "evaluations")]
    with pytest.raises(UserError, match="an engine was asked for"):
        evaluate(measured, *WHOLE, "evaluation.seed=1", policy_version=0)


def test_fewer_samples_are_the_first_ones(measured: Path, tmp_path: Path, no_engine: None) -> None:
    fewer = "evaluation.samples_per_prompt=1"
    evaluate(measured, *WHOLE, fewer, policy_version=0, out=tmp_path / "fewer.json")
    store = Store(measured / "store")
    all_of, first = (
        json.loads(path.read_text())["benchmarks"]["ledger"]["artifact"].split("/")[1]
        for path in (measured / "student.json", tmp_path / "fewer.json")
    )
    verdicts = [store.by_fingerprint("evaluations", name) for name in (all_of, first)]
    two, one = (
        load_record(EvaluationManifest, each.folder / "manifest.json").result for each in verdicts
    )
    assert verdicts[0].recipe.inputs == verdicts[1].recipe.inputs
    assert (one.samples, two.samples) == (1, 2)
    assert all(two.correct[name] - right in (0, 1) for name, right in one.correct.items())
    assert 0 < one.completion_tokens < two.completion_tokens


def test_a_copied_policy_finds_its_answers_and_another_family_gets_its_own(
    measured: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    other = MODELS / "routine-student"  # reads other tokens
    absent = ("student.path=none", "teacher.path=none", "evaluation.max_new_tokens=8")
    first = evaluate(measured, *WHOLE, *absent, policy=other, name="other")
    assert first.startswith("ledger: pass@1 ")
    request.getfixturevalue("no_engine")
    shutil.copytree(MODELS / "ledger-student", tmp_path / "copy")
    copied = evaluate(measured, *WHOLE, policy=tmp_path / "copy", out=tmp_path / "copy.json")
    original = json.loads((measured / "student.json").read_text())
    assert original["benchmarks"]["ledger"]["artifact"] in copied
    with pytest.raises(UserError, match="is no checkpoint: found nothing"):
        evaluate(measured, *WHOLE, policy=tmp_path / "none")
    with pytest.raises(UserError, match=r"neither of --policy-version and --policy"):
        evaluate(measured, *WHOLE)
    with pytest.raises(UserError, match=r"there is no folder"):
        evaluate(measured, *WHOLE, policy=other, out=tmp_path / "none" / "out.json")


def test_a_policy_is_named_by_its_version(tmp_path: Path, opd_stream: Command) -> None:
    with pytest.raises(UserError, match="the initial student\\) to 2; choose one"):
        evaluate(tmp_path, policy_version=3)
    with pytest.raises(UserError, match="run train --round 0 first"):
        evaluate(tmp_path, policy_version=1)
    code, _, said = opd_stream("evaluate", str(MODELS.parent / "quickstart.yaml"), "--round", "3")
    assert code == 2
    assert "expected --policy-version: 0 is the initial student, 4 the policy after round 3" in said


def test_a_comparison_has_the_sign_and_the_figures_of_its_sides(measured: Path) -> None:
    student, teacher = str(measured / "student.json"), str(measured / "teacher.json")
    a, b = (
        json.loads(Path(p).read_text())["benchmarks"]["ledger"]["pass@1"]
        for p in (student, teacher)
    )
    assert a < b
    (row,) = [line for line in compare(student, teacher, Bootstrap()) if "pass@1" in line]
    assert row.split()[:6] == ["ledger", "12", "pass@1", f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}"]
    (same,) = [line for line in compare(student, student, Bootstrap()) if "pass@1" in line]
    assert "+0.000   [-0." in same


def test_a_run_is_compared_with_its_own_start(tmp_path: Path) -> None:
    benchmarks = {
        name: {"prompts": {"kind": "ledger", "count": 4, "seed": seed}, "judge": {"kind": "ledger"}}
        for name, seed in (("one", 5), ("two", 6))
    }
    evaluation = {"max_new_tokens": 16, "samples_per_prompt": 2, "benchmarks": benchmarks}
    folder = tmp_path / "run"
    config = small_config(tmp_path, "rounds=1", f"evaluation={json.dumps(evaluation)}")
    run(config, RunFolder(folder), Silent())
    console = Console(width=140, file=io.StringIO(), record=True)
    written = RunFolder(folder).summary()
    assert written is not None
    print_run(RunFolder(folder).reports(), written, "run", console=console)
    table = console.export_text()
    assert all(f"\n{name}: pass@1 " in table for name in ("one", "two", "mean of 2"))
    lines = list(compare(f"{folder}@0", str(folder), Bootstrap()))
    assert lines[0] == f"A: {folder}@0   B: {folder}"
    assert [line.split("  ")[0] for line in lines[2::2]] == ["one", "two", "mean of 2"]
    with pytest.raises(UserError, match="has no evaluation of policy version 7"):
        list(compare(f"{folder}@7", str(folder), Bootstrap()))
    rewrite(folder / "summary.json", finished=False, rounds=0)
    with pytest.raises(UserError, match="is not finished \\(0 of 1 rounds\\)"):
        list(compare(f"{folder}@0", str(folder), Bootstrap()))


def test_answers_are_written_with_their_verdicts(measured: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    evaluate(measured, *WHOLE, policy_version=0, answers=file)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = json.loads((measured / "student.json").read_text())
    samples = found["samples"]
    assert len({(row["prompt_id"], row["sample_index"]) for row in rows}) == len(rows)
    assert len(rows) == found["problems"] * samples
    assert sum(row["is_right"] for row in rows) / len(rows) == pytest.approx(found["pass@1"])
    for row in rows:
        assert row["is_right"] == row["completion"].endswith(f"Answer: {row['reference']}")
    with pytest.raises(UserError, match=r"--answers .* is a folder"):
        evaluate(measured, *WHOLE, policy_version=0, answers=tmp_path)


def test_what_cannot_be_compared_is_one_line(measured: Path, tmp_path: Path) -> None:
    student = str(measured / "student.json")
    judge, out = "evaluation.judge.kind=exact", tmp_path / "exact.json"
    evaluate(measured, *WHOLE, judge, policy_version=0, out=out)
    cases = {
        str(out): r"differ in judge\.kind: 'ledger' and 'exact'; .*expected the same problems",
        str(tmp_path / "none"): "does not exist; expected RUN, RUN@POLICY_VERSION",
        str(tmp_path): "has no config.json",
        f"{measured / 'run'}@x": "names the policy version 'x'",
        str(measured / "small.yaml"): "is not valid JSON",
    }
    for other, line in cases.items():
        with pytest.raises(UserError, match=line) as caught:
            list(compare(student, other, Bootstrap()))
        assert "\n" not in str(caught.value)


def test_the_commands_tell_a_mistake_in_one_line(
    opd_stream: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(MODELS.parent / "quickstart.yaml")
    for arguments in (["evaluate", config], ["compare", "none-a", "none-b"]):
        code, _, said = opd_stream(*arguments)
        assert code == 2, said
        assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
