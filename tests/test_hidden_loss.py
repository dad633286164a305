"""Distributions rebuilt of cached hidden states: one loss, whatever the way to it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.batches import Batch, collate
from opd_stream.drift import NAMES, named
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.loss import batch_loss
from opd_stream.objectives import (
    Bucket,
    EntropyAware,
    Hybrid,
    Lsm,
    MonteCarlo,
    Objective,
    SampledPg,
    Skew,
)
from opd_stream.rebuilt import TeacherHead, with_candidates
from opd_stream.store.codecs import StoredStates
from opd_stream.store.reader import ScoredRow
from tests.test_guards import STOPS, VOCABULARY, row

WIDTH = 5
TEACHER = OutputHead(
    weight_VH=torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(7))
)
OBJECTIVES = [
    *(Bucket(direction=each) for each in ("reverse", "forward", "js")),
    *(Skew(direction="reverse"), Lsm(), EntropyAware(threshold=0.1), Hybrid(), MonteCarlo()),
    *(SampledPg(), SampledPg(baseline="bucket")),
]


def states_of_row(number: int, tokens: int) -> Any:
    random = np.random.default_rng(100 + number)
    return (2 * random.normal(size=(tokens, WIDTH))).astype(np.float32)


def row_of(number: int, *, tokens: int, stop: int | None, top_k: int) -> ScoredRow:
    """A row whose teacher is a head over hidden states, with its own top K, exact to float32."""
    plain = row(number, tokens=tokens, stop=stop, draws=2)
    states = states_of_row(number, tokens)
    weight = TEACHER.weight_VH.double().numpy()
    logits = states.astype(np.float64) @ weight.T
    teacher = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-teacher, axis=1)
    assert plain.candidate_ids is not None
    with np.errstate(divide="ignore"):
        tail = np.log(np.take_along_axis(np.exp(teacher), order[:, top_k:], 1).sum(1))
    return replace(
        plain,
        behavior_logprobs=np.full(tokens, -2.0, np.float32),
        teacher_logprobs=teacher[np.arange(tokens), plain.completion_ids].astype(np.float32),
        teacher_top_ids=order[:, :top_k].astype(np.uint32),
        teacher_top_logprobs=np.take_along_axis(teacher, order[:, :top_k], 1).astype(np.float32),
        teacher_tail_logprobs=tail.astype(np.float32),
        teacher_forced_logprobs=teacher[:, list(STOPS)].astype(np.float32),
        candidate_teacher_logprobs=np.take_along_axis(teacher, plain.candidate_ids, 1).astype(
            np.float32
        ),
    )


def batch_of(top_k: int, *, has_states: bool, tokens: int = 7) -> Batch:
    rows = [
        row_of(0, tokens=tokens, stop=9, top_k=top_k),
        row_of(1, tokens=3, stop=None, top_k=top_k),
    ]
    if has_states:  # and nothing else that is right: candidates are wrong on purpose
        rows = [
            replace(
                each,
                teacher_states=StoredStates(
                    tokens=len(states), width=WIDTH, plain=states.reshape(-1)
                ),
                teacher_logprobs=each.teacher_logprobs - 1,
                teacher_top_logprobs=each.teacher_top_logprobs - 1,
                teacher_forced_logprobs=each.teacher_forced_logprobs - 1,
                candidate_teacher_logprobs=np.zeros_like(each.candidate_teacher_logprobs),
            )
            for each in rows
            for states in [states_of_row(int(each.prompt_id[1:]), len(each.completion_ids))]
        ]
    return collate(rows, window_tokens=99)


def loss_of(
    batch: Batch, *objectives: Objective, teacher: TeacherHead | None = None, **student: Any
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, gradients (head and hidden states, flat) and sums of a small student in float64."""
    torch.manual_seed(1)
    table = torch.randn(VOCABULARY, 6, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, 6, dtype=torch.float64).requires_grad_()
    hidden = table[batch.input_ids_BL].requires_grad_()
    head = OutputHead(weight_VH=weight, **student)
    found = batch_loss(hidden, head, batch, objectives, teacher=teacher)
    found.loss.backward()
    assert weight.grad is not None
    assert hidden.grad is not None
    gradient = torch.cat([weight.grad.flatten(), hidden.grad.flatten()])
    return found.loss.item(), gradient, named(found.sums)


def rebuilt(top_k: int | None) -> TeacherHead:
    head = replace(TEACHER, weight_VH=TEACHER.weight_VH.double())
    return TeacherHead(head=head, top_k=top_k, vocabulary=VOCABULARY)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("student", [{}, {"cap": 3.0, "scale": 0.7}], ids=["plain", "capped"])
def test_exact_candidates_and_hidden_states_give_one_loss_and_gradient(
    objective: Objective, student: Any
) -> None:
    every, few = batch_of(VOCABULARY, has_states=False), batch_of(3, has_states=False)
    states = batch_of(3, has_states=True)
    for cached, top_k in ((every, VOCABULARY), (every, None), (few, 3)):
        expected = loss_of(cached, objective, **student)
        found = loss_of(states, objective, teacher=rebuilt(top_k), **student)
        assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5)
        for name in (each for each in NAMES if "overlap" not in each):
            assert found[2][name] == pytest.approx(expected[2][name], rel=1e-3, abs=2e-3), name


def test_candidates_are_rebuilt_as_exactly_within_mixed_precision() -> None:
    batch, teacher = batch_of(3, has_states=True), replace(rebuilt(3), head=TEACHER)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_candidates(batch, teacher)
    expected = with_candidates(batch, teacher)
    assert torch.equal(found.teacher_top_logprobs_NK, expected.teacher_top_logprobs_NK)
    assert torch.equal(found.teacher_tail_logprobs_N, expected.teacher_tail_logprobs_N)


def test_the_reverse_kl_over_the_vocabulary_is_that_of_all_logits() -> None:
    batch = replace(batch_of(3, has_states=True), terminator_ids_T=torch.zeros(0, dtype=torch.long))
    batch = replace(batch, teacher_terminator_logprobs_NT=torch.zeros(len(batch.weights_N), 0))
    loss, gradient, _ = loss_of(batch, Bucket(direction="reverse"), teacher=rebuilt(None))
    torch.manual_seed(1)
    table = torch.randn(VOCABULARY, 6, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, 6, dtype=torch.float64).requires_grad_()
    hidden = table[batch.input_ids_BL].requires_grad_()
    student = (hidden.flatten(0, 1)[batch.hidden_rows_N] @ weight.t()).log_softmax(1)
    assert batch.teacher_states_NG is not None
    teacher = rebuilt(None).head(batch.teacher_states_NG.double()).log_softmax(1)
    dense = (student.exp() * (student - teacher)).sum(1).mean()
    expected = torch.cat([each.flatten() for each in torch.autograd.grad(dense, [weight, hidden])])
    # The outcome for what is outside the candidates, which is empty, adds 1e-6 times 46 nats.
    assert loss == pytest.approx(dense.item(), abs=6e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_chunks_of_a_dense_loss_change_nothing_and_hold_few_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = batch_of(3, has_states=True, tokens=40)
    whole = loss_of(batch, Bucket(), EntropyAware(), teacher=rebuilt(None))
    monkeypatch.setattr(OutputHead, "chunk_rows", 4)
    most = 0
    call = OutputHead.__call__

    def watched(head: OutputHead, hidden_NH: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(hidden_NH))
        return call(head, hidden_NH)

    monkeypatch.setattr(OutputHead, "__call__", watched)
    parts = loss_of(batch, Bucket(), EntropyAware(), teacher=rebuilt(None))
    assert most == 4
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1], whole[1])
    assert parts[2] == pytest.approx(whole[2], rel=1e-9)


def test_candidates_end_where_a_vocabulary_does() -> None:
    """Ids that no tokenizer has are in the tail, as where candidates were scored."""
    head = rebuilt(None)
    states = batch_of(3, has_states=True)
    part = loss_of(states, Bucket(), teacher=replace(head, vocabulary=VOCABULARY - 1))
    all_but_one = loss_of(
        states, Bucket(), teacher=replace(head, top_k=VOCABULARY - 1, vocabulary=VOCABULARY - 1)
    )
    assert part[0] == pytest.approx(all_but_one[0], rel=1e-6)
    torch.testing.assert_close(part[1], all_but_one[1], rtol=1e-5, atol=1e-7)


def test_rows_with_and_without_states_do_not_train_together() -> None:
    batch = batch_of(3, has_states=False)
    for top_k in (None, 3):
        with pytest.raises(UserError, match="holds no hidden states"):
            loss_of(batch, Bucket(), teacher=rebuilt(top_k))
