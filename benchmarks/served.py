"""A served teacher: reading answers, telling models apart, and a server beside this process.

    python -m benchmarks.served parse               # tokens of an answer read in a CPU second
    python -m benchmarks.served probe               # what the probe says of other precisions
    python -m benchmarks.served scores URL MODEL    # a server of the same folder: error, throughput

The pair is the real one (`make real-models`); `--folder` names another teacher.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from opd_stream.engines.base import ScoringSettings
from opd_stream.engines.server_client import ServerOptions
from opd_stream.engines.server_engine import (
    PROBE_TOP,
    ServerEngine,
    distance,
    probe_ids,
    tolerance,
)
from opd_stream.engines.server_forms import Completions, Question, Sglang
from opd_stream.types import RolloutBatch

MODELS = Path(__file__).parent.parent / "models" / "real"
TOKENS, TOP_K, VOCABULARY, REPEATS = 400, 64, 151_936, 5
TEXTS = (" the", "Ġhello", '"', "\\", "\n", "漢字", "\ufffd", "):", "<|im_end|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("parse", "probe", "scores"))
    parser.add_argument("server", nargs="*", help="URL MODEL")
    parser.add_argument("--folder", type=Path, default=MODELS / "teacher")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    if arguments.what == "parse":
        parse()
    elif arguments.what == "probe":
        probe(arguments.folder)
    else:
        url, model = arguments.server
        scores(arguments.folder, url, model, arguments.rows, arguments.tokens)


def parse() -> None:
    """Answers at K = 64 as the servers write them, read to columns."""
    random = np.random.default_rng(0)
    ids_L = random.integers(0, VOCABULARY, TOKENS + 1)
    top = [random.permutation(VOCABULARY)[:TOP_K].tolist() for _ in range(TOKENS)]
    logprobs = -np.sort(random.exponential(3.0, (TOKENS, TOP_K + 1)).astype(np.float32))
    asked = Question(ids_L=ids_L, first=1, top_k=TOP_K)
    positions: list[Any] = [None]
    pairs: list[Any] = [None]
    for place in range(TOKENS):
        entries = [int(ids_L[place + 1]), *top[place]]
        values = logprobs[place].astype(float).tolist()
        positions.append(
            {
                str(number): {
                    "logprob": value,
                    "rank": rank,
                    "decoded_token": TEXTS[number % len(TEXTS)],
                }
                for rank, (number, value) in enumerate(zip(entries, values, strict=True), 1)
            }
        )
        pairs.append(
            [[value, number, None] for number, value in zip(top[place], values, strict=False)]
        )
    drawn = [[None, int(ids_L[0]), None], *([-1.5, int(number), None] for number in ids_L[1:])]
    choice = {"prompt_logprobs": positions, "prompt_token_ids": ids_L.tolist()}
    meta = {"input_token_logprobs": drawn, "input_top_logprobs": pairs}
    answers = {
        "vLLM, /v1/completions": (Completions("m"), {"choices": [choice]}),
        "SGLang, /generate": (Sglang("m"), {"meta_info": meta}),
    }
    for name, (form, answer) in answers.items():
        data = json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()
        read = rate(lambda form=form, data=data: form.read(data, asked))
        plain = rate(lambda data=data: json.loads(data))
        print(
            f"{name}, K = {TOP_K}: {len(data) / TOKENS:,.0f} bytes a token, {read:,.0f} tokens a "
            f"CPU second; json.loads alone {plain:,.0f}"
        )


def rate(call: Callable[[], Any]) -> float:
    """Tokens of an answer in a CPU second, the best of some."""
    seconds: list[float] = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return TOKENS / min(seconds)


def probe(folder: Path) -> None:
    """The probe's distance from the teacher in float32, of other precisions and models."""
    import torch

    from opd_stream.engines.loading import load_model

    torch.set_num_threads(1)

    def values(model: Any, others: int = 0) -> np.ndarray:
        ids = torch.tensor(probe_ids(model.config.vocab_size).astype(np.int64))[None]
        batch = torch.cat([ids, ids.flip(1).repeat(others, 1)])  # a batch changes the arithmetic
        with torch.inference_mode():
            logprobs_LV = model(input_ids=batch).logits[0, :-1].float().log_softmax(1)
        drawn = logprobs_LV.gather(1, ids[0, 1:, None])
        return torch.cat([drawn, logprobs_LV.topk(PROBE_TOP).values], dim=1).double().numpy()

    def rounded(model: Any, levels: int) -> Any:
        for weight in model.parameters():
            if weight.ndim == 2:
                step = weight.data.abs().amax(1, keepdim=True) / levels
                weight.data = torch.round(weight.data / step) * step
        return model

    exact = values(load_model(folder, dtype=torch.float32))
    half = load_model(folder, dtype=torch.bfloat16)
    one, many = values(half), values(half, others=7)
    noise = distance(one, many)
    print(f"bfloat16, alone and among 8: {noise:.4f} nats (allowed {tolerance(noise):.4f})")
    print(f"float32 and bfloat16: {distance(exact, one):.4f}")
    for name, levels in (("int8", 127), ("int4", 7)):
        found = values(rounded(load_model(folder, dtype=torch.bfloat16), levels))
        print(f"bfloat16 and {name} weights: {distance(one, found):.4f}")
    for other in ("noisy", "pruned26"):
        if (folder.parent / other).is_dir():
            found = values(load_model(folder.parent / other, dtype=torch.float32))
            print(f"float32 and model {other}: {distance(exact, found):.4f}")


def scores(folder: Path, url: str, model: str, rows: int, tokens: int) -> None:
    """The same rollouts by a server and by the engine in this process."""
    import torch

    from opd_stream.engines import open_engine

    torch.set_num_threads(1)
    options = ServerOptions(url=url, model=model, forced="tail")
    served = ServerEngine(folder, options)
    live = open_engine(engine="transformers", folder=folder, dtype="float32", batch_rows=16)
    random = np.random.default_rng(0)
    ids = random.integers(100, 40_000, (rows, 16 + tokens)).astype(np.int32)
    rollouts = RolloutBatch(
        prompt_id=tuple(map(str, range(rows))),
        sample_index=np.zeros(rows, np.int32),
        prompt_ids=tuple(ids[:, :16]),
        completion_ids=tuple(ids[:, 16:]),
        behavior_logprobs=(np.zeros(tokens, np.float32),) * rows,
        finish_reason=("length",) * rows,
    )
    asked = ScoringSettings(top_k=TOP_K, forced_ids=(2,))
    served.check(asked, own_ids=False)
    print(f"noise of the probe: {served.probe().noise:.2g} nats")
    rates: dict[str, float] = {}
    found: dict[str, Any] = {}
    for name, engine in (("served", served), ("in this process", live)) * 2:
        start, cpu = time.perf_counter(), time.process_time()
        found[name] = engine.score(rollouts, asked)
        seconds, own = time.perf_counter() - start, time.process_time() - cpu
        rates[name] = max(rates.get(name, 0.0), rows * tokens / seconds)
        print(f"{name}: {rows * tokens / seconds:,.0f} tokens a second, {own:.2f} CPU s here")
    print(f"served : in this process = {rates['served'] / rates['in this process']:.2f}")
    for name in ("teacher_logprobs", "teacher_top_logprobs"):
        left, right = (np.concatenate(getattr(each, name)) for each in found.values())
        gap = np.abs(left - right)
        print(f"{name}: differ by {gap.mean():.1e} nats in the mean, {gap.max():.1e} at most")


if __name__ == "__main__":
    main()
