"""The embedded task with a tool: the calculator, its pair, and what the student learns."""

import time
from pathlib import Path
from typing import Any

import pytest

from opd_stream.config_file import load_config
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.tasks.calculator import calculator
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import MODELS, run, summary_of

CONFIG = MODELS.parent / "calculator.yaml"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Monday receives: 42+38=", "80"),
        ("5+4=", "09"),
        ("42+38=80\nTuesday gives: 80-12= ", "68"),
        ("12-38=", "-26"),
        ("Answer: 68", None),
        ("42+38=80", None),
        ("42*38=", None),
        ("1234567890+1=", None),
        ("", None),
    ],
)
def test_the_calculator_answers_a_sum_at_the_end(said: str, answer: str | None) -> None:
    found = calculator([{"role": "assistant", "content": said}], None)
    assert found == (None if answer is None else [{"role": "tool", "content": answer}])


def test_the_pair_writes_conversations_alike() -> None:
    turns = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "1+1="},
        {"role": "tool", "content": "02"},
    ]
    for role in ("student", "teacher"):
        tokenizer: Any = open_tokenizer(MODELS / f"calculator-{role}")
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert text == "<bos>How many?\n1+1=<eos>02\n"  # behind it the student goes on


@pytest.mark.slow
def test_the_student_learns_to_ask_the_calculator(tmp_path: Path) -> None:
    changes = [f"store={tmp_path / 'store'}", "executor=local", "evaluation.samples_per_prompt=2"]
    config = load_config(CONFIG, [*changes, "evaluation.prompts.count=64"])
    start = time.process_time()
    run(config, RunFolder(tmp_path / "run"), Silent())
    assert time.process_time() - start < 180
    first, *_, last = summary_of(RunFolder(tmp_path / "run"))["evaluations"]
    assert first["benchmarks"]["ledger"]["pass@1"] <= 0.4
    assert last["benchmarks"]["ledger"]["pass@1"] >= 0.9
