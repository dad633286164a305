"""Figures of one run over its rounds: window, reverse KL by position, cache, time and cost."""

from collections.abc import Sequence
from math import nan

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from opd_stream.outcome import PositionMeans, WindowAudit
from opd_stream.windows import AdaptiveWindow
from pipeline.records import RoundReport, StageNumbers
from pipeline.report.drawing import (
    FAINT,
    STAGE_COLORS,
    Exhibit,
    Look,
    Series,
    count_axis,
    decades,
    exhibit,
    graded,
    look,
    panels,
    prefixed,
)
from pipeline.report.read import Run
from pipeline.report.tables import STAGES, Table, count, number, scaled

MOST_CURVES = 6  # of reverse KL by position
MOST_NAMES = 9  # of ranges along the axis
THRESHOLD = Look(color=FAINT, dashes=(5, 2))


def window_exhibit(run: Run, name: str) -> Exhibit:
    """The window of each round, and the cosines that chose the next one."""
    title = "Window over rounds"
    windows = {plan.round_index: plan.window_tokens for plan in run.plans}
    windows |= {report.round: report.window_tokens for report in run.rounds}
    if not windows:
        return Exhibit(name=name, title=title, caption="No round has a window yet.")
    window = run.config.rollouts.window
    audits = {r.round: r.window_decision for r in run.rounds if r.window_decision is not None}
    figure, axes = panels(2 if audits else 1, height=1.7 if audits else 2.6)
    places, tokens = zip(*sorted(windows.items()), strict=True)
    axes[0].step(places, tokens, where="mid", color=look(0).color, marker="o")
    axes[0].set_ylabel("window (tokens)")
    axes[0].set_ylim(bottom=0, top=max(tokens) * 1.1)
    legend: list[Series] = []
    tables: list[Table] = []
    caption = f"Window kind: {window.kind}."
    if isinstance(window, AdaptiveWindow) and audits:
        legend = _draw_cosines(axes[1], audits, window.candidates)
        axes[1].axhline(window.threshold, color=FAINT, linewidth=1, linestyle=THRESHOLD.line)
        legend.append(Series(label=f"threshold {window.threshold:.3f}", look=THRESHOLD))
        tables = [_cosine_table(audits, window.candidates)]
        caption += (
            " Below, the cosine of each candidate's gradient with that of full rollouts; the "
            "first candidate at or above the threshold is the window of the next round."
        )
    count_axis(axes[-1], "round")
    return exhibit(figure, name, title, caption, run=run.name, legend=legend, tables=tables)


def _draw_cosines(
    axis: Axes, audits: dict[int, WindowAudit], candidates: Sequence[int]
) -> list[Series]:
    legend: list[Series] = []
    for place, candidate in enumerate(candidates):
        drawn = graded(place, len(candidates))
        cosines = [audit.cosines[place] for audit in audits.values()]
        axis.plot(list(audits), cosines, color=drawn.color, marker=drawn.mark, alpha=drawn.alpha)
        legend.append(Series(label=f"{candidate} tokens", look=drawn))
    axis.set_ylabel("cosine")
    return legend


def _cosine_table(audits: dict[int, WindowAudit], candidates: Sequence[int]) -> Table:
    rows = [
        [str(index), *(number(each, 3) for each in audit.cosines), str(audit.window_tokens)]
        for index, audit in audits.items()
    ]
    head = ["round", *(f"{candidate} tokens" for candidate in candidates), "next window"]
    return Table(caption="Cosines behind each decision", head=head, rows=rows)


def position_exhibit(run: Run, name: str) -> Exhibit:
    """One curve a round, of its first epoch: what the teacher thinks of fresh rollouts."""
    title = "Reverse KL by position"
    means = {r.round: r.epochs[0].by_position for r in run.rounds if r.epochs[0].by_position}
    if not means:
        caption = "No epoch has recorded reverse KL by position."
        return Exhibit(name=name, title=title, caption=caption)
    chosen = _spread(sorted(means))
    places = sorted({bin_.first for index in chosen for bin_ in means[index]})
    has_entropy = any(b.teacher_entropy is not None for index in chosen for b in means[index])
    figure, axes = panels(2 if has_entropy else 1, height=1.6 if has_entropy else 2.6)
    legend: list[Series] = []
    for order, index in enumerate(chosen):
        drawn = graded(order, len(chosen))
        xs = [places.index(bin_.first) for bin_ in means[index]]
        measures = [[bin_.reverse_kl for bin_ in means[index]]]
        measures += [[bin_.teacher_entropy for bin_ in means[index]]] if has_entropy else []
        for axis, values in zip(axes, measures, strict=True):
            ys = [nan if value is None else value for value in values]
            axis.plot(xs, ys, color=drawn.color, marker=drawn.mark, alpha=drawn.alpha)
        legend.append(Series(label=f"round {index}", look=drawn))
    axes[0].set_ylabel("reverse KL\n(nats a token)")
    if has_entropy:
        axes[1].set_ylabel("teacher entropy\n(nats)")
    step = 1 if len(places) <= MOST_NAMES else 2
    axes[-1].set_xticks(range(0, len(places), step), [str(first) for first in places[::step]])
    axes[-1].set_xlabel("position in the completion, from")
    caption = "Means over the tokens of each range of positions, first epoch of a round."
    if len(chosen) < len(means):
        caption += f" {len(chosen)} of {len(means)} rounds are drawn; the table has all."
    if not has_entropy:
        caption += (
            " Teacher entropy is not recorded by position; its mean is in the table of epochs."
        )
    table = _position_table(means)
    return exhibit(figure, name, title, caption, run=run.name, legend=legend, tables=[table])


def _spread(rounds: Sequence[int]) -> list[int]:
    """All rounds, or a few from first to last."""
    if len(rounds) <= MOST_CURVES:
        return list(rounds)
    last = len(rounds) - 1
    return [rounds[round(place * last / (MOST_CURVES - 1))] for place in range(MOST_CURVES)]


def _position_table(means: dict[int, tuple[PositionMeans, ...]]) -> Table:
    rows = [
        [
            str(index),
            f"{bin_.first}–{2 * bin_.first}" if bin_.first else "0",
            count(bin_.tokens),
            number(bin_.reverse_kl),
            number(bin_.teacher_entropy),
        ]
        for index, bins in means.items()
        for bin_ in bins
    ]
    head = ["round", "positions", "tokens", "reverse KL, nats", "teacher entropy, nats"]
    return Table(caption="Reverse KL by position", head=head, rows=rows)


def cache_exhibit(run: Run, name: str) -> Exhibit:
    """Bytes of each round's cache, and the mass that its candidates do not hold."""
    title = "Cache: bytes and retained mass"
    if not run.rounds:
        return Exhibit(name=name, title=title, caption="No round is finished yet.")
    rounds = [report.round for report in run.rounds]
    masses = {
        "teacher": [report.epochs[-1].teacher_top_mass for report in run.rounds],
        "student": [report.epochs[-1].student_top_mass for report in run.rounds],
    }
    outside = {
        who: [1 - value if value is not None and value < 1 else nan for value in values]
        for who, values in masses.items()
    }
    positive = [value for values in outside.values() for value in values if value > 0]
    figure, axes = panels(2 if positive else 1, height=1.5)
    axes[0].bar(rounds, [r.cache_bytes for r in run.rounds], color=look(0).color, width=0.6)
    axes[0].set_ylabel("new bytes\nof the round")
    prefixed(axes[0], on="y")
    legend: list[Series] = []
    if positive:
        for place, (who, values) in enumerate(outside.items(), start=1):
            if any(value > 0 for value in values):
                drawn = look(place)
                axes[1].plot(
                    rounds, values, color=drawn.color, marker=drawn.mark, linestyle=drawn.line
                )
                label = f"mass of the {who} outside the candidates"
                legend.append(Series(label=label, look=drawn))
        decades(axes[1], positive)
        axes[1].set_ylabel("1 - mass")
    count_axis(axes[-1], "round")
    caption = (
        "Bytes of rollouts and scores that the round added to the store, whoever made them. Mass "
        "is of the last epoch: what the teacher's candidates in the cache hold of teacher and "
        "student."
    )
    table = _cache_table(run.rounds)
    return exhibit(figure, name, title, caption, run=run.name, legend=legend, tables=[table])


def _cache_table(reports: Sequence[RoundReport]) -> Table:
    rows = [
        [
            str(report.round),
            scaled(report.cache_bytes, "B"),
            number(_bytes_per_token(report), 1),
            number(report.epochs[-1].teacher_top_mass, 6),
            number(report.epochs[-1].student_top_mass, 4),
        ]
        for report in reports
    ]
    head = ["round", "new bytes", "bytes a token", "teacher's mass retained", "student's mass"]
    return Table(caption="Cache", head=head, rows=rows)


def _bytes_per_token(report: RoundReport) -> float | None:
    """Of rollouts and scores together; None where units were reused, whose tokens do not count."""
    if report.reused.rollout_units or report.reused.score_units:
        return None
    tokens = report.tokens.teacher_scored - report.tokens.probed
    return report.cache_bytes / tokens if tokens > 0 else None


def stage_exhibit(run: Run, name: str) -> Exhibit:
    """Seconds and FLOPs of each stage, stacked, a round each."""
    title = "Time and cost of the stages"
    if not run.rounds:
        return Exhibit(name=name, title=title, caption="No round is finished yet.")
    has_flops = any(getattr(report.flops, stage) for report in run.rounds for stage in STAGES)
    figure, axes = panels(2 if has_flops else 1, height=1.5)
    _stack(axes[0], run.rounds, [report.seconds for report in run.rounds], "seconds")
    if has_flops:
        _stack(axes[1], run.rounds, [report.flops for report in run.rounds], "FLOPs")
        axes[1].yaxis.set_major_formatter(EngFormatter(sep=""))
    count_axis(axes[-1], "round")
    caption = (
        "What the run itself did. Seconds are those of the workers: stages that overlap and "
        "several workers at once add up to more than the wall clock."
    )
    legend = [
        Series(label=stage, look=Look(color=color, mark="s", glyph="■"), is_mark=True)
        for stage, color in STAGE_COLORS.items()
    ]
    table = _stage_table(run.rounds)
    return exhibit(figure, name, title, caption, run=run.name, legend=legend, tables=[table])


def _stack(
    axis: Axes, reports: Sequence[RoundReport], values: Sequence[StageNumbers], label: str
) -> None:
    rounds, floor = [report.round for report in reports], [0.0] * len(reports)
    for stage in STAGES:
        heights = [getattr(value, stage) for value in values]
        axis.bar(rounds, heights, bottom=floor, color=STAGE_COLORS[stage], width=0.6)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axis.set_ylabel(label)


def _stage_table(reports: Sequence[RoundReport]) -> Table:
    rows = [
        [
            str(report.round),
            count(report.window_tokens),
            count(report.steps),
            count(report.tokens.generated),
            count(report.tokens.teacher_scored),
            count(report.tokens.trained),
            *(number(getattr(report.seconds, stage), 1) for stage in STAGES),
            *(scaled(getattr(report.flops, stage), "FLOP") for stage in STAGES),
        ]
        for report in reports
    ]
    head = ["round", "window", "steps", "tokens generated", "teacher-scored", "trained"]
    head += [f"{stage}, s" for stage in STAGES] + list(STAGES)
    return Table(caption="Rounds", head=head, rows=rows)
