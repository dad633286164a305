"""Sampling and scoring on a real pair beside the plain library: `make bench-engines-real`.

Completion tokens per CPU second in one process on one thread, medians of interleaved runs after one
that is not counted. Sampling stands beside stock `generate`; scoring beside a plain forward pass of
the rows in batches of eight, with log-softmax and top K of the completion tokens in float32. Both
with the chat prompts as they are, whose template gives them the same first tokens, and behind a
common prefix.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines import interleaved
from benchmarks.generation import stock_tokens
from benchmarks.real_questions import questions
from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.engines.head import padded
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.types import PromptBatch, RolloutBatch

REAL = Path(__file__).parent.parent / "models" / "real"
PLAIN_ROWS = 8  # whose logits of every position are in memory at one time
TOP_K = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, default=REAL / "noisy")
    parser.add_argument("--teacher", type=Path, default=REAL / "teacher")
    parser.add_argument("--questions", type=Path, help="JSON lines with `question`")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefix", type=int, nargs="+", default=[0, 256])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"Python {platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, "
        f"{arguments.rows} rows, {arguments.tokens} new tokens"
    )
    print("| dtype | common prefix | what | opd-stream | plain | ratio |")
    print("|---|---|---|---|---|---|")
    for dtype in arguments.dtype:
        for prefix in arguments.prefix:
            prompts = _prompts(arguments, prefix)
            rollouts = _compare_sampling(arguments, dtype, prefix, prompts)
            _compare_scoring(arguments, dtype, prefix, rollouts)


def _compare_sampling(
    arguments: Any, dtype: str, prefix: int, prompts: PromptBatch
) -> RolloutBatch:
    engine, model = _opened(arguments.student, dtype, arguments.rows)
    settings = SamplingSettings(window_tokens=arguments.tokens, stop_ids=(), seed=1)
    found: list[RolloutBatch] = []
    mine, plain = interleaved(
        arguments.repeats,
        lambda: found.append(engine.sample(prompts, settings)),
        lambda: stock_tokens(model, prompts, arguments.tokens, (), {}),
    )
    _print_row(dtype, prefix, "sampling", found[0].completion_tokens, mine, plain)
    return found[0]


def _compare_scoring(arguments: Any, dtype: str, prefix: int, rollouts: RolloutBatch) -> None:
    engine, model = _opened(arguments.teacher, dtype, arguments.rows)
    mine, plain = interleaved(
        arguments.repeats,
        lambda: engine.score(rollouts, ScoringSettings(top_k=TOP_K)),
        lambda: _plain_scores(model, rollouts),
    )
    _print_row(dtype, prefix, "scoring", rollouts.completion_tokens, mine, plain)


@torch.inference_mode()
def _plain_scores(model: Any, rollouts: RolloutBatch) -> None:
    for start in range(0, len(rollouts), PLAIN_ROWS):
        rows = slice(start, start + PLAIN_ROWS)
        pairs = zip(rollouts.prompt_ids[rows], rollouts.completion_ids[rows], strict=True)
        texts = [(len(prompt), np.concatenate([prompt, ids])) for prompt, ids in pairs]
        ids, mask = padded([text for _, text in texts], torch.device("cpu"), side="right")
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, (prompt, text) in enumerate(texts):
            logprobs = logits[row, prompt - 1 : len(text) - 1].float().log_softmax(1)
            logprobs.topk(TOP_K, dim=1)
            logprobs.gather(1, ids[row, prompt : len(text), None])


def _opened(folder: Path, dtype: str, rows: int) -> tuple[TransformersEngine, Any]:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return TransformersEngine(folder, dtype=dtype, batch_rows=rows), plain.eval()


def _prompts(arguments: Any, prefix: int) -> PromptBatch:
    """Chat prompts, behind as many ids of a text that all have in common."""
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.student)
    asked = questions(0)
    if arguments.questions:
        lines = arguments.questions.read_text().splitlines()
        asked = [json.loads(line)["question"] for line in lines]
    first = tokenizer.encode(" ".join(asked[arguments.rows :]))[:prefix]
    chats = [[{"role": "user", "content": question}] for question in asked[: arguments.rows]]
    ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    return PromptBatch(
        prompt_id=tuple(f"p{row}" for row in range(len(chats))),
        prompt_ids=tuple(np.array([*first, *prompt], np.int32) for prompt in ids),
    )


def _print_row(dtype: str, prefix: int, what: str, tokens: int, mine: float, plain: float) -> None:
    print(
        f"| {dtype} | {prefix} | {what} | {tokens / mine:.1f} tok/s | {tokens / plain:.1f} tok/s "
        f"| {plain / mine:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
