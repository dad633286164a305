"""A distribution rebuilt from stored hidden states and head is the model's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from opd_stream.engines import gives_hidden, hidden_engine
from opd_stream.engines.base import HiddenStates
from opd_stream.engines.fake_engine import FakeEngine
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.hidden_states import read_head
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch
from stages.teacher_head import (
    check_bound,
    head_input,
    store_head,
    unrounded,
    widened,
)

VOCAB = 611  # more than one row of a head's shard
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
CONFIGS = {
    "llama": LlamaConfig(vocab_size=VOCAB, **SIZES, **HEADS),
    "gemma2": Gemma2Config(vocab_size=VOCAB, **SIZES, **HEADS, final_logit_softcapping=3.0),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4),
}
RECIPE = Recipe(kind="heads", settings={"engine": "transformers"}, inputs={"teacher": "t"})


def model_at(folder: Path, name: str) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
    return folder


def rollouts() -> RolloutBatch:
    random = np.random.default_rng(0)
    lengths = [(3, 5), (6, 0), (3, 9), (4, 1)]
    return RolloutBatch(
        prompt_id=tuple("abcd"),
        sample_index=np.zeros(4, np.int32),
        prompt_ids=tuple(random.integers(VOCAB, size=prompt) for prompt, _ in lengths),
        completion_ids=tuple(random.integers(VOCAB, size=tokens) for _, tokens in lengths),
        behavior_logprobs=tuple(np.zeros(tokens, np.float32) for _, tokens in lengths),
        finish_reason=("length",) * 4,
    )


def check_head(
    hidden: HiddenStates, head: OutputHead, completion_ids: Sequence[NDArray[Any]]
) -> None:
    logits = head(head_input(np.concatenate(hidden.states), head)).float()
    ids = torch.tensor(np.concatenate(completion_ids).astype(np.int64))[:, None]
    rebuilt = logits.log_softmax(1).gather(1, ids)[:, 0].detach().numpy()
    check_bound(rebuilt, np.concatenate(hidden.logprobs), head)


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_the_stored_head_give_the_whole_distribution(
    name: str, tmp_path: Path
) -> None:
    folder, batch = model_at(tmp_path / "model", name), rollouts()
    engine = TransformersEngine(folder, dtype="float32", batch_rows=3)
    artifact = Store(tmp_path / "store").artifact(RECIPE)
    store_head(artifact, engine.head())
    hidden, head = engine.hidden(batch), read_head(artifact)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for row, completion in enumerate(batch.completion_ids):
        prompt = batch.prompt_ids[row]
        ids = torch.tensor(np.concatenate([prompt, completion]))[None]
        expected = dense(ids).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        found = head(head_input(hidden.states[row], head)).log_softmax(1)
        assert found.shape == (len(completion), VOCAB)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
        own = expected.gather(1, torch.tensor(completion)[:, None])[:, 0]
        np.testing.assert_allclose(hidden.logprobs[row], own.detach(), atol=1e-4)
    check_head(hidden, head, batch.completion_ids)


def test_a_head_of_16_bits_takes_two_bytes_a_number_and_comes_back_bit_for_bit(
    tmp_path: Path,
) -> None:
    folder = model_at(tmp_path / "model", "llama")
    engine = TransformersEngine(folder, dtype="bfloat16", batch_rows=4)
    artifact = Store(tmp_path / "store").artifact(RECIPE)
    store_head(artifact, engine.head())
    assert torch.equal(read_head(artifact).weight_VH, engine.head().weight_VH)
    hidden = engine.hidden(rollouts())
    assert unrounded(np.concatenate(hidden.states)).dtype == np.uint16
    check_head(hidden, read_head(artifact), rollouts().completion_ids)


def test_numbers_are_stored_without_rounding() -> None:
    random = np.random.default_rng(0)
    whole = random.normal(size=1000).astype(np.float32)
    half = whole.astype(np.float16).astype(np.float32)
    bits = (whole.view(np.uint32) & 0xFFFF0000).view(np.float32)
    for values, dtype in ((whole, np.float32), (half, np.float16), (bits, np.uint16)):
        stored = unrounded(values)
        assert stored.dtype == dtype
        np.testing.assert_array_equal(widened(stored), values)


@pytest.mark.parametrize("file", ["00001-*.arrow", "00001.json"])
def test_a_damaged_part_of_a_head_is_named_and_made_again(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = Store(tmp_path / "store").artifact(RECIPE)
    head = OutputHead(weight_VH=torch.randn(20_000, 3), bias_V=torch.randn(20_000), scale=0.5)
    store_head(artifact, head)
    assert len(artifact.units()) == 2
    path = next((artifact.folder / "units").glob(file))
    path.write_bytes(path.read_bytes()[:-1])
    store_head(artifact, head)
    assert f"unit 1 of {artifact.name} is damaged" in caplog.text
    found = read_head(artifact)
    assert torch.equal(found.weight_VH, head.weight_VH)
    assert found.bias_V is not None
    assert torch.equal(found.bias_V, head.bias_V)
    assert found.scale == 0.5


def test_what_belongs_to_another_model_is_refused() -> None:
    hidden = HiddenStates((np.ones((2, 3), np.float32),), (np.array([-0.5, -4], np.float32),))
    with pytest.raises(UserError, match="nats from the engine's"):
        check_head(hidden, OutputHead(weight_VH=torch.eye(3)), (np.array([0, 1]),))


def test_an_engine_without_hidden_states_is_refused(tmp_path: Path) -> None:
    assert [gives_hidden(name) for name in ("transformers", "vllm", "fake")] == [True, False, False]
    with pytest.raises(UserError, match="FakeEngine has no hidden and no head"):
        hidden_engine(FakeEngine(tmp_path))
