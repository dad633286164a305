"""All methods on the same work: `make bench-methods` runs what is missing and writes the tables.

    python benchmarks/methods.py run --jobs 2        # missing runs, one process a core
    python benchmarks/methods.py tables              # the tables of docs/results.md and its figures

A run is the program itself on a config and its overrides, in a store of its own, so that nothing is
shared and everything is counted. Its policies are then evaluated on held-out problems, and one line
with every figure goes to benchmarks/results/methods.jsonl. Tables and figures come from that file
alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from methods_rows import HELD_OUT, ROWS, TASKS, TUNING, Row, Task

if TYPE_CHECKING:
    from opd_stream.tasks import ledger

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "methods.jsonl"
TRAINING_SEED = 100  # first seed of training prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "one", "tables", "list"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--task", choices=sorted(TASKS), help="one task only")
    parser.add_argument("--row", action="append", default=[], help="these rows only")
    parser.add_argument("--group", action="append", default=[], help="these groups only")
    parser.add_argument("--seed", type=int, default=0, help="of `one`")
    parser.add_argument("--seeds", type=int, help="at most so many of each row")
    parser.add_argument("--tuning", action="store_true", help="print, on the tuning problems")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    if arguments.action == "tables":
        from methods_tables import write

        write(RESULTS)
    elif arguments.action == "one":
        (row,) = [row for row in ROWS[arguments.task] if row.name in arguments.row]
        line = measure(
            arguments.task, row, arguments.seed, arguments.overrides, tuning=arguments.tuning
        )
        print(json.dumps(line))
    else:
        _run_missing(arguments)


def _run_missing(arguments: argparse.Namespace) -> None:
    done = {(line["task"], line["row"], line["seed"]) for line in read_results()}
    todo = [
        (task, row.name, seed)
        for seed in range(max(row.seeds for rows in ROWS.values() for row in rows))
        for task, rows in ROWS.items()
        for row in rows
        if seed < min(row.seeds, arguments.seeds or row.seeds)
        and (arguments.task or task) == task
        and (not arguments.row or row.name in arguments.row)
        and (not arguments.group or row.group in arguments.group)
        and (task, row.name, seed) not in done
    ]
    print(f"{len(todo)} runs missing", flush=True)
    if arguments.action == "list":
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda job: _run_one(*job), todo))


def _run_one(task: str, row: str, seed: int) -> None:
    """One run in a process of its own with one thread; its line is appended at the end."""
    command = [sys.executable, __file__, "one", "--task", task, "--row", row, "--seed", str(seed)]
    found = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if found.returncode:
        print(f"{task} {row} {seed}: failed\n{found.stderr[-2000:]}", flush=True)
        return
    line = found.stdout.strip().splitlines()[-1]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")
    final = json.loads(line)["curve"][-1]
    print(f"{task} {row} {seed}: pass@1 {final['pass@1']:.3f}", flush=True)


def read_results() -> list[dict[str, Any]]:
    """The stored lines."""
    return [json.loads(line) for line in RESULTS.open()] if RESULTS.exists() else []


def measure(
    task: str, row: Row, seed: int, overrides: list[str], *, tuning: bool = False
) -> dict[str, Any]:
    """One run with its evaluations."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        if row.name == "SFT":
            from methods_controls import fine_tune

            rounds = fine_tune(cast("ledger.Task", task), seed, Path(folder))
        else:
            rounds = distil(task, row, seed, overrides, Path(folder))
        problems = TUNING if tuning else HELD_OUT + seed
        curve = _curve(TASKS[task], task, rounds, problems, has_curve=row.has_curve)
    return {
        "task": task,
        "row": row.name,
        "group": row.group,
        "seed": seed,
        "overrides": [*row.overrides, *overrides],
        "curve": curve,
        "rounds": [{k: v for k, v in r.items() if k != "folder"} for r in rounds],
        "wall_seconds": round(time.time() - started, 1),
    }


def distil(
    task: str, row: Row, seed: int, overrides: list[str], folder: Path
) -> list[dict[str, Any]]:
    """Costs and decisions of each round, with the folder of its policy."""
    from opd_stream.config_file import load_config
    from pipeline.run import run
    from pipeline.run_folder import RunFolder
    from stages.step import Silent

    settings = [
        *(text.replace("SEED", str(seed)) for text in row.overrides),
        f"seed={seed}",
        f"prompts.seed={TRAINING_SEED + seed}",
        f"store={folder / 'store'}",
        *overrides,
    ]
    config = load_config(FOLDER / f"methods_{task}.yaml", settings)
    directory = RunFolder(folder / "run")
    run(config, directory, Silent())
    return [
        {
            "folder": report["policy"]["folder"],
            "steps": report["steps"],
            "window_tokens": report["window_tokens"],
            "tokens": report["tokens"],
            "flops": report["flops"],
            "cpu_seconds": report["cpu_seconds"],
            "audit_cpu_seconds": report["audit_cpu_seconds"],
            "policy_drift": report["policy_drift"],
            "decision": report["decision"],
            "window_decision": report["window_decision"],
            "extrapolations": report["extrapolations"],
            "origins": [cache["origin"] for cache in report["caches"]],
            "by_position": report["epochs"][0]["by_position"],
            "student_top_mass": report["epochs"][-1]["student_top_mass"],
        }
        for report in (each.as_json() for each in directory.reports())
    ]


def _curve(
    task: Task, name: str, rounds: list[dict[str, Any]], problems_seed: int, *, has_curve: bool
) -> list[dict[str, Any]]:
    """Evaluations after some rounds, and a larger one after the last."""
    from methods_evaluation import evaluate

    start = FOLDER.parent / "configs" / "models" / f"{name}-student"
    points = [(0, start), *((n + 1, Path(r["folder"])) for n, r in enumerate(rounds))]
    due = {0, *task.curve_rounds, len(rounds)} if has_curve else {len(rounds)}
    curve: list[dict[str, Any]] = []
    for number, folder in points:
        if number not in due:
            continue
        is_last = number == len(rounds)
        result = evaluate(
            folder,
            cast("ledger.Task", name),
            problems=task.final_problems if is_last else task.curve_problems,
            samples=task.final_samples if is_last else task.curve_samples,
            seed=problems_seed,
            window_tokens=task.full_tokens,
        )
        curve.append({"rounds": number, **result})
    return curve


if __name__ == "__main__":
    main()
