"""The control: fine-tuning on worked solutions, with the steps and rows of the distillation."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.methods_rows import TASKS
from opd_stream.config import Train
from opd_stream.costs import TokenCounts, counts_of, shape_of, train_flops
from opd_stream.tasks import ledger

ROWS_PER_STEP, STEPS_PER_ROUND = 16, 4
PEAK = 1e-3  # better than 3e-4 on the tuning problems of both tasks
TRAINING_SEED = 100


def fine_tune(task: ledger.Task, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Cross-entropy on programs' solutions; the teacher is not asked at all."""
    torch.manual_seed(seed)
    start = Path(__file__).parent.parent / "configs" / "models" / f"{task}-student"
    tokenizer = AutoTokenizer.from_pretrained(start, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0)
    rounds = TASKS[task].rounds
    steps = rounds * STEPS_PER_ROUND
    problems = ledger.make_problems(
        count=steps * ROWS_PER_STEP, seed=TRAINING_SEED + seed, task=task
    )
    rising = {"learning_rate": PEAK, "schedule": "linear", "warmup": 0.1}
    schedule = Train.model_validate({"objective": {"kind": "lsm"}, **rising})
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    shape = shape_of(model.config.to_dict(), shapes)
    records: list[dict[str, Any]] = []
    for number in range(rounds):
        cpu, total = time.process_time(), TokenCounts(tokens=0, completion_tokens=0, pairs=0)
        for step in range(number * STEPS_PER_ROUND, (number + 1) * STEPS_PER_ROUND):
            chosen = problems[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
            ids, labels, counts = _batch(tokenizer, chosen)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate_at((step + 0.5) / steps, step)
            model(input_ids=ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += counts
        cpu_seconds = time.process_time() - cpu
        policy = folder / f"policy-{number}"
        model.save_pretrained(policy)
        tokenizer.save_pretrained(policy)
        trained = int(total.completion_tokens)
        records.append(
            {
                "folder": str(policy),
                "steps": STEPS_PER_ROUND,
                "window_tokens": TASKS[task].full_tokens,
                "tokens": {"generated": 0, "teacher_scored": 0, "probed": 0, "trained": trained},
                "flops": {"generate": 0.0, "score": 0.0, "train": train_flops(shape, total)},
                "cpu_seconds": {"generate": 0.0, "score": 0.0, "train": round(cpu_seconds, 3)},
                "audit_cpu_seconds": 0.0,
            }
        )
    return records


def _batch(
    tokenizer: Any, problems: list[ledger.LedgerProblem]
) -> tuple[torch.Tensor, torch.Tensor, TokenCounts]:
    total = TokenCounts(tokens=0, completion_tokens=0, pairs=0)
    rows: list[tuple[list[int], list[int]]] = []
    for problem in problems:
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(ledger.prompt_text(problem))]
        solution = [*tokenizer.encode(problem.solution), tokenizer.eos_token_id]
        rows.append((prompt, solution))
        total += counts_of(prompt_tokens=len(prompt), completion_tokens=len(solution))
    width = max(len(prompt) + len(solution) for prompt, solution in rows)
    ids, labels = torch.zeros(len(rows), width).long(), torch.full((len(rows), width), -100)
    for place, (prompt, solution) in enumerate(rows):
        end = len(prompt) + len(solution)
        ids[place, :end] = torch.tensor(prompt + solution)
        labels[place, len(prompt) : end] = torch.tensor(solution)
    return ids, labels, total
