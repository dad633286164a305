"""A run that starts from a policy of another run takes its weights, and nothing beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import run, small_config

ADAPTED = (
    "rounds=1",
    "evaluation=null",
    "train.learning_rate=3e-3",
    "train.lora={rank: 4, alpha: 8}",
    "train.extrapolation={rows: 4}",
    "staleness.policy_drift=10",
)


def trained(folder: Path, name: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
    """A run of one round: its policy, and its report."""
    run(small_config(folder, *ADAPTED, *overrides), RunFolder(folder / name), Silent())
    report = json.loads((folder / name / "rounds" / "0000" / "report.json").read_text())
    return Path(report["policy"]["folder"]), report


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy of an earlier run: merged weights, `adapter/` and `extrapolation/`."""
    policy, _ = trained(tmp_path_factory.mktemp("earlier"), "run")
    assert (policy / "adapter").is_dir()
    assert (policy / "extrapolation").is_dir()
    return policy


def test_an_adapter_of_another_run_is_not_applied_again(earlier: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    rank = "train.lora={rank: 2, alpha: 8}"
    policy, report = trained(tmp_path, "run", f"student.path={earlier}", rank)
    assert report["sampler_gap"] < 1e-5  # the student that is trained is the one that sampled
    assert json.loads((policy / "adapter" / "adapter_config.json").read_text())["r"] == 2
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()[name]
        for folder in (earlier, policy)
    )
    assert 0 < torch.linalg.matrix_rank(after - before, rtol=1e-3) <= 2


@pytest.mark.slow
def test_an_extrapolation_of_another_run_gives_no_direction(earlier: Path, tmp_path: Path) -> None:
    _, report = trained(tmp_path, "run", f"student.path={earlier}", "train.lora=null")
    assert report["sampler_gap"] < 1e-5
    assert [entry["step"] for entry in report["extrapolations"]] == [1, 2, 4]
