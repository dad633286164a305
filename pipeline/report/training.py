"""Figures of one run over its optimizer steps: drift, effective samples, gates, regenerations."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes

from pipeline.report.parts import Entry, Exhibit, Table, left_out, shown
from pipeline.report.read import Run, Step
from pipeline.report.style import FAINT, SERIES, Look, look
from pipeline.report.svg import count_axis, inline, panels

MOST_POINTS = 800
MOST_LINES = 60  # of rounds
TITLE = "Drift, effective samples, gates and regenerations"
BOUND = Look(color=FAINT, mark="", glyph="", dashes=(5, 2))
REGENERATION = Look(color=FAINT, mark="", glyph="", dashes=())
KEPT = Look(color=FAINT, mark="", glyph="", dashes=(1.5, 2.5))
JUMP = Look(color=SERIES[1], mark="D", glyph="◆", dashes=())
GATED = Look(color=SERIES[3], mark="s", glyph="■", dashes=(), alpha=0.35)


def drift_exhibit(run: Run, name: str) -> Exhibit:
    """Drift and its consequences, a step each."""
    tables = _tables(run)
    everything = [step for step in run.steps if step.policy_drift is not None]
    steps, together = thinned(everything)
    if not steps:
        return left_out(name, TITLE, "No optimizer step has recorded its drift.", tables)
    is_weighed = any((step.mean_drift_weight or 1.0) < 1.0 for step in steps)
    figure, axes = panels(3 if is_weighed else 2, height=1.5)
    legend: list[Entry] = []
    _measure(
        axes[0], steps, lambda step: step.policy_drift, look(0), "policy_drift\n(nats a token)"
    )
    _measure(
        axes[1], steps, lambda s: s.effective_sample_fraction, look(2), "effective\nsample fraction"
    )
    axes[1].set_ylim(-0.02, 1.04)
    if is_weighed:
        _measure(axes[2], steps, lambda s: s.mean_drift_weight, look(3), "mean weight\nby drift")
        axes[2].set_ylim(-0.02, 1.04)
    far = _bounds(run, axes, steps, legend)
    has_lines = _events(run, axes, steps, legend)
    axes[-1].set_xlabel("optimizer step")
    count_axis(axes[-1])
    caption = (
        "policy_drift estimates KL(behavior ‖ student) on the tokens of a step; what decides is "
        "its mean over an epoch, in the table, or over a quarter of one. The effective sample "
        "fraction is 1 on fresh rollouts."
    )
    caption += " At a vertical line a round begins." if has_lines else ""
    caption += f" The bound on policy_drift is {far:g}, above what is drawn." if far else ""
    caption += f" A point is the mean of up to {together} steps." if together > 1 else ""
    caption += "" if is_weighed else " No token was weighed by drift."
    return Exhibit(
        name=name,
        title=TITLE,
        caption=caption,
        svg=inline(figure, name, title=f"{TITLE}: {run.name}", description=caption),
        legend=legend,
        tables=tables,
    )


def thinned(steps: Sequence[Step]) -> tuple[list[Step], int]:
    """At most about a thousand points, each the mean of steps of one epoch; and of how many."""
    together = -(-len(steps) // MOST_POINTS)
    groups: list[list[Step]] = []
    for step in steps:
        last = groups[-1] if groups else []
        is_same = bool(last) and (last[0].round, last[0].epoch) == (step.round, step.epoch)
        if is_same and len(last) < together:
            last.append(step)
        else:
            groups.append([step])
    return [_mean(group) for group in groups], together


def _mean(group: Sequence[Step]) -> Step:
    measured = ("policy_drift", "effective_sample_fraction", "mean_drift_weight")
    values = {
        name: [v for step in group if (v := getattr(step, name)) is not None] for name in measured
    }
    means = {name: sum(found) / len(found) if found else None for name, found in values.items()}
    return group[0].model_copy(update=means)


def _measure(
    axis: Axes, steps: Sequence[Step], of: Callable[[Step], float | None], drawn: Look, label: str
) -> None:
    values = [of(step) for step in steps]
    finite = [math.nan if v is None or not math.isfinite(v) else v for v in values]
    places = [step.step for step in steps]
    axis.plot(
        places,
        finite,
        color=drawn.color,
        marker="o",
        markersize=2 if len(steps) < 200 else 0,
        linewidth=1.1,
    )
    axis.set_ylabel(label)


def _bounds(run: Run, axes: Sequence[Axes], steps: Sequence[Step], legend: list[Entry]) -> float:
    """Draw the limits; returns the one of drift where it is too far above to be drawn."""
    drift = _number(run.setting("staleness.policy_drift"))
    samples = _number(run.setting("staleness.effective_sample_fraction"))
    highest = max(step.policy_drift or 0.0 for step in steps)
    is_near = drift is not None and drift <= 4 * highest
    for axis, bound in ((axes[0], drift if is_near else None), (axes[1], samples)):
        if bound is not None:
            axis.axhline(bound, color=FAINT, linewidth=1, linestyle=BOUND.line)
    if is_near or samples is not None:
        legend.append(Entry(label="bound", look=BOUND))
    return drift if drift is not None and not is_near else 0.0


def _events(run: Run, axes: Sequence[Axes], steps: Sequence[Step], legend: list[Entry]) -> bool:
    """Draw rounds, gates and extrapolations; returns whether rounds are few enough for lines."""
    begun = _round_starts(run, steps)
    has_lines = 0 < sum(len(starts) for _, _, starts in begun) <= MOST_LINES
    for label, drawn, starts in begun if has_lines else []:
        for axis in axes:
            for start in starts:
                axis.axvline(start - 0.5, color=FAINT, linewidth=0.8, linestyle=drawn.line)
        if starts:
            legend.append(Entry(label=label, look=drawn))
    spans = _gated_spans(run, steps)
    for first, last in spans:
        for axis in axes:
            axis.axvspan(first - 0.5, last + 0.5, color=GATED.color, alpha=0.16, linewidth=0)
    if spans:
        legend.append(Entry(label="epoch with gates", look=GATED, is_mark=True))
    jumps = [jump.step - 1 for here in run.rounds for jump in here.extrapolations if jump.kept]
    drift = {step.step: step.policy_drift for step in run.steps}
    known = [step for step in jumps if drift.get(step) is not None]
    if known:
        heights: Any = [drift[step] for step in known]
        axes[0].plot(known, heights, JUMP.mark, color=JUMP.color, markersize=5, zorder=3)
        legend.append(Entry(label="step before a kept extrapolation", look=JUMP, is_mark=True))
    return has_lines


def _round_starts(run: Run, steps: Sequence[Step]) -> list[tuple[str, Look, list[int]]]:
    """First steps of the rounds after the first: with new rollouts, and without."""
    first: dict[int, int] = {}
    for step in steps:
        first.setdefault(step.round, step.step)
    caches = {plan.round_index: plan.caches for plan in run.plans}
    caches |= {report.round: report.caches for report in run.rounds}
    fresh = {
        place for place, used in caches.items() if any(c.origin in ("fresh", "ahead") for c in used)
    }
    later = list(first.items())[1:]
    return [
        ("new rollouts", REGENERATION, [step for place, step in later if place in fresh]),
        ("round without any", KEPT, [step for place, step in later if place not in fresh]),
    ]


def _gated_spans(run: Run, steps: Sequence[Step]) -> list[tuple[int, int]]:
    """First and last step of every epoch that drift's weights were at work in."""
    epochs: dict[tuple[int, int], list[Step]] = {}
    for step in steps:
        epochs.setdefault((step.round, step.epoch), []).append(step)
    return [
        (inside[0].step, inside[-1].step)
        for inside in epochs.values()
        if any((step.mean_drift_weight or 1.0) < 1.0 for step in inside)
    ]


def _tables(run: Run) -> list[Table]:
    rows = [
        [
            str(report.round),
            str(epoch.epoch),
            epoch.action,
            shown(epoch.policy_drift),
            shown(epoch.effective_sample_fraction, 3),
            shown(epoch.reverse_kl),
            shown(epoch.teacher_entropy),
        ]
        for report in run.rounds
        for epoch in report.epochs
    ]
    head = [
        "round",
        "epoch",
        "then",
        "policy_drift",
        "effective sample fraction",
        "reverse KL, nats",
        "teacher entropy, nats",
    ]
    return [Table(caption="Epochs", head=head, rows=rows)] if rows else []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
