"""The fused head and loss against the same computed from all logits."""

from collections.abc import Callable

import pytest
import torch

from opd_stream.fused import FusedLoss, OutputHead, fused_loss

TOKENS, HIDDEN, VOCABULARY, ASKED = 45, 12, 70, 6


def example(
    dtype: torch.dtype = torch.float64, *, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """hidden, weight, bias, ids (with repeats), token weights (some zero)."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype).requires_grad_()
    offset = torch.randn(VOCABULARY, dtype=dtype).requires_grad_() if bias else None
    ids = torch.randint(0, VOCABULARY, (TOKENS, ASKED))
    ids[:, 3] = ids[:, 1]
    weights = torch.rand(TOKENS, dtype=dtype)
    weights[::7] = 0
    return hidden, weight, offset, ids, weights


def curved(logprobs: torch.Tensor, rows: slice) -> torch.Tensor:
    """An objective without any symmetry; row n has its own factor."""
    factor = torch.arange(1, TOKENS + 1, dtype=logprobs.dtype)[rows]
    return factor * (logprobs.exp() * logprobs.sin()).sum(1) + logprobs[:, 0] ** 2


def dense(
    head: OutputHead,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    token_loss: Callable[[torch.Tensor, slice], torch.Tensor] = curved,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, log-probabilities, entropy) from all logits, in the obvious way."""
    logprobs = torch.log_softmax(head(hidden), dim=1)
    asked = logprobs.gather(1, ids)
    loss = (token_loss(asked, slice(None)) * weights).sum()
    return loss, asked, -(logprobs.exp() * logprobs).sum(1)


def run(head: OutputHead, hidden: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> FusedLoss:
    return fused_loss(hidden, head, ids_NJ=ids, weights_N=w, token_loss=curved, chunk_rows=16)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_values_and_gradients_are_those_of_all_logits(
    bias: bool, cap: float | None, scale: float
) -> None:
    hidden, weight, offset, ids, weights = example(bias=bias)
    head = OutputHead(weight_VH=weight, bias_V=offset, scale=scale, cap=cap)
    leaves = [hidden, weight] if offset is None else [hidden, weight, offset]
    expected, logprobs, entropy = dense(head, hidden, ids, weights)
    expected_grads = torch.autograd.grad(expected * 3, leaves)
    found = run(head, hidden, ids, weights)
    found_grads = torch.autograd.grad(found.loss * 3, leaves)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.logprobs_NJ, logprobs)
    torch.testing.assert_close(found.entropy_N, entropy)
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk_rows", [1, 7, 45, 1000])
def test_chunks_change_nothing(chunk_rows: int) -> None:
    hidden, weight, _, ids, weights = example()
    head = OutputHead(weight_VH=weight)
    whole = run(head, hidden, ids, weights)
    parts = fused_loss(
        hidden, head, ids_NJ=ids, weights_N=weights, token_loss=curved, chunk_rows=chunk_rows
    )
    torch.testing.assert_close(parts.loss, whole.loss)
    one = torch.autograd.grad(whole.loss, [hidden, weight])
    other = torch.autograd.grad(parts.loss, [hidden, weight])
    torch.testing.assert_close(one, other)


def test_a_tied_head_and_accumulated_batches_add_their_gradients() -> None:
    _, weight, _, ids, weights = example()
    rows = torch.randint(0, VOCABULARY, (TOKENS,))

    def loss(fused: bool, part: slice) -> torch.Tensor:
        hidden, head = weight[rows[part]].sin(), OutputHead(weight_VH=weight)
        if fused:
            return fused_loss(
                hidden,
                head,
                ids_NJ=ids[part],
                weights_N=weights[part],
                token_loss=lambda logprobs, _: logprobs[:, 0] ** 2,
            ).loss
        asked = torch.log_softmax(head(hidden), dim=1).gather(1, ids[part])
        return (asked[:, 0] ** 2 * weights[part]).sum()

    halves = [slice(0, 20), slice(20, None)]
    for part in halves:
        loss(True, part).backward()
    found, weight.grad = weight.grad, None
    loss(False, slice(None)).backward()
    torch.testing.assert_close(found, weight.grad)


def test_an_adapter_on_the_head_gets_the_gradient_and_the_frozen_weight_none() -> None:
    hidden, weight, _, ids, weights = example()
    weight = weight.detach()
    left = torch.randn(VOCABULARY, 2, dtype=torch.float64).requires_grad_()
    right = torch.randn(2, HIDDEN, dtype=torch.float64).requires_grad_()
    found = run(OutputHead(weight_VH=weight + 0.5 * left @ right), hidden, ids, weights)
    expected, *_ = dense(OutputHead(weight_VH=weight + 0.5 * left @ right), hidden, ids, weights)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, [left, right]), torch.autograd.grad(expected, [left, right])
    )
    frozen = run(OutputHead(weight_VH=weight), hidden, ids, weights)
    frozen.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_bfloat16_keeps_the_small_gradients_of_confident_tokens() -> None:
    """Where p is near 1 the gradient is a small difference of large terms."""
    torch.manual_seed(1)
    weight = torch.randn(400, 32).bfloat16().requires_grad_()
    ids = torch.stack([torch.randperm(400)[:5] for _ in range(48)])
    hidden = weight.detach()[ids[:, 0]].float().mul(0.7).bfloat16().requires_grad_()

    def pull(logprobs: torch.Tensor, rows: slice) -> torch.Tensor:
        first = logprobs[:, 0]
        return first.exp() * (first + 0.005) - 0.005 * logprobs[:, 1:].sum(1)

    weights = torch.full((48,), 1 / 48)
    logits = (hidden @ weight.t()).float()
    asked = torch.log_softmax(logits, dim=1).gather(1, ids)
    assert asked[:, 0].exp().median() > 0.99
    expected = torch.autograd.grad((pull(asked, slice(None)) * weights).sum(), [hidden, weight])
    found = fused_loss(
        hidden, OutputHead(weight_VH=weight), ids_NJ=ids, weights_N=weights, token_loss=pull
    )
    for one, other in zip(torch.autograd.grad(found.loss, [hidden, weight]), expected, strict=True):
        error = (one.float() - other.float()).norm() / other.float().norm()
        assert error < 0.01
    assert (found.entropy_N >= 0).all()


def test_bfloat16_stays_near_float64() -> None:
    hidden, weight, _, ids, weights = example()
    expected, logprobs, _ = dense(OutputHead(weight_VH=weight), hidden, ids, weights)
    expected_grad = torch.autograd.grad(expected, weight)[0]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    found = run(OutputHead(weight_VH=half[1]), half[0], ids, weights.float())
    grad = torch.autograd.grad(found.loss, half[1])[0]
    assert (found.logprobs_NJ.double() - logprobs).abs().max() < 0.1  # logits up to 10
    assert (grad.double() - expected_grad).norm() / expected_grad.norm() < 0.03


def test_under_autocast_the_products_are_narrow_and_the_gradients_of_the_weights_wide() -> None:
    hidden, weight, _, ids, weights = example(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(OutputHead(weight_VH=weight), hidden, ids, weights)
    narrow = run(OutputHead(weight_VH=weight.bfloat16()), hidden.bfloat16(), ids, weights)
    assert torch.equal(found.logprobs_NJ, narrow.logprobs_NJ)
    gradients = torch.autograd.grad(found.loss, [hidden, weight])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = run(OutputHead(weight_VH=weight), hidden, ids, weights)
    for one, other in zip(
        gradients, torch.autograd.grad(exact.loss, [hidden, weight]), strict=True
    ):
        assert (one - other).norm() / other.norm() < 0.03


def test_ids_that_no_float_can_hold_still_have_their_log_probability() -> None:
    weight = torch.zeros(4, 1, dtype=torch.float32)
    weight[0] = 200.0
    head, hidden = OutputHead(weight_VH=weight), torch.ones(2, 1, requires_grad=True)
    found = fused_loss(
        hidden,
        head,
        ids_NJ=torch.tensor([[1], [0]]),
        weights_N=torch.ones(2),
        token_loss=lambda logprobs, _: logprobs[:, 0],
    )
    assert found.logprobs_NJ[:, 0].tolist() == [-200.0, 0.0]
    found.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_overlap_counts_the_teachers_candidates_among_the_students_as_many() -> None:
    weight = torch.eye(6)
    hidden = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    ids = torch.tensor([[5, 0, 4, 1]])  # sampled, then the teacher's three
    top = torch.tensor([[-0.1, -3.0, -torch.inf]])
    found = fused_loss(
        hidden,
        OutputHead(weight_VH=weight),
        ids_NJ=ids,
        weights_N=torch.ones(1),
        token_loss=lambda logprobs, _: logprobs[:, 0],
        top_NK=top,
    )
    assert found.overlap_M.tolist() == [0.5]  # 0 is among the student's first two, 4 is not


@pytest.mark.requires_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bfloat16_on_a_gpu_stays_near_float64() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(5000, 64, device="cuda").mul(0.3).bfloat16().requires_grad_()
    ids = torch.randint(0, 5000, (300, 8), device="cuda")
    weights = torch.full((300,), 1 / 300, device="cuda")

    def token_loss(logprobs: torch.Tensor, _: slice) -> torch.Tensor:
        return (logprobs.exp() * logprobs).sum(1)

    found = fused_loss(
        hidden, OutputHead(weight_VH=weight), ids_NJ=ids, weights_N=weights, token_loss=token_loss
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected, *_ = dense(OutputHead(weight_VH=exact[1]), exact[0], ids, weights, token_loss)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-3, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found.loss, [hidden, weight]),
        torch.autograd.grad(expected, exact),
        strict=True,
    ):
        assert (one.double() - other).norm() / other.norm() < 0.02
