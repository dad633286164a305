"""Figures of one run over its rounds: window, cache, time and cost of the stages."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from pipeline.report.parts import Entry, Exhibit, Table, left_out, scaled, shown, whole
from pipeline.report.read import RoundRecord, Run
from pipeline.report.style import FAINT, STAGE_COLORS, STAGES, Look, graded, look
from pipeline.report.svg import count_axis, decades, inline, panels, prefixed

THRESHOLD = Look(color=FAINT, mark="", glyph="", dashes=(5, 2))


def window_exhibit(run: Run, name: str) -> Exhibit:
    """The window of each round, and the cosines that chose the next one."""
    title = "Window over rounds"
    windows = {plan.round_index: plan.window_tokens for plan in run.plans}
    windows |= {report.round: report.window_tokens for report in run.rounds}
    known = sorted((place, tokens) for place, tokens in windows.items() if tokens is not None)
    if not known:
        why = "its rows came from elsewhere" if run.rounds else "none is in this folder"
        return left_out(name, title, f"No round has a window: {why}.")
    audited = [report for report in run.rounds if report.window_decision is not None]
    candidates = [int(tokens) for tokens in run.setting("rollouts.window.candidates") or []]
    has_cosines = bool(audited and candidates)
    figure, axes = panels(2 if has_cosines else 1, height=1.7 if has_cosines else 2.6)
    places, tokens = zip(*known, strict=True)
    axes[0].step(places, tokens, where="mid", color=look(0).color, marker="o")
    axes[0].set_ylabel("window (tokens)")
    axes[0].set_ylim(bottom=0, top=max(tokens) * 1.1)
    legend: list[Entry] = []
    caption = f"Window kind: {run.setting('rollouts.window.kind') or 'unknown'}."
    if has_cosines:
        legend = _cosines(run, axes[1], audited, candidates)
        caption += (
            " Below, the cosine of each candidate's gradient with that of full rollouts; the "
            "first candidate at or above the threshold is the window of the next round."
        )
    axes[-1].set_xlabel("round")
    count_axis(axes[-1])
    return Exhibit(
        name=name,
        title=title,
        caption=caption,
        svg=inline(figure, name, title=f"{title}: {run.name}", description=caption),
        legend=legend,
        tables=[_cosine_table(audited, candidates)] if has_cosines else [],
    )


def _cosines(
    run: Run, axis: Axes, audited: Sequence[RoundRecord], candidates: Sequence[int]
) -> list[Entry]:
    legend: list[Entry] = []
    for place, candidate in enumerate(candidates):
        drawn = graded(place, len(candidates))
        points = [
            (report.round, report.window_decision.cosines[place])
            for report in audited
            if report.window_decision and place < len(report.window_decision.cosines)
        ]
        if points:
            axis.plot(
                *zip(*points, strict=True), color=drawn.color, marker=drawn.mark, alpha=drawn.alpha
            )
            legend.append(Entry(label=f"{candidate} tokens", look=drawn))
    threshold = run.setting("rollouts.window.threshold")
    if isinstance(threshold, int | float):
        axis.axhline(threshold, color=FAINT, linewidth=1, linestyle=THRESHOLD.line)
        legend.append(Entry(label=f"threshold {threshold:.3f}", look=THRESHOLD))
    axis.set_ylabel("cosine")
    return legend


def _cosine_table(audited: Sequence[RoundRecord], candidates: Sequence[int]) -> Table:
    rows: list[list[str]] = []
    for report in audited:
        decision = report.window_decision
        if decision is not None:
            cosines = [shown(cosine, 3) for cosine in decision.cosines]
            cosines += ["–"] * (len(candidates) - len(cosines))
            rows.append(
                [str(report.round), *cosines[: len(candidates)], f"{decision.window_tokens}"]
            )
    head = ["round", *(f"{candidate} tokens" for candidate in candidates), "next window"]
    return Table(caption="Cosines behind each decision", head=head, rows=rows)


def cache_exhibit(run: Run, name: str) -> Exhibit:
    """Bytes of each round's cache, and the mass that its candidates do not hold."""
    title = "Cache: bytes and retained mass"
    known = [report for report in run.rounds if report.cache_bytes is not None]
    if not known:
        return left_out(name, title, "No finished round says how large its cache is.")
    places = [report.round for report in known]
    lost = {
        "teacher": [1 - mass if mass is not None else None for mass in map(_teacher_mass, known)],
        "student": [1 - mass if mass is not None else None for mass in map(_student_mass, known)],
    }
    drawable = {who: v for who, v in lost.items() if any(x and x > 0 for x in v)}
    figure, axes = panels(2 if drawable else 1, height=1.5)
    axes[0].bar(
        places, [report.cache_bytes or 0 for report in known], color=look(0).color, width=0.6
    )
    axes[0].set_ylabel("new bytes\nof the round")
    prefixed(axes[0], on="y")
    legend: list[Entry] = []
    for place, (who, values) in enumerate(drawable.items()):
        drawn = look(place + 1)
        positive = [value if value and value > 0 else float("nan") for value in values]
        axes[1].plot(places, positive, color=drawn.color, marker=drawn.mark, linestyle=drawn.line)
        legend.append(Entry(label=f"mass of the {who} outside the candidates", look=drawn))
    if drawable:
        decades(axes[1], [value for values in drawable.values() for value in values if value])
        axes[1].set_ylabel("1 - mass")
    axes[-1].set_xlabel("round")
    count_axis(axes[-1])
    caption = (
        "Bytes of rollouts and scores that the round added to the store, whoever made them. Mass "
        "is of the last epoch: what the teacher's candidates in the cache hold of teacher and "
        "student."
    )
    return Exhibit(
        name=name,
        title=title,
        caption=caption,
        svg=inline(figure, name, title=f"{title}: {run.name}", description=caption),
        legend=legend,
        tables=[_cache_table(known)],
    )


def _teacher_mass(report: RoundRecord) -> float | None:
    return report.epochs[-1].teacher_top_mass if report.epochs else None


def _student_mass(report: RoundRecord) -> float | None:
    return report.epochs[-1].student_top_mass if report.epochs else None


def bytes_per_token(report: RoundRecord) -> float | None:
    """Of rollouts and scores together; None where tokens of reused units are not known."""
    reused = report.reused
    if report.cache_bytes is None or reused is None or reused.rollout_units or reused.score_units:
        return None
    tokens = report.tokens.get("teacher_scored", 0) - report.tokens.get("probed", 0)
    return report.cache_bytes / tokens if tokens > 0 else None


def _cache_table(known: Sequence[RoundRecord]) -> Table:
    rows = [
        [
            str(report.round),
            scaled(report.cache_bytes, "B"),
            shown(bytes_per_token(report), 1),
            shown(_teacher_mass(report), 6),
            shown(_student_mass(report), 4),
        ]
        for report in known
    ]
    head = ["round", "new bytes", "bytes a token", "teacher's mass retained", "student's mass"]
    return Table(caption="Cache", head=head, rows=rows)


def stage_exhibit(run: Run, name: str) -> Exhibit:
    """Seconds and FLOPs of each stage, stacked, a round each."""
    title = "Time and cost of the stages"
    known = [report for report in run.rounds if report.seconds]
    if not known:
        return left_out(name, title, "No finished round says how long its stages took.")
    has_flops = any(sum(report.flops.values()) for report in known)
    figure, axes = panels(2 if has_flops else 1, height=1.5)
    _stacked(axes[0], known, [report.seconds for report in known], "seconds")
    if has_flops:
        _stacked(axes[1], known, [report.flops for report in known], "FLOPs")
        axes[1].yaxis.set_major_formatter(EngFormatter(sep=""))
    axes[-1].set_xlabel("round")
    count_axis(axes[-1])
    caption = (
        "What the run did itself. Seconds are those of the workers: stages that overlap and "
        "several workers at once add up to more than the wall clock."
    )
    looks = {
        stage: Look(color=c, mark="s", glyph="■", dashes=()) for stage, c in STAGE_COLORS.items()
    }
    return Exhibit(
        name=name,
        title=title,
        caption=caption,
        svg=inline(figure, name, title=f"{title}: {run.name}", description=caption),
        legend=[Entry(label=stage, look=drawn, is_mark=True) for stage, drawn in looks.items()],
        tables=[_round_table(known)],
    )


def _stacked(
    axis: Axes, known: Sequence[RoundRecord], values: Sequence[dict[str, float]], label: str
) -> None:
    floor = [0.0] * len(known)
    for stage in STAGES:
        heights = [value.get(stage, 0.0) for value in values]
        places = [report.round for report in known]
        axis.bar(places, heights, bottom=floor, color=STAGE_COLORS[stage], width=0.6)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axis.set_ylabel(label)


def _round_table(known: Sequence[RoundRecord]) -> Table:
    rows = [
        [
            str(report.round),
            whole(report.window_tokens),
            whole(report.steps),
            *(
                whole(report.tokens.get(name))
                for name in ("generated", "teacher_scored", "trained")
            ),
            *(shown(report.seconds.get(stage), 1) for stage in STAGES),
            *(scaled(report.flops.get(stage), "FLOP") for stage in STAGES),
        ]
        for report in known
    ]
    head = ["round", "window", "steps", "tokens generated", "teacher-scored", "trained"]
    head += [f"{stage}, s" for stage in STAGES] + list(STAGES)
    return Table(caption="Rounds", head=head, rows=rows)
