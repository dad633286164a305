"""Laws of the drift gate and of freshness, without models."""

import math

import numpy as np
import pytest
import torch

from opd_stream.batches import collate
from opd_stream.drift import named
from opd_stream.fused import OutputHead
from opd_stream.loss import batch_loss
from opd_stream.objectives import Bucket
from opd_stream.weighting import (
    DriftGate,
    Freshness,
    Weighting,
    drift_gate,
    fixed_blocks,
    freshness,
    newline_spans,
)
from tests.test_guards import HIDDEN, ROWS, VOCABULARY

TWO_BLOCKS = torch.tensor([0] * 4 + [1] * 4)


def normalised(gate: torch.Tensor) -> torch.Tensor:
    return gate / gate.mean()


@pytest.mark.parametrize("statistic", ["signed", "abs", "rms"])
def test_without_drift_the_gate_is_an_exact_no_op(statistic: str) -> None:
    gate = drift_gate(torch.zeros(8), TWO_BLOCKS, tau=1.0, statistic=statistic)  # type: ignore[arg-type]
    assert torch.equal(gate, torch.ones(8))


def test_two_blocks_have_the_published_gates() -> None:
    d = torch.tensor([0.0] * 4 + [0.5] * 4, dtype=torch.float64)
    gate = normalised(drift_gate(d, TWO_BLOCKS, tau=1.0))
    assert gate.tolist() == pytest.approx([1.2449] * 4 + [0.7551] * 4, abs=1e-4)
    assert gate.mean().item() == pytest.approx(1.0)


def test_opposite_shifts_cancel_in_signed_only() -> None:
    d = torch.tensor([0.5, -0.5] * 4)
    assert torch.equal(drift_gate(d, TWO_BLOCKS, tau=1.0), torch.ones(8))
    for statistic in ("abs", "rms"):
        gate = drift_gate(d, TWO_BLOCKS, tau=1.0, statistic=statistic)  # type: ignore[arg-type]
        torch.testing.assert_close(gate, torch.full((8,), math.exp(-0.5)))


def test_freshness_has_its_known_values_and_falls_in_each_argument() -> None:
    cases = [(0, 0.0, 1.0), (4, 0.0, 0.2), (0, 0.02, 0.868), (2, 0.05, 0.267)]
    for staleness, drift, expected in cases:
        found = freshness(torch.tensor([staleness]), torch.tensor([drift]), alpha=1.0).item()
        assert found == pytest.approx(expected, abs=1e-3)
    drifts = torch.linspace(0, 1, 20)
    assert (freshness(torch.zeros(20), drifts, alpha=1.0).diff() < 0).all()
    assert (freshness(torch.arange(20), torch.zeros(20), alpha=1.0).diff() < 0).all()


def test_spans_are_lines_joined_and_cut_to_their_bounds() -> None:
    newline = np.zeros(400, np.bool_)
    newline[[4, 9, 30, 31, 330]] = True
    spans = newline_spans(newline)
    lengths = np.bincount(spans)
    assert (np.diff(spans) >= 0).all()
    assert (lengths[:-1] >= 16).all()
    assert (lengths <= 128).all()
    assert spans[30] != spans[32]  # a newline ends a span that is long enough
    assert np.array_equal(newline_spans(np.zeros(130, np.bool_)), fixed_blocks(130, 64))


def weighted(
    rows: list[list[int]], weighting: Weighting | None, *, blocks: int = 2
) -> tuple[torch.Tensor, dict[str, float]]:
    """Gradient of the head over micro-batches, normalised as the training step does."""
    torch.manual_seed(1)
    table = torch.randn(VOCABULARY, HIDDEN)
    weight = torch.randn(VOCABULARY, HIDDEN).requires_grad_()
    tokens = sum(len(ROWS[row].completion_ids) for part in rows for row in part)
    total: torch.Tensor | None = None
    for part in rows:
        chosen = [ROWS[row] for row in part]
        batch = collate(chosen, window_tokens=9, tokens_of_step=tokens, blocks=blocks)
        found = batch_loss(
            table[batch.input_ids_BL],
            OutputHead(weight_VH=weight),
            batch,
            (Bucket(),),
            weighting=weighting,
        )
        found.loss.backward()
        total = found.sums if total is None else total + found.sums
    assert total is not None
    assert weight.grad is not None
    sums = named(total)
    return weight.grad / (sums["drift_weight"] / sums["tokens"]), sums


BOTH = Weighting(gate=DriftGate(blocks=2, tau=1.0, statistic="abs"), freshness=Freshness())


def test_weights_are_normalised_over_all_microbatches_at_once() -> None:
    whole, _ = weighted([[0, 1, 2, 3]], BOTH)
    parts, sums = weighted([[0], [1, 2], [3]], BOTH)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    assert 0 < sums["drift_weight"] < sums["tokens"]


def test_a_weight_that_all_tokens_share_changes_nothing() -> None:
    """One block as long as everything has one gate, and normalising takes it out again."""
    plain, _ = weighted([[1]], None)
    gated, sums = weighted([[1]], Weighting(gate=DriftGate(tau=2.0, statistic="abs")), blocks=100)
    assert sums["drift_weight"] < 0.9 * sums["tokens"]
    torch.testing.assert_close(plain, gated, rtol=1e-4, atol=1e-6)
