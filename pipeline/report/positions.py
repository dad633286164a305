"""Reverse KL by place in the completion, and teacher entropy where it is recorded."""

from collections.abc import Sequence

from pipeline.report.parts import Entry, Exhibit, Table, left_out, shown, whole
from pipeline.report.read import PositionBin, RoundRecord, Run
from pipeline.report.style import graded
from pipeline.report.svg import inline, panels

MOST_CURVES = 6
MOST_NAMES = 9  # of ranges along the axis


def position_exhibit(run: Run, name: str) -> Exhibit:
    """One curve a round, of its first epoch: what the teacher thinks of fresh rollouts."""
    title = "Reverse KL by position"
    known = [report for report in run.rounds if report.epochs and report.epochs[0].by_position]
    if not known:
        return left_out(name, title, "No epoch has recorded reverse KL by position.")
    chosen = _spread(known)
    places = sorted({bin_.first for report in chosen for bin_ in report.epochs[0].by_position})
    has_entropy = any(
        bin_.teacher_entropy is not None
        for report in chosen
        for bin_ in report.epochs[0].by_position
    )
    figure, axes = panels(2 if has_entropy else 1, height=1.6 if has_entropy else 2.6)
    legend: list[Entry] = []
    for number, report in enumerate(chosen):
        drawn = graded(number, len(chosen))
        bins = report.epochs[0].by_position
        for axis, values in zip(axes, _measures(bins, has_entropy=has_entropy), strict=True):
            axis.plot(
                [places.index(bin_.first) for bin_ in bins],
                values,
                color=drawn.color,
                marker=drawn.mark,
                alpha=drawn.alpha,
            )
        legend.append(Entry(label=f"round {report.round}", look=drawn))
    axes[0].set_ylabel("reverse KL\n(nats a token)")
    if has_entropy:
        axes[1].set_ylabel("teacher entropy\n(nats)")
    step = 1 if len(places) <= MOST_NAMES else 2
    axes[-1].set_xticks(range(0, len(places), step), [str(first) for first in places[::step]])
    axes[-1].set_xlabel("place in the completion, from")
    caption = "Means over the tokens of each range of places, first epoch of a round."
    if len(chosen) < len(known):
        caption += f" {len(chosen)} of {len(known)} rounds are drawn; the table has all."
    if not has_entropy:
        caption += (
            " Teacher entropy is not recorded by position; its mean is in the table of epochs."
        )
    return Exhibit(
        name=name,
        title=title,
        caption=caption,
        svg=inline(figure, name, title=f"{title}: {run.name}", description=caption),
        legend=legend,
        tables=[_table(known)],
    )


def _measures(bins: Sequence[PositionBin], *, has_entropy: bool) -> list[list[float]]:
    missing = float("nan")
    found = [[missing if b.reverse_kl is None else b.reverse_kl for b in bins]]
    if has_entropy:
        found.append([missing if b.teacher_entropy is None else b.teacher_entropy for b in bins])
    return found


def _spread(known: Sequence[RoundRecord]) -> list[RoundRecord]:
    """All rounds, or a few from first to last."""
    if len(known) <= MOST_CURVES:
        return list(known)
    last = len(known) - 1
    return [known[round(place * last / (MOST_CURVES - 1))] for place in range(MOST_CURVES)]


def _ranges(places: Sequence[int]) -> list[str]:
    """Names of the bins that begin at these places: 0, 1–2, 3–6, ..."""
    return [str(first) if first == 0 else f"{first}–{2 * first}" for first in places]


def _table(known: Sequence[RoundRecord]) -> Table:
    rows = [
        [
            str(report.round),
            _ranges([bin_.first])[0],
            whole(bin_.tokens),
            shown(bin_.reverse_kl),
            shown(bin_.teacher_entropy),
        ]
        for report in known
        for bin_ in report.epochs[0].by_position
    ]
    head = ["round", "places", "tokens", "reverse KL, nats", "teacher entropy, nats"]
    return Table(caption="Reverse KL by position", head=head, rows=rows)
