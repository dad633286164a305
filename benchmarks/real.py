"""What a real pair of 135 M parameters learns: `make real-models`, then `make bench-real`.

    python -m benchmarks.real run              # runs that have no stored line yet, then the tables
    python -m benchmarks.real run --only noisy --seeds 0
    python -m benchmarks.real tables           # of benchmarks/results/real.jsonl

Seed 0 is for tuning; tables are of seeds 1 to 3. Prompts of training and of the held-out text share
no subject. The held-out text is written once by the teacher; divergences are those of plain
transformers over the full vocabulary, of every completion token.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_questions import HELD_OUT, questions

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models" / "real"
LINES = ROOT / "benchmarks" / "results" / "real.jsonl"
SEEDS = (1, 2, 3)  # 0 is for tuning
TEXT_TOKENS, TEXT_SEED = 48, 7
CONTROLS = "benchmarks.controls"
NOISY = ("train.rows_per_step=4",)
BASE = {
    "rollouts.prompts_per_round": 32,
    "rollouts.window": "{kind: fixed, tokens: 48}",
    "scores.top_k": 64,
    "scores.codec": "{kind: compact, mass: 0.999}",
    "train.objective": "{kind: bucket, direction: reverse}",
    "train.learning_rate": 5e-5,
    "train.warmup": 0,
    "train.rows_per_step": 8,
    "train.threads": 1,
    "staleness.max_epochs": 2,
    "evaluation": "null",
    "held_out_prompts": 0,
    "executor": "local",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table.

    Example:
        >>> Row(name="noisy", group="pairs", student="noisy", rounds=2)
    """

    name: str
    group: str
    student: str
    rounds: int
    settings: tuple[str, ...] = ()
    seeds: int = 3


def _rows() -> Iterator[Row]:
    yield Row(name="noisy", group="pairs", student="noisy", rounds=2, settings=NOISY)
    yield Row(
        name="pruned26",
        group="pairs",
        student="pruned26",
        rounds=3,
        settings=("rollouts.prompts_per_round=64", "train.learning_rate=1e-4"),
    )
    yield Row(
        name="the teacher itself",
        group="pairs",
        student="teacher",
        rounds=1,
        settings=("staleness.max_epochs=1",),
    )
    for epochs in (1, 4):
        yield _noisy(f"{epochs} passes", "passes", f"staleness.max_epochs={epochs}")
    for tokens, prompts in ((16, 96), (32, 48)):
        yield _noisy(
            f"window {tokens}",
            "windows at equal scored tokens",
            f"rollouts.window={{kind: fixed, tokens: {tokens}}}",
            f"rollouts.prompts_per_round={prompts}",
        )
    for k in (8, 32, 256):
        yield _noisy(f"K {k}", "support", f"scores.top_k={k}")
    yield _noisy("K 32 + 32", "support", "scores.top_k=32", "rollouts.student_top_k=32")
    yield _noisy("hidden", "support", "scores.codec={kind: hidden}")
    yield _noisy("hybrid, K 64", "support", "train.objective={kind: hybrid}")
    for rate in ("5e-5", "5e-4"):
        lora = "train.lora={rank: 16, alpha: 32}"
        yield _noisy(f"LoRA r 16, {rate}", "weights", lora, f"train.learning_rate={rate}")
    yield _noisy("bf16-mixed", "weights", "train.precision=bf16-mixed")
    for name in ("Shuffled", "Constant"):
        yield _noisy(name.lower(), "controls", f"train.objective={{kind: {CONTROLS}:{name}}}")


def _noisy(name: str, group: str, *settings: str) -> Row:
    return Row(name=name, group=group, student="noisy", rounds=2, settings=(*NOISY, *settings))


ROWS = {row.name: row for row in _rows()}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "tables"])
    parser.add_argument("--only", choices=list(ROWS), nargs="*", default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--set", dest="settings", nargs="*", default=[])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "real-pair")
    asked = parser.parse_args()
    if asked.command == "run":
        if not (MODELS / "teacher" / "config.json").exists():
            sys.exit(f"{MODELS} has no pair; run: make real-models")
        _run_missing([ROWS[name] for name in asked.only], asked)
    print(_table(_lines()))


def _run_missing(rows: Sequence[Row], asked: argparse.Namespace) -> None:
    known = {(line["row"], line["seed"], tuple(line["settings"])) for line in _lines()}
    text = _held_out(asked.folder)
    for row in rows:
        settings = (*row.settings, *asked.settings)
        for seed in asked.seeds[: row.seeds]:
            if (row.name, seed, settings) not in known:
                line = _measured(row, seed, settings, text, asked.folder)
                with LINES.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


def _lines() -> list[dict[str, Any]]:
    text = LINES.read_text() if LINES.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def _measured(
    row: Row, seed: int, settings: Sequence[str], text: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """One run in a process of its own, and what its last policy is on held-out text."""
    name = f"{row.name.replace(' ', '-')}-{seed}-{zlib.crc32(repr(settings).encode()):08x}"
    prompts = folder / f"prompts-{seed}.jsonl"
    rows = [{"messages": [{"role": "user", "content": q}]} for q in questions(seed)]
    prompts.write_text("".join(json.dumps(each) + "\n" for each in rows))
    values = {
        "rounds": row.rounds,
        "seed": seed,
        "student.path": MODELS / row.student,
        "prompts.path": prompts,
        "store": folder / "store",
        **BASE,
    }
    pairs = [f"{key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "configs" / "real.yaml")]
    command += ["--run-dir", str(folder / "runs" / name)]
    for setting in (*pairs, *settings):
        command += ["--set", setting]
    start, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = folder / "runs" / name
    summary = json.loads((run / "summary.json").read_text())
    reports = [json.loads(path.read_text()) for path in sorted(run.glob("rounds/*/report.json"))]
    policy = Path(reports[-1]["policy"]["folder"])
    return {
        "row": row.name,
        "seed": seed,
        "settings": list(settings),
        "before": _before(row.student, text, folder),
        "after": _distance(policy, text),
        "scored": summary["tokens"]["teacher_scored"],
        "trained_share": mean(report["trained_share"] for report in reports),
        "steps": summary["steps"],
        "bytes": summary["cache_bytes"],
        "cpu_seconds": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1
        ),
        "wall_seconds": round(time.time() - start, 1),
        "peak_mib": round(after.ru_maxrss / 1024) if after.ru_maxrss > before.ru_maxrss else None,
        "decisions": [report["decision"] for report in reports],
    }


def _before(student: str, text: dict[str, Any], folder: Path) -> dict[str, float]:
    path = folder / f"before-{student}.json"
    if not path.exists():
        path.write_text(json.dumps(_distance(MODELS / student, text)))
    return json.loads(path.read_text())


def _held_out(folder: Path) -> dict[str, Any]:
    """Prompt and completion ids of text that the teacher writes, made once."""
    path = folder / "held-out.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(MODELS / "teacher")
        model: Any = AutoModelForCausalLM.from_pretrained(MODELS / "teacher", dtype=torch.float32)
        torch.manual_seed(TEXT_SEED)
        rows: list[dict[str, list[int]]] = []
        for question in HELD_OUT:
            turns = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            whole = model.generate(**ids, max_new_tokens=TEXT_TOKENS, do_sample=True, top_k=0)
            start = ids["input_ids"].shape[1]
            rows.append({"prompt": whole[0, :start].tolist(), "text": whole[0, start:].tolist()})
        path.write_text(json.dumps({"rows": rows}))
    return json.loads(path.read_text())


@torch.no_grad()
def _distance(folder: Path, text: dict[str, Any]) -> dict[str, float]:
    """Divergences from the teacher on its own text, means over tokens; nats."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder, MODELS / "teacher")
    )
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for row in text["rows"]:
        ids = torch.tensor([row["prompt"] + row["text"]])
        start, own = len(row["prompt"]) - 1, torch.tensor(row["text"])
        p, q = (m(ids).logits[0, start:-1].double().log_softmax(1) for m in (student, teacher))
        sums += torch.stack(
            [
                (p.exp() * (p - q)).sum(),
                (q.exp() * (q - p)).sum(),
                (p.argmax(1) == q.argmax(1)).sum().double(),
                -p.gather(1, own[:, None]).sum(),
            ]
        )
        tokens += len(own)
    names = ("reverse_kl", "forward_kl", "top1", "cross_entropy")
    return dict(zip(names, (sums / tokens).tolist(), strict=True))


def _table(lines: Sequence[dict[str, Any]]) -> str:
    found = [
        "| run | seeds | scored tokens | trained | B a token | KL(student ‖ teacher) before "
        "| after | KL(teacher ‖ student) | same first token | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS.values():
        own = [
            line
            for line in lines
            if (line["row"], tuple(line["settings"])) == (row.name, row.settings)
            and line["seed"] in SEEDS
        ]
        if own:
            found.append(f"| {row.group}: {row.name} | {_cells(own)} |")
    return "\n".join(found) + "\n"


def _cells(lines: Sequence[dict[str, Any]]) -> str:
    def after(name: str) -> str:
        values = [line["after"][name] for line in lines]
        return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

    bought = mean(max(line["scored"], 1) for line in lines)
    cells = [
        str(len(lines)),
        f"{mean(line['scored'] for line in lines):,.0f}",
        f"{mean(line['trained_share'] for line in lines):.0%}",
        f"{mean(line['bytes'] for line in lines) / bought:.0f}",
        f"{lines[0]['before']['reverse_kl']:.3f}",
        *(after(name) for name in ("reverse_kl", "forward_kl", "top1")),
        f"{mean(line['cpu_seconds'] for line in lines):.0f}",
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
