"""The embedded code task: right programs pass their tests, careless ones fail, wherever drawn."""

import random
from typing import Any

import pytest

from opd_stream.sources import EmbeddedPrompts
from opd_stream.tasks import programs
from opd_stream.tasks.code import program_of, read_task
from opd_stream.tasks.ledger import make_problems

DRAWN = [programs.draw_lines(random.Random(seed)) for seed in range(200)]


def passes(program: str, tests: str) -> bool:
    """Of programs that this file draws itself."""
    names: dict[str, Any] = {}
    exec(program, names)
    try:
        exec(tests, names)
    except (AssertionError, ZeroDivisionError):
        return False
    return True


def test_right_programs_pass_their_tests() -> None:
    for lines in DRAWN:
        assert passes(programs.write_program(lines), programs.write_tests(lines))


@pytest.mark.parametrize(
    "operation", [each for each in programs.OPERATIONS if each.careless], ids=lambda o: o.careless
)
def test_a_careless_line_is_told_by_the_tests(operation: programs.Operation) -> None:
    lines = (programs.Line(operation=operation, number=operation.numbers[0]),)
    wrong = programs.write_program(lines, lambda each: each.careless or each.right)
    assert passes(programs.write_program(lines), programs.write_tests(lines))
    assert not passes(wrong, programs.write_tests(lines))


def test_a_question_names_every_line_of_its_program() -> None:
    for lines in DRAWN[:20]:
        assert programs.write_question(lines).count(" Let ") == len(lines)
        assert programs.write_program(lines).count("\n") == len(lines) + 1


def test_problems_are_the_same_whatever_their_count_and_readable_by_the_judge() -> None:
    few = make_problems(count=2, seed=3, task="programs")
    assert make_problems(count=5, seed=3, task="programs")[:2] == few
    assert few[0] != make_problems(count=1, seed=4, task="programs")[0]
    task = read_task(few[0].answer)
    assert task is not None
    assert task.names == {"f"}
    assert few[0].solution in program_of(few[0].solution, task).code


def test_a_config_may_have_them_as_prompts() -> None:
    assert EmbeddedPrompts(kind="programs", count=3, seed=1).kind == "programs"
