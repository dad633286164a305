"""Every figure that waits for a GPU, by one command: `make bench-gpu`.

    python -m benchmarks.gpu                        # measure, store the lines, write docs/gpu.md
    python -m benchmarks.gpu --page-only            # write the page again from the stored lines
    python -m benchmarks.gpu --device cpu --tiny    # the same work at shapes for a test

Weights, ids and scores are random, so nothing is downloaded. Each figure is the median of runs
after one that is not counted, peak memory that of one run. What does not fit is a line, too.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.engines import random_rollouts
from benchmarks.loss import Case, dense, fused, status_kib
from opd_stream.batches import Batch
from opd_stream.config.sections import Lora
from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.engines.reading import decoder_of
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.objectives import Bucket
from opd_stream.types import PromptBatch
from stages.student_model import load_student

ROOT = Path(__file__).parents[1]
LINES = ROOT / "benchmarks" / "results" / "gpu.jsonl"
PAGE = ROOT / "docs" / "gpu.md"
REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """How large everything is."""

    loss: tuple[int, int, int, int]  # tokens, width, vocabulary, K
    vocabulary: int
    width: int
    layers: int
    heads: int
    rows: int
    prompt: int  # tokens
    completion: int
    top_k: int
    long: int  # tokens of the one row whose memory is taken


LARGE = Shapes(
    loss=(8192, 4096, 128_256, 64),
    vocabulary=151_936,
    width=1024,
    layers=28,
    heads=16,
    rows=32,
    prompt=256,
    completion=768,
    top_k=64,
    long=32_000,
)
TINY = Shapes(
    loss=(64, 32, 512, 8),
    vocabulary=512,
    width=32,
    layers=2,
    heads=2,
    rows=2,
    prompt=8,
    completion=8,
    top_k=4,
    long=64,
)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write the page; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for a test")
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(words)
    if not asked.page_only:
        if asked.device == "cuda" and not torch.cuda.is_available():
            print(
                "torch sees no CUDA device here; expected one GPU of 80 GB or more; run this "
                "where there is one",
                file=sys.stderr,
            )
            return 2
        shapes = TINY if asked.tiny else LARGE
        with asked.lines.open("a") as file:
            for line in measured(shapes, torch.device(asked.device), compiles=not asked.tiny):
                print(json.dumps(line), flush=True)
                file.write(json.dumps(line) + "\n")
    asked.page.write_text(page([json.loads(line) for line in asked.lines.open()]))
    return 0


def measured(shapes: Shapes, device: torch.device, *, compiles: bool) -> Iterator[dict[str, Any]]:
    """A line for each figure."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    about = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = _model(shapes, Path(temporary) / "model")
        for what, tokens, make in [
            *_losses(shapes, device),
            *_engines(shapes, device, folder, compiles=compiles),
            *_trainings(shapes, device, folder),
        ]:
            yield {**about, "what": what, **_figures(make, tokens, device)}


Work = tuple[str, int, Callable[[], Callable[[], object]]]  # name, tokens, what makes the work


def _losses(shapes: Shapes, device: torch.device) -> Iterator[Work]:
    tokens, width, vocabulary, top_k = shapes.loss
    shape = f"BT {tokens:,}, H {width:,}, V {vocabulary:,}, K {top_k}"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def make(loss: Callable[[Case], torch.Tensor]) -> Callable[[], object]:
        case = Case(shapes.loss, str(device), dtype)

        def once() -> None:
            loss(case).backward()
            case.gradients()

        return once

    for name, loss in (("fused", fused), ("dense", dense)):
        yield f"loss, {name} ({shape})", tokens, partial(make, loss)


def _engines(
    shapes: Shapes, device: torch.device, folder: Path, *, compiles: bool
) -> Iterator[Work]:
    rows, tokens = shapes.rows, shapes.rows * shapes.completion
    drawn = {"shared": False, "ids": min(4000, shapes.vocabulary)}
    rollouts = random_rollouts(rows, prompt=shapes.prompt, completion=shapes.completion, **drawn)
    prompts = PromptBatch(prompt_id=rollouts.prompt_id, prompt_ids=rollouts.prompt_ids)
    long = random_rollouts(1, prompt=shapes.prompt, completion=shapes.long, **drawn)
    asked = ScoringSettings(top_k=shapes.top_k)
    sampled = SamplingSettings(window_tokens=shapes.completion, stop_ids=(), seed=1)

    def make(
        work: Callable[[TransformersEngine], object], is_compiled: bool
    ) -> Callable[[], object]:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        engine = TransformersEngine(folder, dtype=dtype, batch_rows=rows, device=device.type)
        if is_compiled:
            decoder_of(engine._model).compile(dynamic=True)
        return lambda: work(engine)

    for is_compiled in (False, True) if compiles else (False,):
        suffix = ", compiled" if is_compiled else ""
        score = partial(make, lambda engine: engine.score(rollouts, asked), is_compiled)
        sample = partial(make, lambda engine: engine.sample(prompts, sampled), is_compiled)
        yield f"scoring{suffix}", tokens, score
        yield f"sampling{suffix}", tokens, sample
    one = partial(make, lambda engine: engine.score(long, asked), False)
    yield f"scoring, one row of {shapes.long:,} tokens", shapes.long, one


def _trainings(shapes: Shapes, device: torch.device, folder: Path) -> Iterator[Work]:
    def make(lora: Lora | None, recomputes: bool, rows: int, tokens: int) -> Callable[[], object]:
        student = load_student(
            folder, lora=lora, initial=folder, gradient_checkpointing=recomputes
        ).to(device)
        trained = [each for each in student.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        batch = random_batch(shapes, rows, tokens).to(device)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found = student(batch, (Bucket(),), merge_terminators=False, limit=None)
            found.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    usual, long = (shapes.rows // 2, shapes.completion), (1, shapes.long)
    for name, lora in (("full", None), ("LoRA", Lora())):
        for recomputes, (rows, tokens) in ((False, usual), (True, usual), (True, long)):
            how = ", activations recomputed" if recomputes else ""
            what = f"training, {name}{how}, {rows} rows of {tokens:,} tokens"
            yield what, rows * tokens, partial(make, lora, recomputes, rows, tokens)


def random_batch(shapes: Shapes, rows: int, tokens: int) -> Batch:
    """A batch of random ids and scores, every token after the prompt of which trains."""
    torch.manual_seed(0)
    length, number = shapes.prompt + tokens, rows * tokens
    ids_BL = torch.randint(0, shapes.vocabulary, (rows, length))
    logits_NK = torch.randn(number, shapes.top_k)
    rest_N1 = torch.zeros(number, 1)
    logprobs = torch.cat([logits_NK, rest_N1], 1).log_softmax(1)
    row_N = torch.arange(rows).repeat_interleave(tokens)
    positions_N = torch.arange(tokens).repeat(rows)
    first_ids_N1 = torch.randint(0, shapes.vocabulary - shapes.top_k, (number, 1))
    return Batch(
        input_ids_BL=ids_BL,
        attention_mask_BL=torch.ones_like(ids_BL),
        hidden_rows_N=row_N * length + shapes.prompt - 1 + positions_N,
        positions_N=positions_N,
        row_N=row_N,
        block_N=torch.zeros_like(row_N),
        staleness_N=torch.zeros_like(row_N),
        weights_N=torch.full((number,), 1 / number),
        completion_ids_N=ids_BL[:, shapes.prompt :].flatten(),
        behavior_logprobs_N=torch.full((number,), -1.0),
        teacher_logprobs_N=torch.full((number,), -1.0),
        teacher_top_ids_NK=first_ids_N1 + torch.arange(shapes.top_k),
        teacher_top_logprobs_NK=logprobs[:, :-1],
        teacher_tail_logprobs_N=logprobs[:, -1],
        terminator_ids_T=torch.zeros(0, dtype=torch.long),
        teacher_terminator_logprobs_NT=torch.zeros(number, 0),
        draws=None,
        chunk_N=None,
        teacher_states_NG=None,
        window_tokens=tokens,
        largest_id=shapes.vocabulary - 1,
        is_given=False,
        names=tuple(f"row {row}" for row in range(rows)),
    )


def _model(shapes: Shapes, folder: Path) -> Path:
    """A random Qwen3 of the shape, in bfloat16."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.width,
        intermediate_size=3 * shapes.width,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=max(1, shapes.heads // 2),
        head_dim=128 if shapes is LARGE else 16,
        max_position_embeddings=max(40_960, shapes.long + shapes.prompt),
        tie_word_embeddings=True,
    )
    model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _figures(
    make: Callable[[], Callable[[], object]], tokens: int, device: torch.device
) -> dict[str, Any]:
    """Median seconds, tokens a second and the peak of memory; or why there are none."""
    try:
        work = make()
        work()
        before = _start_peak(device)
        work()
        peak = _peak(device)
        seconds = [_seconds(work, device) for _ in range(REPEATS)]
        found = {
            "seconds": statistics.median(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
            "held_mib": before,
            "peak_mib": peak,
        }
    except (RuntimeError, MemoryError) as error:  # does not fit, or cannot be compiled
        found = {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
    work = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = _now(device)
    work()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _start_peak(device: torch.device) -> float:
    """MiB that are held now, from which the next peak is taken."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return status_kib("VmRSS") / 1024


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return status_kib("VmHWM") / 1024


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The page, with the latest line of each figure on each device."""
    latest = {(line["device"], line["what"]): line for line in lines}
    parts = [
        "# On a GPU\n",
        "    make bench-gpu\n",
        "Random weights of a 0.6 B Qwen3 in bfloat16 (training: float32 weights, bfloat16 "
        f"products); medians of {REPEATS}. Memory is what is held before a run and its peak.\n",
    ]
    for device in dict.fromkeys(device for device, _ in latest):
        own = [line for (name, _), line in latest.items() if name == device]
        dates, versions = ({line[field] for line in own} for field in ("date", "torch"))
        parts.append(f"## {device}\n")
        parts.append(f"torch {', '.join(sorted(versions))}, {', '.join(sorted(dates))}.\n")
        parts.append("| what | s | tokens/s | held, MiB | peak, MiB |\n|---|---|---|---|---|")
        parts += [_row(line) for line in own]
        parts[-1] += "\n"
    return "\n".join(parts)


def _row(line: dict[str, Any]) -> str:
    if "refused" in line:
        return f"| {line['what']} | {line['refused'].replace('|', '/')} | | | |"
    return (
        f"| {line['what']} | {line['seconds']:.3g} | {line['tokens_per_second']:,.0f} "
        f"| {line['held_mib']:,.0f} | {line['peak_mib']:,.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
