"""Figures of one run over its rounds: window, reverse KL, cache, time and cost, lineage."""

from collections.abc import Sequence
from math import nan

from matplotlib.axes import Axes

from opd_stream.outcome import WindowAudit
from opd_stream.windows import AdaptiveWindow
from pipeline.records import CacheRecord, RoundReport, StageNumbers
from pipeline.report.drawing import (
    FAINT,
    INK,
    SERIES,
    STAGE_COLORS,
    STAGES,
    Exhibit,
    Look,
    Series,
    Table,
    count,
    count_axis,
    decades,
    exhibit,
    graded,
    look,
    number,
    panels,
    prefixed,
    scaled,
    table_of,
)
from pipeline.report.read import Run

MOST_CURVES = 6  # of reverse KL by position
MOST_TICKS = 9  # of ranges along the axis
THRESHOLD = Look(color=FAINT, dashes=(5, 2))
SHORT = 16  # digits of a fingerprint, as folders of a store have them
MOST_NAMES = 8  # policies whose fingerprints fit side by side
ROLLOUTS_AT, SCORES_AT = 0.2, 0.5  # to the right of the policy that wrote them
HEIGHTS = {"policies": 2.0, "scores": 1.0, "rollouts": 0.0}


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
        _draw_cosines(axes[1], audits, window, legend)
        rows = [
            [str(index), *(number(each, 3) for each in audit.cosines), str(audit.window_tokens)]
            for index, audit in audits.items()
        ]
        head = ["round", *(f"{tokens} tokens" for tokens in window.candidates), "next window"]
        tables = [Table(caption="Cosines behind each decision", head=head, rows=rows)]
        caption += (
            " Below, the cosine of each candidate's gradient with that of full rollouts; the "
            "first candidate at or above the threshold is the window of the next round."
        )
    count_axis(axes[-1], "round")
    return exhibit(figure, name, title, caption, run=run.name, legend=legend, tables=tables)


def _draw_cosines(
    axis: Axes, audits: dict[int, WindowAudit], window: AdaptiveWindow, legend: list[Series]
) -> None:
    for place, candidate in enumerate(window.candidates):
        drawn = graded(place, len(window.candidates))
        axis.plot(list(audits), [a.cosines[place] for a in audits.values()], **drawn.style)
        legend.append(Series(label=f"{candidate} tokens", look=drawn))
    axis.set_ylabel("cosine")
    axis.axhline(window.threshold, color=FAINT, linewidth=1, linestyle=THRESHOLD.line)
    legend.append(Series(label=f"threshold {window.threshold:.3f}", look=THRESHOLD))


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
        for axis, measure in zip(axes, ("reverse_kl", "teacher_entropy"), strict=False):
            values = [getattr(bin_, measure) for bin_ in means[index]]
            axis.plot(xs, [nan if value is None else value for value in values], **drawn.style)
        legend.append(Series(label=f"round {index}", look=drawn))
    axes[0].set_ylabel("reverse KL\n(nats a token)")
    step = 1 if len(places) <= MOST_TICKS else 2
    axes[-1].set_xticks(range(0, len(places), step), [str(first) for first in places[::step]])
    axes[-1].set_xlabel("position in the completion, from")
    caption = "Means over the tokens of each range of positions, first epoch of a round."
    if len(chosen) < len(means):
        caption += f" {len(chosen)} of {len(means)} rounds are drawn; the table has all."
    if has_entropy:
        axes[1].set_ylabel("teacher entropy\n(nats)")
    else:
        caption += (
            " Teacher entropy is not recorded by position; its mean is in the table of epochs."
        )
    table = table_of(
        "Reverse KL by position",
        [(index, bin_) for index, bins in means.items() for bin_ in bins],
        {
            "round": lambda each: str(each[0]),
            "positions": lambda e: f"{e[1].first}–{2 * e[1].first}" if e[1].first else "0",
            "tokens": lambda each: count(each[1].tokens),
            "reverse KL, nats": lambda each: number(each[1].reverse_kl),
            "teacher entropy, nats": lambda each: number(each[1].teacher_entropy),
        },
    )
    return exhibit(figure, name, title, caption, run=run.name, legend=legend, tables=[table])


def _spread(rounds: Sequence[int]) -> list[int]:
    """All rounds, or a few from first to last."""
    if len(rounds) <= MOST_CURVES:
        return list(rounds)
    last = len(rounds) - 1
    return [rounds[round(place * last / (MOST_CURVES - 1))] for place in range(MOST_CURVES)]


def _seen(report: RoundReport) -> str:
    found = report.coverage
    if found is None or found.share is None:
        return "–"
    return f"{found.share:.3f} ± {found.error or 0:.3f}"


def cache_exhibit(run: Run, name: str) -> Exhibit:
    """Bytes of each round's cache, and the mass that its candidates do not hold."""
    title = "Cache: bytes and retained mass"
    if not run.rounds:
        return Exhibit(name=name, title=title, caption="No round is finished yet.")
    rounds = [report.round for report in run.rounds]
    last = [report.epochs[-1] for report in run.rounds]
    masses = {
        "teacher": [epoch.teacher_top_mass for epoch in last],
        "student": [epoch.student_top_mass for epoch in last],
    }
    outside = {
        who: [1 - value if value is not None and value < 1 else nan for value in values]
        for who, values in masses.items()
    }
    positive = [value for values in outside.values() for value in values if value > 0]
    figure, axes = panels(2 if positive else 1, height=1.5)
    axes[0].bar(rounds, [r.cache_bytes for r in run.rounds], color=look(0).color, width=0.6)
    axes[0].set_ylabel("new bytes\nof the round")
    prefixed(axes[0].yaxis)
    legend: list[Series] = []
    if positive:
        for place, (who, values) in enumerate(outside.items(), start=1):
            if any(value > 0 for value in values):
                axes[1].plot(rounds, values, **look(place).style)
                label = f"mass of the {who} outside the candidates"
                legend.append(Series(label=label, look=look(place)))
        decades(axes[1], positive)
        axes[1].set_ylabel("1 - mass")
    count_axis(axes[-1], "round")
    caption = (
        "Bytes of rollouts and scores that the round added to the store, whoever made them. Mass "
        "is of the last epoch: what the teacher's candidates in the cache hold of teacher and "
        "student."
    )
    table = table_of(
        "Cache",
        run.rounds,
        {
            "round": lambda report: str(report.round),
            "new bytes": lambda report: scaled(report.cache_bytes, "B"),
            "bytes a token": lambda report: number(_bytes_per_token(report), 1),
            "teacher's mass retained": lambda r: number(r.epochs[-1].teacher_top_mass, 6),
            "student's mass": lambda report: number(report.epochs[-1].student_top_mass, 4),
            "reverse KL seen": lambda report: _seen(report),
        },
    )
    return exhibit(figure, name, title, caption, run=run.name, legend=legend, tables=[table])


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
    _stack(axes[0], {report.round: report.seconds for report in run.rounds}, "seconds")
    if has_flops:
        _stack(axes[1], {report.round: report.flops for report in run.rounds}, "FLOPs")
        prefixed(axes[1].yaxis)
    count_axis(axes[-1], "round")
    caption = (
        "What the run itself did. Seconds are those of the workers: stages that overlap and "
        "several workers at once add up to more than the wall clock."
    )
    legend = [
        Series(label=stage, look=Look(color=color, mark="s", glyph="■"), is_mark=True)
        for stage, color in STAGE_COLORS.items()
    ]
    table = table_of(
        "Rounds",
        run.rounds,
        {
            "round": lambda report: str(report.round),
            "window": lambda report: count(report.window_tokens),
            "steps": lambda report: count(report.steps),
            "tokens generated": lambda report: count(report.tokens.generated),
            "teacher-scored": lambda report: count(report.tokens.teacher_scored),
            "trained": lambda report: count(report.tokens.trained),
            **{f"{s}, s": lambda r, s=s: number(getattr(r.seconds, s), 1) for s in STAGES},
            **{s: lambda r, s=s: scaled(getattr(r.flops, s), "FLOP") for s in STAGES},
        },
    )
    return exhibit(figure, name, title, caption, run=run.name, legend=legend, tables=[table])


def _stack(axis: Axes, values: dict[int, StageNumbers], label: str) -> None:
    floor = [0.0] * len(values)
    for stage in STAGES:
        heights = [getattr(value, stage) for value in values.values()]
        axis.bar(list(values), heights, bottom=floor, color=STAGE_COLORS[stage], width=0.6)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axis.set_ylabel(label)


def lineage_exhibit(run: Run, name: str) -> Exhibit:
    """Policies from scores, scores from rollouts, rollouts from policies; and a table."""
    title, caches = "Lineage of artifacts", run.caches()
    if not caches:
        return Exhibit(name=name, title=title, caption="No round is planned yet.")
    first = "" if run.summary is None else run.summary.policies[0].fingerprint
    planned = {plan.round_index + 1: plan.policy for plan in run.plans}
    made = {report.round + 1: report.policy.fingerprint for report in run.rounds}
    policies, done = dict(sorted({0: first, **planned, **made}.items())), {0, *made}
    figure, (axis,) = panels(1, height=2.2)
    places: dict[str, float] = {}
    for round_index in sorted(caches):
        _draw_caches(axis, round_index, caches[round_index], places)
    for version, fingerprint in policies.items():
        face = SERIES[0] if version in done else "none"
        axis.plot(version, 2, "o", markersize=8, markeredgecolor=SERIES[0], markerfacecolor=face)
        if len(policies) <= MOST_NAMES:
            axis.text(version, 2.25, fingerprint[:6], ha="center", color=INK, fontsize=7)
    axis.set_yticks(list(HEIGHTS.values()), list(HEIGHTS))
    every = 1 if len(policies) <= 2 * MOST_NAMES else -(-len(policies) // MOST_NAMES)
    axis.set_xticks(range(0, len(policies), every))
    axis.set_xlim(-0.5, max(policies) + 0.5)
    axis.set_ylim(-0.5, 2.6)
    axis.set_xlabel("policy version")
    axis.grid(visible=False)
    caption = (
        "A policy writes rollouts (down), the teacher scores them (up), and a later policy is "
        "trained on the scores (up again). Continued rollouts hang on the policy of their oldest "
        "tokens. A hollow policy is not made yet."
    )
    table = _lineage_table(caches, policies, done)
    return exhibit(figure, name, title, caption, run=run.name, tables=[table])


def _draw_caches(
    axis: Axes, round_index: int, caches: Sequence[CacheRecord], places: dict[str, float]
) -> None:
    """Rollouts and scores of a round, each once, with what came from what."""
    for cache in caches:
        is_new = cache.scores not in places
        if is_new:
            beside = sum(int(x) == round_index for x in places.values())
            places[cache.scores] = round_index + SCORES_AT + min(0.12 * beside, 0.24)
        x = places[cache.scores]
        if is_new:
            below = x - SCORES_AT + ROLLOUTS_AT
            _arrow(axis, (below, 0), (x, 1))
            if cache.origin not in ("replayed", "given"):
                _arrow(axis, (cache.policy_version, 2), (below, 0))
            axis.plot(below, 0, "^", color=SERIES[2], markersize=7, zorder=3)
            axis.plot(x, 1, "s", color=SERIES[1], markersize=6, zorder=3)
        _arrow(axis, (x, 1), (round_index + 1, 2))


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "->", "color": FAINT, "linewidth": 0.9, "shrinkA": 5, "shrinkB": 6}
    axis.annotate("", end, start, arrowprops=style)


def _lineage_table(
    caches: dict[int, tuple[CacheRecord, ...]], policies: dict[int, str], done: set[int]
) -> Table:
    rows: list[list[str]] = []
    for round_index, cache in ((r, cache) for r in sorted(caches) for cache in caches[r]):
        version = round_index + 1
        is_ours = cache.origin not in ("replayed", "given")
        author = policies.get(cache.policy_version, "") if is_ours else ""
        rows.append(
            [
                str(round_index),
                f"policies/{policies[version][:SHORT]}{'' if version in done else ' (not yet)'}",
                f"scores/{cache.scores[:SHORT]}",
                f"rollouts/{cache.rollouts[:SHORT]}",
                f"policies/{author[:SHORT]}" if author else "not of this run",
                cache.origin,
                "all" if cache.units is None else str(len(cache.units)),
            ]
        )
    head = ["round", "policy", "trained on", "of", "written by", "cache", "units"]
    return Table(caption="Artifacts", head=head, rows=rows, is_text=True)
