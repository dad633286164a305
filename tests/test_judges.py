"""Judges and pass@k."""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_stream.errors import UserError
from opd_stream.tasks import mathematics
from opd_stream.tasks.algebra import Algebra
from opd_stream.tasks.judges import (
    BuiltInJudge,
    FunctionJudge,
    is_exact,
    is_final_number,
    open_judge,
)
from opd_stream.tasks.numbers import final_number, whole_number
from opd_stream.tasks.pass_at_k import pass_at_k, standard_error


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("so 9 * 2 = 18\n#### 18", "16 - 3 - 4 = 9\n#### 18", True),
        ("The answer is $1,234.00.", "#### 1234", True),
        ("#### -5", "-5", True),
        ("#### 18 eggs, not 19", "#### 18", True),
        ("3.5", "#### 3.50", True),
        ("#### 5", "#### -5", False),
        ("no number here", "#### 5", False),
        ("####", "#### 5", False),
        ("", "0", False),
    ],
)
def test_the_final_number_decides(completion: str, answer: str, right: bool) -> None:
    assert is_final_number(completion, answer) is right


def test_a_marked_number_counts_before_later_ones() -> None:
    assert final_number("12 and 13 #### 7 then 9") == 7
    assert final_number("12 and 13") == 13


def test_a_judge_has_a_name() -> None:
    judge = open_judge(BuiltInJudge(kind="final_number"))
    assert (judge("so 1,004", "1004"), judge("so 5", "4")) == (True, False)
    assert open_judge(BuiltInJudge(kind="ledger"))("...\nAnswer: 07", "07")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(k: int) -> None:
    samples, correct = 5, [0, 1, 3, 5]
    shares = []
    for right in correct:
        subsets = list(combinations(range(samples), k))
        shares.append(sum(min(subset) < right for subset in subsets) / len(subsets))
    assert pass_at_k(correct, samples=samples, k=k) == pytest.approx(sum(shares) / len(shares))


def test_pass_at_more_than_there_are_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@9 needs at least 9 samples"):
        pass_at_k([1], samples=8, k=9)


def test_the_standard_error_is_over_problems() -> None:
    assert standard_error([8, 8, 8], samples=8) == 0
    assert standard_error([0, 8], samples=8) == pytest.approx(0.5)
    assert standard_error([3], samples=8) == 0


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("6 * 3 = 18\n#### 18", "...\n#### 18", True),
        ("#### 70,000.", "#### 70000", True),
        ("#### $18", "#### 18", True),
        ("the answer is 18", "#### 18", False),  # not marked
        ("#### 18.0", "#### 18", False),  # the text, not the value
        ("B", "B", True),
        ("", "", False),
    ],
)
def test_the_exact_judge_compares_marked_text(completion: str, answer: str, right: bool) -> None:
    assert is_exact(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so $x=\frac{1}{2}$, thus \boxed{0.5}", r"\frac12", True),
        (r"3 cases give \boxed{27}. Checked in 2 ways.", "27.0", True),  # AMC23
        (r"\boxed{33}", "033", True),  # AIME
        (r"\boxed{70,000}", "5 * 4 = 20\n#### 70000", True),  # GSM8K
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{(9,36)\cup(0,9)}", r"(0,9) \cup (9,36)", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{18.9}", r"\$18.90", True),
        (r"\boxed{28}", "27.0", False),
        (r"\boxed{(3, \pi)}", r"\left( 3, \frac{\pi}{2} \right)", False),
        ("I do not know", "27", False),
        ("", "27", False),
    ],
)
def test_the_math_judge_compares_values(completion: str, answer: str, right: bool) -> None:
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    assert open_judge(BuiltInJudge(kind="math"))(completion, answer) is right


@pytest.mark.parametrize(
    ("kind", "readable", "unreadable"),
    [
        ("ledger", "07", "7"),
        ("final_number", "#### 1,234", "see below"),
        ("exact", "B", "#### "),
        ("math", r"x \in [0, \infty)", r"\frac{1}{"),
        ("math", "#### 18", "#### "),
        ("math", '{"any": ["?!", "4"]}', '{"all": ["?!", "4"]}'),
        ("final_number", "1/2", "1/0"),
        ("final_number", "9" * 400, "9" * 4000),
    ],
)
def test_a_judge_knows_what_it_can_read(kind: Any, readable: str, unreadable: str) -> None:
    if kind == "math":
        pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    judge = open_judge(BuiltInJudge(kind=kind))
    assert judge.unreadable([readable, None, unreadable, readable]) == [1, 2]
    assert not judge(unreadable, unreadable)


def function_judge(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """Write the module again and forget what was imported."""
    (folder / "own_judge.py").write_text(f"def right(completion, reference):\n    {body}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_judge", raising=False)
    return "own_judge:right"


@pytest.mark.parametrize(
    ("body", "path", "line"),
    [
        ("return 0.5", "own_judge:right", r"returned 0\.5; expected True or False"),
        ("raise KeyError(reference)", "own_judge:right", r"raised KeyError: '2' on completion"),
        ("return True", "own_judge:wrong", "has nothing under the name wrong"),
        ("return True", "no_such_module:right", "cannot be imported .*ModuleNotFoundError"),
        ("return (", "own_judge:right", "cannot be imported .*SyntaxError"),
    ],
)
def test_a_function_that_cannot_judge_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, path: str, line: str
) -> None:
    function_judge(tmp_path, monkeypatch, body)
    with pytest.raises(UserError, match=line) as caught:
        open_judge(FunctionJudge(kind="function", path=path))("1", "2")
    assert "\n" not in str(caught.value)


PIECES = [
    *("####", r"\boxed{", r"\frac{", "}", "{", "\\", "1", "/", "0", ".", ",", " ", "-", "^", "$"),
    *("<think>", "</think>", r"\text{", r"\sqrt", "e", "*", "10", "½", "²", "answer is ", "\n"),
    *("(C)", "%", "=", "x", "{,}"),
]
TABLE = [
    json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("kind", ["math", "final_number", "exact"])
def test_answers_as_models_write_them_are_judged_without_an_error(kind: Any) -> None:
    if kind == "math":
        pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    judge = open_judge(BuiltInJudge(kind=kind))
    rows = [row for row in TABLE if row["judge"] == kind]
    wrong = [row for row in rows if judge(row["completion"], row["reference"]) != row["right"]]
    assert not wrong
    assert {row["right"] for row in rows} == {True, False}
    assert len(TABLE) >= 450


NUMBERS = st.fractions(max_denominator=10**6) | st.integers(-(10**40), 10**40).map(Fraction)


def written(value: Fraction) -> list[str]:
    """A number in several notations."""
    sign, top, bottom = "-" * (value < 0), abs(value.numerator), value.denominator
    forms = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", f"−{top} / {bottom}"]
    if bottom == 1:
        grouped = f"{top:,}"
        forms += [sign + grouped.replace(",", mark) for mark in (",", "{,}", r"\,", "\u2009", "")]
        forms += [rf"{sign}{top}00 \times 10^{{-2}}", f"{sign}{top}.000", f"{sign}{top}e0"]
    return forms if value < 0 else [form for form in forms if "−" not in form]


@settings(max_examples=50)
@given(NUMBERS, NUMBERS)
def test_a_number_is_the_same_in_every_notation_and_no_other(
    left: Fraction, right: Fraction
) -> None:
    reference = f"#### {left.numerator}/{left.denominator}"
    for form in written(left):
        assert whole_number(form) == left
        assert is_final_number(f"it is {form}.", reference)
        assert is_final_number(rf"\boxed{{{form}}}, of 7", reference)
    for form in written(right):
        assert is_final_number(f"it is {form}", reference) is (left == right)


@settings(max_examples=50)
@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_no_text_is_an_error(text: str) -> None:
    for kind in ("final_number", "exact", "ledger"):
        judge = open_judge(BuiltInJudge(kind=kind))
        assert not judge(text, "no such answer")
        assert judge.can_read(text) in (True, False)
    mathematics.is_equal_mathematics(text, text, lambda found, expected: False)


def test_mathematics_that_never_ends_is_wrong_and_the_next_answer_is_judged() -> None:
    """In a thread, where no alarm can be set."""
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    algebra = Algebra(cpu_seconds=1)
    with ThreadPoolExecutor(1) as threads:
        for endless in (r"9^{9^{9^{9}}}", r"2^{100000000000}"):
            assert not threads.submit(algebra.is_equal, endless, "x+1").result()
            assert threads.submit(algebra.is_equal, "2x+2-x-1", "x+1").result()
        child = algebra._running()
        os.kill(child.pid, signal.SIGKILL)
        assert threads.submit(algebra.is_equal, "2x", "x+x").result()
    algebra.close()


def test_math_without_its_process_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match="judge math cannot start its process") as caught:
        Algebra().is_equal("1", "2")
    assert "\n" not in str(caught.value)
