"""Laws of the extrapolation on toy weights."""

import pytest
import torch

from opd_stream.extrapolation import (
    Score,
    Search,
    is_better,
    is_due,
    moved_parameters,
    search,
)


def test_searches_follow_powers_of_two() -> None:
    assert [step for step in range(70) if is_due(step)] == [1, 2, 4, 8, 16, 32, 64]


def quadratic(weight: torch.Tensor, target: torch.Tensor) -> Score:
    return Score(kl=-((weight - target) ** 2).sum().item())


@pytest.mark.parametrize(("best", "kept"), [(1.0, 0), (2.9, 1), (5.2, 2), (40.0, 5)])
def test_only_descent_is_accepted_on_a_quadratic(best: float, kept: int) -> None:
    """From base 0 at 1 the candidates are 3, 5, 7, 9, 11; the nearest to the best one wins."""
    weight = torch.nn.Parameter(torch.ones(3))
    target = torch.full((3,), best)
    outcome = search(
        [weight], [torch.zeros(3)], lambda: quadratic(weight, target), step=4, settings=Search()
    )
    assert outcome.kept == kept
    assert weight.tolist() == pytest.approx([1 + 2 * kept] * 3)
    assert len(outcome.scores) == min(kept + 2, 6)


def test_the_factor_recursion_of_the_official_code_is_a_constant_step() -> None:
    """Its factor f becomes f / (1 + f) on the grown difference: 3, 5, 7, 9, 11 times the start."""
    point, factor = 1.0, 2.0
    for k in range(1, 6):
        point, factor = point + factor * point, factor / (1 + factor)
        assert point == pytest.approx(1 + 2 * k)


def test_a_rejected_search_leaves_every_bit() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, 50) * 1e-3)
    before = weight.detach().clone()
    outcome = search(
        [weight], [torch.randn(50, 50)], lambda: Score(reward=0.5), step=2, settings=Search()
    )
    assert outcome.kept == 0
    assert torch.equal(weight, before)


def test_acceptance_is_strict_or_may_stay_equal_and_two_signals_must_agree() -> None:
    same = Score(reward=0.5)
    assert not is_better(same, same, "strict")
    assert is_better(same, same, "equal")
    best = Score(reward=0.5, kl=-1.0)
    assert is_better(Score(reward=0.5, kl=-0.9), best, "strict")
    assert not is_better(Score(reward=0.6, kl=-1.1), best, "strict")
    assert not is_better(Score(reward=0.4, kl=-0.1), best, "equal")


def test_norms_embeddings_and_heads_never_move_and_of_lora_one_factor() -> None:
    names = {
        "model.embed_tokens.weight": (4, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.self_attn.q_norm.weight": (4,),
        "model.layers.0.mlp.down_proj.weight": (4, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "lm_head.weight": (4, 4),
    }
    plain = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    assert list(moved_parameters(iter(plain.items()))) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    for parameter in plain.values():
        parameter.requires_grad_(False)
    for factor in ("lora_A", "lora_B"):
        name = f"model.layers.0.self_attn.q_proj.{factor}.default.weight"
        plain[name] = torch.nn.Parameter(torch.zeros(2, 2))
    assert list(moved_parameters(iter(plain.items()))) == [
        "model.layers.0.self_attn.q_proj.lora_B.default.weight"
    ]
