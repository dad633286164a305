"""One optimizer step of one's own loop on cached teacher scores; no teacher is loaded.

    python examples/train_step.py store/scores/3f0c5d1a2b3c4d5e

The loop is plain PyTorch over a transformers model: another optimizer, sampler or trainer stands
where this one does. The scores are those of `examples/score_texts.py` or of any run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from opd_stream.batches import collate
from opd_stream.engines.head import output_head
from opd_stream.loss import batch_loss
from opd_stream.objectives import Bucket
from opd_stream.store import open_scores

MODELS = Path(__file__).parent.parent / "configs" / "models"


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train one step; returns the loss of its rows before and after, nats a token."""
    asked = _arguments(arguments)
    rows = open_scores(asked.scores)
    chosen = [rows[number] for number in range(min(asked.rows, len(rows)))]
    batch = collate(chosen, window_tokens=asked.window)
    model = AutoModelForCausalLM.from_pretrained(asked.student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.learning_rate)

    def loss() -> torch.Tensor:
        hidden_BLH = model.get_decoder()(
            input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL
        ).last_hidden_state
        return batch_loss(hidden_BLH, output_head(model), batch, [Bucket()]).loss

    before = loss()
    before.backward()
    optimizer.step()
    optimizer.zero_grad()
    after = loss()
    tokens = len(batch.completion_ids_N)
    print(f"{len(chosen)} rows, {tokens} tokens: loss {before.item():.4f} -> {after.item():.4f}")
    return before.item(), after.item()


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One step on cached scores.")
    parser.add_argument("scores", help="STORE/scores/FINGERPRINT")
    parser.add_argument("--student", type=Path, default=MODELS / "ledger-student")
    parser.add_argument("--rows", type=int, default=16, help="rollouts of the step")
    parser.add_argument("--window", type=int, default=256, help="completion tokens used of each")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
