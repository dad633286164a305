"""The share of a ten-minute run on Ray that is no work of a stage: `make bench-ray-share`.

The quickstart with more prompts, in two pools of Ray Data, is timed from outside. Its engines sleep
as long as they are told, as if they worked elsewhere; training is real. Start-up is from the call
to the first unit's begin: imports, Ray, workers. The rest is what no stage accounts for after that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SETTINGS = (
    "executor=ray",
    "student.engine=fake",
    "teacher.engine=fake",
    "prompts.count=512",
    "rollouts.prompts_per_round=512",
    "rollouts.window={kind: fixed, tokens: 208}",
    "staleness.policy_drift=1000",  # random rollouts: every planned step is taken
    "staleness.effective_sample_fraction=1e-9",
    "train.learning_rate=1e-5",
    "evaluation.samples_per_prompt=1",
    "evaluation.pass_at=[1]",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--pace", type=float, default=1e-3, help="seconds a token")
    parser.add_argument("--unit", type=int, default=64, help="prompts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.rounds, arguments.pace, arguments.unit)
    print("| " + " | ".join(figures) + " |")
    print("|" + "---|" * len(figures))
    print("| " + " | ".join(figures.values()) + " |")


def measure(folder: Path, rounds: int, pace: float, unit: int) -> dict[str, str]:
    """Seconds and shares of one run."""
    fields = (*SETTINGS, f"rounds={rounds}", f"prompts_per_unit={unit}", f"store={folder}/store")
    command = [sys.executable, "-m", "pipeline", "run", str(QUICKSTART)]
    command += ["--run-dir", str(folder / "run")]
    command += [part for field in fields for part in ("--set", field)]
    environment = {**os.environ, "OPD_STREAM_FAKE_SECONDS_PER_TOKEN": str(pace)}
    start = time.time()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    whole = time.time() - start
    seconds = json.loads((folder / "run" / "summary.json").read_text())["seconds"]
    first = min(record["made_at"] - record["seconds"] for record in commits(folder / "store"))
    other = whole - (seconds["wall"] - seconds["other"])
    return {
        "command, s": f"{whole:.0f}",
        "generate": f"{seconds['generate']:.0f}",
        "score": f"{seconds['score']:.0f}",
        "train": f"{seconds['train']:.0f}",
        "evaluate": f"{seconds['evaluate']:.0f}",
        "start-up": f"{first - start:.1f}",
        "no stage, after it": f"{other - (first - start):.1f}",
        "share of both": f"{other / whole:.1%}",
        "share after start-up": f"{(other - (first - start)) / whole:.1%}",
    }


def commits(store: Path) -> list[dict[str, float]]:
    """The commit records of what workers made."""
    paths = [*store.glob("rollouts/*/units/*.json"), *store.glob("scores/*/units/*.json")]
    return [json.loads(path.read_text()) for path in paths]


if __name__ == "__main__":
    main()
