"""What scoring costs beside what it cannot do without: `make bench-engines`.

Everything runs in one process on one thread; figures are medians of interleaved runs in CPU
seconds. The bare pass is the decoder over the same padded batches, without the head, plus the
product of the completion tokens' hidden states with the head, in the same chunks, written to one
buffer. What reads the logits, whatever it makes of them, reads them at least twice: once for what
is largest, once for the sum of their exponentials. The second reference is the bare pass with these
two passes, a maximum and a softmax in place, and no search for the top K.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_stream.engines import head, reading
from opd_stream.engines.base import ScoringSettings, rows_per_chunk
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.types import RolloutBatch

TINY = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "heads": 3}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "heads": 8}
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "tiny, V 4,096": (TINY, 4_096),
    "70 M, V 4,096": (SMALL, 4_096),
    "tiny, V 32,768": (TINY, 32_768),
    "tiny, V 151,936": (TINY, 151_936),
    "70 M, V 32,768": (SMALL, 32_768),
    "130 M, V 151,936": (SMALL, 151_936),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"Python {platform.python_version()}, torch {version('torch')}, "
        f"threads: {arguments.threads}\n"
    )
    print(
        "| model | scoring, CPU s | bare | bare + two passes | bare / scoring | with the passes |"
    )
    print("|---|---|---|---|---|---|")
    engines: dict[str, TransformersEngine] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.shape or list(SHAPES)[2:]:
            engines[name] = make_engine(Path(folder), name)
            _compare_with_bare(name, engines[name], arguments)
        print("\n| model | 8 samples of a 512-token prompt | separately | saving |")
        print("|---|---|---|---|")
        for name, engine in engines.items():
            _compare_shared(name, engine, arguments)


def make_engine(folder: Path, name: str) -> TransformersEngine:
    """An engine over a random model of a shape, written below a folder."""
    shape, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=max(1, shape["heads"] // 4),
        head_dim=32 if shape is TINY else 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    place = folder / name.replace(" ", "-").replace(",", "")
    Qwen3ForCausalLM(config).save_pretrained(place)
    return TransformersEngine(place, dtype="float32", batch_rows=8)


def random_rollouts(
    rows: int, *, prompt: int, completion: int, shared: bool, ids: int = 4_000
) -> RolloutBatch:
    """Rows of random ids, of one prompt or of one each."""
    random = np.random.default_rng(0)
    one = random.integers(0, ids, prompt).astype(np.int32)
    return RolloutBatch(
        prompt_id=tuple(f"p{0 if shared else row}" for row in range(rows)),
        sample_index=np.arange(rows, dtype=np.int32),
        prompt_ids=tuple(
            one if shared else random.integers(0, ids, prompt).astype(np.int32) for _ in range(rows)
        ),
        completion_ids=tuple(
            random.integers(0, ids, completion).astype(np.int32) for _ in range(rows)
        ),
        behavior_logprobs=tuple(np.zeros(completion, np.float32) for _ in range(rows)),
        finish_reason=("length",) * rows,
    )


def _compare_with_bare(name: str, engine: TransformersEngine, arguments: Any) -> None:
    rollouts = random_rollouts(arguments.rows, prompt=64, completion=192, shared=False)
    mine, bare, passes = interleaved(
        arguments.repeats,
        lambda: engine.score(rollouts, ScoringSettings(top_k=arguments.top_k, forced_ids=(1, 2))),
        lambda: _bare(engine, rollouts, passes=False),
        lambda: _bare(engine, rollouts, passes=True),
    )
    print(
        f"| {name} | {mine:.2f} | {bare:.2f} | {passes:.2f} | {bare / mine:.2f} "
        f"| {passes / mine:.2f} |",
        flush=True,
    )


@torch.inference_mode()
def _bare(engine: TransformersEngine, rollouts: RolloutBatch, *, passes: bool) -> None:
    """The decoder and the head's product, and nothing made of them but, if asked, two passes."""
    model: Any = engine._model
    weight = model.get_output_embeddings().weight.t()
    for start in range(0, len(rollouts), 8):
        rows = slice(start, start + 8)
        hidden = head.completion_hidden(
            model.get_decoder(),
            rollouts.prompt_ids[rows],
            rollouts.completion_ids[rows],
            torch.device("cpu"),
        )
        logits = torch.empty(rows_per_chunk(weight.shape[1], "cpu"), weight.shape[1])
        for chunk in hidden.split(len(logits)):
            made = torch.mm(chunk, weight, out=logits[: len(chunk)])
            if passes:
                made.amax(1)
                torch.softmax(made, 1, out=made)


def _compare_shared(name: str, engine: TransformersEngine, arguments: Any) -> None:
    rollouts = random_rollouts(8, prompt=512, completion=64, shared=True)

    def score() -> None:
        engine.score(rollouts, ScoringSettings(top_k=arguments.top_k, forced_ids=(1, 2)))

    def separately() -> None:
        kept, reading.MIN_SAVING = reading.MIN_SAVING, 0.0
        score()
        reading.MIN_SAVING = kept

    together, apart = interleaved(arguments.repeats, score, separately)
    print(f"| {name} | {together:.2f} | {apart:.2f} | {apart / together:.2f} |", flush=True)


def interleaved(
    repeats: int, *work: Callable[[], object], clock: Callable[[], float] = time.process_time
) -> list[float]:
    """Median seconds of each, of the CPU by default, in turn after one run that is not counted."""
    seconds: list[list[float]] = [[] for _ in work]
    for number in range(repeats + 1):
        for place, do in enumerate(work):
            start = clock()
            do()
            if number:
                seconds[place].append(clock() - start)
    return [statistics.median(values) for values in seconds]


if __name__ == "__main__":
    main()
