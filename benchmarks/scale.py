"""What everything around the models costs as stores grow: `make bench-scale`.

Engines are fakes that take no time, so what is left is the cost of prompts, units, records and
commands. Four tables, each over growing sizes, with the exponent of a line fitted to logarithms
(1: cost grows with the work, 0: it does not grow):

    python -m benchmarks.scale units    # units of one round, at a fixed number of prompts
    python -m benchmarks.scale prompts  # prompts of the source, at a fixed number of units
    python -m benchmarks.scale rounds   # rounds of a finished run, and what commands take there
    python -m benchmarks.scale store    # the same of many more rounds, written without being run

CPU seconds are of whole processes and all their children, memory is the most that was resident.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
UNITS = (64, 256, 1024)
PROMPTS = (4096, 16_384, 65_536)
ROUNDS = (10, 30, 100)
WRITTEN = (10, 100, 1000)
UNITS_OF_A_ROUND = 100
SETTINGS = (
    "executor=local",
    "evaluation=null",
    "student.engine=fake",
    "teacher.engine=fake",
    "rollouts.window={kind: fixed, tokens: 4}",
    "rollouts.samples_per_prompt=1",
    "scores.top_k=4",
    "staleness={max_epochs: 1}",
    "train.rows_per_step=128",
    "train.schedule=constant",
    "train.warmup=0",
    "train.warmup_steps=0",
    "train.learning_rate=1e-6",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one command took."""

    cpu_seconds: float
    memory_mb: float


def command(*arguments: str, status: int = 0) -> Cost:
    """Run the program and take its cost.

    Raises:
        RuntimeError: it ended with another exit code than `status`.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    said = child.stderr.read()
    _, code, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(code)
    if child.returncode != status:
        raise RuntimeError(f"{' '.join(arguments)} ended with {child.returncode}: {said[-500:]}")
    return Cost(cpu_seconds=used.ru_utime + used.ru_stime, memory_mb=used.ru_maxrss / 1024)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of a line through the logarithms, by least squares; NaN of one point.

    Example:
        >>> round(exponent([1, 10, 100], [2, 20, 200]), 6)
        1.0
    """
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return above / sum((a - x) ** 2 for a in xs) if len(xs) > 1 else math.nan


def settings_of(store: Path, **sizes: int) -> list[str]:
    """Arguments of a run with so many prompts, units and rounds."""
    units, per_unit = sizes["units"], sizes.get("per_unit", 4)
    fields = [
        *SETTINGS,
        f"store={store}",
        f"prompts.count={sizes['prompts']}",
        f"rounds={sizes.get('rounds', 1)}",
        f"rollouts.prompts_per_round={units * per_unit}",
        f"prompts_per_unit={per_unit}",
    ]
    return [part for field in fields for part in ("--set", field)]


def stages(folder: Path, **sizes: int) -> dict[str, Cost]:
    """The cost of each stage of one round."""
    run = ("--run-dir", str(folder / "run"), *settings_of(folder / "store", **sizes))
    found: dict[str, Cost] = {}
    for stage in ("generate", "score", "train"):
        found[stage] = command(stage, str(QUICKSTART), "--round", "0", *run)
    found["verify"] = command("cache", "verify", str(folder / "store"))
    found["finished"] = command("train", str(QUICKSTART), "--round", "0", *run)
    return found


def commands(folder: Path, **sizes: int) -> dict[str, Cost]:
    """The cost of each command on a finished run, and of one more round."""
    store, run = folder / "store", folder / "run"
    whole = ("run", str(QUICKSTART), "--run-dir", str(run), *settings_of(store, **sizes))
    found = {"run, from nothing": command(*whole)}
    found |= looks(folder, whole)
    more = settings_of(store, **{**sizes, "rounds": sizes["rounds"] + 1})
    found["run, one round more"] = command("run", str(QUICKSTART), "--run-dir", str(run), *more)
    print_folder(run, sizes["rounds"])
    return found


def looks(folder: Path, run: Sequence[str]) -> dict[str, Cost]:
    """The cost of each command that finds a run and its store finished."""
    store = str(folder / "store")
    return {
        "run, finished": command(*run),
        "status": command("status", str(folder / "run")),
        "plan": command("plan", run[1], *run[4:]),
        "cache ls": command("cache", "ls", store),
        "cache gc": command("cache", "gc", store),
        "cache verify": command("cache", "verify", store),
    }


def written(folder: Path, **sizes: int) -> dict[str, Cost]:
    """The cost of the same on a store that was written, and of a round that was killed."""
    store, run = folder / "store", folder / "run"
    start = ("run", str(QUICKSTART), "--run-dir", str(run))
    command(*start, *settings_of(store, **{**sizes, "rounds": 1}))
    settings = settings_of(store, **sizes)
    made = [sys.executable, "-m", "benchmarks.scale_store", str(QUICKSTART), *settings[1::2]]
    subprocess.run(made, cwd=ROOT, check=True)
    found = {"run, its folder lost": command(*start, *settings)}
    found |= looks(folder, (*start, *settings))
    subprocess.run([*made, "--kill"], cwd=ROOT, check=True)
    found["run, a round killed"] = command(*start, *settings)
    print_folder(run, sizes["rounds"])
    return found


def print_folder(run: Path, rounds: int) -> None:
    """How large the folder of a run is."""
    files = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    print(f"{rounds} rounds: the run's folder has {files / 1e6:.2f} MB", flush=True)


def print_table(name: str, sizes: Sequence[int], found: Sequence[dict[str, Cost]]) -> None:
    """A row for each command: CPU seconds and MB at each size, and the exponent of the seconds."""
    print(f"| {name} | " + " | ".join(f"{size:,}" for size in sizes) + " | exponent |")
    print("|---|" + "---|" * (len(sizes) + 1))
    for what in found[0]:
        costs = [each[what] for each in found]
        shown = " | ".join(f"{cost.cpu_seconds:.1f} s, {cost.memory_mb:.0f} MB" for cost in costs)
        print(f"| {what} | {shown} | {exponent(sizes, [c.cpu_seconds for c in costs]):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", choices=("units", "prompts", "rounds", "store"))
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=None, help="in place of the table's"
    )
    arguments = parser.parse_args()
    usual = {"units": UNITS, "prompts": PROMPTS, "rounds": ROUNDS, "store": WRITTEN}
    sizes = arguments.sizes or usual[arguments.table]
    found: list[dict[str, Cost]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            if arguments.table == "units":
                found.append(stages(path, units=size, prompts=4 * max(sizes)))
            elif arguments.table == "prompts":
                found.append(stages(path, units=64, prompts=size))
            else:
                units = UNITS_OF_A_ROUND
                measured = commands if arguments.table == "rounds" else written
                found.append(measured(path, units=units, per_unit=1, prompts=units, rounds=size))
    print_table(arguments.table, sizes, found)


if __name__ == "__main__":
    main()
