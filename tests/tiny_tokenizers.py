"""Tiny tokenizers of the families that alignment reads, trained in a moment."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TEXT = [
    "On Monday Anna has 12 coins and gives 7 of them to Ben.",
    "Every day she writes down what is left: 5, then 3, then nothing.",
    "naïve café, Größe, 漢字 and кириллица; 😀 too",
]


def byte_level(
    size: int = 320, *, specials: tuple[str, ...] = ("<pad>", "<eos>")
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet)
    return _trained(tokenizer, trainer, specials)


def metaspace(size: int = 400, *, prepends: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE with byte fall-back, as Llama 2: the prefix space is a normaliser's."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    draft = Tokenizer(models.BPE())
    draft.normalizer = normalizers.Replace(" ", "▁")
    draft.train_from_iterator(TEXT, BpeTrainer(vocab_size=size - len(vocabulary)))
    learned = draft.get_vocab()
    merges = _merges(draft)
    vocabulary += sorted(learned, key=lambda each: learned[each])
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(vocabulary)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Prepend("▁")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    names = ["<unk>", "<s>", "</s>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def unigram(size: int = 120, **normalizer: Any) -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model without fall-back: characters it never saw are unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    if normalizer:
        tokenizer.normalizer = normalizer["normalizer"]
    names = ("<unk>", "<eos>")
    trainer = UnigramTrainer(vocab_size=size, special_tokens=list(names), unk_token="<unk>")
    return _trained(tokenizer, trainer, names)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _trained(tokenizer: Tokenizer, trainer: Any, specials: tuple[str, ...]) -> Any:
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=specials[-1])


def random_teacher(folder: Path, tokenizer: PreTrainedTokenizerFast, *, stop: str) -> Path:
    """A tiny Llama of random weights that reads another tokenizer's tokens."""
    torch.manual_seed(0)
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,  # padded, as published models are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=stop_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def permuted(source: Path, folder: Path) -> Path:
    """A checkpoint that computes the same under other ids: its vocabulary in another order."""
    spec = json.loads((source / "tokenizer.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source)
    size = model.config.vocab_size
    moved = np.random.default_rng(0).permutation(size)
    names = {piece: int(moved[number]) for piece, number in spec["model"]["vocab"].items()}
    spec["model"]["vocab"] = dict(sorted(names.items(), key=lambda item: item[1]))
    for token in spec["added_tokens"]:
        token["id"] = int(moved[token["id"]])
    spec["added_tokens"].sort(key=lambda token: token["id"])
    order = torch.from_numpy(np.argsort(moved))
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {layer.weight for layer in layers}:
        weight.data = weight.data[order].clone()
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, int(moved[getattr(config, name)]))
    shutil.copytree(source, folder)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder
