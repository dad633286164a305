"""A small language model of Python source, for codec figures on a larger vocabulary.

    python benchmarks/text_teacher.py --out models/text-teacher

Byte-level BPE of 16,384 tokens and a Qwen3 model of two layers of width 128, trained for a few
minutes on the standard library of the running Python: real text that every machine has. It writes
poor code; its next-token distributions have the shape of a language model's.
"""

import argparse
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 16_384
END = "<|end|>"
CONTEXT, ROWS = 192, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    texts = standard_library(arguments.seed)
    tokenizer = train_tokenizer(texts)
    ids = torch.tensor([i for part in tokenizer(texts)["input_ids"] for i in [*part, 0]])
    print(f"{len(texts)} files, {len(ids):,} tokens", flush=True)
    model = train(ids, minutes=arguments.minutes, seed=arguments.seed)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def standard_library(seed: int) -> list[str]:
    """Sources of the running Python's standard library, in a random order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(folder.rglob("*.py")) if "site-packages" not in path.parts]
    random.Random(seed).shuffle(paths)
    return [path.read_text(errors="replace") for path in paths]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END)


def train(ids: torch.Tensor, *, minutes: float, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = (
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    )
    draw = torch.Generator().manual_seed(seed)
    started, step, mean = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        for optimizer, peak in zip(optimizers, (0.02, 3e-3), strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30, 3 * (1 - done))
        starts = torch.randint(len(ids) - CONTEXT, (ROWS,), generator=draw)
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step} loss {mean:.3f}", flush=True)
    return model


if __name__ == "__main__":
    main()
