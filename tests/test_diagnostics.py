"""Diagnostics of the comparison: geometry of updates, the teacher behind a student's prefix."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import diagnostics
from opd_stream.errors import UserError
from opd_stream.tasks import ledger


def test_the_effective_rank_counts_directions_of_equal_strength() -> None:
    assert diagnostics.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert diagnostics.effective_rank(torch.ones(6, 4)) == pytest.approx(1, abs=1e-3)


def test_the_largest_values_hold_a_share_of_the_squares() -> None:
    values = torch.tensor([3.0, *[1.0] * 99])
    assert diagnostics.top_energy(values) == pytest.approx(9 / 108)
    assert diagnostics.top_energy(torch.tensor([2.0, 0.0])) == 1


def test_modules_are_told_by_the_names_of_weights() -> None:
    names = {
        "model.embed_tokens.weight": "embeddings",
        "model.layers.0.self_attn.q_proj.weight": "attention",
        "model.layers.0.self_attn.q_norm.weight": "norms",
        "model.layers.0.mlp.up_proj.weight": "mlp",
        "model.norm.weight": "norms",
    }
    assert {name: diagnostics.module_of(name) for name in names} == names


def test_a_run_that_goes_straight_has_one_direction() -> None:
    step = {"layers.0.mlp.up_proj.weight": torch.outer(torch.ones(3), torch.arange(1.0, 5))}
    start = {name: torch.ones(3, 4) for name in step}
    policies = [{n: w + k * step[n] for n, w in start.items()} for k in (0, 2, 3)]
    first, second, whole = diagnostics.geometry_lines(policies)[2:]
    assert "| 1.0 of 3 | 1.00 |" in first
    assert "| 0.00, 1.00, 0.00, 0.00 |" in first
    assert second.endswith("| 1.00 | 1.00 |")
    assert whole.startswith("| all rounds |")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model\*\.safetensors"):
        diagnostics.read_weights(tmp_path)


def test_the_teacher_goes_on_behind_a_prefix_and_an_ended_rollout_stays() -> None:
    problems = ledger.make_problems(count=2, seed=7)
    tokenizer = AutoTokenizer.from_pretrained(diagnostics.MODELS / "ledger-teacher")
    rows: list[Any] = [
        SimpleNamespace(
            prompt_id=problem.problem_id,
            prompt_ids=np.array(
                [tokenizer.bos_token_id, *tokenizer.encode(f"{problem.question}\n")]
            ),
            completion_ids=np.array([*tokenizer.encode("Answer: 00"), tokenizer.eos_token_id]),
        )
        for problem in problems
    ]
    assert diagnostics.continued("ledger", rows, 0) == (1.0, 0.0)
    assert diagnostics.continued("ledger", rows, 208) == (0.0, 1.0)
