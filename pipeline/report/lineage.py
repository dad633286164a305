"""What a run is made of: policies from scores, scores from rollouts, rollouts from policies."""

from dataclasses import dataclass

from matplotlib.axes import Axes

from pipeline.report.parts import Exhibit, Table, left_out
from pipeline.report.read import CacheUse, Run
from pipeline.report.style import FAINT, INK, SERIES
from pipeline.report.svg import inline, panels

SHORT = 16  # digits of a fingerprint, as folders of a store have them
MOST_NAMES = 8  # policies whose fingerprints fit side by side
ROLLOUTS_AT, SCORES_AT = 0.2, 0.5  # to the right of the policy that wrote them
HEIGHTS = {"policies": 2.0, "scores": 1.0, "rollouts": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A round: the policy it made and the caches it trained on."""

    round_index: int
    policy: str
    is_done: bool
    caches: list[CacheUse]


def trainings(run: Run) -> list[Training]:
    """Of every planned round, in order."""
    done = {report.round for report in run.rounds}
    planned = {
        plan.round_index: Training(
            round_index=plan.round_index,
            policy=plan.policy,
            is_done=plan.round_index in done,
            caches=plan.caches,
        )
        for plan in run.plans
    }
    for report in run.rounds:
        if report.round not in planned and report.policy is not None:
            planned[report.round] = Training(
                round_index=report.round,
                policy=report.policy.fingerprint,
                is_done=True,
                caches=report.caches,
            )
    return [planned[place] for place in sorted(planned)]


def lineage_exhibit(run: Run, name: str) -> Exhibit:
    """The graph of the run's artifacts, and the same as a table."""
    title = "Lineage of artifacts"
    rounds = trainings(run)
    if not rounds:
        return left_out(name, title, "No round is planned yet.")
    figure, (axis,) = panels(1, height=2.2)
    first = _first_policy(run)
    policies = {0: first, **{r.round_index + 1: r.policy for r in rounds}}
    planned = {r.round_index + 1 for r in rounds if not r.is_done}
    places: dict[str, float] = {}
    for training in rounds:
        _draw_caches(axis, training, places)
    for version in policies:
        is_done = version not in planned
        face = SERIES[0] if is_done else "none"
        axis.plot(version, 2, "o", markersize=8, markeredgecolor=SERIES[0], markerfacecolor=face)
        if len(policies) <= MOST_NAMES:
            axis.text(version, 2.25, policies[version][:6], ha="center", color=INK, fontsize=7)
    axis.set_yticks(list(HEIGHTS.values()), list(HEIGHTS))
    axis.set_xticks(range(len(policies)) if len(policies) <= 2 * MOST_NAMES else _some(policies))
    axis.set_xlim(-0.5, max(policies) + 0.5)
    axis.set_ylim(-0.5, 2.6)
    axis.set_xlabel("version of the policy")
    axis.grid(visible=False)
    caption = (
        "A policy writes rollouts (down), the teacher scores them (up), and a later policy is "
        "trained on the scores (up again). Continued rollouts hang on the policy of their oldest "
        "tokens. A hollow policy is not made yet."
    )
    return Exhibit(
        name=name,
        title=title,
        caption=caption,
        svg=inline(figure, name, title=f"{title}: {run.name}", description=caption),
        tables=[_table(rounds, policies)],
    )


def _draw_caches(axis: Axes, training: Training, places: dict[str, float]) -> None:
    """Rollouts and scores of a round, each once, with what came from what."""
    for cache in training.caches:
        is_new = cache.scores not in places
        if is_new:
            beside = sum(int(x) == training.round_index for x in places.values())
            places[cache.scores] = training.round_index + SCORES_AT + min(0.12 * beside, 0.24)
        x, version = places[cache.scores], author_of(cache)
        if is_new:
            below = x - SCORES_AT + ROLLOUTS_AT
            _arrow(axis, (below, 0), (x, 1))
            if version is not None:
                _arrow(axis, (version, 2), (below, 0))
            axis.plot(below, 0, "^", color=SERIES[2], markersize=7, zorder=3)
            axis.plot(x, 1, "s", color=SERIES[1], markersize=6, zorder=3)
        _arrow(axis, (x, 1), (training.round_index + 1, 2))


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "->", "color": FAINT, "linewidth": 0.9, "shrinkA": 5, "shrinkB": 6}
    axis.annotate("", end, start, arrowprops=style)


def author_of(cache: CacheUse) -> int | None:
    """Version of the policy of this run that wrote the rollouts; None: not of this run."""
    return None if cache.origin == "replayed" else cache.policy_version


def _some(policies: dict[int, str]) -> list[int]:
    step = -(-len(policies) // MOST_NAMES)
    return list(range(0, len(policies), step))


def _first_policy(run: Run) -> str:
    known = run.summary.policies if run.summary is not None else []
    return known[0].fingerprint if known else ""


def _table(rounds: list[Training], policies: dict[int, str]) -> Table:
    rows: list[list[str]] = []
    for training in rounds:
        for cache in training.caches:
            version = author_of(cache)
            author = "" if version is None else policies.get(version, "")
            rows.append(
                [
                    str(training.round_index),
                    f"policies/{training.policy[:SHORT]}"
                    + ("" if training.is_done else " (not yet)"),
                    f"scores/{cache.scores[:SHORT]}",
                    f"rollouts/{cache.rollouts[:SHORT]}",
                    f"policies/{author[:SHORT]}" if author else "not of this run",
                    cache.origin,
                    "all" if cache.units is None else str(len(cache.units)),
                ]
            )
    head = ["round", "policy", "trained on", "of", "written by", "cache", "units"]
    return Table(caption="Artifacts", head=head, rows=rows, is_text=True)
