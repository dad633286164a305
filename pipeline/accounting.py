"""What rounds and runs did, summed over the commit records of their steps and never remembered.

A unit's commit record says which run made it and how long that took, so the same run resumed after
a kill counts its own work once, and a run that finds a unit made by another counts it as reused. It
does not matter on which machine a stage ran: whoever finishes a round writes the same report.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from opd_stream.config import PLACEMENT, Config, Train, counts_rounds
from opd_stream.costs import (
    ModelShape,
    TokenCounts,
    forward_flops,
    train_flops,
    unknown_costs,
)
from opd_stream.coverage import SEE_MORE, SEE_MORE_OF_A_CACHE, coverage_text, is_low
from opd_stream.errors import UserError
from opd_stream.filters import OTHER_TEACHER, dropped_of, dropped_text
from opd_stream.outcome import TrainOutcome
from opd_stream.section import Record
from opd_stream.store.artifact import Commit, summed_counts
from opd_stream.store.files import canonical_json, sha256
from opd_stream.store.recipe import differing_fields
from pipeline.caches import Cache, replayed_caches
from pipeline.plan import is_due
from pipeline.records import (
    AlignmentShares,
    EvaluationRecord,
    PolicyRecord,
    ReusedUnits,
    RoundPolicy,
    RoundReport,
    RoundReuse,
    RoundTokens,
    RunSeconds,
    RunSummary,
    StageNumbers,
    SummaryEvaluation,
    TeacherFigures,
    TeacherSummary,
    TokenNumbers,
)
from pipeline.rounds import Round, checkpoint_of, rounds
from pipeline.run_folder import RunFolder, is_below
from pipeline.setup import Setup
from stages.checkpoints import Checkpoint, model_shape, student_shape
from stages.step import GIVEN, PROBE, PROBE_SCORE, Stage, Step, of_stage
from stages.workers import Role

Span = tuple[float, float]

# What a report says of a policy needs no weights.
described_checkpoint = partial(checkpoint_of, part="texts")

ENOUGH_TRAINED = 0.9  # of the scored tokens; below, a line says so


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """Brings the reports and the summary of a run's folder up to date with the store."""

    setup: Setup
    folder: RunFolder
    run_id: str
    warn: Callable[[str], None]
    _reports: dict[int, RoundReport] = field(default_factory=dict)
    _metrics: dict[int, bytes | None] = field(default_factory=dict)

    @cached_property
    def models(self) -> "Models":
        """What the costs of the run follow from."""
        setup = self.setup
        return Models(
            train=setup.config.train,
            student=student_shape(setup.student, setup.config.train.lora),
            teachers={
                each.name: model_shape(each.teacher)
                for each in setup.by_teacher
                if each.teacher is not None
            },
        )

    def write_round(self, round_: Round, *, is_changed: bool) -> None:
        """Metrics, plan and report of a finished round.

        Args:
            round_: the round.
            is_changed: whether something was made or evaluated since its report was written.
        """
        config = self.setup.config
        known = None if is_changed else self.folder.report(round_.index)
        if (
            known is None
            or known.policy.folder != str(round_.policy.folder("name"))
            or (known.evaluation is None and is_due(config, round_.index))
            or not self.folder.metrics.exists()
            or not self.folder.is_planned(round_.index)
        ):
            self.folder.write_plan(round_)
            self.folder.add_metrics(round_)
            known = self._new_report(round_)
            if known is None:
                return
            self.folder.write_report(known)
            for line in (
                *dropped_line(known),
                *untrained_line(known, config),
                *uncovered_line(known, config),
            ):
                self.warn(line)
        self._reports[round_.index] = known
        self._metrics[round_.index] = round_.policy.metrics()

    def mend_metrics(self) -> None:
        """Once all rounds are written: metrics.jsonl has the lines of their policies."""
        if None not in self._metrics.values():
            self.folder.mend_metrics(
                b"".join(self._metrics[index] or b"" for index in sorted(self._metrics))
            )

    def write_summary(self, calls: dict[str, float]) -> RunSummary:
        """The run so far.

        Args:
            calls: seconds of all calls of `run` together (`wall`), and of these when nothing was
                sampled, scored, trained or evaluated (`other`); empty where there was none.
        """
        student = self.setup.student
        summary = run_summary(
            reports=[self._reports[index] for index in sorted(self._reports)],
            rounds_planned=self.setup.config.rounds,
            due={index for index in range(self.setup.config.rounds) if self._is_asked_for(index)},
            initial=PolicyRecord(
                version=0,
                fingerprint=student.identity.fingerprint,
                weights_sha256=student.identity.weights_sha256,
            ),
            initial_evaluation=self._evaluation(student, is_first=True),
            calls=calls,
        )
        self.folder.write_summary(summary)
        return summary

    def write(self, changed: int | None) -> None:
        """All finished rounds and the summary, whoever made them; `changed` is a round's number."""
        for round_ in rounds(self.setup, opened=described_checkpoint):
            if round_.policy.is_complete():
                self.write_round(round_, is_changed=round_.index == changed)
        self.write_summary(self.folder.calls())

    def share(self, round_: Round) -> None:
        """Tell the store which round is worked on, and for which run of several machines.

        What a run has cost is then known on each of its machines, and `gc` leaves it.
        """
        self.setup.store.add_to_run(
            self.run_id,
            self.folder.path,
            inputs_of(self.setup) | round_.names(),
            shared=_name_of_run(self.setup),
        )

    def _is_asked_for(self, round_index: int) -> bool:
        """Whether a run is not finished without the evaluation of a round's policy."""
        evaluation = self.setup.config.evaluation
        is_default = evaluation is not None and evaluation.held_out is not None
        return not is_default and is_due(self.setup.config, round_index)

    def _evaluation(self, policy: Checkpoint, *, is_first: bool = False) -> EvaluationRecord | None:
        setup = self.setup
        if setup.config.evaluation is None:
            return None
        from pipeline.evaluation import evaluation_record

        run_ids = setup.store.ids_of_run(self.run_id)
        return evaluation_record(
            setup.config, setup.store, policy, setup.vocabulary, run_ids, is_first=is_first
        )

    def _new_report(self, round_: Round) -> RoundReport | None:
        """None after a mistake of ours, which must not end a run that has trained."""
        try:
            return self._report(round_)
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            self.warn(
                f"round {round_.index} has no report ({type(error).__name__}: {error}), a bug; its "
                "policy is whole, and the report is written when the command is called again"
            )
            return None

    def _report(self, round_: Round) -> RoundReport:
        evaluation = self._evaluation(described_checkpoint(round_.policy))
        run_ids = self.setup.store.ids_of_run(self.run_id)
        return round_report(round_, run_ids, self.models, evaluation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The shapes of a run's models; those of its policies are the student's."""

    train: Train  # how the student does
    student: ModelShape
    teachers: dict[str | None, ModelShape]  # by name, of several

    @property
    def unknown(self) -> tuple[str, ...]:
        """A line for each whose cost is not known."""
        teachers = [*self.teachers.values()] or [None]
        lines = (unknown_costs(student=self.student, teacher=teacher) for teacher in teachers)
        return tuple(dict.fromkeys(line for each in lines for line in each))


def round_report(
    round_: Round,
    run_ids: Collection[str],
    models: Models,
    evaluation: EvaluationRecord | None,
) -> RoundReport:
    """The report of a finished round.

    Args:
        round_: the round.
        run_ids: of the run, one for each machine's folder; what others made counts as reused.
        models: of the run.
        evaluation: of its policy, if there is one.
    """
    outcome = round_.policy.manifest().outcome
    work, last = RoundWork(round_, run_ids, outcome), outcome.epochs[-1]
    rollouts = summed_counts(c for each in round_.own_caches for c in each.used(each.rollouts))
    scores = summed_counts(c for cache in round_.caches for c in cache.used(cache.scores))
    length_share = _share(rollouts, "length_rows", "rows")
    return RoundReport(
        round=round_.index,
        window_tokens=round_.window_tokens,
        first_step=round_.plan.first_step,
        steps=outcome.steps,
        rows=outcome.rows,
        tokens=work.tokens(),
        refused_rows=int(scores.get("refused_rows", 0)),
        dropped_rows=dropped_of(_dropped_counts(round_.caches)),
        length_share=length_share,
        terminator_rate=1 - length_share,
        repeat_ratio=_share(rollouts, "repeated_tokens", "completion_tokens"),
        alignment=_alignment(scores),
        cache_bytes=sum(commit.bytes for commit in work.used(work.cached)),
        flops=work.flops(models),
        unknown_costs=models.unknown,
        seconds=work.by_stage(_seconds, outcome.seconds),
        cpu_seconds=work.by_stage(_cpu_seconds, outcome.cpu_seconds),
        audit_cpu_seconds=work.audit_cpu_seconds(),
        reused=work.reused(),
        processes=outcome.processes,
        extrapolations=outcome.extrapolations,
        held_out_rows=outcome.held_out_rows,
        **_windows(outcome),
        sampler_gap=outcome.start.sampler_gap,
        trained_share=outcome.trained_share,
        cut_share=outcome.cut_tokens / max(outcome.cached_tokens or 0, 1),
        drift_floor=outcome.start.floor,
        start_drift=outcome.start.policy_drift,
        start=outcome.start,
        coverage=outcome.start.coverage,
        teachers=work.teachers(round_.caches),
        unit_decisions=round_.unit_decisions,
        policy_drift=last.policy_drift,
        effective_sample_fraction=last.effective_sample_fraction,
        epochs=outcome.epochs,
        decision=last.reason,
        policy=_policy_record(round_),
        caches=tuple(cache.record() for cache in round_.caches),
        evaluation=evaluation,
    )


def _share(counts: Mapping[str, float], part: str, whole: str) -> float:
    return counts.get(part, 0) / max(counts.get(whole, 0), 1)


def _windows(outcome: TrainOutcome) -> dict[str, Any]:
    """What audits of the window decided."""
    names = ("window_decision", "window_audits", "decision_age")
    return {name: getattr(outcome, name) for name in names}


def _dropped_counts(caches: Sequence[Cache]) -> dict[str, float]:
    """Counts of rollouts that are left out, once where several teachers would have read them."""
    reason_of = {
        (cache.rollouts.artifact.name, commit.unit, row): f"dropped_{reason}"
        for cache in caches
        for commit in cache.used(cache.scores)
        for reason, rows in commit.dropped_rows.items()
        if reason != OTHER_TEACHER
        for row in rows
    }
    return dict(Counter(reason_of.values()))


def _policy_record(round_: Round) -> RoundPolicy:
    return RoundPolicy(
        version=round_.index + 1,
        fingerprint=round_.policy.fingerprint,
        weights_sha256=round_.policy.manifest().weights_sha256,
        folder=str(round_.policy.folder("name")),
    )


def untrained_line(report: RoundReport, config: Config) -> Iterator[str]:
    """What to know of scores that were paid for and trained nothing."""
    share = report.trained_share
    if share is None or share >= ENOUGH_TRAINED:
        return
    if 2 * report.cut_share >= 1 - share:
        why = "the rest lies behind the training window (rollouts.window)"
    elif report.alignment is not None:
        why = "the rest is in no chunk that both tokenizers share (scores.alignment)"
    elif config.train.segment is not None:
        why = "the rest lies outside train.segment"
    else:
        why = "the rest is left out by train.guards.mask_first"
    yield f"round {report.round}: {share:.0%} of its scored tokens were trained; {why}"


def dropped_line(report: RoundReport) -> Iterator[str]:
    """What `rollouts.keep` left out of a round."""
    if report.dropped_rows:
        yield f"round {report.round}: {dropped_text(report.dropped_rows)}; {report.rows:,} train"


def uncovered_line(report: RoundReport, config: Config) -> Iterator[str]:
    """What to know of candidates that see little of the distance to the teacher."""
    found, reads = report.coverage, {part.reads for part in config.train.objective}
    if found is None or "candidates" not in reads or not is_low(found):
        return
    remedy = SEE_MORE if config.replay is None else SEE_MORE_OF_A_CACHE
    yield f"round {report.round}: the cached candidates {coverage_text(found, remedy)}"


class RoundWork:
    """What a run did for a round, summed over the units that it made itself."""

    def __init__(self, round_: Round, run_ids: Collection[str], outcome: TrainOutcome) -> None:
        self.run_ids, self.outcome = run_ids, outcome
        # Of a replay too, whose units count as reused; units kept from earlier rounds do not.
        self.steps = [s for s in round_.steps[:-1] if s.is_new or s.model is None]
        self.probes = [step for step in self.steps if step.kind in (PROBE, PROBE_SCORE)]
        self.cached = [step for step in self.steps if step not in self.probes]
        self.is_trained_here = outcome.made_by in run_ids
        self._units = {
            step.artifact.name: cache.units
            for cache in round_.caches
            for step in (cache.rollouts, cache.scores)
        }

    def used(self, steps: Iterable[Step]) -> list[Commit]:
        """The units of some steps that the round uses: of an artifact in a replay perhaps some."""
        found = [(self._units.get(s.artifact.name), c) for s in steps for c in s.commits()]
        return [commit for units, commit in found if units is None or commit.unit in units]

    def commits(self, steps: Iterable[Step]) -> list[Commit]:
        """Those that the run made."""
        return [commit for commit in self.used(steps) if commit.made_by in self.run_ids]

    def by_stage(self, number: Callable[[list[Commit]], float], train: float) -> StageNumbers:
        """A number of the units of each stage, and that of training."""
        made = [step for step in of_stage(self.steps, "generate") if step.kind != GIVEN]
        return StageNumbers(
            generate=number(self.commits(made)),
            score=number(self.commits(of_stage(self.steps, "score"))),
            train=train if self.is_trained_here else 0.0,
        )

    def tokens(self) -> RoundTokens:
        """Completion tokens."""
        made = self.by_stage(_tokens, self.outcome.trained.tokens)
        return RoundTokens(
            generated=int(made.generate),
            teacher_scored=int(made.score),
            trained=int(made.train),
            probed=int(_tokens(self.commits(of_stage(self.probes, "score")))),
        )

    def flops(self, models: Models) -> StageNumbers:
        """Operations, by the cost model of `opd_stream/costs.py`."""
        trained = self.outcome.trained
        read = TokenCounts(
            tokens=trained.row_tokens, completion_tokens=trained.tokens, pairs=trained.row_pairs
        )
        train = train_flops(
            models.student,
            read,
            recomputed=self.outcome.gradient_checkpointing,
            selects=models.train.select is not None,
            has_reference=models.train.reference is not None,
        )
        return StageNumbers(
            generate=self._flops("generate", {None: models.student})
            + self._flops("generate", models.teachers, author="teacher"),
            score=self._flops("score", models.teachers),
            train=train if self.is_trained_here else 0.0,
        )

    def _flops(
        self, stage: Stage, shapes: Mapping[str | None, ModelShape], author: Role = "student"
    ) -> float:
        steps = [step for step in of_stage(self.steps, stage) if step.kind != GIVEN]
        made = [s for s in steps if s.model is not None and s.kind.author == author]
        return sum(self._step_flops(step, shapes.get(step.teacher)) for step in made)

    def _step_flops(self, step: Step, shape: ModelShape | None) -> float:
        counts = summed_counts(self.commits([step]))
        if shape is None or "pairs" not in counts:
            return 0.0
        names = ("tokens", "completion_tokens", "pairs")
        return forward_flops(shape, TokenCounts(**{n: counts[n] for n in names}))

    def teachers(self, caches: Sequence[Cache]) -> dict[str, TeacherFigures]:
        """What each of several teachers scored, and how far the student was from it."""
        found: dict[str, TeacherFigures] = {}
        for cache in caches:
            if (name := cache.scores.teacher) is None:
                continue
            used = cache.used(cache.scores)
            counts = summed_counts(used)
            tokens, gap = counts.get("completion_tokens", 0.0), counts.get("student_gap")
            found[name] = TeacherFigures(
                teacher_scored=int(_tokens(self.commits([cache.scores]))),
                rows=int(counts["rows"]) - sum(len(commit.skipped_rows) for commit in used),
                tokens=int(tokens),
                reverse_kl=None if gap is None or not tokens else gap / tokens,
            )
        return found

    def audit_cpu_seconds(self) -> float:
        """CPU seconds of probes and of the decisions they serve."""
        decided, audits = self.outcome.window_decision, self.outcome.window_audits
        audits = audits or (() if decided is None else (decided,))
        return _cpu_seconds(self.commits(self.probes)) + sum(each.cpu_seconds for each in audits)

    def reused(self) -> RoundReuse:
        """What was made by others."""

        def units(stage: Stage) -> int:
            steps = of_stage(self.cached, stage)
            return len(self.used(steps)) - len(self.commits(steps))

        return RoundReuse(
            rollout_units=units("generate"),
            score_units=units("score"),
            policy=not self.is_trained_here,
        )


def run_summary(
    *,
    reports: Sequence[RoundReport],
    rounds_planned: int,
    due: Collection[int],
    initial: PolicyRecord,
    initial_evaluation: EvaluationRecord | None,
    calls: dict[str, float],
) -> RunSummary:
    """The whole run in one value, for other programs.

    Args:
        reports: of the finished rounds, in order.
        rounds_planned: of the config.
        due: rounds whose policy is evaluated.
        initial: the initial student.
        initial_evaluation: of it, if there is one.
        calls: see `Accounts.write_summary`.
    """
    found = [initial_evaluation, *(report.evaluation for report in reports)]
    is_evaluated = all(r.evaluation is not None for r in reports if r.round in due)
    seconds = _total(StageNumbers, [report.seconds for report in reports], digits=3)
    evaluate = sum(each.seconds for each in found if each is not None)
    return RunSummary(
        finished=len(reports) == rounds_planned and is_evaluated,
        rounds=len(reports),
        rounds_planned=rounds_planned,
        evaluations=tuple(
            SummaryEvaluation.model_validate(
                {"round": version, "policy_version": version, **evaluation.as_json()}
            )
            for version, evaluation in enumerate(found)
            if evaluation is not None
        ),
        tokens=_total(TokenNumbers, [report.tokens for report in reports]),
        flops=_total(StageNumbers, [report.flops for report in reports]),
        unknown_costs=tuple(dict.fromkeys(line for r in reports for line in r.unknown_costs)),
        seconds=RunSeconds(
            **seconds.model_dump(),
            evaluate=round(evaluate, 3),
            **{name: round(value, 3) for name, value in calls.items()},
        ),
        cpu_seconds=_total(StageNumbers, [report.cpu_seconds for report in reports], digits=3),
        reused=_total(ReusedUnits, [report.reused for report in reports]),
        policies=(initial, *(PolicyRecord(**report.policy.model_dump()) for report in reports)),
        final_policy=reports[-1].policy.folder if reports else None,
        caches=tuple(report.caches for report in reports),
        steps=sum(report.steps for report in reports),
        refused_rows=sum(report.refused_rows for report in reports),
        dropped_rows=dict(sum((Counter(r.dropped_rows) for r in reports), Counter[str]())),
        teachers=_all_teachers(reports),
        cache_bytes=sum(report.cache_bytes for report in reports),
        decisions=tuple(report.decision for report in reports),
    )


def _all_teachers(reports: Sequence[RoundReport]) -> dict[str, TeacherSummary]:
    """The figures of several teachers, of all rounds."""
    names = dict.fromkeys(name for report in reports for name in report.teachers)
    found = {name: [r.teachers[name] for r in reports if name in r.teachers] for name in names}
    return {
        name: TeacherSummary(
            teacher_scored=sum(each.teacher_scored for each in rounds_),
            rows=sum(each.rows for each in rounds_),
            reverse_kl=tuple(each.reverse_kl for each in rounds_),
        )
        for name, rounds_ in found.items()
    }


def inputs_of(setup: Setup) -> set[str]:
    """The names of what a run finds made: its prompts, and what all rounds of a replay read.

    Raises:
        UserError: some of a replay is not in the store, or not of one teacher.
    """
    names = {setup.prompts.name}
    for each in setup.by_teacher:
        if each.teacher_prompts is not None:
            names.add(each.teacher_prompts.name)
        if each.alignment is not None:
            names.add(f"prompts/{each.alignment.inputs['prompts'][:16]}")
    caches = [cache for caches in replayed_caches(setup) or () for cache in caches]
    return names | {step.artifact.name for c in caches for step in (c.rollouts, c.scores)}


def busy_seconds(spans: Iterable[Span]) -> float:
    """Length of the union of spans: time in which at least one of them was going on."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


N = TypeVar("N", bound=Record)


def _total(kind: type[N], numbers: Sequence[Record], digits: int | None = None) -> N:
    """Records of numbers added up, field by field."""
    sums = {name: sum(getattr(each, name) for each in numbers) for name in kind.model_fields}
    if digits is not None:
        sums = {name: round(value, digits) for name, value in sums.items()}
    return kind(**sums)


def _alignment(counts: dict[str, float]) -> AlignmentShares | None:
    if "student_tokens" not in counts:
        return None
    tokens = max(counts["student_tokens"], 1)
    return AlignmentShares(
        aligned_share=counts["aligned_tokens"] / tokens,
        chunk_share=counts["chunk_tokens"] / tokens,
    )


def _tokens(commits: Iterable[Commit]) -> float:
    return summed_counts(commits).get("completion_tokens", 0.0)


def _seconds(commits: Iterable[Commit]) -> float:
    return round(sum(commit.seconds for commit in commits), 3)


def _cpu_seconds(commits: Iterable[Commit]) -> float:
    """Of the processes that did the work, all threads; of the first process in training."""
    return round(summed_counts(commits).get("cpu_seconds", 0.0), 3)


def _name_of_run(setup: Setup) -> str:
    """Digest of what all machines of a run agree on; where files lie may differ between them.

    What a path leads to is in the recipe of the first round's policy.
    """
    config = setup.config
    settings = differing_fields(config.model_dump(), {})
    paths = [name for name, (value, _) in settings.items() if isinstance(value, Path)]
    grows = () if counts_rounds(config) else ("rounds",)
    free = (*PLACEMENT, *paths, *grows, "evaluation", "held_out_prompts")
    agreed = {
        name: value
        for name, (value, _) in differing_fields(config.model_dump(mode="json"), {}).items()
        if not is_below(name, free)
    }
    return sha256(canonical_json([agreed, next(rounds(setup)).policy.fingerprint]))
