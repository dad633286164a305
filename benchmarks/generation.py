"""Sampling speed against stock `generate`: `make bench-generation`.

Interleaved repeats in one process on one thread; completion tokens per CPU second. "fixed" draws
the same number of tokens for every row; "real" stops at the end of the text, and only real tokens
count.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_stream.engines.base import SamplingSettings
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.tasks.ledger import make_problems, prompt_text
from opd_stream.types import PromptBatch

STUDENT = Path(__file__).parent.parent / "configs" / "models" / "ledger-student"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=STUDENT)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=208)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = _prompts(tokenizer, arguments.rows)
    engine = TransformersEngine(arguments.model, dtype="float32", batch_rows=arguments.rows)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    eos = tokenizer.eos_token_id
    print(
        f"Python {platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}, 1 thread, {arguments.rows} rows, {arguments.tokens} new tokens"
    )
    print("| case | ours | generate | ratio (min-max) | generate, static cache | ratio |")
    print("|---|---|---|---|---|---|")
    for case, stops in (("fixed", ()), ("real", (eos,))):
        runs: dict[str, Callable[[int], int]] = {
            "ours": lambda seed, stops=stops: (
                engine.sample(
                    prompts,
                    SamplingSettings(window_tokens=arguments.tokens, stop_ids=stops, seed=seed),
                ).completion_tokens
            ),
            "stock": lambda seed, stops=stops: stock_tokens(
                model, prompts, arguments.tokens, stops, {}
            ),
            "static": lambda seed, stops=stops: stock_tokens(
                model,
                prompts,
                arguments.tokens,
                stops,
                {"cache_implementation": "static", "disable_compile": True},
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(arguments.repeats + 1):
            for name, run in runs.items():
                start = time.process_time()
                tokens = run(repeat)
                if repeat:  # the first is a warm-up
                    rates[name].append(tokens / (time.process_time() - start))
        print(_row(case, rates), flush=True)


def _prompts(tokenizer: object, rows: int) -> PromptBatch:
    problems = make_problems(count=rows, seed=5)
    encode, bos = tokenizer.encode, tokenizer.bos_token_id  # type: ignore[attr-defined]
    ids = [np.array([bos, *encode(prompt_text(p))], np.int32) for p in problems]
    return PromptBatch(prompt_id=tuple(p.problem_id for p in problems), prompt_ids=tuple(ids))


@torch.inference_mode()
def stock_tokens(
    model: torch.nn.Module,
    prompts: PromptBatch,
    tokens: int,
    stops: tuple[int, ...],
    options: dict[str, object],
) -> int:
    """What the library's own `generate` makes of prompts: the number of new tokens."""
    longest = max(len(ids) for ids in prompts.prompt_ids)
    ids = torch.zeros(len(prompts.prompt_ids), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts.prompt_ids):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt).long()
        mask[row, longest - len(prompt) :] = 1
    minimum = {} if stops else {"min_new_tokens": tokens}
    output = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        **minimum,
        **options,
    )
    return int((output[:, longest:] != 0).sum()) if stops else output[:, longest:].numel()


def _row(case: str, rates: dict[str, list[float]]) -> str:
    def ratio(name: str) -> str:
        values = [ours / other for ours, other in zip(rates["ours"], rates[name], strict=True)]
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    median = {name: f"{statistics.median(values):,.0f}" for name, values in rates.items()}
    return (
        f"| {case} | {median['ours']} tok/s | {median['stock']} tok/s | {ratio('stock')} | "
        f"{median['static']} tok/s | {ratio('static')} |"
    )


if __name__ == "__main__":
    main()
