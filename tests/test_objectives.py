"""The laws of the objectives, in float64, by enumeration over a vocabulary of five."""

import math
from itertools import pairwise

import pytest
import torch

from opd_stream.logprobs import log_tail, logprobs_at
from opd_stream.objectives import (
    Bucket,
    Lsm,
    Objective,
    ObjectiveInputs,
    SampledPg,
    token_losses,
)

P = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05], dtype=torch.float64)  # student
Q = torch.tensor([0.50, 0.05, 0.25, 0.12, 0.08], dtype=torch.float64)  # teacher
B = torch.tensor([0.30, 0.30, 0.20, 0.10, 0.10], dtype=torch.float64)  # behavior
DENSE = [Bucket(direction="reverse"), Bucket(direction="forward"), Lsm()]


def inputs_for(
    logits: torch.Tensor, *, teacher: torch.Tensor = Q, top_k: int = 2, token: int = 0
) -> ObjectiveInputs:
    """One position: student logits [V], teacher probabilities, K candidates, a sampled token."""
    top = teacher.topk(top_k)
    tail = teacher.sum() - top.values.sum()
    return ObjectiveInputs(
        student_logprobs_N=logprobs_at(logits[None], torch.tensor([[token]]))[:, 0],
        student_top_logprobs_NK=logprobs_at(logits[None], top.indices[None]),
        teacher_logprobs_N=teacher[token].log()[None],
        teacher_top_logprobs_NK=top.values.log()[None],
        teacher_tail_logprobs_N=tail.clamp(min=0).log()[None],
        behavior_logprobs_N=B[token].log()[None],
    )


def value_and_gradient(
    objective: Objective, probabilities: torch.Tensor, **changes: object
) -> tuple[float, torch.Tensor]:
    logits = probabilities.log().requires_grad_()
    loss = token_losses(objective, inputs_for(logits, **changes)).sum()  # type: ignore[arg-type]
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


def kl(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left * (left / right).log()).sum().item()


def reverse_gradient(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Gradient of KL(p || q) in the logits of p, in closed form."""
    advantage = (p / q).log()
    return p * (advantage - (p * advantage).sum())


@pytest.mark.parametrize(
    ("objective", "value", "gradient"),
    [
        (DENSE[0], 0.098623, (-0.128707, 0.146749, -0.091417, 0.048916, 0.024458)),
        (DENSE[1], 0.092332, (-0.100000, 0.133333, -0.100000, 0.044444, 0.022222)),
        (DENSE[2], 0.008553, (0.057061, 0, -0.057061, 0, 0)),
    ],
)
def test_the_example_has_its_known_values_and_gradients(
    objective: Objective, value: float, gradient: tuple[float, ...]
) -> None:
    found, found_gradient = value_and_gradient(objective, P)
    assert found == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(
        found_gradient, torch.tensor(gradient, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("objective", [*DENSE, SampledPg()])
@pytest.mark.parametrize("token", range(5))
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(
    objective: Objective, token: int
) -> None:
    value, gradient = value_and_gradient(objective, Q, token=token)
    assert value == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_the_truncated_reverse_kl_fails_that_law_and_is_therefore_not_offered() -> None:
    logits = Q.log().requires_grad_()
    inputs = inputs_for(logits)
    student, teacher = inputs.student_top_logprobs_NK, inputs.teacher_top_logprobs_NK
    (student.exp() * (student - teacher)).sum().backward()
    expected = torch.tensor([0.125, -0.0375, 0.0625, -0.09, -0.06], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", [*DENSE, SampledPg()])
def test_gradients_over_the_vocabulary_sum_to_zero(objective: Objective) -> None:
    assert value_and_gradient(objective, P)[1].sum().abs() < 1e-12


@pytest.mark.parametrize("objective", DENSE)
def test_a_constant_added_to_all_logits_changes_nothing(objective: Objective) -> None:
    one = token_losses(objective, inputs_for(P.log()))
    other = token_losses(objective, inputs_for(P.log() + 3.7))
    torch.testing.assert_close(one, other)


def test_all_candidates_make_the_dense_objectives_exact() -> None:
    for objective, exact in zip(DENSE, (kl(P, Q), kl(Q, P), kl(P, Q)), strict=True):
        value, _ = value_and_gradient(objective, P, top_k=5)
        assert value == pytest.approx(exact, abs=5e-5)  # the student's tail is clamped at 1e-6
    gradient = value_and_gradient(Lsm(), P, top_k=5)[1]
    torch.testing.assert_close(gradient, reverse_gradient(P, Q))


@pytest.mark.parametrize("seed", range(5))
def test_a_bucket_never_exceeds_the_full_divergence_and_grows_with_k(seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.softmax(torch.randn(2, 12, dtype=torch.float64) * 2, dim=1)
    for objective, exact in ((DENSE[0], kl(student, teacher)), (DENSE[1], kl(teacher, student))):
        values = [
            value_and_gradient(objective, student, teacher=teacher, top_k=k)[0]
            for k in range(1, 12)
        ]
        assert all(low <= high + 1e-12 for low, high in pairwise(values))
        assert values[-1] <= exact + 1e-6


def test_outside_the_candidates_lsm_has_no_gradient_and_the_bucket_moves_as_one() -> None:
    assert value_and_gradient(Lsm(), P)[1][[1, 3, 4]].abs().max() < 1e-15
    outside = value_and_gradient(Bucket(direction="reverse"), P)[1][[1, 3, 4]]
    torch.testing.assert_close(outside / P[[1, 3, 4]], torch.full((3,), outside[0] / P[1]).double())


def test_sampled_pg_has_the_full_reverse_kl_gradient_in_expectation_on_stale_rows() -> None:
    expected = sum(B[y] * value_and_gradient(SampledPg(), P, token=y)[1] for y in range(5))
    torch.testing.assert_close(expected, reverse_gradient(P, Q), atol=1e-12, rtol=0)


def test_sampled_pg_promotes_a_token_that_the_teacher_prefers() -> None:
    assert Q[0] > P[0]
    assert value_and_gradient(SampledPg(), P, token=0)[1][0] < 0
    assert Q[1] < P[1]
    assert value_and_gradient(SampledPg(), P, token=1)[1][1] > 0


def test_sampled_pg_stays_finite_on_absurd_importance() -> None:
    inputs = inputs_for(P.log())
    absurd = ObjectiveInputs(
        **{
            **{name: getattr(inputs, name) for name in ObjectiveInputs.__slots__},
            "behavior_logprobs_N": torch.tensor([-1e4], dtype=torch.float64),
        }
    )
    assert math.isfinite(token_losses(SampledPg(), absurd).item())


@pytest.mark.parametrize("objective", DENSE)
def test_a_teacher_without_a_tail_gives_a_finite_loss(objective: Objective) -> None:
    teacher = torch.tensor([0.7, 0.0, 0.3, 0.0, 0.0], dtype=torch.float64)
    value, gradient = value_and_gradient(objective, P, teacher=teacher)
    assert math.isfinite(value)
    assert gradient.isfinite().all()


def test_the_tail_of_a_head_is_what_is_left_of_one() -> None:
    head = torch.tensor([[0.4, 0.15], [0.9, 0.05]], dtype=torch.float64).log()
    torch.testing.assert_close(log_tail(head).exp(), torch.tensor([0.45, 0.05]).double())
