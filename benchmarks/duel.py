"""The same student, teacher and prompts by trl with a live teacher, and by opd-stream: the costs.

    python benchmarks/duel.py run            # missing lines, then the table
    python benchmarks/duel.py tables

Every line is a process of its own on one thread; contestants take turns, seed by seed. CPU seconds
are those of the process: "in training" without imports and loading of models (for opd-stream: of
its stages), "whole" with all of them. Policies are evaluated apart, on problems that no setting was
chosen on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods_rows import HELD_OUT, TUNING

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "configs" / "models"
LINES = ROOT / "benchmarks" / "results" / "duel.jsonl"
FULL, ROWS, TARGET, TRAINING_SEED = 208, 16, 0.75, 100
PROBLEMS, SAMPLES = 96, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to train, with its settings.

    Example:
        >>> Contestant(name="trl, full rollouts", by="trl", tokens=208, rate=6e-4, steps=32)
    """

    name: str
    by: str  # trl, opd-stream, or replay: on the scores that the line before has made
    tokens: int = FULL  # of a rollout, at most
    rate: float = 0.0  # peak learning rate
    steps: int = 0  # of trl
    every: int = 4  # steps after which a policy is kept
    settings: tuple[str, ...] = ()  # of opd-stream


# Chosen on seed 50 and the tuning problems: trl's rates of 0.6, 1.2 and 2.4e-3, nine settings here.
CONTESTANTS = (
    Contestant(name="trl, full rollouts", by="trl", rate=2.4e-3, steps=16),
    Contestant(name="trl, half rollouts", by="trl", tokens=FULL // 2, rate=2.4e-3, steps=20),
    Contestant(
        name="opd-stream",
        by="opd-stream",
        settings=(
            "rounds=2",
            "rollouts.prompts_per_round=32",
            "rollouts.window.tokens=128",
            "staleness.max_epochs=3",
            "train.learning_rate=2.4e-3",
        ),
    ),
    Contestant(
        name="opd-stream, more rollouts",
        by="opd-stream",
        settings=(
            "rounds=2",
            "rollouts.prompts_per_round=48",
            "rollouts.window.tokens=96",
            "staleness.max_epochs=4",
        ),
    ),
    Contestant(
        name="opd-stream, another objective on its cache",
        by="replay",
        settings=("train.objective={kind: hybrid}",),
    ),
)
BY_NAME = {each.name: each for each in CONTESTANTS}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "tables", "one"])
    parser.add_argument("--only", choices=list(BY_NAME), nargs="*", default=list(BY_NAME))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="of opd-stream")
    parser.add_argument("--rate", type=float, help="learning rate of trl")
    parser.add_argument("--steps", type=int, help="of trl")
    parser.add_argument("--tuning", action="store_true", help="print, on the tuning problems")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.command == "one":
        print(json.dumps(_trained(BY_NAME[asked.only[0]], asked.seeds[0], asked)))
        return
    if asked.command == "run":
        known = {(line["name"], line["seed"]) for line in _lines()}
        for seed in asked.seeds:
            with tempfile.TemporaryDirectory() as folder:
                for name in asked.only:
                    if asked.tuning or (name, seed) not in known:
                        _measure(BY_NAME[name], seed, asked, Path(folder))
    if not asked.tuning:
        print(table(_lines()))


def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.open()] if LINES.exists() else []


def _measure(one: Contestant, seed: int, asked: argparse.Namespace, folder: Path) -> None:
    """Train in a process of its own, evaluate what it kept, and store a line."""
    command = [sys.executable, __file__, "one", "--only", one.name, "--seeds", str(seed)]
    command += ["--folder", str(folder)]
    command += [] if asked.rate is None else ["--rate", str(asked.rate)]
    command += [] if asked.steps is None else ["--steps", str(asked.steps)]
    command += ["--set", *asked.settings] if asked.settings else []
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **threads}
    )
    points = json.loads(done.stdout.splitlines()[-1])
    problems = TUNING if asked.tuning else HELD_OUT + seed
    for point in points:
        point["pass@1"] = _accuracy(Path(point.pop("policy")), problems)
    line = {"name": one.name, "seed": seed, "points": points}
    print(json.dumps(line), flush=True)
    if not asked.tuning:
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _accuracy(policy: Path, problems: int) -> float:
    from methods_evaluation import evaluate

    found = evaluate(
        policy, "ledger", problems=PROBLEMS, samples=SAMPLES, seed=problems, window_tokens=FULL
    )
    return round(found["pass@1"], 4)


def _trained(one: Contestant, seed: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The policies that one process keeps on the way, and what it had spent by then."""
    import torch

    torch.set_num_threads(1)
    if one.by == "trl":
        rate, steps = asked.rate or one.rate, asked.steps or one.steps
        return _by_trl(one, seed, rate, steps, asked.folder)
    return _by_opd_stream(one, seed, asked.settings, asked.folder)


def _by_opd_stream(
    one: Contestant, seed: int, more: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    from opd_stream.config_file import load_config
    from pipeline.run import run
    from pipeline.run_folder import RunFolder
    from stages.step import Silent

    first = BY_NAME["opd-stream"]
    base = first.settings if one.by == "replay" else ()
    replay = [f"replay={{run: {folder / first.name}}}"] if one.by == "replay" else []
    settings = [
        *(*base, *one.settings, *more, *replay),
        f"seed={seed}",
        f"prompts.seed={TRAINING_SEED + seed}",
        f"store={folder / 'store' / (first if one.by == 'replay' else one).name}",
        "evaluation=null",
        "held_out_prompts=0",
    ]
    config = load_config(ROOT / "benchmarks" / "methods_ledger.yaml", settings)
    directory = RunFolder(folder / one.name)
    run(config, directory, Silent())
    whole = time.process_time()
    points: list[dict[str, Any]] = []
    spent = 0.0
    for report in directory.reports():
        parts = report.cpu_seconds
        spent += parts.generate + parts.score + parts.train
        points.append(_point(report.policy.folder, report.first_step + report.steps, spent, 0.0))
    beside = whole - spent  # start and bookkeeping, all of it counted with the first round
    return [{**point, "whole": round(point["cpu"] + beside, 3)} for point in points]


def _point(policy: str, steps: int, spent: float, whole: float) -> dict[str, Any]:
    return {
        "policy": policy,
        "steps": steps,
        "cpu": round(spent, 3),
        "whole": round(whole, 3),
    }


def _by_trl(
    one: Contestant, seed: int, rate: float, steps: int, folder: Path
) -> list[dict[str, Any]]:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import (  # pyright: ignore[reportMissingImports]
        DistillationConfig,
        DistillationTrainer,
    )

    from opd_stream.tasks import ledger

    tokenizer: Any = AutoTokenizer.from_pretrained(MODELS / "ledger-student", padding_side="left")
    problems = ledger.make_problems(count=ROWS * steps, seed=TRAINING_SEED + seed, task="ledger")
    prompts = [tokenizer.bos_token + ledger.prompt_text(problem) for problem in problems]
    expected = [tokenizer.bos_token_id, *tokenizer.encode(ledger.prompt_text(problems[0]))]
    assert tokenizer(text=prompts[:1])["input_ids"][0] == expected
    points: list[dict[str, Any]] = []
    lost = 0.0  # seconds in which policies were kept

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            nonlocal lost
            if state.global_step % one.every and state.global_step != steps:
                return
            now = time.process_time()
            policy = folder / f"{one.name}-{state.global_step}"
            named["model"].save_pretrained(policy)
            tokenizer.save_pretrained(policy)
            points.append(_point(str(policy), state.global_step, now - start - lost, now - lost))
            lost += time.process_time() - now

    torch.manual_seed(seed)
    model, teacher = (
        AutoModelForCausalLM.from_pretrained(MODELS / f"ledger-{role}", dtype=torch.float32)
        for role in ("student", "teacher")
    )
    trainer = DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=ROWS,
            max_completion_length=one.tokens,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, steps // 10),
            beta=1.0,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Marks()],
    )
    start = time.process_time()
    trainer.train()
    return points


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Markdown: what is reached at the end, and what it took to reach the target."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for line in lines:
        found.setdefault(line["name"], []).append(line["points"])
    rows = [
        "| by | seeds | pass@1 at the end | CPU s in training, whole | "
        f"reached {TARGET} | CPU s to it in training, whole |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        ends = [run[-1] for run in runs]
        firsts = [next((p for p in run if p["pass@1"] >= TARGET), None) for run in runs]
        reached = [point for point in firsts if point is not None]
        cost = f"{_median(reached, 'cpu')}, {_median(reached, 'whole')}" if reached else "never"
        rows.append(
            f"| {name} | {len(runs)} | {_spread(ends)} | "
            f"{_median(ends, 'cpu')}, {_median(ends, 'whole')} | "
            f"{len(reached)} of {len(runs)} | {cost} |"
        )
    return "\n".join(rows)


def _median(points: Sequence[dict[str, Any]], name: str) -> str:
    return f"{statistics.median(point[name] for point in points):.1f}"


def _spread(points: Sequence[dict[str, Any]]) -> str:
    values = [point["pass@1"] for point in points]
    mean: Callable[[Sequence[float]], float] = statistics.fmean
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
