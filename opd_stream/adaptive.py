"""The adaptive window's decision: pure functions of gradient sketches.

Windows are nested, so the gradient of every prefix is a sum of segments: one backward pass a
segment gives them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SKETCH_SIZE = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowDecision:
    """The window of the next round, with the numbers that chose it."""

    window_tokens: int
    cosines: tuple[float, ...]  # of each candidate's gradient with that of the full rollouts
    fell_back: bool  # no candidate was admissible
    reason: str


def choose_window(
    segments: Sequence[torch.Tensor],
    candidates: Sequence[int],
    *,
    threshold: float = 2**-0.5,
    current: int | None = None,
    earlier: Sequence[float] = (),
    smoothing: float = 0.0,
) -> WindowDecision:
    """The shortest candidate whose cumulative gradient has the cosine (ADWIN).

    Args:
        segments: gradients (or sketches) of the tokens in (0, c_1], (c_1, c_2], ..., and beyond the
            last candidate: one more than candidates.
        candidates: windows, ascending.
        threshold: sqrt(2) / 2 is a signal-to-noise ratio of 1.
        current: with hysteresis, the window now; the next is at most one candidate away.
        earlier: cosines of the audit before, for smoothing.
        smoothing: their share.
    """
    full = torch.stack(list(segments)).sum(0)
    run = torch.zeros_like(full)
    cosines: list[float] = []
    for segment in segments[: len(candidates)]:
        run = run + segment
        cosines.append(torch.cosine_similarity(run, full, dim=0, eps=1e-30).item())
    if earlier and smoothing:
        pairs = zip(cosines, earlier, strict=True)
        cosines = [(1 - smoothing) * now + smoothing * before for now, before in pairs]
    admissible = [place for place, cosine in enumerate(cosines) if cosine >= threshold]
    place = admissible[0] if admissible else len(candidates) - 1
    if current is not None:
        here = max((p for p, c in enumerate(candidates) if c <= current), default=0)
        place = min(max(place, here - 1), here + 1)
    measured = ", ".join(f"{c}: {v:.3f}" for c, v in zip(candidates, cosines, strict=True))
    why = f"window {candidates[place]}" if admissible else f"fell back to {candidates[place]}"
    return WindowDecision(
        window_tokens=candidates[place],
        cosines=tuple(cosines),
        fell_back=not admissible,
        reason=f"{why}: cosines {measured} (threshold {threshold:.3f})",
    )


def sketch(gradients: Sequence[torch.Tensor], *, seed: int = 0) -> torch.Tensor:
    """Signed sums of the gradients' entries in 2^16 cells: keeps inner products in expectation."""
    total = sum(gradient.numel() for gradient in gradients)
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    if total <= SKETCH_SIZE:
        return flat
    generator = torch.Generator().manual_seed(seed)
    cell = torch.randint(SKETCH_SIZE, (total,), generator=generator).to(flat.device)
    sign = torch.randint(2, (total,), generator=generator).to(flat.device) * 2 - 1
    return flat.new_zeros(SKETCH_SIZE).index_add(0, cell, flat * sign)
