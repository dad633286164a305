"""Hidden states: coded without loss, rounded within a bound, never unpacked beyond one."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.hidden_states import StateRounding, fit_basis
from opd_stream.store.codecs import (
    HiddenCodec,
    decode_scores,
    encode_scores,
    hidden,
    rans,
    scores_batch,
)
from opd_stream.store.codecs.hidden import (
    StateBasis,
    basis_of,
    basis_table,
    encode_states,
    integers_of,
    states_of,
    step_of,
    stored_states,
)
from opd_stream.types import ScoreBatch
from stages.score import append_scores
from stages.teacher_states import check_rounding
from tests.test_codecs import random_scores, rollouts_of

WIDTH, VOCABULARY = 12, 200
HEAD = OutputHead(
    weight_VH=torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
)


def random_states(tokens: int, seed: int) -> Any:
    """Channels of very different spreads, as after a norm with weights."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(tokens, WIDTH)) * np.logspace(-2, 0.5, WIDTH)).astype(np.float32)


@given(
    lengths=st.lists(st.integers(0, 40), max_size=9),
    seed=st.integers(0, 1000),
    spread=st.integers(-40, 120),
)
@settings(max_examples=60)
def test_coded_integers_come_back(lengths: list[int], seed: int, spread: int) -> None:
    random = np.random.default_rng(seed)
    widths = random.integers(spread - 12, spread + 12, sum(lengths))
    values = np.rint(random.standard_t(2, sum(lengths)) * 2.0 ** (widths / 4))
    values = values.clip(-(2**31) + 1, 2**31 - 1).astype(np.int32)
    coded = rans.encode(values, widths, np.array(lengths, np.int64))
    np.testing.assert_array_equal(rans.decode(coded, widths, np.array(lengths, np.int64)), values)


def test_coded_normal_channels_take_little_more_than_their_entropy() -> None:
    random, widths = np.random.default_rng(0), np.repeat([[0, 6, 11, 17, 30]], 4000, axis=0)
    deviation = 2.0 ** (widths / 4)
    values = np.rint(random.normal(size=widths.shape) * deviation).astype(np.int64)
    normal = torch.distributions.Normal(0.0, torch.tensor(deviation))
    edges = torch.tensor(values, dtype=torch.float64)
    mass = normal.cdf(edges + 0.5) - normal.cdf(edges - 0.5)
    entropy = -mass.clamp(min=1e-12).log2().sum().item() / 8
    coded = rans.encode(values.reshape(-1), widths.reshape(-1), np.array([values.size]))
    bytes_ = 2 * len(coded.words) + 8 * len(coded.places)
    assert entropy < bytes_ < 1.01 * entropy


def test_words_of_other_lanes_are_refused() -> None:
    widths, lengths = np.full(50, 9), np.array([25, 25])
    coded = rans.encode(np.arange(50) - 25, widths, lengths)
    for broken, of in (
        (coded._replace(words=coded.words[:-1]), lengths),
        (coded._replace(words=coded.words[::-1].copy()), lengths),
        (coded._replace(places=np.array([50], np.uint32), values=np.ones(1, np.int32)), lengths),
        (coded, np.array([50])),
        (coded, np.array([30, 25])),
    ):
        wide = np.full(int(of.sum()), 9)
        with pytest.raises(ValueError, match="hidden states"):
            rans.decode(broken, wide, of)


def integers(lengths: list[int], seed: int) -> list[Any]:
    """As `StateRounding` gives them."""
    random = np.random.default_rng(seed)
    steps = [random.integers(-30, 3, (length, 1)) for length in lengths]
    spread = np.logspace(0, 3, WIDTH)
    return [
        np.concatenate(
            [step, np.rint(random.normal(size=(len(step), WIDTH)) * spread)], axis=1
        ).astype(np.int32)
        for step in steps
    ]


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_integers_and_states_come_back_row_by_row(lengths: list[int], seed: int) -> None:
    rows, basis = (
        integers(lengths, seed),
        StateBasis(mean_H=random_states(1, 1)[0], inverse_HH=random_states(WIDTH, 2)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden, "LANE", 3 * WIDTH)
        patch.setattr(hidden, "AT_ONCE", 17 * WIDTH)  # several groups, cut within rows
        columns, metadata = encode_states(rows)
        batch = pa.table(columns).replace_schema_metadata(metadata).to_batches()[0]
        stored = stored_states(batch, np.array(lengths), basis_of(basis_table(basis)))
        found, states = integers_of(stored), states_of(stored[::-1])[::-1]
    for row, back, state in zip(rows, found, states, strict=True):
        np.testing.assert_array_equal(back, row)
        expected = row[:, 1:] * step_of(row[:, 0])[:, None] @ basis.inverse_HH + basis.mean_H
        np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-4)


def test_what_is_unpacked_at_one_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = integers([200, 3], 0)
    monkeypatch.setattr(hidden, "AT_ONCE", 400 * WIDTH)
    monkeypatch.setattr(hidden, "LANE", WIDTH)
    columns, metadata = encode_states(rows)
    batch = pa.table(columns).replace_schema_metadata(metadata).to_batches()[0]
    stored = stored_states(batch, np.array([200, 3]), None)
    sizes: list[int] = []

    def watched(coded: rans.Coded, widths: Any, lengths: Any) -> Any:
        sizes.append(len(widths))
        return rans.decode(coded, widths, lengths)

    monkeypatch.setattr(hidden, "AT_ONCE", 20 * WIDTH)
    monkeypatch.setattr(hidden, "decode", watched)
    integers_of(stored)
    assert max(sizes) <= 20 * WIDTH
    assert len(sizes) > 9


@pytest.mark.parametrize("narrow", [np.float32, np.float16])
def test_unrounded_states_come_back_exactly(narrow: Any) -> None:
    rows = [random_states(length, length).astype(narrow).astype(np.float32) for length in (3, 0, 9)]
    columns, metadata = encode_states(rows)
    batch = pa.table(columns).replace_schema_metadata(metadata).to_batches()[0]
    stored = stored_states(batch, np.array([3, 0, 9]), None)
    assert columns["hidden"].type.value_type == pa.from_numpy_dtype(narrow)
    for row, back in zip(rows, states_of(stored), strict=True):
        np.testing.assert_array_equal(back, row)
    with pytest.raises(ValueError, match="as many tokens"):
        stored_states(batch, np.array([3, 1, 8]), None)


def true_kl(left: Any, right: Any) -> Any:
    """KL of the heads' distributions, float64."""
    weight = HEAD.weight_VH.double()
    p, q = ((torch.tensor(side).double() @ weight.t()).log_softmax(1) for side in (left, right))
    return (p.exp() * (p - q)).sum(1).numpy()


@pytest.mark.parametrize("max_kl", [1e-5, 1e-3])
def test_rounding_costs_what_is_allowed_and_says_what_it_cost(max_kl: float) -> None:
    states = random_states(600, 3)
    basis = fit_basis(random_states(300, 4), HEAD)
    rounding = StateRounding(basis, HEAD)
    rounded = rounding.rounded(states, max_kl=max_kl, max_kl_p99=1.0)
    columns, metadata = encode_states([rounded.integers_NH])
    batch = pa.table(columns).replace_schema_metadata(metadata).to_batches()[0]
    back = states_of(stored_states(batch, np.array([600]), basis))[0]
    kl = true_kl(states, back)
    assert 0.4 * max_kl < kl.mean() <= max_kl
    np.testing.assert_allclose(rounded.kl_N, kl, rtol=0.2, atol=0.05 * max_kl)
    finer = rounding.rounded(states, max_kl=max_kl / 64, max_kl_p99=1.0).integers_NH
    octaves = np.median(rounded.integers_NH[:, 0] - finer[:, 0]) / 4
    assert octaves == pytest.approx(3)  # a quarter of the error is half a step


@pytest.mark.parametrize("tokens", [1, 2, 5, 400])
def test_every_token_holds_the_bound_of_the_percentile_and_few_the_mean(tokens: int) -> None:
    """Steps are finer where the second order of a cost misleads; other tokens stay as they were."""
    rounding = StateRounding(fit_basis(random_states(300, 4), HEAD), HEAD)
    states = random_states(tokens, 6)
    tight = rounding.rounded(states, max_kl=1e-3, max_kl_p99=1.2e-3)
    loose = rounding.rounded(states, max_kl=1e-3, max_kl_p99=1.0)
    assert tight.kl_N.max() <= 1.2e-3
    assert max(tight.kl_N.mean(), loose.kl_N.mean()) <= 1e-3
    is_other = (tight.integers_NH != loose.integers_NH).any(1)
    assert (loose.kl_N[is_other] > 1e-3).all()
    if tokens == 400:
        assert is_other.any()
        halves = np.split(states, [150])  # units of another size
        parts = [rounding.rounded(half, max_kl=1e-3, max_kl_p99=1.2e-3) for half in halves]
        np.testing.assert_array_equal(
            np.concatenate([part.integers_NH[:, 0] for part in parts]), tight.integers_NH[:, 0]
        )


def test_a_bound_that_rounding_does_not_hold_is_refused() -> None:
    rounding = StateRounding(fit_basis(random_states(300, 4), HEAD), HEAD)
    kl = rounding.rounded(random_states(100, 5), max_kl=1e-3, max_kl_p99=1e-7).kl_N
    with pytest.raises(
        UserError, match=r"max_kl_p99 1e-07; raise them, or set scores.codec.max_kl"
    ):
        check_rounding(kl, 1e-3, 1e-7)
    check_rounding(kl, 1e-3, 1.0)


def test_no_token_at_all_is_rounded_to_none() -> None:
    rounding = StateRounding(fit_basis(random_states(9, 4), HEAD), HEAD)
    assert rounding.rounded(random_states(0, 0), max_kl=1e-3, max_kl_p99=1.0).integers_NH.shape == (
        0,
        1 + WIDTH,
    )


def scored(lengths: list[int], seed: int) -> ScoreBatch:
    plain = random_scores(lengths, top_k=4, vocabulary=606, forced=1, seed=seed)
    finite = tuple(np.maximum(row, -50) for row in plain.teacher_logprobs)
    return replace(plain, teacher_logprobs=finite, teacher_states=tuple(integers(lengths, seed)))


def test_an_extension_rounds_nothing_again() -> None:
    before, more = scored([4, 6, 2], 0), scored([3, 5], 1)
    table, _ = encode_scores(HiddenCodec(), before, rollouts_of(before))
    grown = append_scores(scores_batch(table), more, [0, 2])
    table, _ = encode_scores(HiddenCodec(), grown, rollouts_of(grown))
    found = scores_batch(table).teacher_states
    assert found is not None
    assert before.teacher_states
    assert more.teacher_states
    expected = [
        np.concatenate([before.teacher_states[0], more.teacher_states[0]]),
        before.teacher_states[1],
        np.concatenate([before.teacher_states[2], more.teacher_states[1]]),
    ]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_serve_without_a_head_what_few_candidates_serve() -> None:
    scores = scored([4, 6], 0)
    table, fidelity = encode_scores(HiddenCodec(), scores, rollouts_of(scores))
    block = decode_scores(table.to_batches()[0])
    np.testing.assert_array_equal(block.teacher_top_ids, np.concatenate(scores.teacher_top_ids))
    np.testing.assert_allclose(
        block.teacher_logprobs, np.concatenate(scores.teacher_logprobs), atol=1 / 32
    )
    assert fidelity.max_error <= 1 / 32


def test_frequencies_are_the_same_on_every_machine() -> None:
    """Numbers of a format: where one is another, every shard of codec hidden is lost."""
    frequency = rans._tables().frequency  # pyright: ignore[reportPrivateUsage]
    digest = hashlib.sha256(frequency.astype("<u4").tobytes()).hexdigest()
    assert digest == "ede0037a677d24eabd5bfd0d7be3351ba63ccdcdb2f12bb1f572e8fe464bb5b7"
