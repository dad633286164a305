"""All methods on the same work: `make bench-methods` runs what is missing and writes the tables.

    python -m benchmarks.methods run --jobs 2        # missing runs, one process a core
    python -m benchmarks.methods run --row FILE      # rows of your own: docs/bench.md
    python -m benchmarks.methods cache --task ledger # the public cache, for rows that replay it
    python -m benchmarks.methods tables              # the tables of the results and their figures

A run is the program itself on a config and its overrides, in a store of its own, so that nothing is
shared and everything is counted. Its policies are then evaluated on held-out problems, and one line
with every figure goes to benchmarks/results/methods.jsonl. Tables and figures come from that file
alone; a line counts for a row as long as the row's settings are those it was measured with.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.methods_rows import (
    HELD_OUT,
    PUBLIC_PROMPTS,
    ROWS,
    TASKS,
    TUNING,
    Row,
    Task,
    read_rows,
)
from opd_stream.errors import UserError

if TYPE_CHECKING:
    from opd_stream.tasks import ledger

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "methods.jsonl"
TRAINING_SEED = 100  # first seed of training prompts
ONE_ROUND = ("rounds=1", f"rollouts.prompts_per_round={PUBLIC_PROMPTS}", "prompts_per_unit=64")
PUBLIC = (*ONE_ROUND, "scores.top_k=32", "seed=0", f"prompts.seed={TRAINING_SEED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "one", "cache", "tables", "list"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--task", choices=sorted(TASKS), help="one task only")
    parser.add_argument(
        "--row", action="append", default=[], help="these rows only: a name, or a YAML file of rows"
    )
    parser.add_argument("--group", action="append", default=[], help="these groups only")
    parser.add_argument("--seed", type=int, default=0, help="of `one`")
    parser.add_argument("--seeds", type=int, help="at most so many of each row")
    parser.add_argument("--tuning", action="store_true", help="print, on the tuning problems")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of the lines")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        _act(arguments)
    except UserError as error:
        print(f"methods: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _act(arguments: argparse.Namespace) -> None:
    if arguments.action == "tables":
        from benchmarks.methods_tables import write

        write(arguments.results)
        return
    if arguments.action == "cache":
        for task in [arguments.task] if arguments.task else TASKS:
            print(make_public_cache(task, public_cache(task)))
        return
    chosen = chosen_rows(arguments.row, arguments.task, arguments.group)
    if arguments.action != "one":
        _run_missing(arguments, chosen)
        return
    if len(chosen) != 1:
        raise UserError(f"one was given {len(chosen)} rows; expected one; name it with --row")
    ((task, row),) = chosen
    line = measure(task, row, arguments.seed, arguments.overrides, tuning=arguments.tuning)
    print(json.dumps(line))


def chosen_rows(names: list[str], task: str | None, groups: list[str]) -> list[tuple[str, Row]]:
    """Rows with their tasks: those named, those of files that are named, or all.

    Raises:
        UserError: there is no such row or file.
    """
    files = [read_rows(Path(name)) for name in names if name.endswith((".yaml", ".yml"))]
    found = [(file.task, row) for file in files for row in file.rows]
    named = {name for name in names if not name.endswith((".yaml", ".yml"))}
    if named or not names:
        found += [(t, r) for t, rows in ROWS.items() for r in rows if not named or r.name in named]
    if missing := named - {row.name for _, row in found}:
        raise UserError(f"there is no row {min(missing)!r}; expected one of benchmarks/rows")
    return [
        (name, row)
        for name, row in found
        if task in (None, name) and (not groups or row.group in groups)
    ]


def _run_missing(arguments: argparse.Namespace, chosen: list[tuple[str, Row]]) -> None:
    lines = read_results(arguments.results)
    todo = [
        (task, row, seed)
        for seed in range(max((row.seeds for _, row in chosen), default=0))
        for task, row in chosen
        if seed < min(row.seeds, arguments.seeds or row.seeds)
        and not any(
            (line["task"], line["seed"]) == (task, seed) and row.is_of(line) for line in lines
        )
    ]
    print(f"{len(todo)} runs missing", flush=True)
    if arguments.action == "list":
        return
    for task in {task for task, row, _ in todo if row.replay}:
        cached_scores(public_cache(task))  # refused before any work
    is_failed = False
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, max_tasks_per_child=1) as pool:
        jobs = {
            pool.submit(measure, task, row, seed, []): f"{task} {row.name} {seed}"
            for task, row, seed in todo
        }
        for job in as_completed(jobs):
            if (error := job.exception()) is not None:
                print(f"{jobs[job]}: failed: {error}", flush=True)
                is_failed = True
                continue
            line = job.result()
            arguments.results.parent.mkdir(exist_ok=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{jobs[job]}: pass@1 {line['curve'][-1]['pass@1']:.3f}", flush=True)
    if arguments.row:
        from benchmarks.methods_tables import table

        lines = [
            *read_results(),
            *(read_results(own) if (own := arguments.results) != RESULTS else ()),
        ]
        for task in dict.fromkeys(task for task, _ in chosen):
            print("\n".join(table(task, [row for name, row in chosen if name == task], lines)))
    if is_failed:
        raise SystemExit(1)


def public_cache(task: str) -> Path:
    """The store of a task's public cache."""
    return FOLDER.parent / "store" / f"public-{task}"


def make_public_cache(task: str, folder: Path) -> str:
    """Rollouts of the initial student at full length, scored; what is there is found again.

    Returns:
        The folder, and the name of the scores, which says what they were made from.
    """
    from opd_stream.config_file import load_config
    from pipeline.run_folder import RunFolder
    from pipeline.single_stage import run_stage
    from stages.step import Silent

    config = load_config(FOLDER / f"methods_{task}.yaml", [*PUBLIC, f"store={folder}"])
    with tempfile.TemporaryDirectory() as run:
        for stage in ("generate", "score"):
            run_stage(stage, config, RunFolder(Path(run)), round_index=0, progress=Silent())
    return f"{folder}: {cached_scores(folder)}"


def cached_scores(folder: Path) -> str:
    """The name of the scores in the store of a public cache.

    Raises:
        UserError: there are none, or several.
    """
    found = sorted(folder.glob("scores/*"))
    if len(found) != 1:
        raise UserError(
            f"{folder} has {len(found)} scores; expected one, a task's public cache; make it with "
            "`python -m benchmarks.methods cache`, or fetch it with `opd-stream cache pull`"
        )
    return f"scores/{found[0].name}"


def read_results(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The stored lines."""
    return [json.loads(line) for line in path.open()] if path.exists() else []


def measure(
    task: str, row: Row, seed: int, overrides: list[str], *, tuning: bool = False
) -> dict[str, Any]:
    """One run with its evaluations."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        if row.name == "SFT":
            from benchmarks.methods_controls import fine_tune

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
        **({"replay": True, "cache": cached_scores(public_cache(task))} if row.replay else {}),
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
        *(_replayed(public_cache(task)) if row.replay else ()),
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
            "window_audits": report.get("window_audits", []),
            "decision_age": report.get("decision_age"),
            "extrapolations": report["extrapolations"],
            "origins": [cache["origin"] for cache in report["caches"]],
            "by_position": report["epochs"][0]["by_position"],
            "student_top_mass": report["epochs"][-1]["student_top_mass"],
        }
        for report in (each.as_json() for each in directory.reports())
    ]


def _replayed(cache: Path) -> list[str]:
    """Settings of a row that trains on a public cache, without bounds on its age."""
    return [
        *ONE_ROUND,
        "teacher=null",
        f"replay={{scores: [{cached_scores(cache)}], store: {cache}}}",
        "staleness.policy_drift=100",
        "staleness.effective_sample_fraction=1e-6",
    ]


def _curve(
    task: Task, name: str, rounds: list[dict[str, Any]], problems_seed: int, *, has_curve: bool
) -> list[dict[str, Any]]:
    """Evaluations after some rounds, and a larger one after the last."""
    from benchmarks.methods_evaluation import evaluate

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
