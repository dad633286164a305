"""The rounds in order: first those that the store can name, then those behind them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from opd_stream.costs import TokenCounts, train_flops
from opd_stream.store.artifact import summed_counts
from opd_stream.store.policy import PolicyArtifact
from opd_stream.windows import AdaptiveWindow, FixedWindow
from pipeline.caches import ReplaySource
from pipeline.forecast.amounts import Amount, Basis, RoundForecast, Stage
from pipeline.forecast.collected import (
    Rows,
    extended_rows,
    fresh_rows,
    kept_rows,
    probe_stages,
)
from pipeline.forecast.known import Known
from pipeline.forecast.lengths import expected_counts, measured_of
from pipeline.forecast.units import commits_of, sizes_of, stage_of, unit_rows, work_on
from pipeline.plan import RoundPlan, is_due, plan_round
from pipeline.rounds import Round, named_checkpoint, rounds
from stages.checkpoints import Checkpoint
from stages.evaluate import evaluation_rollouts
from stages.prompts import every_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training reads in a round, done or expected; a live teacher would read as much."""

    counts: TokenCounts
    steps: int


def forecast_rounds(known: Known) -> Iterator[tuple[RoundForecast, TokenCounts]]:
    """Each round, with the counts of what it trains on; number -1 is the initial evaluation."""
    config, first_step, window = known.config, 0, None
    nothing = TokenCounts(tokens=0, completion_tokens=0, pairs=0)
    if config.evaluation is not None:
        stages = tuple(_evaluate(known, known.setup.student))
        window = config.evaluation.max_new_tokens
        start = RoundForecast(index=-1, window_tokens=window, first_step=0, steps=0, stages=stages)
        yield start, nothing
    named = rounds(known.setup, opened=partial(_named, known))
    source = None if config.replay is None else ReplaySource(known.setup, config.replay)
    decided: int | None = None
    for round_index in range(config.rounds):
        here = next(named, None)
        plan = (
            here.plan
            if here is not None
            else plan_round(
                config, round_index=round_index, first_step=first_step, decided_window=decided
            )
        )
        stages, rows = _collected(known, plan, here, source)
        is_trained = here is not None and here.policy.is_complete()
        student: Checkpoint | None = None
        if here is not None and is_trained:
            trained = _was_trained(here.policy)
            student = _named(known, here.policy)
            outcome = here.policy.manifest().outcome
            decision = outcome.window_decision
            decided = decided if decision is None else decision.window_tokens
        else:
            trained = _will_be_trained(known, plan, rows)
        stages.append(_train(known, plan, rows, trained, is_trained=is_trained))
        if is_due(config, round_index):
            stages += _evaluate(known, student)
        first_step = plan.first_step + trained.steps
        forecast = RoundForecast(
            index=round_index,
            window_tokens=rows[-1].window_tokens,
            first_step=plan.first_step,
            steps=trained.steps,
            stages=tuple(stages),
        )
        yield forecast, trained.counts


def _named(known: Known, policy: PolicyArtifact) -> Checkpoint:
    """A policy by its identity alone: its folder may be on another machine."""
    return Checkpoint(folder=known.setup.student.folder, identity=named_checkpoint(policy).identity)


def _collected(
    known: Known, plan: RoundPlan, here: Round | None, source: ReplaySource | None
) -> tuple[list[Stage], list[Rows]]:
    """Generate, score and probe, and the rows that the round trains on."""
    if source is not None:
        return [], [kept_rows(known, plan, cache) for cache in source.caches(plan.round_index)]
    if here is None:
        stages, rows = fresh_rows(known, plan, None)
        return [*stages, *probe_stages(known, plan, rows, None)], [rows]
    stages: list[Stage] = []
    trained: list[Rows] = []
    for cache in here.caches:
        if cache.rollouts.round_index != here.index:
            trained.append(kept_rows(known, plan, cache))
            continue
        is_fresh = cache.origin in ("fresh", "ahead")
        made, rows = fresh_rows(known, plan, cache) if is_fresh else extended_rows(known, cache)
        stages += [*made, *(probe_stages(known, plan, rows, here) if is_fresh else [])]
        trained.append(rows)
    return stages, trained


def _was_trained(policy: PolicyArtifact) -> Trained:
    outcome = policy.manifest().outcome
    counts = outcome.trained
    return Trained(
        counts=TokenCounts(
            tokens=counts.row_tokens,
            completion_tokens=counts.tokens,
            pairs=counts.row_pairs,
        ),
        steps=outcome.steps,
    )


def _will_be_trained(known: Known, plan: RoundPlan, parts: Sequence[Rows]) -> Trained:
    """Every epoch over every row, each step up to its own window."""
    rows_per_step, rows = known.config.train.rows_per_step, sum(part.rows for part in parts)
    per_epoch = -int(-rows // rows_per_step)
    steps = per_epoch * known.config.staleness.max_epochs
    window = known.config.rollouts.window
    if isinstance(window, AdaptiveWindow):
        window = FixedWindow(tokens=plan.window_tokens)
    epochs: Counter[int] = Counter()  # window -> share of the rows that a step with it reads
    for step in range(steps):
        in_step = min(rows_per_step, rows - step % per_epoch * rows_per_step)
        epochs[window.tokens_at(plan.first_step + step)] += in_step / rows  # pyright: ignore
    total = TokenCounts(tokens=0, completion_tokens=0, pairs=0)
    for tokens, share in epochs.items():
        for part in parts:
            total += (
                expected_counts(
                    part.rows, min(tokens, part.window_tokens), part.lengths, part.measured
                )
                * share
            )
    return Trained(counts=total, steps=steps)


def _train(
    known: Known, plan: RoundPlan, parts: Sequence[Rows], trained: Trained, *, is_trained: bool
) -> Stage:
    amount = Amount(
        rows=sum(part.rows for part in parts),
        tokens=trained.counts.completion_tokens,
        flops=train_flops(
            known.student, trained.counts, recomputed=known.config.train.gradient_checkpointing
        ),
    )
    is_measured = all(part.measured is not None for part in parts)
    basis: Basis = "estimated" if is_measured else "full window"
    return Stage(
        name="train",
        window_tokens=max(part.window_tokens for part in parts),
        prompts=sum(part.prompts for part in parts),
        done=amount if is_trained else Amount(),
        left=Amount() if is_trained else amount,
        store=f"{int(is_trained)} of 1 policy",
        basis="measured" if is_trained else basis,
    )


def _evaluate(known: Known, student: Checkpoint | None) -> Iterator[Stage]:
    """Sampling on held-out prompts, where it is known how many there are."""
    for problems in known.opened.evaluation:
        rows, settings = problems.source.rows, problems.settings
        if rows is None:
            continue
        artifact = None
        if student is not None:
            artifact = evaluation_rollouts(
                known.setup.store,
                known.config,
                settings,
                prompts=problems.artifact,
                student=student,
                stop_ids=known.setup.stop_ids,
            )
        commits, window = commits_of(artifact), settings.max_new_tokens
        found = measured_of(window, summed_counts(commits.values()))
        known.evaluated = found or known.evaluated
        known.evaluation_sizes = sizes_of(commits, known.evaluation_sizes)
        units = unit_rows(
            artifact,
            commits,
            partial(
                expected_counts,
                window_tokens=window,
                prompts=problems.source.chosen(every_prompt()),
                measured=known.evaluated,
            ),
            prompts=rows,
            prompts_per_unit=known.config.prompts_per_unit,
            samples=settings.samples_per_prompt,
        )
        yield stage_of(
            "evaluate",
            work_on(units, commits, known.student, known.evaluation_sizes),
            window_tokens=window,
            prompts=rows,
            is_measured=known.evaluated is not None,
        )
