"""Figures of one run over its rounds: window, reverse KL, cache, time and cost, lineage."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from opd_stream.outcome import WindowAudit
from opd_stream.windows import AdaptiveWindow
from pipeline.records import CacheRecord, RoundReport
from pipeline.report.charts import (
    FAINT,
    SERIES,
    Drawing,
    Exhibit,
    axis_x,
    axis_y,
    bars,
    data,
    decades,
    exhibit,
    lines,
    rule,
)
from pipeline.report.read import Run
from pipeline.report.tables import STAGES, Table, count, number, scaled, table_of

MOST_CURVES = 6  # of reverse KL by position
SHORT = 16  # digits of a fingerprint, as folders of a store have them
STAGE_COLORS = [f"var(--{stage})" for stage in STAGES]
ROLLOUTS_AT, SCORES_AT = 0.2, 0.5  # to the right of the policy that wrote them
KINDS = ("policies", "scores", "rollouts")

Panels = list[tuple[str | alt.TitleParams, Drawing]]


def window_exhibit(run: Run, name: str) -> Exhibit:
    """The window of each round, and the cosines that chose the next one."""
    title = "Window over rounds"
    windows = {plan.round_index: plan.window_tokens for plan in run.plans}
    windows |= {report.round: report.window_tokens for report in run.rounds}
    if not windows:
        return Exhibit(name=name, title=title, caption="No round has a window yet.")
    window = run.config.rollouts.window
    audits = {r.round: r.window_decision for r in run.rounds if r.window_decision is not None}
    rows = [{SERIES: "window", "round": r, "tokens": t} for r, t in sorted(windows.items())]
    y = axis_y("tokens", form="~s", span=(0, 1.1 * max(windows.values())))
    drawn = lines(
        alt.Chart(data(rows)),
        ["window"],
        axis_x("round", "round"),
        y,
        tip=["round:Q", "tokens:Q"],
        step=True,
    )
    panels: Panels = [("window (tokens)", drawn)]
    tables: list[Table] = []
    caption = f"Window kind: {window.kind}."
    if isinstance(window, AdaptiveWindow) and audits:
        panels.append(("cosine of each candidate", _cosines(audits, window)))
        numbers = [
            [str(index), *(number(each, 3) for each in audit.cosines), str(audit.window_tokens)]
            for index, audit in audits.items()
        ]
        head = ["round", *(f"{tokens} tokens" for tokens in window.candidates), "next window"]
        tables = [Table(caption="Cosines behind each decision", head=head, rows=numbers)]
        caption += (
            " A cosine is that of a candidate's gradient with that of full rollouts; the first "
            f"candidate at or above the threshold, {window.threshold:.3f}, is the window of the "
            "next round."
        )
    return exhibit(name, title, caption, panels, tables=tables)


def _cosines(audits: dict[int, WindowAudit], window: AdaptiveWindow) -> Drawing:
    rows = [
        {SERIES: f"{tokens} tokens", "round": index, "cosine": cosine}
        for index, audit in audits.items()
        for tokens, cosine in zip(window.candidates, audit.cosines, strict=True)
    ]
    names = [f"{tokens} tokens" for tokens in window.candidates]
    drawn = lines(
        alt.Chart(data(rows)),
        names,
        axis_x("round", "round"),
        axis_y("cosine"),
        tip=[f"{SERIES}:N", "round:Q", "cosine:Q"],
    )
    return alt.layer(drawn, rule(y=window.threshold, text="threshold"))


def position_exhibit(run: Run, name: str) -> Exhibit:
    """One curve a round, of its first epoch: what the teacher thinks of fresh rollouts."""
    title = "Reverse KL by position"
    means = {r.round: r.epochs[0].by_position for r in run.rounds if r.epochs[0].by_position}
    if not means:
        caption = "No epoch has recorded reverse KL by position."
        return Exhibit(name=name, title=title, caption=caption)
    chosen = _spread(sorted(means))
    rows = [
        {
            SERIES: f"round {index}",
            "position": bin_.first,
            "reverse_kl": bin_.reverse_kl,
            "teacher_entropy": bin_.teacher_entropy,
        }
        for index in chosen
        for bin_ in means[index]
    ]
    measures = {"reverse_kl": "reverse KL (nats a token)"}
    caption = "Means over the tokens of each range of positions, first epoch of a round."
    if len(chosen) < len(means):
        caption += f" {len(chosen)} of {len(means)} rounds are drawn; the table has all."
    if any(row["teacher_entropy"] is not None for row in rows):
        measures["teacher_entropy"] = "teacher entropy (nats)"
    else:
        caption += (
            " Teacher entropy is not recorded by position; its mean is in the table of epochs."
        )
    base = alt.Chart(data(rows))
    x = alt.X(
        "position:O",
        title="position in the completion, from",
        axis=alt.Axis(labelAngle=0, labelOverlap="greedy"),
    )
    panels = [
        (
            said,
            lines(
                base,
                [f"round {index}" for index in chosen],
                x,
                axis_y(measure),
                tip=[f"{SERIES}:N", "position:Q", f"{measure}:Q"],
            ),
        )
        for measure, said in measures.items()
    ]
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
    return exhibit(name, title, caption, panels, tables=[table], zooms=False)


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
    drawn = bars(
        {report.round: {"new bytes": report.cache_bytes} for report in run.rounds},
        unit="bytes",
        colors=["var(--series-0)"],
    )
    panels: Panels = [("new bytes of the round", drawn)]
    outside: list[dict[str, Any]] = [
        {SERIES: f"of the {who}", "round": report.round, "mass": 1 - value}
        for report in run.rounds
        for who in ("teacher", "student")
        if (value := getattr(report.epochs[-1], f"{who}_top_mass")) is not None and value < 1
    ]
    if outside:
        curves = lines(
            alt.Chart(data(outside)),
            list(dict.fromkeys(str(row[SERIES]) for row in outside)),
            axis_x("round", "round"),
            axis_y("mass", form="~e", log=True, span=decades([row["mass"] for row in outside])),
            tip=[f"{SERIES}:N", "round:Q", "mass:Q"],
        )
        panels.append(("mass outside the candidates", curves))
    caption = (
        "Bytes of rollouts and scores that the round added to the store, whoever made them. Mass "
        "is of the last epoch: what the teacher's candidates in the cache do not hold of teacher "
        "and student."
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
    return exhibit(name, title, caption, panels, tables=[table])


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
    panels: Panels = []
    for unit, said in {"seconds": "seconds", "flops": "FLOPs"}.items():
        values = {
            report.round: {stage: getattr(getattr(report, unit), stage) for stage in STAGES}
            for report in run.rounds
        }
        if any(value for parts in values.values() for value in parts.values()):
            panels.append((said, bars(values, unit=said, colors=STAGE_COLORS)))
    caption = (
        "What the run itself did. Seconds are those of the workers: stages that overlap and "
        "several workers at once add up to more than the wall clock."
    )
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
    return exhibit(name, title, caption, panels, tables=[table])


def lineage_exhibit(run: Run, name: str) -> Exhibit:
    """Policies from scores, scores from rollouts, rollouts from policies; and a table."""
    title, caches = "Lineage of artifacts", run.caches()
    if not caches:
        return Exhibit(name=name, title=title, caption="No round is planned yet.")
    first = "" if run.summary is None else run.summary.policies[0].fingerprint
    planned = {plan.round_index + 1: plan.policy for plan in run.plans}
    made = {report.round + 1: report.policy.fingerprint for report in run.rounds}
    policies, done = dict(sorted({0: first, **planned, **made}.items())), {0, *made}
    nodes = [
        {
            SERIES: "policies",
            "version": version,
            "artifact": fingerprint[:SHORT] or "of the run's first student",
            "state": "made" if version in done else "not made yet",
        }
        for version, fingerprint in policies.items()
    ]
    links = list[dict[str, object]]()
    for round_index in sorted(caches):
        _add_caches(round_index, caches[round_index], nodes, links)
    y = alt.Y(f"{SERIES}:N", scale=alt.Scale(domain=[*KINDS]), title=None)
    ends = {"x": axis_x("version", "policy version"), "x2": "to_version:Q", "y2": "to:N"}
    arrows = alt.Chart(data(links)).mark_rule(color=FAINT, strokeWidth=0.8, clip=True)
    shapes = alt.Scale(domain=[*KINDS], range=["circle", "square", "triangle-up"])
    colors = alt.Scale(domain=[*KINDS], range=[f"var(--series-{place})" for place in range(3)])
    pale = alt.when(alt.datum.state == "made").then(alt.value(1)).otherwise(alt.value(0.25))
    marks = (
        alt.Chart(data(nodes))
        .mark_point(size=70, filled=True, clip=True)
        .encode(
            x=axis_x("version", "policy version"),
            y=y,
            shape=alt.Shape(f"{SERIES}:N", scale=shapes, legend=None),
            color=alt.Color(f"{SERIES}:N", scale=colors, legend=None),
            opacity=pale,
            tooltip=[f"{SERIES}:N", "artifact:N", "state:N"],
        )
    )
    caption = (
        "A policy writes rollouts (down), the teacher scores them (up), and a later policy is "
        "trained on the scores (up again). Continued rollouts hang on the policy of their oldest "
        "tokens. A pale policy is not made yet."
    )
    table = _lineage_table(caches, policies, done)
    panels: Panels = [("", arrows.encode(y=y, **ends) + marks)]
    return exhibit(name, title, caption, panels, tables=[table])


def _add_caches(
    round_index: int,
    caches: Sequence[CacheRecord],
    nodes: list[dict[str, object]],
    links: list[dict[str, object]],
) -> None:
    """Rollouts and scores of a round, each once, with what came from what."""
    places = {node["artifact"]: float(str(node["version"])) for node in nodes}

    def link(kind: str, at: float, to: str, to_version: float) -> None:
        links.append({SERIES: kind, "version": at, "to": to, "to_version": to_version})

    for cache in caches:
        scores = cache.scores[:SHORT]
        if scores not in places:
            beside = sum(round_index < at < round_index + 1 for at in places.values()) // 2
            at = round_index + SCORES_AT + min(0.12 * beside, 0.24)
            below = at - SCORES_AT + ROLLOUTS_AT
            places |= {scores: at, cache.rollouts[:SHORT]: below}
            own = {"state": "made"}
            nodes.append({SERIES: "scores", "version": at, "artifact": scores, **own})
            named = {"version": below, "artifact": cache.rollouts[:SHORT]}
            nodes.append({SERIES: "rollouts", **named, **own})
            link("rollouts", below, "scores", at)
            if cache.origin not in ("replayed", "given"):
                link("policies", cache.policy_version, "rollouts", below)
        link("scores", places[scores], "policies", round_index + 1)


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
