"""Log-probabilities against dense float64 formulas."""

import pytest
import torch

from opd_stream.logprobs import completion_rows, head_scores


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


def test_the_row_before_a_token_predicts_it() -> None:
    prompts, completions = torch.tensor([3, 1, 2]), torch.tensor([2, 4, 0])
    rows = completion_rows(prompts, completions, padded_length=6)
    expected = [
        row * 6 + int(prompts[row]) + place - 1
        for row in range(3)
        for place in range(int(completions[row]))
    ]
    assert rows.tolist() == expected == [2, 3, 6, 7, 8, 9]


@pytest.mark.parametrize("vocabulary", [700, 4096, 4113])
def test_the_best_blocks_hold_the_top_k(vocabulary: int) -> None:
    """Whether the blocks divide the vocabulary or not, and where values are equal."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(40, vocabulary, generator=generator).mul(2).round(decimals=1)
    scores = head_scores(
        logits,
        lambda hidden: hidden.clone(),
        asked_ids_NJ=torch.zeros(40, 1, dtype=torch.long),
        forced_ids_F=torch.tensor([3]),
        top_k=16,
        chunk_rows=7,
    )
    dense = torch.log_softmax(logits.double(), dim=1)
    expected = dense.topk(16, dim=1).values
    torch.testing.assert_close(scores.top_NK.double(), expected, atol=1e-5, rtol=0)
    found = dense.gather(1, scores.top_ids_NK)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert all(len(set(row)) == 16 for row in scores.top_ids_NK.tolist())
    rest = dense.scatter(1, scores.top_ids_NK, -torch.inf).logsumexp(1)
    torch.testing.assert_close(scores.tail_N.double(), rest, atol=1e-5, rtol=0)
