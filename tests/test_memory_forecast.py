"""The forecast of training's memory against what a forward pass leaves behind."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_stream.engines.reading import decoder_of, rows_hidden
from pipeline.estimate.memory import activation_numbers, training_memory
from tests.conftest import MODELS, small_config

SHAPE = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 300,
}


def test_activations_are_those_that_autograd_saves() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    ids = torch.arange(200).reshape(4, 50)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rows_hidden(decoder_of(model), ids, torch.ones_like(ids))
    found = sum(saved.values()) / 4 / ids.numel()
    assert activation_numbers(SHAPE, recomputes=False) == pytest.approx(found, rel=0.25)
    assert activation_numbers(SHAPE, recomputes=True) < found / 2


def test_settings_that_save_memory_are_forecast_to(tmp_path: Path) -> None:
    folder, found = MODELS / "ledger-student", dict[str, int]()
    for setting in (
        *("seed=0", "train.precision=bf16-true", "train.optimizer=adamw-8bit"),
        *("train.optimizer=adafactor", "train.gradient_checkpointing=true", "train.lora={}"),
    ):
        config = small_config(tmp_path, setting, "train.tokens_per_microbatch=4000")
        forecast = training_memory(config, folder, row_tokens=1000.0)
        assert forecast is not None
        assert forecast.tokens == 4000
        found[setting] = forecast.bytes
    plain = found.pop("seed=0")
    assert all(size < plain for size in found.values()), found
