"""Windows, learning rates, and the plan of a round."""

from pathlib import Path

import pytest

from opd_stream.config import Train
from opd_stream.windows import (
    FixedWindow,
    LinearWindow,
    RatioWindow,
    Window,
)
from pipeline.plan import plan_round
from tests.conftest import small_config


@pytest.mark.parametrize(("step", "tokens"), [(0, 1024), (1, 1033), (100, 1924), (542, 5902)])
def test_the_linear_window_follows_its_formula(step: int, tokens: int) -> None:
    window = LinearWindow(h0=1024, delta=9, every=1, max_window_tokens=15_360)
    assert window.tokens_at(step) == tokens


@pytest.mark.parametrize(
    "window",
    [
        FixedWindow(tokens=50),
        RatioWindow(ratio=0.01, max_window_tokens=20),
        LinearWindow(h0=3, delta=7, every=2, max_window_tokens=40),
    ],
)
def test_a_window_never_shrinks_leaves_its_bounds_or_ends_at_nothing(window: Window) -> None:
    tokens = [window.tokens_at(step) for step in range(60)]
    assert tokens == sorted(tokens)
    assert min(tokens) >= 1
    assert max(tokens) <= getattr(window, "max_window_tokens", 50)


def test_a_ratio_is_of_the_longest_rollout() -> None:
    assert RatioWindow(ratio=0.25, max_window_tokens=200).tokens_at(7) == 50


def test_a_round_is_generated_with_the_window_of_its_last_step() -> None:
    window = LinearWindow(h0=10, delta=1, every=1, max_window_tokens=100)
    assert window.tokens_of_round(20, 5) == window.tokens_at(24) == 34


def test_a_plan_counts_steps_over_all_planned_epochs(tmp_path: Path) -> None:
    overrides = ["rollouts.window={kind: linear, h0: 10, delta: 1, max_window_tokens: 99}"]
    plan = plan_round(small_config(tmp_path, *overrides), round_index=1, first_step=4)
    assert plan.planned_steps == 2 * 2  # 8 rollouts in steps of 4, twice
    assert plan.window_tokens == 10 + 4 + 3


@pytest.mark.parametrize(
    ("schedule", "progress", "rate"),
    [
        ("linear", 0.1, 0.5),
        ("linear", 0.2, 1.0),
        ("linear", 0.6, 0.5),
        ("linear", 1.0, 0.0),
        ("constant", 0.1, 0.5),
        ("constant", 0.9, 1.0),
    ],
)
def test_the_learning_rate_rises_and_then_holds_or_falls(
    schedule: str, progress: float, rate: float
) -> None:
    settings = {"learning_rate": 1.0, "warmup": 0.2, "schedule": schedule}
    train = Train.model_validate({"objective": {"kind": "lsm"}, **settings})
    assert train.learning_rate_at(progress, 99) == pytest.approx(rate)
