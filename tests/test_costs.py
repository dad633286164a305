"""The cost model against PyTorch's own count of operations."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_stream.costs import counts_of, forward_flops, shape_of, train_flops
from stages.checkpoints import weight_shapes
from tests.conftest import MODELS


@pytest.mark.parametrize("tokens", [(20, 60), (5, 200)])
def test_operations_are_those_that_torch_counts(tokens: tuple[int, int]) -> None:
    from transformers import AutoModelForCausalLM

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
