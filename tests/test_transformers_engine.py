"""The transformers engine against one that is slow and obviously right, on many architectures."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.engines.decoding import is_plain_llama
from opd_stream.engines.reading import _parameters
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

VOCAB = 61
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**BASE),
    "qwen2": Qwen2Config(**{k: v for k, v in BASE.items() if k != "head_dim"}),
    "llama": LlamaConfig(**{**BASE, "head_dim": 6}),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=512),
    "gemma2": Gemma2Config(**BASE, sliding_window=8, final_logit_softcapping=3.0),
    "qwen3-windowed": Qwen3Config(
        **BASE, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
}
FAST = {"qwen3", "qwen2", "llama"}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / request.param
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(folder)
    return folder


def engine_of(folder: Path, *, batch_rows: int = 8) -> TransformersEngine:
    return TransformersEngine(folder, dtype="float32", batch_rows=batch_rows)


def slow_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """log softmax at every position of one unpadded sequence, by the model's own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=1)


def prompts() -> PromptBatch:
    random = np.random.default_rng(0)
    return PromptBatch(
        prompt_id=tuple(f"p{n}" for n in range(6)),
        prompt_ids=tuple(
            random.integers(3, VOCAB, n).astype(np.int32) for n in (3, 14, 1, 8, 5, 20)
        ),
    )


def sampled(engine: TransformersEngine, *, temperature: float = 1.0) -> RolloutBatch:
    return engine.sample(
        prompts(),
        SamplingSettings(
            window_tokens=24, temperature=temperature, seed=4, stop_ids=(11, 12, 13, 14)
        ),
        samples_per_prompt=2,
    )


def tokens_read(engine: TransformersEngine) -> list[int]:
    """Filled by every pass of the decoder over several columns, until the engine is gone."""
    read: list[int] = []

    def count(module: object, args: object, named: dict[str, torch.Tensor]) -> None:
        if named["input_ids"].shape[1] > 1:
            read.append(named["input_ids"].numel())

    engine._model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    return read


def alike(lengths: tuple[int, ...] = (3, 14, 1, 8, 5, 20)) -> PromptBatch:
    """Prompts that begin with the same 40 ids."""
    random = np.random.default_rng(5)
    first = random.integers(15, VOCAB, 40)
    return PromptBatch(
        prompt_id=tuple(f"p{n}" for n in range(len(lengths))),
        prompt_ids=tuple(
            np.concatenate([first, random.integers(15, VOCAB, n)]).astype(np.int32) for n in lengths
        ),
    )


def test_the_fast_decoder_takes_the_plain_llama_family_only(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert is_plain_llama(model) == (checkpoint.name in FAST)


def test_a_bias_behind_the_heads_is_not_the_plain_family() -> None:
    config = LlamaConfig(**{**BASE, "head_dim": 6}, attention_bias=True)
    assert not is_plain_llama(AutoModelForCausalLM.from_config(config))


def test_a_rollout_longer_than_the_teachers_context_is_not_scored(tmp_path: Path) -> None:
    for name, context in (("student", 64), ("teacher", 20)):
        config = LlamaConfig(**{**BASE, "head_dim": 6, "max_position_embeddings": context})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    rollouts = sampled(engine_of(tmp_path / "student"))
    with pytest.raises(UserError, match="tokens with its completion; the model reads 20"):
        engine_of(tmp_path / "teacher").score(rollouts, ScoringSettings(top_k=4, forced_ids=()))


def test_sampling_agrees_with_a_full_forward_pass_at_every_token(checkpoint: Path) -> None:
    batch = sampled(engine_of(checkpoint))
    assert len({len(ids) for ids in batch.completion_ids}) > 2  # rows end at different times
    for row in range(len(batch)):
        prompt, completion = batch.prompt_ids[row].tolist(), batch.completion_ids[row]
        dense = slow_logprobs(checkpoint, prompt + completion.tolist())[len(prompt) - 1 : -1]
        expected = dense[torch.arange(len(completion)), torch.from_numpy(completion).long()]
        np.testing.assert_allclose(batch.behavior_logprobs[row], expected, atol=1e-4)


def test_greedy_decoding_is_the_argmax_of_a_full_forward_pass(checkpoint: Path) -> None:
    batch = sampled(engine_of(checkpoint), temperature=0.0)
    for row in range(0, len(batch), 2):
        prompt, completion = batch.prompt_ids[row].tolist(), batch.completion_ids[row].tolist()
        dense = slow_logprobs(checkpoint, prompt + completion)[len(prompt) - 1 : -1]
        assert completion == dense.argmax(1).tolist()


def test_scores_are_those_of_a_full_forward_pass(checkpoint: Path) -> None:
    batch = sampled(engine_of(checkpoint))
    scores = engine_of(checkpoint, batch_rows=5).score(
        batch, ScoringSettings(top_k=7, forced_ids=(1, 40))
    )
    for row in range(len(batch)):
        prompt, completion = batch.prompt_ids[row].tolist(), batch.completion_ids[row].tolist()
        dense = slow_logprobs(checkpoint, prompt + completion)[len(prompt) - 1 : -1]
        top = dense.topk(7, dim=1)
        np.testing.assert_allclose(scores.teacher_top_logprobs[row], top.values, atol=1e-4)
        at_ids = dense.gather(1, torch.from_numpy(scores.teacher_top_ids[row]).long())
        np.testing.assert_allclose(at_ids, top.values, atol=1e-4)
        np.testing.assert_allclose(
            scores.teacher_forced_logprobs[row], dense[:, [1, 40]], atol=1e-4
        )
        outside = dense.exp().sum(1) - top.values.exp().sum(1)
        np.testing.assert_allclose(np.exp(scores.teacher_tail_logprobs[row]), outside, atol=1e-5)


def test_loading_replaces_the_weights_that_decode_and_score(
    checkpoint: Path, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(CONFIGS[checkpoint.name]).save_pretrained(other)
    engine = engine_of(checkpoint)
    first = sampled(engine)
    engine.load(other)
    batch, expected = sampled(engine), sampled(engine_of(other))
    assert [row.tolist() for row in batch.completion_ids] == [
        row.tolist() for row in expected.completion_ids
    ]
    assert first.completion_ids[0].tolist() != batch.completion_ids[0].tolist()
    for mine, others in zip(batch.behavior_logprobs, expected.behavior_logprobs, strict=True):
        np.testing.assert_allclose(mine, others, atol=1e-5)


def test_loading_holds_one_model_at_a_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(checkpoint)
    before = weakref.ref(engine._model), weakref.ref(next(engine._model.parameters()))
    alive: list[bool] = []
    read = AutoModelForCausalLM.from_pretrained

    def counted(*args: Any, **named: Any) -> Any:
        alive.extend(old() is not None for old in before)
        return read(*args, **named)

    sampled(engine)  # what decoding keeps of a model must not keep it alive either
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    engine.load(checkpoint)
    assert alive == [False, False]


def test_after_weights_that_cannot_be_read_others_can_be_loaded(
    checkpoint: Path, tmp_path: Path
) -> None:
    engine = engine_of(checkpoint)
    expected = sampled(engine)
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        engine.load(tmp_path)
    engine.load(checkpoint)
    for mine, others in zip(sampled(engine).completion_ids, expected.completion_ids, strict=True):
        assert mine.tolist() == others.tolist()


def test_a_cache_argument_named_cache_is_used(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a coming transformers means to name it."""
    engine = engine_of(checkpoint)
    rollouts = sampled(engine)
    expected = engine.score(rollouts, ScoringSettings(top_k=3, forced_ids=()))
    decoder = type(engine._model.get_decoder())
    forward, caches = decoder.forward, []

    def renamed(self: Any, *, position_ids: Any = None, cache: Any = None, **inputs: Any) -> Any:
        assert "past_key_values" not in inputs
        caches.append(cache)
        found = forward(self, past_key_values=cache, position_ids=position_ids, **inputs)
        return SimpleNamespace(last_hidden_state=found.last_hidden_state)

    _parameters.cache_clear()
    monkeypatch.setattr(decoder, "forward", renamed)
    again = sampled(engine)
    scores = engine.score(rollouts, ScoringSettings(top_k=3, forced_ids=()))
    _parameters.cache_clear()
    assert any(cache is not None for cache in caches)
    for mine, others in zip(again.completion_ids, rollouts.completion_ids, strict=True):
        assert mine.tolist() == others.tolist()
    for mine, others in zip(scores.teacher_logprobs, expected.teacher_logprobs, strict=True):
        assert mine.tolist() == others.tolist()


def test_rows_with_logits_that_are_not_finite_are_refused_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**BASE, "head_dim": 6}))
    healthy = tmp_path / "healthy"
    model.save_pretrained(healthy)
    batch = sampled(engine_of(healthy))
    poisoned = set(batch.completion_ids[0].tolist()) - {
        token
        for row in (4, 5)
        for token in (*batch.completion_ids[row].tolist(), *batch.prompt_ids[row].tolist())
    }
    with torch.no_grad():
        model.get_input_embeddings().weight[min(poisoned)] = torch.nan
    model.save_pretrained(tmp_path / "poisoned")
    scores = engine_of(tmp_path / "poisoned").score(batch, ScoringSettings(top_k=3, forced_ids=()))
    assert 0 in scores.refused
    assert 4 not in scores.refused
    assert len(scores.teacher_logprobs[0]) == 0
    assert np.isfinite(scores.teacher_logprobs[4]).all()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, missing: str) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        engine_of(tmp_path)


def test_decoding_in_half_precision_is_as_near_to_its_weights_as_the_plain_model(
    checkpoint: Path,
) -> None:
    batch = sampled(TransformersEngine(checkpoint, dtype="bfloat16", batch_rows=8))
    half = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).float().eval()
    gaps: dict[str, list[float]] = {"engine": [], "plain": []}
    for row, completion in enumerate(batch.completion_ids):
        ids = torch.from_numpy(np.concatenate([batch.prompt_ids[row], completion])).long()
        with torch.inference_mode():
            right, plain = (
                model(ids[None]).logits[0, :-1].float().log_softmax(1).gather(1, ids[1:, None])
                for model in (whole, half)
            )
        place = len(batch.prompt_ids[row]) - 1
        mine = torch.from_numpy(batch.behavior_logprobs[row])
        gaps["engine"].append(float((mine - right[place:, 0]).abs().mean()))
        gaps["plain"].append(float((plain - right)[place:].abs().mean()))
    assert 0 < np.mean(gaps["engine"]) < 1.5 * np.mean(gaps["plain"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_prompts_are_read_once_and_change_no_score(
    checkpoint: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(checkpoint, dtype=dtype, batch_rows=64)
    random = np.random.default_rng(0)
    prompts = PromptBatch(
        prompt_id=("a", "b", "c"),
        prompt_ids=tuple(random.integers(15, VOCAB, n).astype(np.int32) for n in (40, 25, 33)),
    )
    settings = SamplingSettings(window_tokens=9, seed=1, stop_ids=(11, 12, 13, 14))
    rollouts = engine.sample(prompts, settings, samples_per_prompt=4)
    assert len({len(ids) for ids in rollouts.completion_ids}) > 1
    read = tokens_read(engine)
    once = engine.score(rollouts, ScoringSettings(top_k=5, forced_ids=(5,)))
    shared = sum(read)
    monkeypatch.setattr("opd_stream.engines.reading.MIN_SAVING", 0.0)
    read.clear()
    apart = engine.score(rollouts, ScoringSettings(top_k=5, forced_ids=(5,)))
    assert shared < 0.5 * sum(read)
    tolerance = 1e-4 if dtype == "float32" else 0.15
    for row in range(len(rollouts)):
        for name in ("teacher_logprobs", "teacher_top_logprobs", "teacher_forced_logprobs"):
            mine, other = getattr(once, name)[row], getattr(apart, name)[row]
            np.testing.assert_allclose(mine, other, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_beginning_that_prompts_share_is_read_once_and_changes_no_rollout(
    checkpoint: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(checkpoint, dtype=dtype, batch_rows=64)
    read = tokens_read(engine)
    settings = SamplingSettings(window_tokens=9, seed=1, stop_ids=(11, 12, 13, 14))
    once = engine.sample(alike(), settings, samples_per_prompt=2)
    shared = sum(read)
    monkeypatch.setattr("opd_stream.engines.reading.MIN_SHARED", 1000)
    read.clear()
    apart = engine.sample(alike(), settings, samples_per_prompt=2)
    has_windows = checkpoint.name in ("gemma2", "qwen3-windowed")
    assert shared == sum(read) if has_windows else shared < 0.6 * sum(read)
    pairs = zip(once.completion_ids, apart.completion_ids, strict=True)
    same = [
        int((mine[: len(other)] == other[: len(mine)]).cumprod().sum()) for mine, other in pairs
    ]
    if dtype == "float32":
        assert same == [len(ids) for ids in once.completion_ids]
    assert sum(same) >= 0.5 * sum(map(len, apart.completion_ids))
    for row, count in enumerate(same):
        mine, other = once.behavior_logprobs[row][:count], apart.behavior_logprobs[row][:count]
        np.testing.assert_allclose(mine, other, atol=1e-4 if dtype == "float32" else 0.2)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_beginning_that_prompts_share_is_read_once_and_changes_no_score(
    checkpoint: Path, dtype: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(checkpoint, dtype=dtype, batch_rows=64)
    settings = SamplingSettings(window_tokens=9, seed=1, stop_ids=(11, 12, 13, 14))
    rollouts = engine.sample(alike(), settings, samples_per_prompt=samples)
    read = tokens_read(engine)
    once = engine.score(rollouts, ScoringSettings(top_k=5, forced_ids=(5,)))
    shared = sum(read)
    monkeypatch.setattr("opd_stream.engines.reading.MIN_SAVING", 0.0)
    read.clear()
    apart = engine.score(rollouts, ScoringSettings(top_k=5, forced_ids=(5,)))
    assert shared < 0.6 * sum(read)
    tolerance = 1e-4 if dtype == "float32" else 0.2
    for row in range(len(rollouts)):
        for name in ("teacher_logprobs", "teacher_top_logprobs", "teacher_forced_logprobs"):
            mine, other = getattr(once, name)[row], getattr(apart, name)[row]
            np.testing.assert_allclose(mine, other, atol=tolerance, err_msg=name)


def test_several_passes_without_the_padding_give_the_same(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SamplingSettings(window_tokens=9, seed=1, stop_ids=(11, 12, 13, 14))
    found: list[tuple[RolloutBatch, ScoreBatch]] = []
    counts: list[int] = []
    for least in (1000, 1):
        monkeypatch.setattr("opd_stream.engines.reading.MIN_PADDING", least)
        monkeypatch.setattr("opd_stream.engines.reading.ROWS_OF_A_PASS", 2)
        engine = engine_of(checkpoint, batch_rows=64)
        read = tokens_read(engine)
        batches = [engine.sample(each, settings) for each in (prompts(), alike((2, 40, 9, 1, 30)))]
        scores = [engine.score(each, ScoringSettings(top_k=5)) for each in batches]
        found.extend(zip(batches, scores, strict=True))
        counts.append(sum(read))
    assert counts[1] < 0.9 * counts[0]
    for (batch, scores), (other, expected) in zip(found[:2], found[2:], strict=True):
        for row in range(len(batch)):
            assert batch.completion_ids[row].tolist() == other.completion_ids[row].tolist()
            for mine, right in (
                (batch.behavior_logprobs[row], other.behavior_logprobs[row]),
                (scores.teacher_top_logprobs[row], expected.teacher_top_logprobs[row]),
            ):
                np.testing.assert_allclose(mine, right, atol=1e-4)
