"""What a round takes when sampling and scoring go on while it trains: `make bench-overlap`.

Engines are either fakes that sleep as long as they are told (their work costs no CPU, as that of
another pool would not), or the embedded models, which share two cores with the training. The time
of a round is the mean from the third round's first line to the last one's; a round's rollouts grow
with its policy, so the stages are those of the very rollouts that were made in that time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from opd_stream.config_file import load_config
from pipeline.run import run
from pipeline.run_folder import RunFolder
from stages.step import Silent

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ROUNDS = 7


class Clock(Silent):
    """When each round began."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def say(self, line: str) -> None:
        if line.startswith("round "):
            self.begun.append(time.time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(
        "| engines | generate | score | train | one after another | overlapping | longest | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    # seconds a token: sampling about four times as long as training, or half as long
    for name, pace in (
        ("sleeping, sampling longest", 2.0e-3),
        ("sleeping, training longest", 2.5e-4),
        ("transformers", None),
    ):
        print(_line(name, pace, arguments.repeats), flush=True)


def _line(name: str, pace: float | None, repeats: int) -> str:
    found = {ahead: [_rounds(ahead, pace) for _ in range(repeats)] for ahead in (False, True)}
    apart, together = (
        statistics.median(seconds["round"] for seconds in found[ahead]) for ahead in (False, True)
    )
    stages = {
        stage: statistics.median(seconds[stage] for seconds in found[True])
        for stage in ("generate", "score", "train")
    }
    longest = max(stages.values())
    return (
        f"| {name} | "
        + " | ".join(f"{seconds:.2f}" for seconds in stages.values())
        + f" | {apart:.2f} | {together:.2f} | {longest:.2f} | {together / longest:.2f} |"
    )


def _rounds(ahead: bool, pace: float | None) -> dict[str, float]:
    """Mean seconds of a round and of its stages."""
    os.environ["OPD_STREAM_FAKE_SECONDS_PER_TOKEN"] = str(pace or 0)
    settings = [
        f"rounds={ROUNDS}",
        "evaluation=null",
        "rollouts.window={kind: fixed, tokens: 208}",
        f"rollouts.ahead={str(ahead).lower()}",
        "staleness.policy_drift=1000",
        "staleness.effective_sample_fraction=1e-9",
        "prompts_per_unit=8",
    ]
    if pace is not None:
        settings += ["student.engine=fake", "teacher.engine=fake", "train.learning_rate=1e-5"]
    with tempfile.TemporaryDirectory() as folder:
        clock, directory = Clock(), RunFolder(Path(folder) / "run")
        config = load_config(QUICKSTART, [*settings, f"store={folder}/store"])
        run(config, directory, clock)
        seconds = [report.seconds.model_dump() for report in directory.reports()]
        made = seconds[3:] if ahead else seconds[2:-1]  # between these lines
        return {
            "round": (clock.begun[-1] - clock.begun[2]) / len(made),
            "generate": statistics.mean(each["generate"] for each in made),
            "score": statistics.mean(each["score"] for each in made),
            "train": statistics.mean(each["train"] for each in seconds[2:-1]),
        }


if __name__ == "__main__":
    main()
