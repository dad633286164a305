"""The quickstart over several seeds, on problems no tuning has seen: `make bench-quickstart`.

Each seed changes the training prompts, the sampling, the batch order and the held-out problems. The
whole command is timed from outside, Ray and evaluation included.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HELD_OUT_SEEDS = (900_001, 900_002, 900_003)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            rows.append(_run(arguments.config, seed, arguments.overrides, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    print(_table(rows))


def _run(config: Path, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    run = folder / f"run-{seed}"
    fields = [
        f"seed={seed}",
        f"store={folder / f'store-{seed}'}",
        f"prompts.seed={100 + seed}",
        f"evaluation.prompts.seed={HELD_OUT_SEEDS[seed]}",
        *overrides,
    ]
    command = [sys.executable, "-m", "pipeline", "run", str(config), "--run-dir", str(run)]
    command += [part for field in fields for part in ("--set", field)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    summary = json.loads((run / "summary.json").read_text())
    first, last = summary["evaluations"][0], summary["evaluations"][-1]
    return {
        "seed": seed,
        "before": [round(first["pass@1"], 3), round(first["pass@8"], 3)],
        "after": [round(last["pass@1"], 3), round(last["pass@8"], 3)],
        "tokens": summary["tokens"],
        "seconds": summary["seconds"],
        "other share": round(summary["seconds"]["other"] / summary["seconds"]["wall"], 3),
        "command seconds": round(wall, 1),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    names = ("pass@1 before", "pass@8 before", "pass@1 after", "pass@8 after")
    columns = [[row["before"][0] for row in rows], [row["before"][1] for row in rows]]
    columns += [[row["after"][0] for row in rows], [row["after"][1] for row in rows]]
    stages = ("generate", "score", "train", "evaluate", "other", "wall")
    names += (*(f"{stage} s" for stage in stages), "command s", "other share")
    columns += [[row["seconds"][stage] for row in rows] for stage in stages]
    columns += [[row["command seconds"] for row in rows], [row["other share"] for row in rows]]
    lines = [
        f"Python {platform.python_version()}, torch {version('torch')}, ray {version('ray')}, "
        f"{len(rows)} seeds, held-out problems of seeds {HELD_OUT_SEEDS[: len(rows)]}",
        "",
        "| | mean | min | max |",
        "|---|---|---|---|",
    ]
    for name, values in zip(names, columns, strict=True):
        figures = (statistics.mean(values), min(values), max(values))
        lines.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
