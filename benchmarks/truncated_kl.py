"""Why there is no truncated reverse KL here: `make bench-truncated`.

The sum of p (log p - log q) over the teacher's K candidates alone is smallest when the student puts
its mass elsewhere: outside of the sum every token is free. A live loop on the quickstart's models,
once with that sum and once with the same candidates and a bucket for the rest, shows what that does
to the mass on the candidates and to the answers.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.methods_evaluation import evaluate
from opd_stream.engines import open_engine
from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.logprobs import completion_rows
from opd_stream.tasks import ledger
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

MODELS = Path(__file__).parent.parent / "configs" / "models"
ROUNDS, ROWS, STEPS = 12, 32, 2
WINDOW, TUNING_SEED = 208, 4242


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for loss in ("truncated", "bucket"):
        print(json.dumps({"loss": loss, "rounds": _train(loss, arguments)}))


def _train(loss: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "ledger-student", local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        MODELS / "ledger-student", dtype=torch.float32
    )
    teacher = open_engine(
        engine="transformers", folder=MODELS / "ledger-teacher", dtype="float32", batch_rows=64
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    found: list[dict[str, float]] = []
    for number in range(ROUNDS):
        rollouts = _sample(model, tokenizer, seed=arguments.seed * ROUNDS + number)
        scores = teacher.score(rollouts, ScoringSettings(top_k=arguments.top_k, forced_ids=()))
        masses = [_step(model, optimizer, rollouts, scores, rows, loss) for rows in _halves()]
        ended = sum(reason == "stop" for reason in rollouts.finish_reason) / len(rollouts)
        found.append(
            {
                "round": number,
                "student_top_mass": round(sum(masses) / len(masses), 4),
                "ended": round(ended, 3),
                "tokens": rollouts.completion_tokens / len(rollouts),
            }
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        result = evaluate(
            Path(folder), "ledger", problems=48, samples=4, seed=TUNING_SEED, window_tokens=WINDOW
        )
    found.append({"pass@1": result["pass@1"]})
    return found


def _sample(model: Any, tokenizer: Any, *, seed: int) -> RolloutBatch:
    problems = ledger.make_problems(count=ROWS, seed=seed)
    prompts = PromptBatch(
        prompt_id=tuple(problem.problem_id for problem in problems),
        prompt_ids=tuple(
            np.array([tokenizer.bos_token_id, *tokenizer.encode(ledger.prompt_text(problem))])
            for problem in problems
        ),
    )
    engine = TransformersEngine.over(model.eval())
    return engine.sample(
        prompts,
        SamplingSettings(window_tokens=WINDOW, stop_ids=(tokenizer.eos_token_id,), seed=seed),
    )


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rollouts: RolloutBatch,
    scores: ScoreBatch,
    rows: range,
    loss: str,
) -> float:
    """One optimizer step on some rows; returns the student's mass on the candidates before it."""
    texts = [
        np.concatenate([rollouts.prompt_ids[row], rollouts.completion_ids[row]]) for row in rows
    ]
    ids_BL = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for place, text in enumerate(texts):
        ids_BL[place, : len(text)] = torch.from_numpy(text)
        mask_BL[place, : len(text)] = 1
    logits_BLV = model.train()(input_ids=ids_BL, attention_mask=mask_BL).logits
    places_N = completion_rows(
        torch.tensor([len(rollouts.prompt_ids[row]) for row in rows]),
        torch.tensor([len(rollouts.completion_ids[row]) for row in rows]),
        padded_length=ids_BL.shape[1],
    )
    logprobs_NV = logits_BLV.flatten(0, 1)[places_N].log_softmax(-1)
    top_ids_NK = torch.from_numpy(np.concatenate([scores.teacher_top_ids[row] for row in rows]))
    teacher_NK = torch.from_numpy(
        np.concatenate([scores.teacher_top_logprobs[row] for row in rows])
    )
    student_NK = logprobs_NV.gather(1, top_ids_NK.long())
    losses_N = (student_NK.exp() * (student_NK - teacher_NK)).sum(1)
    if loss == "bucket":
        tails = [torch.from_numpy(scores.teacher_tail_logprobs[row]) for row in rows]
        rest_N = (1 - student_NK.exp().sum(1)).clamp(min=1e-7)
        losses_N = losses_N + rest_N * (rest_N.log() - torch.cat(tails).clamp(min=-30))
    losses_N.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(student_NK.detach().exp().sum(1).mean())


def _halves() -> list[range]:
    size = ROWS // STEPS
    return [range(start, start + size) for start in range(0, ROWS, size)]


if __name__ == "__main__":
    main()
