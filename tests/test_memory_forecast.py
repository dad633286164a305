"""The forecast of training's memory against what a forward pass leaves behind."""

from math import prod
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.model_config import read_model_config
from pipeline.estimate.memory import (
    TrainingMemory,
    activation_numbers,
    states_bytes,
    training_memory,
)
from stages.checkpoints import weight_files
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


def test_a_quantised_base_is_forecast_by_its_bits(tmp_path: Path) -> None:
    folder, found = MODELS / "ledger-student", list[int]()
    for base in ("stored", "8bit", "4bit"):
        config = small_config(tmp_path, f"train.lora={{base: {base}}}")
        forecast = training_memory(config, folder, row_tokens=100.0)
        assert forecast is not None
        found.append(forecast.parts["weights"])
    tensors = {name: tensor.shape for name, tensor in weight_files(folder).items()}
    packed = sum(prod(s) for n, s in tensors.items() if len(s) == 2 and "layers" in n)
    assert found[0] - found[1] == pytest.approx(packed * (2 - 1.0625), abs=2)
    assert found[1] - found[2] == pytest.approx(packed / 2, abs=2)


def test_the_copy_of_the_first_student_is_forecast_but_under_adapters(tmp_path: Path) -> None:
    folder, found = MODELS / "ledger-student", list[TrainingMemory]()
    for more in ((), ("train.lora={rank: 4}",)):
        for asked in ((), ("train.reference={weight: 1}",)):
            forecast = training_memory(small_config(tmp_path, *more, *asked), folder, row_tokens=9)
            assert forecast is not None
            found.append(forecast)
    plain, kept, adapted, both = found
    assert kept.bytes - plain.bytes == plain.parts["weights"]
    assert both.bytes == adapted.bytes


def test_the_student_that_an_audit_loads_is_forecast(tmp_path: Path) -> None:
    window = "rollouts.window={kind: adaptive, candidates: [8, 16], max_window_tokens: 48}"
    found = [
        training_memory(small_config(tmp_path, *more), MODELS / "ledger-student", row_tokens=9)
        for more in ((), (window,))
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[1].bytes - found[0].bytes == found[0].parts["weights"]


def test_the_teachers_head_of_codec_hidden_is_forecast(tmp_path: Path) -> None:
    folder, plain = MODELS / "ledger-student", small_config(tmp_path)
    config = small_config(tmp_path, "scores.codec={kind: hidden}")
    teacher = read_model_config(config.teacher.folder) if config.teacher else None
    assert teacher is not None
    width = teacher.settings["hidden_size"]
    head, basis = 4 * teacher.vocabulary * width, 4 * width**2
    both = [training_memory(each, folder, row_tokens=100.0) for each in (config, plain)]
    assert both[0] is not None
    assert both[1] is not None
    assert both[0].bytes - both[1].bytes == head + basis == both[0].parts["teacher_head"]
    assert config.teacher is not None
    copies = 0 if config.teacher.dtype == "float32" else head
    assert states_bytes(config, scoring=True) == copies + 3 * basis


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
