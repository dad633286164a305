"""The embedded tasks: fixed by their seeds, marked strictly, and fit for the shipped models."""

import functools
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from opd_stream.tasks.ledger import (
    WEEKS,
    Task,
    draw_ledger,
    is_correct,
    make_problems,
    prompt_text,
    write_question,
    write_solution,
)

MODELS = Path(__file__).parents[1] / "configs" / "models"
FOLDERS = [MODELS / "ledger-teacher", MODELS / "ledger-student"]
MAX_BYTES_OF_ALL_WEIGHTS = 6_000_000


@functools.cache
def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return load_tokenizer(request.param)


@pytest.mark.parametrize("task", ["ledger", "routine"])
def test_problem_i_of_a_seed_is_the_same_whatever_the_count(task: Task) -> None:
    few, many = (make_problems(count=count, seed=7, task=task) for count in (3, 50))
    assert few == many[:3]


def test_a_known_problem_never_changes() -> None:
    problem = make_problems(count=1, seed=0)[0]
    assert problem.problem_id == "ledger-0-0"
    assert problem.question == (
        "Sue has 50 puzzles. On Monday Sue loses 45 puzzles. On Tuesday Sue finds 61 puzzles. "
        "On Wednesday Sue gets 14 puzzles. On Thursday Sue donates 38 puzzles. "
        "How many puzzles does Sue have?"
    )
    assert problem.solution == (
        "Sue starts with 50.\n"
        "Monday loses: 50-45,10-5=5,5-4-1=0,so 05.\n"
        "Tuesday finds: 05+61,5+1=06,0+6+0=6,so 66.\n"
        "Wednesday gets: 66+14,6+4=10,6+1+1=8,so 80.\n"
        "Thursday donates: 80-38,10-8=2,8-3-1=4,so 42.\n"
        "Answer: 42"
    )


def test_seeds_share_no_problem() -> None:
    questions = [p.question for seed in (0, 1) for p in make_problems(count=500, seed=seed)]
    assert len(set(questions)) == len(questions)


def test_the_prompt_is_the_question_and_a_newline() -> None:
    problem = make_problems(count=1, seed=3)[0]
    assert prompt_text(problem) == problem.question + "\n"


def test_every_worked_solution_is_marked_right() -> None:
    assert all(is_correct(p.solution, p.answer) for p in make_problems(count=300, seed=1))


def test_the_answer_is_the_sum_of_the_story_and_totals_stay_in_two_digits() -> None:
    rng = random.Random(5)
    for _ in range(1000):
        ledger = draw_ledger(rng)
        total = ledger.start
        for entry in ledger.entries:
            assert 10 <= entry.amount <= 99
            total += entry.amount if entry.is_gain else -entry.amount
            assert 0 <= total <= 99
        assert write_solution(ledger)[1] == f"{total:02d}"
        assert 4 <= len(ledger.entries) <= 6


def test_every_equation_of_a_solution_is_true() -> None:
    for problem in make_problems(count=300, seed=2):
        for expression, result in re.findall(r",([\d+-]+)=(\d+)", problem.solution):
            terms = re.findall(r"[+-]?\d+", expression)
            assert sum(map(int, terms)) == int(result), problem.solution


@pytest.mark.parametrize(
    "completion",
    ["Answer: 43", "Answer: 4", "Answer: 042", "Answer: 42 cards", "Answer: 42.", "42", ""],
)
def test_a_wrong_or_malformed_answer_is_marked_wrong(completion: str) -> None:
    assert is_correct("Ken starts with 42.\nAnswer: 42\n", "42")
    assert not is_correct(completion, "42")


def test_the_last_answer_counts_when_there_are_two() -> None:
    assert not is_correct("Answer: 42\nAnswer: 17", "42")


@given(text=st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = load_tokenizer(FOLDERS[0])
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_adds_no_special_token_of_its_own(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = prompt_text(make_problems(count=1, seed=0)[0])
    assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.bos_token_id not in tokenizer.encode(text)


def test_a_digit_is_one_token_and_words_are_too(tokenizer: PreTrainedTokenizerBase) -> None:
    problem = make_problems(count=1, seed=0)[0]
    assert tokenizer.tokenize("50") == ["5", "0"]
    assert len(tokenizer.tokenize("Monday loses:")) == 3
    assert len(tokenizer.encode(prompt_text(problem))) < 80
    assert len(tokenizer.encode(problem.solution)) < 208


def test_teacher_and_student_read_the_same_ids() -> None:
    teacher, student = map(load_tokenizer, FOLDERS)
    assert teacher.get_vocab() == student.get_vocab()
    text = write_question(draw_ledger(random.Random(0))) + " ünïcode ✓"
    assert teacher.encode(text) == student.encode(text)


def test_the_shipped_weights_stay_small() -> None:
    files = [file for folder in FOLDERS for file in folder.glob("*.safetensors")]
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) < MAX_BYTES_OF_ALL_WEIGHTS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_model_loads_and_prefers_the_right_words(folder: Path) -> None:
    """Both models know the format: the copied parts of a solution cost them almost nothing."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = load_tokenizer(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_id == model.generation_config.eos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    problem = make_problems(count=1, seed=0)[0]
    prompt_ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt_text(problem))]
    first_line_ids = tokenizer.encode(problem.solution.split("\n")[0])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt_ids + first_line_ids])).logits[0]
    predicted_ids = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
    assert predicted_ids == first_line_ids


def test_a_known_routine_never_changes() -> None:
    problem = make_problems(count=1, seed=0, task="routine")[0]
    assert problem.question.startswith("Ray has 12 balls. Every Monday Ray earns 28 balls.")
    lines = problem.solution.split("\n")
    assert lines[:4] == [
        "Ray starts with 12.",
        "Week 1 of 4.",
        "Monday earns: 12+28,2+8=10,1+2+1=4,so 40.",
        "Tuesday receives: 40+24,0+4=04,4+2+0=6,so 64.",
    ]
    assert lines[-1] == f"Answer: {problem.answer}" == "Answer: 16"


def test_solutions_of_routines_are_right_and_their_totals_stay_in_two_digits() -> None:
    for problem in make_problems(count=200, seed=3, task="routine"):
        assert is_correct(problem.solution, problem.answer)
        totals = [int(line[-3:-1]) for line in problem.solution.split("\n") if ",so " in line]
        weeks = problem.solution.count("Week ")
        assert weeks in WEEKS
        assert len(totals) in {weeks * 4, weeks * 5}
        assert f"after {weeks} weeks?" in problem.question


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_prompts_of_routines_are_short_and_solutions_long(role: str) -> None:
    tokenizer = load_tokenizer(MODELS / f"routine-{role}")
    problems = make_problems(count=200, seed=5, task="routine")
    prompts = [len(tokenizer.encode(problem.question)) for problem in problems]
    solutions = [len(tokenizer.encode(problem.solution)) for problem in problems]
    assert max(prompts) < 96
    assert min(solutions) > 380
    assert max(solutions) < 864
    assert 500 < sum(solutions) / len(solutions) < 700
