"""Rollouts that the student did not write, as a share of every round: `make bench-given`.

    python -m benchmarks.given run       # runs that benchmarks/results/given.jsonl lacks
    python -m benchmarks.given table     # the table of docs/results-training.md

Each run is the quickstart's config on problems with their worked solutions, three rounds of 64
prompts and two epochs each, with a share of given rollouts and a window that cuts nothing; its last
policy answers 192 held-out problems twice. All runs have as many rows and steps; tokens are
counted.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd_stream.config_file import load_config
from opd_stream.tasks.ledger import make_problems
from pipeline.run import run
from pipeline.run_folder import RunFolder
from stages.step import Silent

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "given.jsonl"
ROWS: dict[str, tuple[str, ...]] = {
    "the student's own": (),
    "1/4 solutions": ("rollouts.given_share=0.25",),
    "1/2 solutions": ("rollouts.given_share=0.5",),
    "all solutions": ("rollouts.given_share=1",),
    "all solutions, ce": ("rollouts.given_share=1", "train.objective={kind: ce}"),
    "1/2 solutions, ce": ("rollouts.given_share=0.5", "train.given_objective={kind: ce}"),
    "1/2 of the teacher": ("rollouts.given_share=0.5", "rollouts.given_by=teacher"),
    "all of the teacher": ("rollouts.given_share=1", "rollouts.given_by=teacher"),
}
SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "table"))
    if parser.parse_args().action == "table":
        print("\n".join(table()))
        return
    torch.set_num_threads(1)
    done = {(line["row"], line["seed"]) for line in read_results()}
    with tempfile.TemporaryDirectory() as folder:
        for name in ROWS:
            for seed in range(SEEDS):
                if (name, seed) not in done:
                    line = measure(name, seed, Path(folder))
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(f"{name}, seed {seed}: {line['pass@1']:.3f}", flush=True)


def read_results() -> list[dict[str, Any]]:
    """The stored lines."""
    return [json.loads(line) for line in RESULTS.open()] if RESULTS.exists() else []


def measure(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run: tokens, CPU seconds and the final policy's pass@1."""
    problems = folder / f"problems-{seed}.jsonl"
    rows = [
        {"prompt": p.question, "answer": p.answer, "solution": p.solution}
        for p in make_problems(count=192, seed=seed)
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = '{kind: raw, text: "{prompt}\\n", bos: always}'
    config = load_config(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"seed={seed}",
            f"prompts={{kind: jsonl, path: {problems}, answer_field: answer, "
            f"completion_field: solution, template: {template}}}",
            "executor=local",
            f"store={folder / name.replace('/', '-')}",  # shared by seeds, which reuse nothing
            "rounds=3",
            "rollouts.prompts_per_round=64",
            "rollouts.window={kind: fixed, tokens: 208}",
            "evaluation.samples_per_prompt=2",
            *ROWS[name],
        ],
    )
    summary = run(config, RunFolder(folder / f"{name}-{seed}".replace("/", "-")), Silent())
    final = summary.evaluations[-1]
    return {
        "row": name,
        "seed": seed,
        "pass@1": final.pass_at_1,
        "standard_error": final.standard_error,
        "start": summary.evaluations[0].pass_at_1,
        "tokens": summary.tokens.as_json(),
        "cpu_seconds": summary.cpu_seconds.as_json(),
        "steps": summary.steps,
    }


def table() -> list[str]:
    """The table, a line a row: means over the seeds, each seed's pass@1 behind."""
    lines = [
        "| rollouts of a round | sampled | scored | trained | pass@1 | of each seed |",
        "|---|---|---|---|---|---|",
    ]
    found = read_results()
    for name in ROWS:
        of_row = [line for line in found if line["row"] == name]
        if not of_row:
            continue
        tokens = [
            f"{np.mean([line['tokens'][kind] for line in of_row]):,.0f}"
            for kind in ("generated", "teacher_scored", "trained")
        ]
        passed = [line["pass@1"] for line in sorted(of_row, key=lambda line: line["seed"])]
        each = ", ".join(f"{value:.3f}" for value in passed)
        lines.append(f"| {name} | {' | '.join(tokens)} | {np.mean(passed):.3f} | {each} |")
    return lines


if __name__ == "__main__":
    main()
