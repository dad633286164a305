"""Peak memory of scoring when sequences or batches grow: `make bench-engines-memory`.

Every line is a process of its own: the highest resident memory while scoring, less what the process
holds with the model loaded and one short row scored (Linux tells both). Beside it the logits of all
completion tokens, which are never there at once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.engines import SHAPES, make_engine, random_rollouts
from opd_stream.engines.base import ScoringSettings
from opd_stream.engines.transformers_engine import TransformersEngine

CASES = ((4, 128), (4, 512), (4, 1536), (16, 512), (64, 512))  # rows, completion tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny, V 151,936")
    parser.add_argument("--case", nargs=3, help="measure one, for this command itself")
    arguments = parser.parse_args()
    if arguments.case:
        folder, rows, tokens = arguments.case
        print(json.dumps(_measure(Path(folder), int(rows), int(tokens))))
        return
    print(f"{arguments.shape}, 8 rows at once\n")
    print("| rows | completion tokens of a row | logits of all, MB | peak of scoring, MB |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_engine(Path(folder), arguments.shape)
        (checkpoint,) = Path(folder).iterdir()
        for rows, tokens in CASES:
            logits = rows * tokens * SHAPES[arguments.shape][1] * 4 / 1e6
            peak = _in_a_process(checkpoint, rows, tokens)
            print(f"| {rows} | {tokens:,} | {logits:,.0f} | {peak:,.0f} |", flush=True)


def _in_a_process(checkpoint: Path, rows: int, tokens: int) -> float:
    command = [sys.executable, "-m", "benchmarks.engines_memory", "--case", str(checkpoint)]
    found = subprocess.run(
        [*command, str(rows), str(tokens)], check=True, capture_output=True, text=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def _measure(checkpoint: Path, rows: int, tokens: int) -> float:
    """MB."""
    engine = TransformersEngine(checkpoint, dtype="float32", batch_rows=8)
    warm = random_rollouts(1, prompt=8, completion=8, shared=False)
    engine.score(warm, ScoringSettings(top_k=64, forced_ids=(1,)))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    rollouts = random_rollouts(rows, prompt=64, completion=tokens, shared=False)
    engine.score(rollouts, ScoringSettings(top_k=64, forced_ids=(1,)))
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """MB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
