"""The stages that make rows: generate and score, of fresh rollouts, continued ones and probes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from opd_stream.costs import TokenCounts
from opd_stream.store.artifact import Artifact, Commit, summed_counts
from opd_stream.windows import AdaptiveWindow
from pipeline.caches import Cache
from pipeline.forecast.amounts import Stage
from pipeline.forecast.known import Known
from pipeline.forecast.lengths import Measured, PromptLengths, expected_counts, measured_of
from pipeline.forecast.precedents import similar_rollouts, similar_scores
from pipeline.forecast.units import (
    UnitRows,
    commits_of,
    counts_in,
    sizes_of,
    stage_of,
    unit_rows,
    work_on,
)
from pipeline.plan import RoundPlan
from pipeline.rounds import Round
from stages.prompts import probe_size, round_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows that a round trains on, from one cache."""

    rows: float
    prompts: int
    window_tokens: int  # they were or will be sampled with
    lengths: PromptLengths
    measured: Measured | None  # None: each is taken to fill its window


Collected = tuple[list[Stage], Rows]


def fresh_rows(known: Known, plan: RoundPlan, cache: Cache | None) -> Collected:
    """Fresh rollouts; without a cache, those of a round that cannot be named yet."""
    settings, per_unit = known.config.rollouts, known.config.prompts_per_unit
    selection = round_prompts(
        seed=known.config.seed, round_index=plan.round_index, per_round=settings.prompts_per_round
    )
    if cache is not None:
        selection = cache.rollouts.shards.recipe.settings["selection"]
        per_unit = max((slot.last - slot.first for slot in cache.slots), default=per_unit)
    ranges = selection.get("ranges", [(0, settings.prompts_per_round)])
    prompts = sum(last - first for first, last in ranges)
    lengths = known.opened.prompts.chosen(selection)
    commits = commits_of(None if cache is None else cache.rollouts.shards)
    found = measured_of(plan.window_tokens, summed_counts(commits.values()))
    known.measured = found or known.measured
    known.rollouts_sizes = sizes_of(commits, known.rollouts_sizes)
    if known.measured is None and cache is not None:
        _look_elsewhere(known, cache)
    units = unit_rows(
        None if cache is None else cache.rollouts.shards,
        commits,
        partial(
            expected_counts,
            window_tokens=plan.window_tokens,
            prompts=lengths,
            measured=known.measured,
        ),
        prompts=prompts,
        prompts_per_unit=per_unit,
        samples=settings.samples_per_prompt,
    )
    rows = Rows(
        rows=sum(unit.rows for unit in units),
        prompts=prompts,
        window_tokens=plan.window_tokens,
        lengths=lengths,
        measured=known.measured,
    )
    return _stages(known, cache, units, commits, rows, learn=True), rows


def _look_elsewhere(known: Known, cache: Cache) -> None:
    """Take what other runs in the store measured."""
    store = known.setup.store
    rollouts = similar_rollouts(store, cache.rollouts.shards.recipe)
    if rollouts is not None:
        commits = commits_of(rollouts)
        window = rollouts.recipe.settings["window_tokens"]
        known.measured = measured_of(window, summed_counts(commits.values()))
        known.rollouts_sizes = sizes_of(commits, known.rollouts_sizes)
    scores = similar_scores(store, cache.scores.shards.recipe)
    known.scores_sizes = sizes_of(commits_of(scores), known.scores_sizes)


def extended_rows(known: Known, cache: Cache) -> Collected:
    """Rows that go on to a longer window: new tokens are sampled and scored, whole rows stored."""
    recipe, commits = cache.rollouts.shards.recipe, commits_of(cache.rollouts.shards)
    base = known.setup.store.by_fingerprint("rollouts", recipe.inputs["rollouts"])
    before, window = commits_of(base), recipe.settings["window_tokens"]
    lengths = known.opened.prompts.chosen(recipe.settings["selection"])
    units: list[UnitRows] = []
    for unit, old in enumerate(recipe.settings["extends"]):
        rows, cut = (before[old].counts[name] for name in ("rows", "length_rows"))
        whole = expected_counts(cut, window, lengths, None)
        new = TokenCounts(
            tokens=whole.tokens,
            completion_tokens=cut * (window - base.recipe.settings["window_tokens"]),
            pairs=whole.pairs,
        )
        units.append(
            UnitRows(
                unit=unit,
                rows=rows,
                counts=new,
                commit=commits.get(unit),
                stored=expected_counts(rows, window, lengths, known.measured),
            )
        )
    trained = Rows(
        rows=sum(unit.rows for unit in units),
        prompts=sum(slot.last - slot.first for slot in cache.slots),
        window_tokens=window,
        lengths=lengths,
        measured=known.measured,
    )
    return _stages(known, cache, units, commits, trained, learn=False), trained


def kept_rows(known: Known, plan: RoundPlan, cache: Cache) -> Rows:
    """Rows that are there: of an earlier round, or of an earlier run."""
    commits = commits_of(cache.rollouts.shards)
    counts = summed_counts(commits[unit] for unit in cache.units or commits)
    window = cache.window_tokens or plan.window_tokens
    settings = cache.rollouts.artifact.recipe.settings
    is_whole = "extends" not in settings  # else only new tokens are counted
    selection = settings.get("selection")
    return Rows(
        rows=counts["rows"],
        prompts=sum(slot.last - slot.first for slot in cache.slots)
        or known.config.rollouts.prompts_per_round,
        window_tokens=window,
        lengths=known.opened.prompts.chosen(selection or {"order": "all"}),
        measured=measured_of(window, counts) if is_whole else known.measured,
    )


def probe_stages(known: Known, plan: RoundPlan, rows: Rows, here: Round | None) -> list[Stage]:
    """The probes of an audit, if the round takes one: unfinished rows, taken to fill the window."""
    window, is_last = known.config.rollouts.window, plan.round_index == known.config.rounds - 1
    if not isinstance(window, AdaptiveWindow) or is_last:
        return []
    if plan.round_index % window.every_rounds:
        return []
    if here is not None and here.probe is None:
        return []
    cut = rows.rows if rows.measured is None else rows.rows * rows.measured.cut_share
    share = {"rows": window.probe_rows, "share": window.probe_share}
    size = probe_size(round(rows.rows), share, -int(-cut // 1))
    rollouts, scores = (None, None)
    if here is not None and here.probe is not None:
        rollouts, scores = here.probe.rollouts.shards, here.probe.shards
    commits = commits_of(rollouts)
    if not size and not commits:
        return []
    counts = expected_counts(size, window.max_window_tokens, rows.lengths, None)
    if 0 in commits:
        counts = counts_in(commits.values())
    unit = UnitRows(unit=0, rows=size, counts=counts, commit=commits.get(0))
    assert known.teacher is not None
    sampled = work_on([unit], commits, known.student, known.rollouts_sizes)
    scored = work_on([unit], commits_of(scores), known.teacher, known.scores_sizes)
    what = {"window_tokens": window.max_window_tokens, "prompts": size, "is_measured": False}
    return [stage_of("probe", sampled, **what), stage_of("probe score", scored, **what)]


def _stages(
    known: Known,
    cache: Cache | None,
    units: list[UnitRows],
    commits: Mapping[int, Commit],
    rows: Rows,
    *,
    learn: bool,
) -> list[Stage]:
    """Generate and score; with `learn` later rounds take the measured size of these shards."""
    assert known.teacher is not None  # else nothing is sampled
    scores: Artifact | None = None if cache is None else cache.scores.shards
    scored = commits_of(scores)
    if learn:
        known.scores_sizes = sizes_of(scored, known.scores_sizes)
    return [
        stage_of(
            "generate",
            work_on(units, commits, known.student, known.rollouts_sizes),
            window_tokens=rows.window_tokens,
            prompts=rows.prompts,
            is_measured=rows.measured is not None,
        ),
        stage_of(
            "score",
            work_on(units, scored, known.teacher, known.scores_sizes),
            window_tokens=rows.window_tokens,
            prompts=rows.prompts,
            is_measured=rows.measured is not None,
        ),
    ]
