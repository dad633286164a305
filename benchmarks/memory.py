"""Resident memory of a run from round to round: `python -m benchmarks.memory --rounds 200`.

A tiny run of the embedded models in this process (executor local, no evaluation); prints the
resident set after each tenth of the rounds and the growth per round over the second half.
"""

import argparse
import tempfile
from pathlib import Path

from opd_stream.config_file import load_config
from pipeline.run import run
from pipeline.run_folder import RunFolder
from stages.step import Silent

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = (
    "executor=local",
    "evaluation=null",
    "prompts.count=64",
    "rollouts.prompts_per_round=8",
    "rollouts.window={kind: fixed, tokens: 16}",
    "scores.top_k=4",
    "train.rows_per_step=4",
    "train.schedule=constant",
    "train.warmup=0",
    "train.learning_rate=1e-5",
)


class Resident(Silent):
    """Notes the resident set, in MiB, when each round's training begins."""

    def __init__(self) -> None:
        self.mebibytes: list[float] = []

    def start(self, stage: str, total: int, done: int = 0) -> None:
        if stage == "train":
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.mebibytes.append(pages * 4096 / 2**20)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    resident = Resident()
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, f"rounds={rounds}", f"store={folder}/store"]
        run(load_config(CONFIG, settings), RunFolder(Path(folder) / "run"), resident)
    print("| round | resident, MiB |\n|---|---|")
    for number in range(0, rounds, max(1, rounds // 10)):
        print(f"| {number} | {resident.mebibytes[number]:.1f} |")
    half = resident.mebibytes[rounds // 2 :]
    print(f"\ngrowth over the second half: {(half[-1] - half[0]) / len(half):.3f} MiB a round")


if __name__ == "__main__":
    main()
