"""Supervised training of the two ledger models, from a random start, in plain float32 torch.

Muon on the weight matrices is what makes minutes enough: with AdamW alone the same model does not
learn the task in the same time. The loss looks at the completion only.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import Qwen3ForCausalLM

WARMUP_STEPS = 30
DECAY_FRACTION = 0.25  # of the steps
FINAL_LR_FRACTION = 0.02
BATCHES_PER_BUCKET = 32  # batches drawn together and sorted by length, so that little is padding
NO_LABEL = -100

# Prompt ids with bos, completion ids with eos, and which of these are learned.
Example = tuple[list[int], list[int], list[bool]]
ExampleSource = Callable[[], Example]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of training with its own warm-up and decay."""

    title: str
    examples: ExampleSource
    steps: int
    muon_lr: float  # matrices of the blocks
    adamw_lr: float  # embedding (tied to the head) and norms
    rows: int = 8  # small batches learn this task faster per second than large ones


def train_phase(model: Qwen3ForCausalLM, phase: Phase, *, seed: int) -> None:
    """Train `model` in place and print the loss ten times."""
    matrices, rest = _split_parameters(model)
    optimizers = (
        torch.optim.Muon(matrices, lr=phase.muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=phase.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_fraction(step, phase.steps))
        for optimizer in optimizers
    ]
    batches = _draw_batches(phase, random.Random(seed))
    started, recent_losses = time.perf_counter(), []
    model.train()
    for step in range(1, phase.steps + 1):
        input_ids, labels = next(batches)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        recent_losses.append(loss.item())
        if step % max(1, phase.steps // 10) == 0:
            mean_loss = sum(recent_losses) / len(recent_losses)
            seconds = time.perf_counter() - started
            print(f"{phase.title}: step {step}/{phase.steps} loss {mean_loss:.5f} {seconds:.0f} s")
            recent_losses = []
    model.eval()


def _split_parameters(
    model: Qwen3ForCausalLM,
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Muon takes matrices only, and not the embedding, whose rows are not a linear map's."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if is_matrix else rest).append(parameter)
    return matrices, rest


def _lr_fraction(step: int, steps: int) -> float:
    """Warm up, hold, come down: which word to copy is learned late, and only at a high rate."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return max(FINAL_LR_FRACTION, min(1.0, (1 - step / steps) / DECAY_FRACTION))


def _draw_batches(phase: Phase, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of fresh examples, similar lengths together, in random order."""
    while True:
        drawn = [phase.examples() for _ in range(phase.rows * BATCHES_PER_BUCKET)]
        drawn.sort(key=lambda example: len(example[0]) + len(example[1]))
        bucket = [drawn[start : start + phase.rows] for start in range(0, len(drawn), phase.rows)]
        rng.shuffle(bucket)
        yield from map(_pad_right, bucket)


def _pad_right(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right padding needs no attention mask: causal attention never looks at what follows."""
    width = max(len(prompt) + len(completion) for prompt, completion, _ in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), NO_LABEL)
    for row, (prompt, completion, is_learned) in enumerate(examples):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        learned = torch.tensor(completion).where(torch.tensor(is_learned), NO_LABEL)
        labels[row, len(prompt) : end] = learned
    return input_ids, labels
