"""Seconds from a written policy to its first token, in an engine that stays: `make bench-reload`.

A fresh engine opens the folder; a live one takes the new weights in place. Both then sample one
token of one prompt. Medians of interleaved runs, wall-clock.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.engines import make_engine
from opd_stream.engines import open_engine
from opd_stream.engines.base import Engine, SamplingSettings, VllmOptions
from opd_stream.types import PromptBatch

PROMPT = PromptBatch(prompt_id=("p",), prompt_ids=(np.arange(2, 34, dtype=np.int32),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| engine | model | opened anew, s | live, s |")
    print("|---|---|---|---|")
    for shape in ("tiny, V 32,768", "70 M, V 32,768"):
        with tempfile.TemporaryDirectory() as folder:
            make_engine(Path(folder), shape)
            (checkpoint,) = Path(folder).iterdir()
            live = _open(arguments.engine, checkpoint)
            _first_token(live)
            anew, again = list[float](), list[float]()
            for _ in range(arguments.repeats):
                start = time.perf_counter()
                live.load(checkpoint)
                _first_token(live)
                again.append(time.perf_counter() - start)
                if arguments.engine == "transformers":  # vLLM keeps one engine a process
                    start = time.perf_counter()
                    _first_token(_open(arguments.engine, checkpoint))
                    anew.append(time.perf_counter() - start)
            opened = f"{statistics.median(anew):.2f}" if anew else "-"
            print(
                f"| {arguments.engine} | {shape} | {opened} | {statistics.median(again):.2f} |",
                flush=True,
            )


def _open(engine: str, folder: Path) -> Engine:
    options = VllmOptions(kv_cache_bytes=1 << 28, max_context=1024, compiled=False)
    return open_engine(engine=engine, folder=folder, dtype="float32", batch_rows=8, vllm=options)


def _first_token(engine: Engine) -> None:
    engine.sample(PROMPT, SamplingSettings(window_tokens=1, stop_ids=()))


if __name__ == "__main__":
    main()
