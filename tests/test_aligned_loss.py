"""Training on scores of a teacher with another tokenizer: masks, advantages, where losses are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.batches import collate
from opd_stream.fused import OutputHead
from opd_stream.loss import batch_loss
from opd_stream.objectives import Bucket, SampledPg
from opd_stream.store.reader import ScoredRow
from opd_stream.types import RolloutBatch, ScoreBatch
from opd_stream.weighting import trained_mask
from tests.test_aligned_scores import EOS, crossed


def scored_rows(batch: RolloutBatch, found: ScoreBatch) -> list[ScoredRow]:
    """The rows as a reader gives them."""
    assert found.chunk_ids is not None
    assert found.same_tokens is not None
    return [
        ScoredRow(
            prompt_id=batch.prompt_id[row],
            sample_index=0,
            prompt_ids=batch.prompt_ids[row],
            completion_ids=batch.completion_ids[row],
            behavior_logprobs=batch.behavior_logprobs[row],
            loss_mask=found.chunk_ids[row] >= 0,
            finish_reason=batch.finish_reason[row],
            teacher_logprobs=found.teacher_logprobs[row],
            teacher_top_ids=found.teacher_top_ids[row].astype(np.uint32),
            teacher_top_logprobs=found.teacher_top_logprobs[row],
            teacher_tail_logprobs=found.teacher_tail_logprobs[row],
            teacher_forced_logprobs=found.teacher_forced_logprobs[row],
            candidate_ids=None,
            candidate_behavior_logprobs=None,
            candidate_teacher_logprobs=None,
            terminators=((EOS,), (0,)),
            cache=0,
            chunk_ids=found.chunk_ids[row],
            same_tokens=found.same_tokens[row],
        )
        for row in range(len(batch))
    ]


def test_a_chunk_trains_whole_or_not_at_all() -> None:
    batch, _, _, found = crossed()
    for row in scored_rows(batch, found):
        chunks = row.chunk_ids
        assert chunks is not None
        cut = 0
        for window in range(1, len(chunks) + 1):
            mask = trained_mask(row, window)
            trained = set(chunks[:window][mask].tolist())
            assert not trained & set(chunks[window:].tolist())
            assert -1 not in trained
            cut += int(mask.sum()) < int((chunks[:window] >= 0).sum())
        first = int(row.completion_ids[0])
        masked = trained_mask(row, len(chunks), [first])
        assert not masked[chunks == chunks[0]].any()
        assert cut or len(set(chunks.tolist())) == len(chunks)


def loss_of(rows: list[ScoredRow], objective: Any, hidden: torch.Tensor, head: torch.Tensor) -> Any:
    batch = collate(rows, window_tokens=100)
    used = hidden[: len(rows), : batch.input_ids_BL.shape[1]]
    return batch, batch_loss(used, OutputHead(weight_VH=head), batch, [objective])


def test_the_advantage_is_the_chunks_shared_out() -> None:
    batch, _, _, found = crossed()
    rows = scored_rows(batch, found)
    torch.manual_seed(1)
    hidden, head = torch.randn(3, 80, 16), torch.randn(606, 16)
    made, result = loss_of(rows, SampledPg(), hidden, head)
    assert made.chunk_N is not None
    states = hidden[:, : made.input_ids_BL.shape[1]].flatten(0, 1)[made.hidden_rows_N]
    student = torch.log_softmax(states @ head.T, 1)
    student = student.gather(1, made.completion_ids_N[:, None])[:, 0]
    importance = (student - made.behavior_logprobs_N).exp()
    advantage = (result.losses_N / importance).numpy()
    for chunk in made.chunk_N.unique():
        mine = made.chunk_N == chunk
        total = float((student - made.teacher_logprobs_N)[mine].sum())
        assert advantage[mine].sum() == pytest.approx(total, abs=1e-3)
        assert np.ptp(advantage[mine]) < 1e-4
    alone = [replace(row, chunk_ids=None) for row in rows]
    _, by_token = loss_of(alone, SampledPg(), hidden, head)
    assert not torch.allclose(by_token.losses_N, result.losses_N, atol=1e-3)


def test_candidates_train_where_the_tokens_are_the_same_and_nowhere_else() -> None:
    batch, _, _, found = crossed()
    assert found.same_tokens is not None
    rows = [row.same_tokens_only() for row in scored_rows(batch, found)]
    torch.manual_seed(1)
    hidden, head = torch.randn(3, 80, 16), torch.randn(606, 16)
    made, result = loss_of(rows, Bucket(), hidden, head)
    assert len(result.losses_N) == sum(int(same.sum()) for same in found.same_tokens)
    assert torch.isfinite(result.losses_N).all()
    assert (result.losses_N >= -1e-5).all()
    assert float(made.weights_N.sum()) == pytest.approx(1)


def test_a_batch_without_a_token_costs_nothing() -> None:
    batch, _, _, found = crossed()
    row = scored_rows(batch, found)[2]
    empty = replace(row, loss_mask=np.zeros(len(row.completion_ids), np.bool_))
    hidden = torch.randn(1, 80, 16, requires_grad=True)
    _, result = loss_of([empty], Bucket(), hidden, torch.randn(606, 16))
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
