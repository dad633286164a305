"""Guards and the loss of a batch of cached rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opd_stream.batches import Batch, collate
from opd_stream.drift import NAMES, by_position, means, named
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.loss import (
    Terminators,
    batch_loss,
    known_terminators,
    merge_into_candidates,
    soft_clamp,
)
from opd_stream.objectives import (
    Bucket,
    EntropyAware,
    Hybrid,
    Lsm,
    MonteCarlo,
    Objective,
    SampledPg,
)
from opd_stream.store.reader import ScoredRow
from opd_stream.weighting import first_occurrences, trained_mask

VOCABULARY, HIDDEN, TOP_K = 11, 6, 3
STOPS = (9, 10)


def row(number: int, *, tokens: int, stop: int | None = None, draws: int = 0) -> ScoredRow:
    """A rollout with a random teacher; the last token may be a terminator."""
    random = np.random.default_rng(number)
    logits = random.normal(size=(tokens, VOCABULARY)) * 2
    teacher = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = random.integers(0, 9, tokens)
    if stop is not None:
        ids[-1] = stop
    order = np.argsort(-teacher, axis=1)[:, :TOP_K]
    top = np.take_along_axis(teacher, order, 1)
    candidates = random.integers(0, VOCABULARY, (tokens, draws))
    return ScoredRow(
        prompt_id=f"p{number}",
        sample_index=0,
        prompt_ids=random.integers(0, 9, 2 + number % 3),
        completion_ids=ids,
        behavior_logprobs=np.full(tokens, -2.0, np.float32),
        loss_mask=None,
        finish_reason="length" if stop is None else "stop",
        teacher_logprobs=teacher[np.arange(tokens), ids].astype(np.float32),
        teacher_top_ids=order.astype(np.uint32),
        teacher_top_logprobs=top.astype(np.float32),
        teacher_tail_logprobs=np.log1p(-np.exp(top).sum(1)).astype(np.float32),
        teacher_forced_logprobs=teacher[:, list(STOPS)].astype(np.float32),
        candidate_ids=candidates if draws else None,
        candidate_behavior_logprobs=np.full((tokens, draws), -2.0, np.float32) if draws else None,
        candidate_teacher_logprobs=(
            np.take_along_axis(teacher, candidates, 1).astype(np.float32) if draws else None
        ),
        terminators=(STOPS, (0, 1)),
        cache=0,
    )


ROWS = [row(0, tokens=5, stop=9), row(1, tokens=8), row(2, tokens=3, stop=10), row(3, tokens=6)]


def loss_and_gradient(
    batches: list[Batch], *objectives: Objective, merge: bool = True
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Over micro-batches, for a student whose hidden state is a function of the token before."""
    torch.manual_seed(1)
    table = torch.randn(VOCABULARY, HIDDEN)
    weight = torch.randn(VOCABULARY, HIDDEN).requires_grad_()
    total, sums = 0.0, torch.zeros(len(NAMES), dtype=torch.float64)
    for batch in batches:
        found = batch_loss(
            table[batch.input_ids_BL],
            OutputHead(weight_VH=weight),
            batch,
            objectives,
            merge_terminators=merge,
        )
        found.loss.backward()
        total, sums = total + found.loss.item(), sums + found.sums
    assert weight.grad is not None
    return total, weight.grad, named(sums)


def test_terminators_are_one_event() -> None:
    """A base student's and an instruct teacher's end of text agree, though their ids do not."""
    student = torch.tensor([[0.97, 1e-5]]).log()
    teacher = torch.tensor([[1e-11, 0.95]]).log()
    stop = Terminators(
        ids_T=torch.tensor(STOPS), student_logprobs_NT=student, teacher_logprobs_NT=teacher
    )
    as_event = (stop.student_N - stop.teacher_N).item()
    assert as_event == pytest.approx(0.0208, abs=1e-3)
    assert (student - teacher)[0, 0].item() == pytest.approx(25.3, abs=0.01)


def test_merged_candidates_are_still_a_distribution() -> None:
    teacher = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05], dtype=torch.float64)
    stop = Terminators(
        ids_T=torch.tensor([1, 5]),
        student_logprobs_NT=teacher[[1, 5]].log()[None],
        teacher_logprobs_NT=teacher[[1, 5]].log()[None],
    )
    student_top, teacher_top, tail = merge_into_candidates(
        stop,
        top_ids_NK=torch.tensor([[0, 1, 2]]),
        student_top_NK=teacher[:3].log()[None],
        teacher_top_NK=teacher[:3].log()[None],
        teacher_tail_N=teacher[3:].sum().log()[None],
    )
    assert teacher_top.exp()[0].tolist() == pytest.approx([0.4, 0, 0.15, 0.25])
    assert tail.exp().item() == pytest.approx(0.2)  # the stop outside the candidates left it
    torch.testing.assert_close(student_top, teacher_top)


@pytest.mark.parametrize("stops", [(1, 5), (4, 5)])
def test_a_terminator_that_is_not_known_stays_in_the_tail_of_both_sides(
    stops: tuple[int, int],
) -> None:
    """Id 5 was not asked for, nor was 4: the outcomes are the candidates and the tail."""
    teacher = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05], dtype=torch.float64)
    student = torch.tensor([0.1, 0.3, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64)
    told = torch.tensor([teacher[id].log() if id < 3 else np.nan for id in stops])
    stop = known_terminators(torch.tensor(stops), student[list(stops)].log()[None], told[None])
    student_top, teacher_top, tail = merge_into_candidates(
        stop,
        top_ids_NK=torch.tensor([[0, 1, 2]]),
        student_top_NK=student[:3].log()[None],
        teacher_top_NK=teacher[:3].log()[None],
        teacher_tail_N=teacher[3:].sum().log()[None],
    )
    merged = [0.4, 0, 0.15, 0.2] if 1 in stops else [0.4, 0.2, 0.15, 0]
    assert teacher_top.exp()[0].tolist() == pytest.approx(merged)
    merged = [0.1, 0, 0.2, 0.3] if 1 in stops else [0.1, 0.3, 0.2, 0]
    assert student_top.exp()[0].tolist() == pytest.approx(merged)
    assert tail.exp().item() == pytest.approx(0.25)


def test_only_a_cache_that_says_so_has_terminators_that_are_not_known() -> None:
    forced = ROWS[0].teacher_forced_logprobs.copy()
    forced[2] = -np.inf
    plain = replace(ROWS[0], teacher_forced_logprobs=forced)
    marked = replace(plain, forced_in_tail=True)
    found = collate([marked], window_tokens=8).teacher_terminator_logprobs_NT
    assert found.isnan().any(1).tolist() == [False, False, True, False, False]
    zero = collate([plain], window_tokens=8).teacher_terminator_logprobs_NT
    assert zero[2].isneginf().all()
    loss, gradient, _ = loss_and_gradient([collate([marked], window_tokens=8)], Bucket())
    assert np.isfinite(loss)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "objective", [Bucket(), Lsm(), Hybrid(importance_cap=1e9), Bucket(direction="js")]
)
def test_exchanging_the_terminators_changes_nothing_when_they_are_one(objective: Objective) -> None:
    """Which of its two end ids a rollout drew is no information."""
    first, *rest = ROWS
    other = replace(first, completion_ids=np.append(first.completion_ids[:-1], 10))
    one, gradient, _ = loss_and_gradient([collate([first, *rest], window_tokens=9)], objective)
    two, other_gradient, _ = loss_and_gradient(
        [collate([other, *rest], window_tokens=9)], objective
    )
    assert one == pytest.approx(two, rel=1e-6)
    torch.testing.assert_close(gradient, other_gradient)


def test_a_stop_that_both_sides_expect_is_no_loss_though_their_ids_differ() -> None:
    base = row(7, tokens=1, stop=9)
    forced = np.log(np.array([[1e-9, 0.9]], np.float32))
    base = replace(
        base, teacher_logprobs=forced[:, 0], teacher_forced_logprobs=forced.astype(np.float32)
    )
    batch = collate([base], window_tokens=9)
    apart = loss_and_gradient([batch], SampledPg(), merge=False)[2]["reverse_kl"]
    merged = loss_and_gradient([batch], SampledPg())[2]["reverse_kl"]
    assert apart - merged > 10


def test_truncated_rows_have_no_terminator() -> None:
    batch = collate([row(1, tokens=8)], window_tokens=5)
    assert len(batch.completion_ids_N) == 5
    assert not torch.isin(batch.completion_ids_N, batch.terminator_ids_T).any()
    assert batch.input_ids_BL.shape[1] == len(row(1, tokens=8).prompt_ids) + 5


def test_the_first_occurrence_mask_takes_the_loss_and_leaves_the_conditioning() -> None:
    ids = np.array([4, 7, 4, 4, 7])
    assert first_occurrences(ids, [4, 7, 8]).tolist() == [True, True, False, False, False]
    some = replace(row(5, tokens=5), completion_ids=ids)
    assert trained_mask(some, 9, [4]).tolist() == [False, True, True, True, True]
    whole = collate([some], window_tokens=9)
    masked = collate([some], window_tokens=9, masked_ids=[4])
    assert torch.equal(whole.input_ids_BL, masked.input_ids_BL)
    assert masked.completion_ids_N.tolist() == [7, 4, 4, 7]
    assert masked.positions_N.tolist() == [1, 2, 3, 4]
    assert masked.weights_N.sum().item() == pytest.approx(1.0)


def test_the_soft_clamp_caps_the_value_and_scales_the_gradient() -> None:
    losses = torch.tensor([0.1] * 9 + [3.1], dtype=torch.float64).requires_grad_()
    limit = 3 * losses.mean().item()
    assert limit == pytest.approx(1.2)
    clamped = soft_clamp(losses, limit)
    clamped.sum().backward()
    assert clamped.tolist() == pytest.approx([0.1] * 9 + [1.2])
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([1.0] * 9 + [1.2 / 3.1])


def test_caches_with_terminators_in_another_order_are_read_by_id() -> None:
    turned = [
        replace(
            row,
            teacher_forced_logprobs=row.teacher_forced_logprobs[:, ::-1],
            terminators=(STOPS[::-1], (0, 1)),
        )
        for row in ROWS[2:]
    ]
    whole = collate(ROWS, window_tokens=9)
    mixed = collate([*ROWS[:2], *turned], window_tokens=9)
    assert torch.equal(mixed.terminator_ids_T, whole.terminator_ids_T)
    assert torch.equal(mixed.teacher_terminator_logprobs_NT, whole.teacher_terminator_logprobs_NT)
    other = replace(turned[0], terminators=(STOPS[:1], (0,)))
    with pytest.raises(UserError, match=r"other terminators, \[9, 10\] and \[9\]; expected"):
        collate([ROWS[0], other], window_tokens=9)


@pytest.mark.parametrize(
    "objectives",
    [(Bucket(),), (Hybrid(), EntropyAware(weight=0.5)), (SampledPg(baseline="bucket"),)],
)
def test_microbatches_and_padding_change_nothing(objectives: tuple[Objective, ...]) -> None:
    tokens = sum(len(some.completion_ids) for some in ROWS)
    whole = loss_and_gradient([collate(ROWS, window_tokens=9)], *objectives)
    parts = [
        collate(part, window_tokens=9, tokens_of_step=tokens)
        for part in (ROWS[:1], ROWS[1:2], [ROWS[3], ROWS[2]])
    ]
    split = loss_and_gradient(parts, *objectives)
    assert whole[0] == pytest.approx(split[0], rel=1e-5)
    torch.testing.assert_close(whole[1], split[1], rtol=1e-4, atol=1e-6)
    for name in NAMES:
        if not name.startswith("overlap"):  # measured on a sample of the tokens
            assert whole[2][name] == pytest.approx(split[2][name], rel=1e-5, abs=1e-5), name


def ragged(full: ScoredRow, *, wide: int) -> ScoredRow:
    """The row with two candidates a token, and id 0 without probability in `wide` - 2 places."""
    cut = full.first_candidates(2)
    room = ((0, 0), (0, wide - 2))
    return replace(
        cut,
        teacher_top_ids=np.pad(cut.teacher_top_ids, room),
        teacher_top_logprobs=np.pad(cut.teacher_top_logprobs, room, constant_values=-np.inf),
        terminators=((0, 10), (0, 1)),  # a model that ends its texts with id 0
    )


@pytest.mark.parametrize(
    "objective", [Bucket(), Hybrid(), SampledPg(baseline="bucket"), Bucket(direction="js")]
)
@pytest.mark.parametrize("merge", [True, False])
def test_a_place_without_a_candidate_is_no_candidate(objective: Objective, merge: bool) -> None:
    rows = [replace(r, completion_ids=r.completion_ids % 3) for r in ROWS]  # id 0 is drawn, too
    narrow, wide = (
        loss_and_gradient(
            [collate([ragged(r, wide=width) for r in rows], window_tokens=9)],
            objective,
            merge=merge,
        )
        for width in (2, 3)
    )
    assert narrow[0] == pytest.approx(wide[0], rel=1e-6)
    torch.testing.assert_close(narrow[1], wide[1])


def test_a_tail_of_rounded_numbers_is_not_nothing() -> None:
    """A tail of 7e-4, of which 7.1e-4 are the terminator, as a codec of 1/32 nats may store it."""
    stop = Terminators(
        ids_T=torch.tensor([5]),
        student_logprobs_NT=torch.tensor([[2e-3]]).log(),
        teacher_logprobs_NT=torch.tensor([[7.1e-4]]).log(),
    )
    _, _, tail = merge_into_candidates(
        stop,
        top_ids_NK=torch.tensor([[0]]),
        student_top_NK=torch.tensor([[0.995]]).log(),
        teacher_top_NK=torch.tensor([[0.9993]]).log(),
        teacher_tail_N=torch.tensor([7e-4]).log(),
    )
    assert tail.exp().item() == pytest.approx(1e-7)


def test_tokens_of_weight_zero_are_neither_trained_on_nor_counted() -> None:
    whole = collate(ROWS[:2], window_tokens=9)
    silent = replace(whole, weights_N=whole.weights_N.where(whole.row_N == 0, 0.0))
    _, gradient, sums = loss_and_gradient([silent], Bucket())
    alone = collate(ROWS[:1], window_tokens=9, tokens_of_step=13)
    torch.testing.assert_close(gradient, loss_and_gradient([alone], Bucket())[1])
    assert sums["tokens"] == 5


def test_draws_of_the_student_reach_the_objective() -> None:
    rows = [row(1, tokens=4, draws=3), row(2, tokens=2, stop=9, draws=3)]
    several = loss_and_gradient([collate(rows, window_tokens=9)], MonteCarlo())
    one = loss_and_gradient([collate(rows, window_tokens=9)], SampledPg())
    assert several[0] != one[0]
    with pytest.raises(UserError, match=r"candidate_ids.*rollouts.extra_draws"):
        loss_and_gradient([collate(ROWS, window_tokens=9)], MonteCarlo())


def test_an_id_outside_the_students_vocabulary_is_named() -> None:
    other = replace(ROWS[1], completion_ids=ROWS[1].completion_ids + VOCABULARY)
    with pytest.raises(UserError, match="the student has 11 tokens"):
        loss_and_gradient(
            [replace(collate([other], window_tokens=9), input_ids_BL=torch.zeros(1, 11).long())],
            Bucket(),
        )


def test_statistics_are_means_over_the_tokens() -> None:
    _, _, sums = loss_and_gradient([collate(ROWS, window_tokens=9)], Bucket())
    found = means(sums)
    assert sums["tokens"] == 22
    assert 0 < found["student_top_mass"] < 1
    assert 0 < found["teacher_entropy"] < np.log(VOCABULARY)
    assert found["absolute_reverse_kl_p50"] <= found["absolute_reverse_kl_p99"]
    places = by_position(sums)
    assert [place["first"] for place in places] == [0, 1, 3, 7]
    assert sum(place["tokens"] for place in places) == 22
    total = sum(place["tokens"] * place["reverse_kl"] for place in places)
    assert total / 22 == pytest.approx(found["reverse_kl"], rel=1e-6)
