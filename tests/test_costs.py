"""The cost model against PyTorch's own count of operations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from opd_stream.config.sections import Lora
from opd_stream.costs import (
    adapter_weights,
    counts_of,
    forward_flops,
    shape_of,
    train_flops,
    unknown_costs,
)
from opd_stream.engines.reading import decoder_of
from opd_stream.model_config import read_model_config
from stages.checkpoints import weight_shapes
from tests.conftest import MODELS
from tests.tiny_models import build


@pytest.mark.parametrize("tokens", [(20, 60), (5, 200)])
def test_operations_are_those_that_torch_counts(tokens: tuple[int, int]) -> None:
    folder = MODELS / "ledger-teacher"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    shape = shape_of(json.loads((folder / "config.json").read_text()), weight_shapes(folder))
    prompt, completion = tokens
    ids = torch.randint(3, 500, (1, prompt + completion))

    def work() -> torch.Tensor:
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
        return model.get_output_embeddings()(hidden[:, prompt:])

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    counts = counts_of(prompt_tokens=prompt, completion_tokens=completion)
    # torch counts attention over all pairs, the model over causal ones only
    length = prompt + completion
    others = length * (length - 1) / 2
    uncounted = 4 * shape.attention_width * others
    found = forward_flops(shape, counts) + uncounted
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as counter:
        work().sum().backward()
    found = train_flops(shape, counts) + 3 * uncounted
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_counts_add_and_a_longer_window_costs_in_proportion() -> None:
    one = counts_of(prompt_tokens=10, completion_tokens=30)
    assert (one + one) == one * 2
    assert one.pairs == 40 * 41 / 2
    folder = MODELS / "ledger-student"
    shape = shape_of(json.loads((folder / "config.json").read_text()), weight_shapes(folder))
    assert train_flops(shape, one) == 3 * forward_flops(shape, one)
    assert train_flops(shape, one, recomputed=True) == 4 * forward_flops(shape, one)
    head = forward_flops(replace(shape, weights=0, attention_width=0), one)
    selected = train_flops(shape, one, selects=True) - train_flops(shape, one)
    assert selected == pytest.approx(head)
    beside = train_flops(shape, one, has_reference=True) - train_flops(shape, one)
    assert beside == pytest.approx(forward_flops(shape, one) + 3 * head)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "mixtral", "bart", "gemma3"])
def test_layers_and_experts_of_any_family_are_counted(model_type: str, tmp_path: Path) -> None:
    """Names of fields that only one family has, experts, matrices that are never read, wrappers."""
    model = build(model_type)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # which torch counts
    model.save_pretrained(tmp_path)
    shape = shape_of(read_model_config(tmp_path).settings, weight_shapes(tmp_path))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder_of(model)(input_ids=torch.randint(8, 90, (1, 40)), use_cache=False)
    others = 4 * shape.attention_width * 40 * 39 / 2
    found = forward_flops(shape, counts_of(prompt_tokens=40, completion_tokens=0)) + others
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_adapters_save_the_gradients_of_frozen_weights() -> None:
    folder = MODELS / "ledger-student"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    shape = shape_of(read_model_config(folder).settings, weight_shapes(folder))
    ids = torch.randint(3, 500, (1, 60))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # as by an adapter there
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    counts = replace(counts_of(prompt_tokens=0, completion_tokens=60), pairs=60**2)
    frozen = replace(shape, adapter_weights=1)
    found = train_flops(frozen, counts)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_the_products_of_adapters_count(targets: str | tuple[str, ...]) -> None:
    """As torch counts them, with a rank that makes them half of the work."""
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    folder, lora = MODELS / "ledger-student", Lora(rank=64, targets=targets)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = peft.LoraConfig(
        r=64, target_modules=targets if isinstance(targets, str) else list(targets)
    )
    model = peft.get_peft_model(plain, config)
    shapes = weight_shapes(folder)
    shape = replace(
        shape_of(read_model_config(folder).settings, shapes),
        adapter_weights=adapter_weights(shapes, lora),
    )
    ids = torch.randint(3, 500, (1, 60))
    embedded = plain.get_input_embeddings()(ids).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    counts = replace(counts_of(prompt_tokens=0, completion_tokens=60), pairs=60**2)
    without = train_flops(replace(shape, adapter_weights=1), counts)
    assert train_flops(shape, counts) > 1.2 * without
    assert train_flops(shape, counts) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_cost_that_does_not_follow_is_nothing_and_says_why() -> None:
    layer = {"model.layers.0.mlp.experts.gate_up_proj": [8, 64, 32]}
    settings = {"hidden_size": 32, "vocab_size": 99, "num_local_experts": 8}
    unknown = shape_of(settings, layer)
    assert forward_flops(unknown, counts_of(prompt_tokens=5, completion_tokens=5)) == 0
    (line,) = unknown_costs(student=shape_of({**settings, "moe_k": 2}, layer), teacher=unknown)
    assert line == (
        "cost unknown: how many of its experts a token meets is not said; the operations of the "
        "teacher are left out"
    )
    assert shape_of({**settings, "moe_k": 2}, layer).weights == 2 * 64 * 32
    assert shape_of({}, {}).unknown
