"""Log-probabilities against dense float64 formulas."""

import pytest
import torch

from opd_stream.logprobs import HeadScores, completion_rows, head_scores


def head_of(vocab: int, hidden: int) -> torch.nn.Linear:
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocab, bias=False)
    head.weight.data *= 5
    return head


def test_scores_of_a_head_are_those_of_the_dense_softmax() -> None:
    head, hidden = head_of(50, 8), torch.randn(9, 8)
    sampled, forced = torch.randint(0, 50, (9,)), torch.tensor([3, 4])
    scores = head_scores(
        hidden, head, asked_ids_NJ=sampled[:, None], forced_ids_F=forced, top_k=5, chunk_rows=4
    )
    dense = torch.log_softmax(head(hidden).double(), dim=1)
    top = dense.topk(5, dim=1)
    torch.testing.assert_close(scores.top_NK.double(), top.values, atol=1e-5, rtol=0)
    assert torch.equal(scores.top_ids_NK, top.indices)
    torch.testing.assert_close(
        scores.asked_NJ[:, 0].double(), dense[range(9), sampled], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(scores.forced_NF.double(), dense[:, forced], atol=1e-5, rtol=0)


def test_a_tail_far_below_rounding_is_still_exact() -> None:
    logits = torch.tensor([[30.0, 25.0, 4.0, 3.0, 2.0]])
    scores = head_scores(
        logits,
        lambda hidden: hidden.clone(),
        asked_ids_NJ=torch.tensor([[0]]),
        forced_ids_F=torch.tensor([0]),
        top_k=2,
        chunk_rows=1,
    )
    exact = torch.log_softmax(logits.double(), dim=1)[0, 2:].logsumexp(0)
    assert exact < -25  # 1 - sum would be 0 in float32
    torch.testing.assert_close(scores.tail_N[0].double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("draws", [False, True])
def test_no_tokens_have_no_scores(draws: bool) -> None:
    scores = head_scores(
        torch.zeros(0, 8),
        head_of(50, 8),
        asked_ids_NJ=torch.zeros(0, 1, dtype=torch.long),
        forced_ids_F=torch.tensor([3, 4]),
        top_k=5,
        chunk_rows=4,
        draws_ND=torch.zeros(0, 6) if draws else None,
    )
    assert scores.top_NK.shape[0] == len(scores.tail_N) == 0
    assert scores.forced_NF.shape == (0, 2)


def test_the_row_before_a_token_predicts_it() -> None:
    prompts, completions = torch.tensor([3, 1, 2]), torch.tensor([2, 4, 0])
    rows = completion_rows(prompts, completions, padded_length=6)
    expected = [
        row * 6 + int(prompts[row]) + place - 1
        for row in range(3)
        for place in range(int(completions[row]))
    ]
    assert rows.tolist() == expected == [2, 3, 6, 7, 8, 9]


@pytest.mark.parametrize("vocabulary", [700, 4096, 4113, 9999])
@pytest.mark.parametrize("top_k", [3, 16])
def test_the_best_groups_hold_the_top_k(vocabulary: int, top_k: int) -> None:
    """Whether the groups divide the vocabulary or not, and where values are equal."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(40, vocabulary, generator=generator).mul(2).round(decimals=1)
    logits[:3, -40:] += 20  # what no group holds, and its neighbours
    logits[3] = 1.0
    scores = scores_of(logits, top_k=top_k, chunk_rows=7)
    dense = torch.log_softmax(logits.double(), dim=1)
    expected = dense.topk(top_k, dim=1).values
    torch.testing.assert_close(scores.top_NK.double(), expected, atol=1e-5, rtol=0)
    found = dense.gather(1, scores.top_ids_NK)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert all(len(set(row)) == top_k for row in scores.top_ids_NK.tolist())
    rest = dense.scatter(1, scores.top_ids_NK, -torch.inf).logsumexp(1)
    torch.testing.assert_close(scores.tail_N.double(), rest, atol=1e-5, rtol=0)


def scores_of(logits: torch.Tensor, *, top_k: int, chunk_rows: int) -> HeadScores:
    return head_scores(
        logits,
        lambda hidden: hidden,
        asked_ids_NJ=torch.zeros(len(logits), 1, dtype=torch.long),
        forced_ids_F=torch.tensor([3]),
        top_k=top_k,
        chunk_rows=chunk_rows,
    )


def test_neither_chunks_nor_company_decide_between_equal_logits() -> None:
    logits = torch.randn(24, 5000).mul(2).round(decimals=1)
    before = logits.clone()
    whole, one = (scores_of(logits, top_k=16, chunk_rows=rows) for rows in (24, 1))
    assert torch.equal(whole.top_ids_NK, one.top_ids_NK)
    torch.testing.assert_close(whole.tail_N, one.tail_N, atol=1e-6, rtol=0)
    assert torch.equal(logits, before)  # what a head returns is its own


def test_the_sum_over_a_large_vocabulary_is_rounded_once() -> None:
    """One float32 after another, as many equal small terms drift by several 1e-6."""
    logits = torch.randn(6, 200_000, generator=torch.Generator().manual_seed(1)).mul(3)
    scores = scores_of(logits, top_k=64, chunk_rows=6)
    dense = torch.log_softmax(logits.double(), dim=1)
    assert torch.equal(scores.top_ids_NK, dense.topk(64, dim=1).indices)
    exact = dense.scatter(1, scores.top_ids_NK, -torch.inf).logsumexp(1)
    torch.testing.assert_close(scores.tail_N.double(), exact, atol=2e-6, rtol=0)


@pytest.mark.parametrize("vocabulary", [50, 4113])
def test_ids_that_cannot_be_leave_an_empty_tail(vocabulary: int) -> None:
    logits = torch.full((2, vocabulary), -torch.inf)
    logits[:, 5:9] = torch.tensor([1.0, 4.0, 2.0, 3.0])
    scores = scores_of(logits, top_k=4, chunk_rows=2)
    assert scores.top_ids_NK.tolist() == [[6, 8, 7, 5]] * 2
    assert (scores.tail_N == -torch.inf).all()
    torch.testing.assert_close(scores.top_NK, logits[:, 5:9].log_softmax(1)[:, [1, 3, 2, 0]])
    more = scores_of(logits, top_k=6, chunk_rows=2)
    assert all(len(set(row)) == 6 and max(row) < vocabulary for row in more.top_ids_NK.tolist())
    assert (more.top_NK[:, 4:] == -torch.inf).all()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_so_in_every_figure(odd: float) -> None:
    logits = torch.randn(3, 4113)
    logits[1, 17] = odd
    scores = scores_of(logits, top_k=4, chunk_rows=3)
    assert scores.top_NK[1].isnan().any()
    assert scores.asked_NJ[1].isnan().all() or odd == torch.inf
    assert scores.top_NK[[0, 2]].isfinite().all()


def test_a_head_may_have_a_bias_or_half_precision() -> None:
    torch.manual_seed(0)
    hidden, ids = torch.randn(9, 8), torch.zeros(9, 1, dtype=torch.long)
    for dtype in (torch.float32, torch.bfloat16):
        head = torch.nn.Linear(8, 50).to(dtype)
        scores = head_scores(
            hidden.to(dtype),
            head,
            asked_ids_NJ=ids,
            forced_ids_F=torch.tensor([3]),
            top_k=5,
            chunk_rows=4,
        )
        dense = torch.log_softmax(head(hidden.to(dtype)).double(), dim=1)
        assert scores.top_NK.dtype == torch.float32
        expected = dense.topk(5, dim=1).values
        torch.testing.assert_close(scores.top_NK.double(), expected, atol=2e-2, rtol=0)
