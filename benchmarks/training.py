"""The training stage: where its time goes, and beside a live teacher and trl's trainer.

    python benchmarks/training.py

CPU seconds, one thread. The student is a small random Qwen3 (vocabulary 8,192, width 128), windows
are 64 tokens, K is 32; trl runs where it is installed (`make bench-train`).
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from loss import status_kib

from opd_stream.batches import Batch
from opd_stream.config_file import load_config
from opd_stream.objectives import Bucket
from opd_stream.store.reader import open_scores
from opd_stream.windows import FixedWindow
from pipeline.run import run
from pipeline.run_folder import RunFolder
from stages.learner import Learner
from stages.student_model import load_student
from stages.train_data import BatchPlan, bucketed, read_epoch

VOCABULARY, ROWS, STEPS, WINDOW, TOP_K = 8192, 16, 12, 64, 32


class Clock:
    """A progress that notes the CPU time of every training step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self, stage: str, total: int, done: int = 0) -> None:
        if stage == "train":
            self.times = [time.process_time()]

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        if stage == "train" and count:
            self.times.append(time.process_time())

    def say(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--memory-of"]:
        print(json.dumps(_growth(sys.argv[2], Path(sys.argv[3]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for role in ("student", "teacher"):
            make_model(folder / role, seed=len(role))
        ours = _cached(folder)
        _live_teacher(folder)
        _layouts(folder)
        if importlib.util.find_spec("trl") is None:
            print("trl is not installed: `make bench-train` measures it too")
            return
        theirs = _trl(folder)
        print("\n## Whole trainer, completion tokens trained per CPU second\n")
        print("| trainer | tokens / CPU s |\n|---|---|")
        print(f"| opd-stream, second epoch over cached scores | {ours:,.0f} |")
        print(f"| trl DistillationTrainer | {theirs:,.0f} |")
        print(f"\nratio {ours / theirs:.1f}")


def make_model(folder: Path, *, seed: int) -> None:
    """A random Qwen3 with a vocabulary of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {"<pad>": 0, "<end>": 1, **{f"w{n}": n for n in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def prompts() -> list[str]:
    """Random words, 16 a prompt."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, VOCABULARY, (ROWS * STEPS, 16), generator=generator).tolist()
    return [" ".join(f"w{n}" for n in words) for words in drawn]


def _cached(folder: Path) -> float:
    """Tokens per CPU second of the second epoch; prints where the time of a step goes."""
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts())
    (folder / "prompts.jsonl").write_text(lines)
    settings: dict[str, Any] = {
        "rounds": 1,
        "student": {"path": "student"},
        "teacher": {"path": "teacher"},
        "prompts": {"kind": "jsonl", "path": "prompts.jsonl"},
        "rollouts": {
            "prompts_per_round": ROWS * STEPS,
            "window": {"kind": "fixed", "tokens": WINDOW},
        },
        "scores": {"top_k": TOP_K},
        "train": {
            "objective": {"kind": "bucket"},
            "learning_rate": 1e-6,
            "rows_per_step": ROWS,
        },
        "staleness": {"max_epochs": 2},
        "executor": "local",
        "store": str(folder / "store"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    clock = Clock()
    parts: dict[str, float] = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    undo = _timed(parts, clock)
    summary = run(load_config(folder / "run.yaml", []), RunFolder(folder / "run"), clock)
    undo()
    second = clock.times[STEPS], clock.times[-1]
    seconds = second[1] - second[0]
    tokens = summary.tokens.trained / 2
    print("## A training step of the second epoch\n")
    print("| part | share |\n|---|---|")
    for name, value in parts.items():
        print(f"| {name} | {value / seconds:.1%} |")
    print(f"| everything else | {1 - sum(parts.values()) / seconds:.1%} |")
    print(f"\n{1e3 * seconds / STEPS:.0f} ms CPU a step, {tokens / STEPS:,.0f} tokens each\n")
    return tokens / seconds


def _timed(parts: dict[str, float], clock: Clock) -> Callable[[], None]:
    """Add up CPU time inside forward, backward and optimizer; returns how to stop."""
    targets: list[tuple[Any, str, str]] = [
        (Learner, "loss", "forward"),
        (Fabric, "backward", "backward"),
        (torch.optim.AdamW, "step", "optimizer"),
    ]
    plain = [(owner, method, getattr(owner, method)) for owner, method, _ in targets]
    for (owner, method, part), (_, _, function) in zip(targets, plain, strict=True):

        def timed(*inputs: Any, function: Any = function, part: str = part, **named: Any) -> Any:
            start = time.process_time()
            result = function(*inputs, **named)
            if len(clock.times) > STEPS:
                parts[part] += time.process_time() - start
            return result

        setattr(owner, method, timed)

    def undo() -> None:
        for entry in plain:
            setattr(*entry)

    return undo


def _step(kind: str, folder: Path) -> tuple[Callable[[Batch], torch.Tensor], torch.optim.Optimizer]:
    """The loss of a batch from cached scores, or from dense logits and a teacher in memory."""
    student = load_student(
        folder / "student", lora=None, initial=folder / "student", gradient_checkpointing=False
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    if kind == "cached":
        return (
            lambda batch: student(batch, (Bucket(),), merge_terminators=True, limit=None).loss
        ), optimizer
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)

    def live(batch: Batch) -> torch.Tensor:
        def logprobs(model: Any) -> torch.Tensor:
            logits = model(
                input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL
            ).logits
            return logits.flatten(0, 1)[batch.hidden_rows_N].log_softmax(1)

        with torch.no_grad():
            theirs = logprobs(teacher)
        ours = logprobs(student.model)
        return (ours.exp() * (ours - theirs)).sum(1).mean()

    return live, optimizer


def _batches(folder: Path) -> list[Batch]:
    (scores,) = (folder / "store" / "scores").iterdir()
    plan = BatchPlan(
        rows_per_step=ROWS,
        tokens_per_microbatch=10**9,
        seed=0,
        first_step=0,
        window=FixedWindow(tokens=WINDOW),
    )
    return [step.batches[0] for step in read_epoch(open_scores(scores), plan, 0)]


def _do(step: Callable[[Batch], torch.Tensor], optimizer: Any, batch: Batch) -> None:
    step(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def _live_teacher(folder: Path) -> None:
    batches = _batches(folder)
    steps = {kind: _step(kind, folder) for kind in ("cached", "live")}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for batch in batches:
        for kind, (step, optimizer) in steps.items():
            start = time.process_time()
            _do(step, optimizer, batch)
            seconds[kind].append(time.process_time() - start)
    print("## One step from the cache, and with dense logits and a live teacher of the same size\n")
    print("| step | ms CPU, median | extra MiB |\n|---|---|---|")
    for kind, values in seconds.items():
        command = [sys.executable, __file__, "--memory-of", kind, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        growth = json.loads(done.stdout.splitlines()[-1])
        print(f"| {kind} | {1e3 * statistics.median(values):.0f} | {growth:,.0f} |")


def _growth(kind: str, folder: Path) -> float:
    """MiB that a second step's peak rises over what is held between steps."""
    batches = _batches(folder)
    step, optimizer = _step(kind, folder)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    for batch in batches[:2]:
        _do(step, optimizer, batch)
    return (status_kib("VmHWM") - before) / 1024


def _layouts(folder: Path) -> None:
    """The same 64 rows of uneven length, laid out in three ways, through decoder and back."""
    student = load_student(
        folder / "student", lora=None, initial=folder / "student", gradient_checkpointing=False
    )
    decoder = student.model.get_decoder()
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(64, generator=generator).mul(0.7).exp() * 120).clamp(20, 480).int()
    rows = [torch.randint(2, VOCABULARY, (int(n),), generator=generator) for n in lengths]
    plain = [list(range(start, start + 8)) for start in range(0, 64, 8)]
    sorted_rows = bucketed([len(row) for row in rows], budget=4096)

    def padded(groups: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        inputs: list[dict[str, torch.Tensor]] = []
        for group in groups:
            ids = torch.nn.utils.rnn.pad_sequence([rows[row] for row in group], batch_first=True)
            inputs.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
        return inputs

    def packed(groups: list[list[int]]) -> list[dict[str, torch.Tensor]]:
        inputs: list[dict[str, torch.Tensor]] = []
        for group in groups:
            blocks = [torch.ones(len(rows[row]), len(rows[row])).tril().bool() for row in group]
            inputs.append(
                {
                    "input_ids": torch.cat([rows[row] for row in group])[None],
                    "position_ids": torch.cat([torch.arange(len(rows[r])) for r in group])[None],
                    "attention_mask": torch.block_diag(*blocks).bool()[None, None],
                }
            )
        return inputs

    layouts = {
        "padded, as they come": padded(plain),
        "padded, sorted by length": padded(sorted_rows),
        "packed, block-diagonal mask": packed(plain),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(5):
        for name, inputs in layouts.items():
            start = time.process_time()
            for each in inputs:
                decoder(**each, use_cache=False).last_hidden_state.sum().backward()
            seconds[name].append(time.process_time() - start)
    print("\n## 64 rows of 20 to 480 tokens, decoder forward and backward\n")
    print("| layout | s CPU, median |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} |")


def _trl(folder: Path) -> float:
    """Completion tokens per CPU second of trl's trainer after its first two steps."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import (  # pyright: ignore[reportMissingImports]
        DistillationConfig,
        DistillationTrainer,
    )

    times: list[float] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

    model, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32)
        for role in ("student", "teacher")
    )
    for each in (model, teacher):
        each.generation_config.eos_token_id = None  # every completion has the same length
    trainer = DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=ROWS,
            max_completion_length=WINDOW,
            max_steps=STEPS,
            learning_rate=1e-6,
            beta=1.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts()}),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=[Marks()],
    )
    trainer.train()
    return ROWS * WINDOW * (len(times) - 2) / (times[-1] - times[1])


if __name__ == "__main__":
    main()
