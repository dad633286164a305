"""One contract over every engine."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_stream.engines import open_engine
from opd_stream.engines.base import Engine, SamplingSettings, ScoringSettings, VllmOptions
from opd_stream.errors import UserError
from opd_stream.types import PromptBatch, RolloutBatch

VOCAB = 97
STOPS = (5, 6, 7, 8, 9, 10)

Open = Callable[..., Engine]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


NO_VLLM = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed; make test-vllm installs it"
)
ENGINES = ["transformers", "fake", pytest.param("vllm", marks=NO_VLLM)]
SMALL = VllmOptions(kv_cache_bytes=1 << 24, max_context=4096, compiled=False)


@pytest.fixture(scope="module", params=ENGINES)
def opened(request: pytest.FixtureRequest, checkpoint: Path) -> Open:
    """Opens the engine; vLLM's only once, because its processes are slow to start."""
    held: list[Engine] = []

    def open_it(*, batch_rows: int = 4) -> Engine:
        if held:
            return held[0]
        engine = open_engine(
            engine=request.param,
            folder=checkpoint,
            dtype="float32",
            batch_rows=batch_rows,
            vllm=SMALL,
        )
        if request.param == "vllm":
            held.append(engine)
        return engine

    return open_it


@pytest.fixture
def exact(opened: Open) -> Open:
    """Engines that own their random numbers."""
    if type(opened()).__name__ == "VllmEngine":
        pytest.skip("vLLM draws no further ids, and continues with another random stream")
    return opened


def prompts_of(count: int = 5) -> PromptBatch:
    random = np.random.default_rng(3)
    lengths = [4, 9, 1, 6, 3, 12, 2, 7][:count]
    return PromptBatch(
        prompt_id=tuple(f"p{row}" for row in range(count)),
        prompt_ids=tuple(random.integers(11, VOCAB, n).astype(np.int32) for n in lengths),
    )


def sample(engine: Engine, prompts: PromptBatch, **changes: Any) -> RolloutBatch:
    rows = {
        name: changes.pop(name) for name in ("samples_per_prompt", "extra_draws") if name in changes
    }
    settings: dict[str, Any] = {"window_tokens": 12, "seed": 7, "stop_ids": STOPS, **changes}
    return engine.sample(prompts, SamplingSettings(**settings), **{"samples_per_prompt": 3, **rows})


def tokens_of(batch: RolloutBatch) -> list[list[int]]:
    return [row.tolist() for row in batch.completion_ids]


def test_every_field_has_the_length_of_the_completion(opened: Open) -> None:
    prompts = prompts_of()
    batch = sample(opened(), prompts)
    assert batch.prompt_id == tuple(p for p in prompts.prompt_id for _ in range(3))
    assert batch.sample_index.tolist() == [0, 1, 2] * 5
    for ids, logprobs in zip(batch.completion_ids, batch.behavior_logprobs, strict=True):
        assert 1 <= len(ids) <= 12
        assert len(logprobs) == len(ids)
        assert (logprobs <= 0).all()


def test_a_rollout_ends_with_its_first_stop_id_or_at_the_window(opened: Open) -> None:
    batch = sample(opened(), prompts_of())
    assert set(batch.finish_reason) == {"stop", "length"}
    for ids, reason in zip(batch.completion_ids, batch.finish_reason, strict=True):
        stops = [place for place, token in enumerate(ids.tolist()) if token in STOPS]
        assert stops == ([len(ids) - 1] if reason == "stop" else [])
        assert reason == "stop" or len(ids) == 12


def test_the_seed_decides_the_rollouts(opened: Open) -> None:
    engine, prompts = opened(), prompts_of()
    first = tokens_of(sample(engine, prompts))
    assert tokens_of(sample(engine, prompts)) == first
    assert tokens_of(sample(engine, prompts, seed=8)) != first
    assert any(first[row] != first[row + 1] for row in range(0, 15, 3))


def test_neither_batch_size_nor_order_nor_company_changes_a_rollout(opened: Open) -> None:
    prompts = prompts_of()
    expected = dict(zip(range(15), tokens_of(sample(opened(), prompts)), strict=True))
    assert tokens_of(sample(opened(batch_rows=64), prompts)) == list(expected.values())
    alone = PromptBatch(prompt_id=prompts.prompt_id[3:4], prompt_ids=prompts.prompt_ids[3:4])
    assert tokens_of(sample(opened(), alone)) == [expected[row] for row in (9, 10, 11)]


def test_a_longer_window_continues_the_same_rollout(opened: Open) -> None:
    engine, prompts = opened(), prompts_of()
    short = tokens_of(sample(engine, prompts))
    long = tokens_of(sample(engine, prompts, window_tokens=20))
    assert [row[:12] for row in long] == short


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_extending_is_what_a_longer_window_would_have_given(
    exact: Open, temperature: float
) -> None:
    engine, prompts = exact(), prompts_of()
    settings: dict[str, Any] = {"temperature": temperature, "stop_ids": STOPS}
    short = sample(engine, prompts, window_tokens=5, **settings)
    long = sample(engine, prompts, window_tokens=20, **settings)
    assert {"stop", "length"} <= {*short.finish_reason, *long.finish_reason}
    found = engine.extend(short, SamplingSettings(window_tokens=20, seed=7, **settings))
    assert tokens_of(found) == tokens_of(long)
    assert found.finish_reason == long.finish_reason
    for mine, other in zip(found.behavior_logprobs, long.behavior_logprobs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4)
    same = engine.extend(short, SamplingSettings(window_tokens=5, seed=7, **settings))
    assert tokens_of(same) == tokens_of(short)


def test_further_draws_change_nothing_that_is_sampled(exact: Open) -> None:
    engine, prompts = exact(), prompts_of()
    plain, several = sample(engine, prompts), sample(engine, prompts, extra_draws=3)
    assert tokens_of(plain) == tokens_of(several)
    assert several.candidate_ids is not None
    assert several.candidate_behavior_logprobs is not None
    scores = engine.score(several, ScoringSettings(top_k=2, forced_ids=()))
    assert scores.candidate_teacher_logprobs is not None
    for row, ids in enumerate(several.candidate_ids):
        assert ids.shape == (len(several.completion_ids[row]), 3)
        np.testing.assert_allclose(
            scores.candidate_teacher_logprobs[row],
            several.candidate_behavior_logprobs[row],
            atol=1e-4,
        )


def test_the_students_own_ids_join_the_candidates_and_leave_the_tail(opened: Open) -> None:
    engine = opened()
    plain = sample(engine, prompts_of(), window_tokens=6)
    batch = sample(engine, prompts_of(), window_tokens=6, student_top_k=4)
    assert tokens_of(batch) == tokens_of(plain)
    assert batch.student_top_ids is not None
    first = engine.score(plain, ScoringSettings(top_k=4))
    for own, top in zip(batch.student_top_ids, first.teacher_top_ids, strict=True):
        np.testing.assert_array_equal(np.sort(own), np.sort(top))  # it scores itself
    others = tuple((own + 3) % VOCAB for own in batch.student_top_ids)
    scores = engine.score(replace(batch, student_top_ids=others), ScoringSettings(top_k=3))
    whole = engine.score(plain, ScoringSettings(top_k=VOCAB))
    for row, own in enumerate(others):
        for place in range(len(own)):
            logprobs = np.empty(VOCAB)
            ids = whole.teacher_top_ids[row][place]
            logprobs[ids] = whole.teacher_top_logprobs[row][place]
            top = scores.teacher_top_logprobs[row][place]
            found = scores.teacher_top_ids[row][place][top > -np.inf].tolist()
            assert set(found) == {*ids[:3].tolist(), *own[place].tolist()}
            assert len(set(found)) == len(found)
            assert (top[:-1] >= top[1:]).all()
            np.testing.assert_allclose(top[top > -np.inf], logprobs[found], atol=1e-4)
            rest = np.exp(np.delete(logprobs, found)).sum()
            assert np.exp(scores.teacher_tail_logprobs[row][place]) == pytest.approx(rest, abs=1e-5)


def test_greedy_takes_the_teachers_first_candidate(opened: Open) -> None:
    engine = opened()
    batch = sample(engine, prompts_of(), temperature=0.0, samples_per_prompt=1)
    scores = engine.score(batch, ScoringSettings(top_k=1, forced_ids=()))
    for ids, top in zip(batch.completion_ids, scores.teacher_top_ids, strict=True):
        assert ids.tolist() == top[:, 0].tolist()


def test_scoring_its_own_rollouts_gives_the_behavior_logprobs(opened: Open) -> None:
    engine = opened()
    for temperature in (1.0, 0.7):
        batch = sample(engine, prompts_of(), temperature=temperature)
        scores = engine.score(batch, ScoringSettings(top_k=4, forced_ids=()))
        for mine, other in zip(scores.teacher_logprobs, batch.behavior_logprobs, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-4)


def test_the_candidates_stand_in_rank_order_and_with_the_tail_sum_to_one(opened: Open) -> None:
    engine = opened()
    scores = engine.score(sample(engine, prompts_of()), ScoringSettings(top_k=6, forced_ids=()))
    for top, tail in zip(scores.teacher_top_logprobs, scores.teacher_tail_logprobs, strict=True):
        assert (np.diff(top, axis=1) <= 0).all()
        np.testing.assert_allclose(np.exp(top).sum(1) + np.exp(tail), 1, atol=1e-5)


def test_all_candidates_leave_an_empty_tail_and_forced_ids_are_among_them(opened: Open) -> None:
    engine = opened()
    forced = (5, 90)
    scores = engine.score(
        sample(engine, prompts_of()), ScoringSettings(top_k=VOCAB, forced_ids=forced)
    )
    for row in range(len(scores)):
        assert (scores.teacher_tail_logprobs[row] < -20).all()
        dense = np.zeros_like(scores.teacher_top_logprobs[row])
        ids = scores.teacher_top_ids[row]
        np.put_along_axis(dense, ids, scores.teacher_top_logprobs[row], axis=1)
        np.testing.assert_allclose(scores.teacher_forced_logprobs[row], dense[:, forced], atol=1e-5)


def test_an_empty_completion_has_empty_scores(opened: Open) -> None:
    engine = opened()
    batch = sample(engine, prompts_of(2), samples_per_prompt=1)
    empty = RolloutBatch(
        prompt_id=batch.prompt_id,
        sample_index=batch.sample_index,
        prompt_ids=batch.prompt_ids,
        completion_ids=(batch.completion_ids[0], np.zeros(0, np.int32)),
        behavior_logprobs=(batch.behavior_logprobs[0], np.zeros(0, np.float32)),
        finish_reason=("length", "length"),
    )
    scores = engine.score(empty, ScoringSettings(top_k=3, forced_ids=(1,)))
    assert scores.teacher_top_ids[1].shape == (0, 3)
    assert len(scores.teacher_logprobs[0]) == len(batch.completion_ids[0])
    assert scores.refused == {}


def test_what_cannot_be_done_is_refused_in_one_line(opened: Open) -> None:
    engine, prompts = opened(), prompts_of(2)
    batch = sample(engine, prompts)
    with pytest.raises(UserError, match=f"top_k is {VOCAB + 1} but the vocabulary has {VOCAB}"):
        engine.score(batch, ScoringSettings(top_k=VOCAB + 1, forced_ids=()))
    with pytest.raises(UserError, match=r"prompt 'p0' has 4 tokens and the window 4093"):
        sample(engine, prompts, window_tokens=4093)


def test_tokens_are_drawn_as_often_as_their_probability_says(opened: Open) -> None:
    engine = opened(batch_rows=4000)
    prompt = PromptBatch(prompt_id=("p",), prompt_ids=(np.array([20, 30], np.int32),))
    drawn = sample(engine, prompt, window_tokens=1, samples_per_prompt=4000, stop_ids=())
    counts = np.bincount([row[0] for row in drawn.completion_ids], minlength=VOCAB)
    one = RolloutBatch(
        prompt_id=("p",),
        sample_index=np.zeros(1, np.int32),
        prompt_ids=prompt.prompt_ids,
        completion_ids=(np.array([0], np.int32),),
        behavior_logprobs=(np.zeros(1, np.float32),),
        finish_reason=("length",),
    )
    scores = engine.score(one, ScoringSettings(top_k=VOCAB, forced_ids=()))
    expected = np.zeros(VOCAB)
    expected[scores.teacher_top_ids[0][0]] = np.exp(scores.teacher_top_logprobs[0][0]) * 4000
    common = expected > 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = common.sum() - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)
