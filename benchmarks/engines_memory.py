"""Peak memory of scoring when sequences or batches grow: `make bench-engines-memory`.

Every line is a process of its own: the highest resident memory while scoring, less what the process
held with the model loaded and one short row scored. Beside it the logits of all completion tokens,
which are never there at once.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.engines import SHAPES, make_engine, random_rollouts

CASES = ((4, 128), (4, 512), (4, 1536), (16, 512), (64, 512))  # rows, completion tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny, V 151,936")
    parser.add_argument("--case", type=int, nargs=2, help="measure one, for this command itself")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(_measure(arguments.shape, *arguments.case)))
        return
    print(f"{arguments.shape}, 8 rows at once\n")
    print("| rows | completion tokens of a row | logits of all, MB | peak of scoring, MB |")
    print("|---|---|---|---|")
    vocabulary = SHAPES[arguments.shape][1]
    for rows, tokens in CASES:
        command = [sys.executable, "-m", "benchmarks.engines_memory", "--shape", arguments.shape]
        found = subprocess.run(
            [*command, "--case", str(rows), str(tokens)], check=True, capture_output=True, text=True
        )
        logits = rows * tokens * vocabulary * 4 / 1e6
        peak = json.loads(found.stdout.splitlines()[-1])
        print(f"| {rows} | {tokens:,} | {logits:,.0f} | {peak:,.0f} |", flush=True)


def _measure(shape: str, rows: int, tokens: int) -> float:
    """MB."""
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(Path(folder), shape)
        warm = random_rollouts(1, prompt=8, completion=8, shared=False)
        engine.score(warm, top_k=64, forced_ids=(1,))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rollouts = random_rollouts(rows, prompt=64, completion=tokens, shared=False)
        engine.score(rollouts, top_k=64, forced_ids=(1,))
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


if __name__ == "__main__":
    main()
