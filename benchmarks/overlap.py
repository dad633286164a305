"""What a round takes when sampling and scoring go on while it trains: `make bench-overlap`.

Engines are either fakes that sleep as long as they are told (their work costs no CPU, as that of
another pool would not), or the embedded models, which share two cores with the training. The time
of a round is the median of the rounds after the second, from one round's first line to the next's.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from opd_stream.config_file import load_config
from pipeline.rounds import run
from pipeline.run_directory import RunDirectory
from stages.progress import Silent

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
    # seconds a token: sampling as long as training, half as long, twice as long
    for name, pace in (
        ("sleeping, sampling longest", 1.0e-3),
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
    """Median seconds of a round and of its stages."""
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
        clock, directory = Clock(), RunDirectory(Path(folder) / "run")
        config = load_config(QUICKSTART, [*settings, f"store={folder}/store"])
        run(config, directory, clock)
        reports: list[dict[str, Any]] = directory.reports()[2:-1]
        lasted = [
            after - before for before, after in zip(clock.begun, clock.begun[1:], strict=False)
        ]
        return {
            "round": statistics.median(lasted[2:]),
            **{
                stage: statistics.median(report["seconds"][stage] for report in reports)
                for stage in ("generate", "score", "train")
            },
        }


if __name__ == "__main__":
    main()
