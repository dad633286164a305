"""The laws of the objectives, in float64, by enumeration over a vocabulary of five."""

import itertools
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from opd_stream.logprobs import logprobs_at
from opd_stream.objectives import (
    Bucket,
    DrawnForward,
    Draws,
    EntropyAware,
    EntropyMix,
    Hybrid,
    Lsm,
    MonteCarlo,
    Objective,
    ObjectiveInputs,
    SampledPg,
    Skew,
    log_tail,
    outcomes,
    seen_reverse_kl,
    token_losses,
    tolerates_staleness,
)

P = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05], dtype=torch.float64)  # student
Q = torch.tensor([0.50, 0.05, 0.25, 0.12, 0.08], dtype=torch.float64)  # teacher
B = torch.tensor([0.30, 0.30, 0.20, 0.10, 0.10], dtype=torch.float64)  # behavior
DENSE = [
    Bucket(direction="reverse"),
    Bucket(direction="forward"),
    Lsm(),
    Bucket(direction="js", beta=0.5),
    Skew(direction="forward", alpha=0.1),
    Skew(direction="reverse", alpha=0.1),
    EntropyMix(),
]
UNCAPPED = Hybrid(importance_cap=1e30)  # no ratio is larger
SAMPLED = [SampledPg(), SampledPg(baseline="bucket"), UNCAPPED]


def inputs_for(
    logits: torch.Tensor,
    *,
    teacher: torch.Tensor = Q,
    behavior: torch.Tensor = B,
    top_k: int = 2,
    token: int = 0,
    draws: tuple[int, ...] = (),
) -> ObjectiveInputs:
    """One position: student logits [V], teacher probabilities, K candidates, a sampled token."""
    top = teacher.topk(top_k)
    tail = teacher.sum() - top.values.sum()
    student = logprobs_at(logits[None], torch.arange(len(logits))[None])[0]
    several = torch.tensor([token, *draws])
    drawn = Draws(
        student_logprobs_NM=student[several][None],
        behavior_logprobs_NM=behavior[several].log()[None],
        reverse_kl_NM=(student[several].detach() - teacher[several].log())[None],
    )
    return ObjectiveInputs(
        student_logprobs_N=student[token][None],
        student_top_logprobs_NK=student[top.indices][None],
        teacher_top_logprobs_NK=top.values.log()[None],
        teacher_tail_logprobs_N=tail.clamp(min=0).log()[None],
        behavior_logprobs_N=behavior[token].log()[None],
        reverse_kl_N=(student[token].detach() - teacher[token].log())[None],
        sampled_in_top_N=(top.indices == token).any()[None],
        draws=drawn,
    )


def value_and_gradient(
    objective: Objective, probabilities: torch.Tensor, **changes: object
) -> tuple[float, torch.Tensor]:
    logits = probabilities.log().requires_grad_()
    loss = token_losses((objective,), inputs_for(logits, **changes)).sum()  # type: ignore[arg-type]
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


def kl(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left * (left / right).log()).sum().item()


def mixed(forward: float, reverse: float, half: float = 1.0) -> float:
    """What `EntropyMix` makes of both directions where every id is a candidate."""
    entropy = -(Q * Q.log()).sum().item()
    return (entropy * forward + half * reverse) / (entropy + half)


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
        (DENSE[3], 0.023587, (-0.028122, 0.034273, -0.023288, 0.011424, 0.005712)),
        (DENSE[4], 0.075216, None),
        (DENSE[5], 0.078195, None),
        (DENSE[6], 0.095416, (-0.114074, 0.139910, -0.095792, 0.046637, 0.023318)),
    ],
)
def test_the_example_has_its_known_values_and_gradients(
    objective: Objective, value: float, gradient: tuple[float, ...] | None
) -> None:
    found, found_gradient = value_and_gradient(objective, P)
    assert found == pytest.approx(value, abs=1e-6)
    if gradient is None:
        return
    torch.testing.assert_close(
        found_gradient, torch.tensor(gradient, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("objective", [*DENSE, *SAMPLED])
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


@pytest.mark.parametrize("objective", [*DENSE, *SAMPLED])
def test_gradients_over_the_vocabulary_sum_to_zero(objective: Objective) -> None:
    assert value_and_gradient(objective, P)[1].sum().abs() < 1e-12


@pytest.mark.parametrize("objective", DENSE)
def test_a_constant_added_to_all_logits_changes_nothing(objective: Objective) -> None:
    one = token_losses((objective,), inputs_for(P.log()))
    other = token_losses((objective,), inputs_for(P.log() + 3.7))
    torch.testing.assert_close(one, other)


def test_all_candidates_make_the_dense_objectives_exact() -> None:
    full_skew = (kl(Q, 0.1 * Q + 0.9 * P), kl(P, 0.1 * P + 0.9 * Q))
    middle = (P + Q) / 2
    js = (kl(P, middle) + kl(Q, middle)) / 2
    assert (js, *full_skew) == pytest.approx((0.060832, 0.178001, 0.226071), abs=1e-6)
    values = (kl(P, Q), kl(Q, P), kl(P, Q), js, *full_skew, mixed(kl(Q, P), kl(P, Q)))
    for objective, exact in zip(DENSE, values, strict=True):
        value, _ = value_and_gradient(objective, P, top_k=5)
        assert value == pytest.approx(exact, abs=5e-5)  # the student's tail is clamped at 1e-6
    gradient = value_and_gradient(Lsm(), P, top_k=5)[1]
    torch.testing.assert_close(gradient, reverse_gradient(P, Q))


@pytest.mark.parametrize("seed", range(5))
def test_a_bucket_never_exceeds_the_full_divergence_and_grows_with_k(seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.softmax(torch.randn(2, 12, dtype=torch.float64) * 2, dim=1)
    middle = (student + teacher) / 2
    for objective, exact in (
        (DENSE[0], kl(student, teacher)),
        (DENSE[1], kl(teacher, student)),
        (DENSE[3], (kl(student, middle) + kl(teacher, middle)) / 2),
        (DENSE[4], kl(teacher, 0.1 * teacher + 0.9 * student)),
        (DENSE[5], kl(student, 0.1 * student + 0.9 * teacher)),
    ):
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


@pytest.mark.parametrize("objective", SAMPLED)
@pytest.mark.parametrize("seed", range(4))
def test_drawn_tokens_have_the_full_reverse_kl_gradient_in_expectation_on_stale_rows(
    objective: Objective, seed: int
) -> None:
    if seed == 0:
        student, teacher, behavior, top_k = P, Q, B, 2
    else:
        torch.manual_seed(seed)
        drawn = torch.softmax(torch.randn(3, 40, dtype=torch.float64) * 1.5, dim=1)
        (student, teacher, behavior), top_k = drawn, 5
    expected = sum(
        behavior[y]
        * value_and_gradient(
            objective, student, teacher=teacher, behavior=behavior, top_k=top_k, token=y
        )[1]
        for y in range(len(behavior))
    )
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(expected, reverse_gradient(student, teacher), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bounded", ["clamp", "tanh"])
@pytest.mark.parametrize("baseline", ["none", "bucket"])
def test_a_bounded_log_ratio_has_the_gradient_of_bounded_rewards_in_expectation(
    bounded: str, baseline: str
) -> None:
    """sum of p_v limited_v grad log p_v, in closed form, also on stale rows."""
    bound, ratio = 0.4, (P / Q).log()  # -0.22, 1.79, -0.51, -0.18, -0.47
    limited = ratio.clamp(-bound, bound) if bounded == "clamp" else bound * (ratio / bound).tanh()
    objective = SampledPg.model_validate({"bound": bound, "bounded": bounded, "baseline": baseline})
    found = sum(B[y] * value_and_gradient(objective, P, token=y)[1] for y in range(5))
    assert isinstance(found, torch.Tensor)
    expected = P * (limited - (P * limited).sum())
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_bound_that_nothing_reaches_changes_no_bit_and_no_recipe_has_one_that_is_not_set() -> (
    None
):
    for token in range(5):
        plain, bounded = (
            value_and_gradient(each, P, token=token) for each in (SampledPg(), SampledPg(bound=2))
        )
        assert plain[0] == bounded[0]
        assert torch.equal(plain[1], bounded[1])
    assert SampledPg().recipe() == {"kind": "sampled_pg", "weight": 1.0, "baseline": "none"}


def test_a_way_to_bound_needs_a_bound() -> None:
    with pytest.raises(ValueError, match="bounded is tanh without bound"):
        SampledPg(bounded="tanh")


def test_the_mix_is_a_direction_alone_where_the_teacher_is_sure_or_counts_as_unsure() -> None:
    sure = torch.tensor([1 - 4e-13, *[1e-13] * 4], dtype=torch.float64)
    mix, reverse = (value_and_gradient(o, P, teacher=sure) for o in (EntropyMix(), Bucket()))
    assert mix[0] == pytest.approx(reverse[0], rel=1e-9)
    ends = [(1e-12, Bucket(direction="forward")), (1e12, Bucket())]
    for half, direction in ends:
        mix, alone = (value_and_gradient(o, P) for o in (EntropyMix(half=half), direction))
        assert mix[0] == pytest.approx(alone[0], rel=1e-9)
        torch.testing.assert_close(mix[1], alone[1], atol=1e-9, rtol=0)


def test_the_hybrid_has_the_value_of_the_full_kl_in_expectation_and_its_known_samples() -> None:
    values = [value_and_gradient(UNCAPPED, P, token=y)[0] for y in range(5)]
    assert values == pytest.approx([0.098623, 1.302596, 0.098623, -0.671485, -0.430272], abs=1e-6)
    assert (B * torch.tensor(values, dtype=torch.float64)).sum().item() == pytest.approx(kl(P, Q))


def test_the_hybrid_is_the_bucket_where_the_sampled_token_is_a_candidate() -> None:
    for token in (0, 2):
        found, bucket = (value_and_gradient(o, P, token=token) for o in (UNCAPPED, DENSE[0]))
        assert found[0] == bucket[0]
        torch.testing.assert_close(found[1], bucket[1])


def test_the_hybrids_cap_keeps_the_gradient_of_the_token_it_caps() -> None:
    """Capping the live importance would delete it: the error is nine times as large."""
    behavior = torch.tensor([0.50, 0.05, 0.25, 0.15, 0.05], dtype=torch.float64)
    expected = sum(
        behavior[y]
        * value_and_gradient(Hybrid(importance_cap=5.0), P, behavior=behavior, token=y)[1]
        for y in range(5)
    )
    assert isinstance(expected, torch.Tensor)
    error = (expected - reverse_gradient(P, Q)).norm().item()
    assert 0.01 < error < 0.08


def total_variance(objective: Objective, draws: int = 1) -> float:
    """Sum over the logits of the variance of the gradient over independent draws from B."""
    gradients, weights = [], []
    for tokens in itertools.product(range(5), repeat=draws):
        gradients.append(value_and_gradient(objective, P, token=tokens[0], draws=tokens[1:])[1])
        weights.append(B[list(tokens)].prod())
    stacked, weight = torch.stack(gradients), torch.stack(weights)[:, None]
    mean = (weight * stacked).sum(0)
    return (weight * (stacked - mean) ** 2).sum().item()


def test_variances_of_the_example_are_the_known_ones() -> None:
    assert total_variance(SampledPg()) == pytest.approx(0.4503, abs=1e-4)
    assert total_variance(SampledPg(baseline="bucket")) == pytest.approx(0.4138, abs=1e-4)
    assert total_variance(UNCAPPED) == pytest.approx(0.286, abs=1e-3)


def test_several_draws_divide_the_variance_and_one_is_sampled_pg() -> None:
    one = total_variance(MonteCarlo())
    assert one == pytest.approx(total_variance(SampledPg()), rel=1e-12)
    assert total_variance(MonteCarlo(), draws=2) == pytest.approx(one / 2, rel=1e-9)
    assert total_variance(MonteCarlo(), draws=3) == pytest.approx(one / 3, rel=1e-9)
    expected = sum(
        B[y] * B[z] * value_and_gradient(MonteCarlo(), P, token=y, draws=(z,))[1]
        for y in range(5)
        for z in range(5)
    )
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(expected, reverse_gradient(P, Q), atol=1e-12, rtol=0)


def test_without_importance_stale_rows_are_biased() -> None:
    """What sampled_pg would be with the factor left out: the factor is not decoration."""
    gradients = []
    for y in range(5):
        logits = P.log().requires_grad_()
        inputs = inputs_for(logits, token=y)
        (inputs.student_logprobs_N * inputs.reverse_kl_N).sum().backward()
        gradients.append(B[y] * logits.grad)
    error = (torch.stack(gradients).sum(0) - reverse_gradient(P, Q)).abs().max()
    assert error > 0.01


def test_the_uncorrected_head_plus_sampled_tail_is_off_by_the_gradient_of_its_mass() -> None:
    """Differentiating the truncated head through its log-ratio carries a +1 (EMA-PG's form)."""
    expected = torch.zeros(5, dtype=torch.float64)
    for y in range(5):
        logits = P.log().requires_grad_()
        inputs = inputs_for(logits, token=y)
        student, teacher = inputs.student_top_logprobs_NK, inputs.teacher_top_logprobs_NK
        head = (student.exp() * (student - teacher)).sum()
        importance = (inputs.student_logprobs_N - inputs.behavior_logprobs_N).exp()
        tail = (importance * inputs.reverse_kl_N * ~inputs.sampled_in_top_N).sum()
        (head + tail).backward()
        assert logits.grad is not None
        expected += B[y] * logits.grad
    logits = P.log().requires_grad_()
    inputs_for(logits).student_top_logprobs_NK.exp().sum().backward()
    torch.testing.assert_close(expected - reverse_gradient(P, Q), logits.grad, atol=1e-12, rtol=0)


def test_skew_is_bounded_and_has_its_limits() -> None:
    disjoint = torch.tensor([1e-12, 1.0, 1e-12, 1e-12, 1e-12], dtype=torch.float64)
    for direction in ("forward", "reverse"):
        near = value_and_gradient(Skew(direction=direction, alpha=0.1), disjoint)[0]
        assert near <= math.log(10) + 1e-9
        plain = value_and_gradient(Bucket(direction=direction), P)
        skewed = value_and_gradient(Skew(direction=direction, alpha=0.0), P)
        assert skewed[0] == pytest.approx(plain[0], abs=1e-12)
        nothing = value_and_gradient(Skew(direction=direction, alpha=1 - 1e-12), P)[0]
        assert nothing == pytest.approx(0, abs=1e-9)


def test_js_meets_forward_and_reverse_at_its_ends_and_stays_below_its_bound() -> None:
    for beta, direction in ((0.0, "forward"), (1.0, "reverse")):
        one = value_and_gradient(Bucket(direction="js", beta=beta), P)
        other = value_and_gradient(Bucket(direction=direction), P)
        assert one[0] == other[0]
    disjoint = torch.tensor([1e-9, 1.0, 1e-9, 1e-9, 1e-9], dtype=torch.float64)
    for beta in (0.1, 0.5, 0.9):
        bound = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
        assert value_and_gradient(Bucket(direction="js", beta=beta), disjoint)[0] <= bound + 1e-9


def test_the_entropy_term_acts_only_where_the_teacher_is_unsure() -> None:
    renormalised = torch.zeros(5, dtype=torch.float64)
    renormalised[[0, 2]] = Q[[0, 2]] / 0.75
    _, gradient = value_and_gradient(EntropyAware(threshold=0.5), P)
    torch.testing.assert_close(gradient, P - renormalised)
    value, gradient = value_and_gradient(EntropyAware(threshold=1.5), P)  # H of 3 outcomes: 1.04
    assert value == 0
    assert gradient.abs().max() == 0


def test_drawn_teacher_ids_have_the_full_forward_kl_gradient_in_expectation() -> None:
    """Two draws with replacement, enumerated; count / D is what the codec stores."""
    expected = torch.zeros(5, dtype=torch.float64)
    for first, second in itertools.product(range(5), repeat=2):
        logits = P.log().requires_grad_()
        student = logprobs_at(logits[None], torch.tensor([[first, second]]))
        inputs = replace(
            inputs_for(logits),
            student_top_logprobs_NK=student,
            teacher_top_logprobs_NK=torch.full((1, 2), 0.5, dtype=torch.float64).log(),
        )
        token_losses((DrawnForward(),), inputs).sum().backward()
        assert logits.grad is not None
        expected += Q[first] * Q[second] * logits.grad
    torch.testing.assert_close(expected, P - Q, atol=1e-12, rtol=0)


def test_a_weighted_sum_of_objectives_is_the_sum_of_its_parts() -> None:
    parts = (Bucket(direction="reverse", weight=0.3), EntropyAware(threshold=0.5, weight=2.0))
    both = token_losses(parts, inputs_for(P.log())).item()
    alone = [value_and_gradient(part.model_copy(update={"weight": 1.0}), P)[0] for part in parts]
    assert both == pytest.approx(0.3 * alone[0] + 2.0 * alone[1])


@pytest.mark.parametrize("objective", DENSE)
def test_the_order_of_the_candidates_does_not_matter(objective: Objective) -> None:
    inputs = inputs_for(P.log(), top_k=4)
    order = torch.tensor([2, 0, 3, 1])
    turned = replace(
        inputs,
        student_top_logprobs_NK=inputs.student_top_logprobs_NK[:, order],
        teacher_top_logprobs_NK=inputs.teacher_top_logprobs_NK[:, order],
    )
    torch.testing.assert_close(
        token_losses((objective,), inputs), token_losses((objective,), turned)
    )


def test_only_objectives_without_a_reverse_kl_tolerate_staleness() -> None:
    assert tolerates_staleness((Bucket(direction="forward"), EntropyAware()))
    assert tolerates_staleness((DrawnForward(),))
    for reverse in (DENSE[0], DENSE[3], DENSE[5], Lsm(), Hybrid(), SampledPg(), MonteCarlo()):
        assert not tolerates_staleness((Bucket(direction="forward"), reverse))


def test_sampled_pg_promotes_a_token_that_the_teacher_prefers() -> None:
    assert Q[0] > P[0]
    assert value_and_gradient(SampledPg(), P, token=0)[1][0] < 0
    assert Q[1] < P[1]
    assert value_and_gradient(SampledPg(), P, token=1)[1][1] > 0


@pytest.mark.parametrize("objective", [*SAMPLED, MonteCarlo()])
def test_drawn_objectives_stay_finite_on_absurd_importance(objective: Objective) -> None:
    behavior = torch.full((5,), 1e-300, dtype=torch.float64)
    inputs = inputs_for(P.log(), behavior=behavior, token=1)
    assert math.isfinite(token_losses((objective,), inputs).item())


@pytest.mark.parametrize("objective", DENSE)
def test_a_teacher_without_a_tail_gives_a_finite_loss(objective: Objective) -> None:
    teacher = torch.tensor([0.7, 0.0, 0.3, 0.0, 0.0], dtype=torch.float64)
    value, gradient = value_and_gradient(objective, P, teacher=teacher)
    assert math.isfinite(value)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("objective", [*DENSE, *SAMPLED])
@pytest.mark.parametrize("empty", [-math.inf, -30.0])
def test_equal_sides_whose_candidates_hold_everything_have_no_loss(
    objective: Objective, empty: float
) -> None:
    """K = V in float32: the student's tail is rounding, and the teacher's is empty or nearly so."""
    logits = torch.randn(64, 606, generator=torch.Generator().manual_seed(0)).mul(4)
    logprobs = logits.log_softmax(1)
    inputs = ObjectiveInputs(
        student_logprobs_N=logprobs[:, 0],
        student_top_logprobs_NK=logprobs.requires_grad_(),
        teacher_top_logprobs_NK=logprobs.detach(),
        teacher_tail_logprobs_N=torch.full((64,), empty),
        behavior_logprobs_N=logprobs[:, 0].detach(),
        reverse_kl_N=torch.zeros(64),
        sampled_in_top_N=torch.ones(64, dtype=torch.bool),
    )
    assert token_losses((objective,), inputs).abs().max() < 1e-7
    assert seen_reverse_kl(inputs)[0].abs().max() < 1e-7


def test_a_teacher_with_less_tail_than_the_student_may_have_is_not_read_as_more() -> None:
    """Its stored tail counts in full where the student's is above the floor."""
    student, teacher = torch.tensor([[0.9]]).log(), torch.tensor([[1.0]]).log()
    inputs = replace(
        inputs_for(P.log()),
        student_top_logprobs_NK=student,
        teacher_top_logprobs_NK=teacher,
        teacher_tail_logprobs_N=torch.tensor([-30.0]),
    )
    assert outcomes(inputs)[1][0, -1] == -30


def test_the_tail_of_a_head_is_what_is_left_of_one() -> None:
    head = torch.tensor([[0.4, 0.15], [0.9, 0.05]], dtype=torch.float64).log()
    torch.testing.assert_close(log_tail(head).exp(), torch.tensor([0.45, 0.05]).double())
