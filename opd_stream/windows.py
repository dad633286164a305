"""Rollout windows: how many new tokens a rollout may have, as a pure function of the step.

A round's rollouts are generated with the window of its last planned step; training masks each step
to its own window, so a stored row is used exactly as far as the schedule says.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedWindow:
    """The same window always (ESR, 2605.27028)."""

    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioWindow:
    """A share of the longest rollout (TOPD, 2605.31490)."""

    ratio: float
    max_window_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWindow:
    """min(max_window_tokens, h0 + delta * floor(step / every)) (POPD, 2605.31490)."""

    h0: int
    delta: int
    every: int
    max_window_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveWindow:
    """The shortest prefix whose gradient still points where that of full rollouts points (ADWIN).

    The window of a round is decided by the audit of the round before: `opd_stream/adaptive.py`.
    """

    candidates: tuple[int, ...]  # ascending
    max_window_tokens: int  # of the probes
    start: int  # window of the first round


Window = FixedWindow | RatioWindow | LinearWindow | AdaptiveWindow


def window_tokens(window: Window, step: int) -> int:
    """The window of an optimizer step, at least 1."""
    match window:
        case FixedWindow(tokens=tokens):
            return max(1, tokens)
        case RatioWindow(ratio=ratio, max_window_tokens=most):
            return max(1, min(most, round(ratio * most)))
        case LinearWindow(h0=h0, delta=delta, every=every, max_window_tokens=most):
            return max(1, min(most, h0 + delta * (step // every)))
        case AdaptiveWindow(start=start):
            return start


def round_window(window: Window, first_step: int, steps: int) -> int:
    """The window to generate with for `steps` steps from `first_step`: that of the last one."""
    return window_tokens(window, first_step + max(1, steps) - 1)


def build_window(*, kind: str, **settings: Any) -> Window:
    """The window of a config section."""
    if kind == "adaptive":
        return AdaptiveWindow(
            candidates=tuple(settings["candidates"]),
            max_window_tokens=settings["max_window_tokens"],
            start=settings["start"] or settings["candidates"][-1],
        )
    return {"fixed": FixedWindow, "ratio": RatioWindow, "linear": LinearWindow}[kind](**settings)
