"""The long task: fixed by its seed, marked by the embedded task's program, and long."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from opd_stream.tasks.ledger import is_correct
from opd_stream.tasks.routine import WEEKS, make_problems

MODELS = Path(__file__).parents[1] / "configs" / "models"


def test_problem_i_of_a_seed_is_the_same_whatever_the_count() -> None:
    assert make_problems(count=3, seed=7) == make_problems(count=20, seed=7)[:3]


def test_a_known_problem_never_changes() -> None:
    problem = make_problems(count=1, seed=0)[0]
    assert problem.question.startswith("Ray has 12 balls. Every Monday Ray earns 28 balls.")
    lines = problem.solution.split("\n")
    assert lines[:4] == [
        "Ray starts with 12.",
        "Week 1 of 4.",
        "Monday earns: 12+28,2+8=10,1+2+1=4,so 40.",
        "Tuesday receives: 40+24,0+4=04,4+2+0=6,so 64.",
    ]
    assert lines[-1] == f"Answer: {problem.answer}" == "Answer: 16"


def test_solutions_are_right_and_totals_stay_in_two_digits() -> None:
    for problem in make_problems(count=200, seed=3):
        assert is_correct(problem.solution, problem.answer)
        totals = [int(line[-3:-1]) for line in problem.solution.split("\n") if ",so " in line]
        weeks = problem.solution.count("Week ")
        assert weeks in WEEKS
        assert len(totals) in {weeks * 4, weeks * 5}
        assert f"after {weeks} weeks?" in problem.question


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_prompts_are_short_and_solutions_long(role: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / f"routine-{role}", local_files_only=True)
    problems = make_problems(count=200, seed=5)
    prompts = [len(tokenizer.encode(problem.question)) for problem in problems]
    solutions = [len(tokenizer.encode(problem.solution)) for problem in problems]
    assert max(prompts) < 96
    assert min(solutions) > 380
    assert max(solutions) < 864
    assert 500 < sum(solutions) / len(solutions) < 700
