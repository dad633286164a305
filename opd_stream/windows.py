"""Rollout windows: how many new tokens a rollout may have, as a pure function of the step.

A round's rollouts are generated with the window of its last planned step; training masks each step
to its own window, so a stored row is used exactly as far as the schedule says. The adaptive window
is decided by audits instead: windows are nested, so the gradient of every prefix is a sum of
segments, and one backward pass a segment gives them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from opd_stream.errors import shortened
from opd_stream.section import Kinds, Part, Record

if TYPE_CHECKING:
    from torch import Tensor

SKETCH_SIZE = 2**16
LAYER_GAP = 0.05  # of cosines, between those of some layers and of all parameters


class Window(Part):
    """New tokens of a rollout. A config names yours by import path: docs/interfaces.md."""

    is_decided: ClassVar[bool] = False  # from round to round, by what training measures

    @model_validator(mode="after")
    def _has_tokens(self) -> Self:
        """Refuse a class of the user's own that gives no window."""
        if ":" not in self.kind:
            return self
        try:
            tokens = cast(object, self.tokens_at(0))
        except Exception as error:  # whatever a class of the user's raises
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            raise ValueError(
                f"rollouts.window {self.kind} raises at tokens_at(0) ({reason}); expected new "
                "tokens, at least 1; mend the class"
            ) from error
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(
                f"rollouts.window {self.kind} gives {shortened(tokens)} at tokens_at(0); expected "
                "new tokens, at least 1; mend the class"
            )
        return self

    def tokens_at(self, step: int) -> int:
        """The window of an optimizer step, at least 1; it never falls from one step to the next."""
        raise NotImplementedError

    def tokens_of_round(self, first_step: int, steps: int) -> int:
        """The window to generate with for `steps` steps from `first_step`: that of the last one."""
        return self.tokens_at(first_step + max(1, steps) - 1)


class FixedWindow(Window):
    """The same window in every round (ESR, 2605.27028)."""

    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(ge=1, description="new tokens per rollout")

    def tokens_at(self, step: int) -> int:
        """`tokens`."""
        return self.tokens


class RatioWindow(Window):
    """A share of the longest rollout (TOPD, 2605.31490)."""

    kind: Literal["ratio"] = "ratio"
    ratio: float = Field(gt=0, le=1, description="share of max_window_tokens")
    max_window_tokens: int = Field(ge=1, description="new tokens of a full rollout")

    def tokens_at(self, step: int) -> int:
        """The share, rounded."""
        return max(1, round(self.ratio * self.max_window_tokens))


class LinearWindow(Window):
    """A window that grows with optimizer steps (POPD, 2605.31490)."""

    kind: Literal["linear"] = "linear"
    h0: int = Field(ge=1, description="new tokens at step 0")
    delta: int = Field(ge=0, description="new tokens added every `every` steps")
    every: int = Field(default=1, ge=1, description="optimizer steps between two additions")
    max_window_tokens: int = Field(ge=1, description="new tokens of a full rollout")

    def tokens_at(self, step: int) -> int:
        """min(max_window_tokens, h0 + delta * floor(step / every))."""
        return min(self.max_window_tokens, self.h0 + self.delta * (step // self.every))


class EntropyGatedWindow(Window):
    """Grows after each round in whose rollouts the teacher was sure.

    Source: our reading of the entropy-gated length curriculum of 2605.16826.
    """

    kind: Literal["entropy_gated"] = "entropy_gated"
    h0: int = Field(ge=1, description="new tokens in the first round")
    delta: int = Field(ge=1, description="new tokens added")
    threshold: float = Field(
        default=0.5,
        gt=0,
        description="mean entropy of the teacher, over candidates and tail, of the tokens that a "
        "round trains, up to which the next one's window grows, nats",
    )
    max_window_tokens: int = Field(ge=1, description="new tokens of a full rollout")

    is_decided: ClassVar[bool] = True

    def tokens_at(self, step: int) -> int:
        """The window of the first round; entropies decide the later ones."""
        return min(self.max_window_tokens, self.h0)

    def after(self, tokens: int, entropy: float) -> int:
        """The window of the round after one with so many tokens and so much entropy."""
        grown = tokens + self.delta if entropy <= self.threshold else tokens
        return min(self.max_window_tokens, grown)


class AdaptiveWindow(Window):
    """Decided by audits on full-length probes, every few steps of training (ADWIN, 2605.28396)."""

    is_decided: ClassVar[bool] = True

    kind: Literal["adaptive"] = "adaptive"
    candidates: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(64, 128, 256, 512, 1024, 2048), min_length=1, description="windows, ascending"
    )
    max_window_tokens: int = Field(ge=2, description="new tokens of a full rollout, and of a probe")
    start: int | None = Field(
        default=None, ge=1, description="window of the first round; null: the last candidate"
    )
    audit_steps: int | None = Field(
        default=5,
        ge=1,
        description="optimizer steps from one audit to the next, within a round and at its end; "
        "null: one before a round, for the next",
    )
    threshold: float = Field(
        default=2**-0.5, gt=0, le=1, description="cosine from which a prefix stands for the whole"
    )
    probe_rows: int = Field(default=64, ge=1, description="unfinished rollouts continued, at most")
    probe_share: float = Field(
        default=0.1, gt=0, le=1, description="of a round's rollouts, at most (never below 2 rows)"
    )
    every_rounds: int = Field(
        default=1, ge=1, description="rounds from one audit to the next, where audit_steps is null"
    )
    fallback: Literal["full", "last"] = Field(
        default="full", description="where no candidate is admissible: full rollouts, or the last"
    )
    objective: Literal["sampled", "trained"] = Field(
        default="trained",
        description="whose gradients are compared: that of the drawn tokens, or train.objective "
        "(every token weighs the same, whatever train.select, gate, freshness and reference say)",
    )
    metric: Literal["identity", "adam"] = Field(
        default="identity", description="of the cosine; adam: divided by root second moments"
    )
    layers: int | None = Field(
        default=None,
        ge=1,
        description="last layers whose gradients are compared; null: so many that the first "
        f"audit's cosines are within {LAYER_GAP} of those of all parameters",
    )
    hysteresis: bool = Field(default=False, description="move one candidate an audit at most")
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of the cosines of the audit before"
    )

    def tokens_at(self, step: int) -> int:
        """The window of the first round's rollouts; audits decide the later ones."""
        return self.start or self.candidates[-1]

    @property
    def fallback_tokens(self) -> int:
        """The window where no candidate is admissible."""
        return self.max_window_tokens if self.fallback == "full" else self.candidates[-1]


AnyWindow = Annotated[
    Window,
    Kinds(
        FixedWindow,
        RatioWindow,
        LinearWindow,
        EntropyGatedWindow,
        AdaptiveWindow,
        group="opd_stream.windows",
    ),
]


class WindowDecision(Record):
    """The window until the next audit, with the numbers that chose it."""

    window_tokens: int
    cosines: tuple[float, ...]  # of each candidate's gradient with that of the full rollouts
    fell_back: bool  # no candidate was admissible
    reason: str


def choose_window(
    segments: Sequence[Tensor],
    candidates: Sequence[int],
    *,
    threshold: float = 2**-0.5,
    fallback: int | None = None,
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
        fallback: the window where none is admissible; None: the last candidate.
        current: with hysteresis, the window now; the next is at most one rung away.
        earlier: cosines of the audit before, for smoothing.
        smoothing: their share.
    """
    cosines = prefix_cosines(segments)
    if earlier and smoothing:
        pairs = zip(cosines, earlier, strict=True)
        cosines = [(1 - smoothing) * now + smoothing * before for now, before in pairs]
    admissible = [place for place, cosine in enumerate(cosines) if cosine >= threshold]
    rungs = sorted({*candidates, fallback or candidates[-1]})
    place = admissible[0] if admissible else len(rungs) - 1
    if current is not None:
        here = max((p for p, c in enumerate(rungs) if c <= current), default=0)
        place = min(max(place, here - 1), here + 1)
    measured = ", ".join(f"{c}: {v:.3f}" for c, v in zip(candidates, cosines, strict=True))
    why = f"window {rungs[place]}" if admissible else f"fell back to {rungs[place]}"
    return WindowDecision(
        window_tokens=rungs[place],
        cosines=tuple(cosines),
        fell_back=not admissible,
        reason=f"{why}: cosines {measured} (threshold {threshold:.3f})",
    )


def prefix_cosines(segments: Sequence[Tensor]) -> list[float]:
    """Cosine of the sum of the first 1, 2, ... segments with that of all, without the last."""
    import torch

    sums = torch.stack(list(segments)).cumsum(0)
    cosines = torch.cosine_similarity(sums[:-1], sums[-1:], dim=1, eps=1e-30)
    return [cosine.item() for cosine in cosines]


def fewest_groups(
    parts: Sequence[Sequence[Tensor]], *, within: float = LAYER_GAP
) -> tuple[int, float]:
    """How many of the first groups of parameters stand for all, and the largest gap of cosines.

    Args:
        parts: of each segment the gradients (or sketches) of each group.
        within: of every candidate's cosine over all groups.
    """
    import torch

    whole = prefix_cosines([torch.cat(list(groups)) for groups in parts])
    for count in range(1, len(parts[0])):
        some = prefix_cosines([torch.cat(list(groups[:count])) for groups in parts])
        gap = max(abs(one - other) for one, other in zip(some, whole, strict=True))
        if gap <= within:
            return count, gap
    return len(parts[0]), 0.0


def sketch(gradients: Sequence[Tensor], *, seed: int = 0) -> Tensor:
    """Signed sums of the gradients' entries in 2^16 cells: keeps inner products in expectation."""
    import torch

    total = sum(gradient.numel() for gradient in gradients)
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    if total <= SKETCH_SIZE:
        return flat
    generator = torch.Generator().manual_seed(seed)
    cell = torch.randint(SKETCH_SIZE, (total,), generator=generator).to(flat.device)
    sign = torch.randint(2, (total,), generator=generator).to(flat.device) * 2 - 1
    return flat.new_zeros(SKETCH_SIZE).index_add(0, cell, flat * sign)
