"""Every codec gives back what was put in, within its bound, whatever the shapes."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_stream.store.codecs import (
    Codec,
    CompactCodec,
    ExactCodec,
    SampledCodec,
    ScoreBlock,
    decode_scores,
    encode_scores,
)
from opd_stream.store.codecs.fidelity import Fidelity
from opd_stream.store.shards import batch_of, schema_of, shard_bytes, table_of
from opd_stream.types import RolloutBatch, ScoreBatch


def rollouts_of(scores: ScoreBatch) -> RolloutBatch:
    rows = range(len(scores))
    return RolloutBatch(
        prompt_id=tuple(f"p{row}" for row in rows),
        sample_index=np.zeros(len(scores), np.int32),
        prompt_ids=tuple(np.array([1]) for _ in rows),
        completion_ids=tuple(np.arange(len(ids)) for ids in scores.teacher_logprobs),
        behavior_logprobs=scores.teacher_logprobs,
        finish_reason=("length",) * len(scores),
    )


def random_scores(
    lengths: list[int], *, top_k: int, vocabulary: int, forced: int, seed: int
) -> ScoreBatch:
    """Peaked and flat positions, ties, ids over the whole vocabulary, exact zeros for K = V."""
    random = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {name: [] for name in ("ids", "top", "tail", "one", "forced")}
    for length in lengths:
        exponent = random.choice([0.0, 1.0, 3.0, 8.0], (length, 1))
        logits = -exponent * np.log(np.arange(1, top_k + 1)) + random.integers(-2, 3, (length, 1))
        if top_k == vocabulary:
            logits[:, top_k // 2 + 1 :] = -np.inf
            rest = np.zeros((length, 1))
        else:
            rest = np.exp(random.normal(-4, 4, (length, 1)))
        norm = np.log(np.exp(logits).sum(1, keepdims=True) + rest)
        top = (logits - norm).astype(np.float32)
        with np.errstate(divide="ignore"):
            tail = (np.log(rest) - norm)[:, 0].astype(np.float32)
        ids = np.array(
            [random.choice(min(vocabulary, 5000), top_k, replace=False) for _ in range(length)]
        ).reshape(length, top_k)
        columns["ids"].append(ids * max(1, vocabulary // 5000))
        columns["top"].append(top)
        columns["tail"].append(tail)
        columns["one"].append(np.where(random.random(length) < 0.1, -np.inf, top[:, 0]))
        columns["forced"].append(random.normal(-9, 2, (length, forced)).clip(max=0))
    return ScoreBatch(
        teacher_logprobs=tuple(x.astype(np.float32) for x in columns["one"]),
        teacher_top_ids=tuple(columns["ids"]),
        teacher_top_logprobs=tuple(columns["top"]),
        teacher_tail_logprobs=tuple(columns["tail"]),
        teacher_forced_logprobs=tuple(x.astype(np.float32) for x in columns["forced"]),
        refused={},
    )


def round_trip(codec: Codec, scores: ScoreBatch) -> tuple[list[ScoreBlock], Fidelity]:
    """Through a shard's bytes, part by part."""
    table, fidelity = encode_scores(codec, scores, rollouts_of(scores))
    data, parts = shard_bytes(table)
    assert table_of(data).equals(table)
    schema = schema_of(data[parts[0].offset : parts[0].offset + parts[0].length])
    batches = [batch_of(data[p.offset : p.offset + p.length], schema) for p in parts[1:]]
    return [decode_scores(batch) for batch in batches], fidelity


def flat(rows: tuple[Any, ...]) -> Any:
    return np.concatenate(rows)


SHAPES = {
    "lengths": st.lists(st.integers(0, 9), min_size=1, max_size=80).filter(any),
    "top_k": st.sampled_from([1, 2, 7, 40]),
    "vocabulary": st.sampled_from([40, 606, 2**17 + 5, 2**32]),
    "forced": st.integers(0, 3),
    "seed": st.integers(0, 10_000),
}


@given(**SHAPES, dtype=st.sampled_from(["float16", "float32"]))
@settings(max_examples=60)
def test_exact_keeps_everything(
    lengths: list[int], top_k: int, vocabulary: int, forced: int, seed: int, dtype: Any
) -> None:
    scores = random_scores(lengths, top_k=top_k, vocabulary=vocabulary, forced=forced, seed=seed)
    blocks, fidelity = round_trip(ExactCodec(dtype=dtype), scores)
    assert fidelity.tokens == sum(lengths)
    for name in ("teacher_top_ids", "teacher_logprobs", "teacher_tail_logprobs"):
        found = np.concatenate([getattr(block, name) for block in blocks])
        np.testing.assert_array_equal(found, flat(getattr(scores, name)))
    for name in ("teacher_top_logprobs", "teacher_forced_logprobs"):
        found = np.concatenate([getattr(block, name) for block in blocks])
        np.testing.assert_array_equal(found, flat(getattr(scores, name)).astype(dtype))


@given(
    **SHAPES,
    max_error=st.sampled_from([1 / 256, 1 / 32, 0.5]),
    mass=st.sampled_from([None, 0.5, 0.999]),
    min_k=st.integers(1, 3),
)
@settings(max_examples=120)
def test_compact_stays_within_its_bound_and_keeps_the_mass(
    lengths: list[int],
    top_k: int,
    vocabulary: int,
    forced: int,
    seed: int,
    max_error: float,
    mass: float | None,
    min_k: int,
) -> None:
    scores = random_scores(lengths, top_k=top_k, vocabulary=vocabulary, forced=forced, seed=seed)
    codec = CompactCodec(max_error=max_error, mass=mass, min_k=min_k)
    blocks, fidelity = round_trip(codec, scores)
    assert fidelity.max_error <= max_error
    true, ids = flat(scores.teacher_top_logprobs), flat(scores.teacher_top_ids)
    start = 0
    for block in blocks:
        found = block.teacher_top_logprobs
        stop, width = start + len(found), found.shape[1]
        kept = np.isfinite(found)
        here = true[start:stop, :width]
        assert np.abs(found[kept] - here[kept]).max(initial=0) <= max_error
        np.testing.assert_array_equal(block.teacher_top_ids[kept], ids[start:stop, :width][kept])
        assert (np.diff(kept.astype(int), axis=1) <= 0).all()  # a prefix of the ranks
        probabilities = np.exp(true[start:stop].astype(np.float64))
        retained = np.where(kept, probabilities[:, :width], 0).sum(1)
        if mass is not None:
            full = kept.sum(1) == np.isfinite(true[start:stop]).sum(1)
            assert ((retained >= mass - 1e-6) | full).all()
        tail = np.exp(flat(scores.teacher_tail_logprobs)[start:stop].astype(np.float64))
        lost = tail + probabilities.sum(1) - retained
        solid = lost > 1e-12  # below it, the sum of the kept is all rounding
        error = np.abs(block.teacher_tail_logprobs[solid] - np.log(lost[solid]))
        assert error.max(initial=0) <= max_error * 1.01 + 1e-3
        start = stop
    for name in ("teacher_logprobs", "teacher_forced_logprobs"):
        found = np.concatenate([getattr(block, name).reshape(-1) for block in blocks])
        wanted = flat(getattr(scores, name)).reshape(-1)
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(np.isfinite(found), finite)
        assert np.abs(found[finite] - wanted[finite]).max(initial=0) <= max_error


def test_compact_refuses_what_it_cannot_hold() -> None:
    scores = random_scores([3], top_k=2, vocabulary=606, forced=0, seed=0)
    far = dataclasses.replace(
        scores, teacher_top_logprobs=(np.array([[-1.0, -9000.0]] * 3, np.float32),)
    )
    with pytest.raises(ValueError, match=r"-9000 is below .* the lowest that this max_error"):
        encode_scores(CompactCodec(), far, rollouts_of(far))
    unranked = dataclasses.replace(
        scores, teacher_top_logprobs=(np.array([[-2.0, -1.0]] * 3, np.float32),)
    )
    with pytest.raises(ValueError, match="not in rank order"):
        encode_scores(CompactCodec(), unranked, rollouts_of(unranked))


def test_an_encoder_that_breaks_its_bound_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd_stream.store.codecs import compact

    scores = random_scores([5], top_k=4, vocabulary=606, forced=0, seed=0)
    monkeypatch.setattr(compact, "STEP_PER_ERROR", 4.0)  # as a defect would
    with pytest.raises(ValueError, match="nats off; the codec promises"):
        encode_scores(CompactCodec(max_error=1 / 256), scores, rollouts_of(scores))


def test_a_refused_and_an_empty_row_take_no_place() -> None:
    scores = random_scores([4, 0, 2], top_k=3, vocabulary=606, forced=1, seed=1)
    scores = dataclasses.replace(scores, refused={1: "not finite"})
    for codec in (ExactCodec(), CompactCodec(mass=0.9)):
        (block,), _ = round_trip(codec, scores)
        assert block.offsets.tolist() == [0, 4, 4, 6]
        assert block.refused == (None, "not finite", None)


def test_a_unit_without_any_token_round_trips() -> None:
    scores = random_scores([0, 0], top_k=3, vocabulary=606, forced=1, seed=1)
    for codec in (ExactCodec(), CompactCodec()):
        (block,), fidelity = round_trip(codec, scores)
        assert block.offsets.tolist() == [0, 0, 0]
        assert fidelity.report()["candidates_per_token"] == 0


@given(st.integers(1, 60), st.integers(0, 999))
@settings(max_examples=30)
def test_sampled_counts_round_trip(draws: int, seed: int) -> None:
    scores = drawn_scores(np.array([0.5, 0.3, 0.15, 0.05]), tokens=7, draws=draws, seed=seed)
    (block,), _ = round_trip(SampledCodec(draws=draws), scores)
    counts = np.rint(np.exp(block.teacher_top_logprobs.astype(np.float64)) * draws)
    assert (counts.sum(1) == draws).all()
    wanted = np.exp(scores.teacher_top_logprobs[0]) @ np.ones(draws)
    np.testing.assert_allclose(np.exp(block.teacher_top_logprobs).sum(1), wanted, atol=1e-5)


def drawn_scores(q: Any, *, tokens: int, draws: int, seed: int) -> ScoreBatch:
    """Draws as an engine makes them, from one distribution."""
    import torch

    from opd_stream.logprobs import head_scores

    random = np.random.default_rng(seed)
    found = head_scores(
        torch.zeros(tokens, 1),
        lambda hidden: torch.tensor(np.log(q), dtype=torch.float32).expand(len(hidden), -1),
        asked_ids_NJ=torch.zeros(tokens, 1, dtype=torch.long),
        forced_ids_F=torch.zeros(0, dtype=torch.long),
        top_k=2,
        chunk_rows=1000,
        draws_ND=torch.from_numpy(random.random((tokens, draws))),
    )
    return ScoreBatch(
        teacher_logprobs=(found.asked_NJ[:, 0].numpy(),),
        teacher_top_ids=(found.top_ids_NK.numpy(),),
        teacher_top_logprobs=(found.top_NK.numpy(),),
        teacher_tail_logprobs=(found.tail_N.numpy(),),
        teacher_forced_logprobs=(found.forced_NF.numpy(),),
        refused={},
    )


def test_the_mean_of_many_draws_is_the_teacher() -> None:
    q = np.array([0.5, 0.3, 0.15, 0.05])
    scores = drawn_scores(q, tokens=20_000, draws=10, seed=3)
    estimate = np.zeros((20_000, 4))
    places = np.arange(20_000)[:, None]
    np.add.at(estimate, (places, scores.teacher_top_ids[0]), np.exp(scores.teacher_top_logprobs[0]))
    np.testing.assert_allclose(estimate.mean(0), q, atol=4 * 0.158 / 20_000**0.5)
    assert estimate[:, 0].std() == pytest.approx((0.25 / 10) ** 0.5, rel=0.03)


@pytest.mark.parametrize("codec", [CompactCodec(), CompactCodec(mass=0.9), ExactCodec()])
def test_no_kl_over_candidates_and_tail_is_further_off_than_the_estimate(codec: Codec) -> None:
    """Of any student: half put everything on one outcome, which may be the tail."""
    scores = random_scores([60] * 20, top_k=8, vocabulary=606, forced=0, seed=7)
    (block,), fidelity = round_trip(codec, scores)
    estimate = fidelity.report()["kl_error_estimate"]
    ids_NK, true_NK = flat(scores.teacher_top_ids), flat(scores.teacher_top_logprobs)
    kept_NK = (ids_NK[:, :, None] == block.teacher_top_ids[:, None]) & np.isfinite(
        block.teacher_top_logprobs[:, None]
    )
    lost_N = np.exp(flat(scores.teacher_tail_logprobs).astype(np.float64))
    lost_N += (np.exp(true_NK, dtype=np.float64) * ~kept_NK.any(2)).sum(1)
    true = np.concatenate([np.where(kept_NK.any(2), true_NK, 0), np.log(lost_N)[:, None]], axis=1)
    found_NK = np.where(kept_NK, block.teacher_top_logprobs[:, None], 0).sum(2)
    stored = np.concatenate([found_NK, block.teacher_tail_logprobs[:, None]], axis=1)
    change = np.abs(stored - true).max()  # of the student that makes it largest
    assert change <= estimate + 1e-6
    assert change > 0.9 * estimate


def test_fidelity_adds_up_and_knows_the_percentile() -> None:
    scores = random_scores([50] * 40, top_k=8, vocabulary=606, forced=0, seed=5)
    _, whole = encode_scores(CompactCodec(), scores, rollouts_of(scores))

    def half(part: slice) -> ScoreBatch:
        fields = dataclasses.asdict(scores)
        return ScoreBatch(**{k: v[part] if isinstance(v, tuple) else v for k, v in fields.items()})

    parts = [half(slice(0, 20)), half(slice(20, 40))]
    summed = sum((encode_scores(CompactCodec(), p, rollouts_of(p))[1] for p in parts), Fidelity())
    assert summed.report() == pytest.approx(whole.report())
    assert Fidelity.model_validate_json(whole.model_dump_json()) == whole
    retained = 1 - np.exp(flat(scores.teacher_tail_logprobs).astype(np.float64))
    report = whole.report()
    assert report["retained_mass_mean"] == pytest.approx(retained.mean(), abs=1e-6)
    lost = 1 - np.quantile(retained, 0.01)
    assert 0.7 < (1 - report["retained_mass_p1"]) / lost < 1.5
