"""What a run is made of: policies from scores, scores from rollouts, rollouts from policies."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from pipeline.records import CacheRecord
from pipeline.report.drawing import FAINT, INK, SERIES, Exhibit, exhibit, panels
from pipeline.report.read import Run
from pipeline.report.tables import Table

SHORT = 16  # digits of a fingerprint, as folders of a store have them
MOST_NAMES = 8  # policies whose fingerprints fit side by side
ROLLOUTS_AT, SCORES_AT = 0.2, 0.5  # to the right of the policy that wrote them
HEIGHTS = {"policies": 2.0, "scores": 1.0, "rollouts": 0.0}


def lineage_exhibit(run: Run, name: str) -> Exhibit:
    """The graph of the run's artifacts, and the same as a table."""
    title = "Lineage of artifacts"
    policies, caches = _policies(run), run.caches()
    if not caches:
        return Exhibit(name=name, title=title, caption="No round is planned yet.")
    figure, (axis,) = panels(1, height=2.2)
    done = {0, *(report.round + 1 for report in run.rounds)}
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
    table = _table(caches, policies, done)
    return exhibit(figure, name, title, caption, run=run.name, tables=[table])


def _policies(run: Run) -> dict[int, str]:
    """Fingerprint of each policy by its version, whether it is made or not."""
    first = "" if run.summary is None else run.summary.policies[0].fingerprint
    planned = {plan.round_index + 1: plan.policy for plan in run.plans}
    made = {report.round + 1: report.policy.fingerprint for report in run.rounds}
    return dict(sorted({0: first, **planned, **made}.items()))


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
            if cache.origin != "replayed":
                _arrow(axis, (cache.policy_version, 2), (below, 0))
            axis.plot(below, 0, "^", color=SERIES[2], markersize=7, zorder=3)
            axis.plot(x, 1, "s", color=SERIES[1], markersize=6, zorder=3)
        _arrow(axis, (x, 1), (round_index + 1, 2))


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "->", "color": FAINT, "linewidth": 0.9, "shrinkA": 5, "shrinkB": 6}
    axis.annotate("", end, start, arrowprops=style)


def _table(
    caches: dict[int, tuple[CacheRecord, ...]], policies: dict[int, str], done: set[int]
) -> Table:
    rows: list[list[str]] = []
    for round_index, cache in ((r, cache) for r in sorted(caches) for cache in caches[r]):
        version = round_index + 1
        author = "" if cache.origin == "replayed" else policies.get(cache.policy_version, "")
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
