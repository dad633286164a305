"""Memory of a run from round to round, in this process (executor local).

`python -m benchmarks.memory --rounds 200` runs the embedded models and prints the growth of what is
resident. `python -m benchmarks.memory --config configs/real.yaml --rounds 3` runs a config as it
is, engines and training in one process, and prints the peaks of each round. Anonymous memory is
what a process holds for itself; files that are mapped come on top and can be given back.
"""

import argparse
import tempfile
import threading
from collections import defaultdict
from pathlib import Path

from opd_stream.config_file import load_config
from pipeline.run import run
from pipeline.run_folder import RunFolder
from stages.step import Silent

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SETTINGS = (
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
FIELDS = ("RssAnon", "RssFile")
EVERY_SECONDS = 0.01


def resident() -> tuple[float, float]:
    """Anonymous memory and mapped files that are resident now, MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0].rstrip(":"): int(words[1]) for words in lines if words[0][:-1] in FIELDS}
    anonymous, files = (found[name] * 1024 / 1e6 for name in FIELDS)
    return anonymous, files


class Peaks(Silent):
    """Notes what is resident when training begins, and the peaks of both halves of each round."""

    def __init__(self) -> None:
        self.at_training: list[float] = []  # by round, anonymous and files
        self.peaks: dict[tuple[int, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self._round, self._half = 0, "engines"
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        if stage == "train":
            self.at_training.append(sum(resident()))
        elif self._half == "training":
            self._round, self._half = self._round + 1, "engines"

    def say(self, line: str) -> None:
        if line.startswith("round ") and self._half == "training":
            self._round, self._half = self._round + 1, "engines"

    def begin_training(self) -> None:
        self._half = "training"

    def end(self) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(EVERY_SECONDS):
            anonymous, files = resident()
            key = (self._round, self._half)
            most, whole = self.peaks[key]
            self.peaks[key] = (max(most, anonymous), max(whole, anonymous + files))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--config", type=Path, help="a config to run as it is")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="as of `run`")
    asked = parser.parse_args()
    own = SETTINGS if asked.config is None else ()
    watched = _watched(asked.config or CONFIG, [*own, *asked.set], asked.rounds)
    if asked.config is not None:
        print("| round | engines: anonymous, all | training: anonymous, all |\n|---|---|---|")
        for number in range(asked.rounds):
            cells = (watched.peaks[number, half] for half in ("engines", "training"))
            print(f"| {number} | " + " | ".join(f"{a:.0f}, {b:.0f} MB" for a, b in cells) + " |")
        return
    found = watched.at_training
    print("| round | resident, MB |\n|---|---|")
    for number in range(0, asked.rounds, max(1, asked.rounds // 10)):
        print(f"| {number} | {found[number]:.1f} |")
    half = found[asked.rounds // 2 :]
    print(f"\ngrowth over the second half: {(half[-1] - half[0]) / len(half):.3f} MB a round")


def _watched(config: Path, settings: list[str], rounds: int) -> Peaks:
    import stages.train as train_stage

    watched, plain = Peaks(), train_stage.train

    def noted(*arguments: object) -> None:
        watched.begin_training()
        plain(*arguments)  # pyright: ignore[reportArgumentType]

    train_stage.train = noted
    try:
        with tempfile.TemporaryDirectory() as folder:
            of_run = ["executor=local", f"rounds={rounds}", f"store={folder}/store"]
            run(load_config(config, [*settings, *of_run]), RunFolder(Path(folder) / "run"), watched)
    finally:
        train_stage.train = plain
        watched.end()
    return watched


if __name__ == "__main__":
    main()
