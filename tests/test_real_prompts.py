"""GSM8K-format prompts go through every stage, without a special case."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K-format prompts are not beside this checkout")
def test_a_round_over_256_gsm8k_prompts_and_the_second_call_does_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "configs" / "gsm8k.yaml")]
    command += ["--run-dir", str(tmp_path / "run"), "--set", f"store={tmp_path / 'store'}"]
    for field in (
        f"prompts.path={GSM8K}",
        f"evaluation.prompts.path={GSM8K}",
        "rollouts.window.tokens=24",
        "evaluation.limit=16",
        "evaluation.max_new_tokens=24",
        "executor=local",
    ):
        command += ["--set", field.replace("evaluation.limit", "evaluation.prompts.limit")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    assert summary["tokens"]["teacher_scored"] == summary["tokens"]["generated"] > 256
    assert [entry["problems"] for entry in summary["evaluations"]] == [16, 16]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing to do" in again.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
