"""What a round trains on: units of rollouts and scores, fresh, kept from earlier rounds, extended.

A round has a place for each of its prompts. Where a unit of an earlier round is kept, it holds the
places it had; the other places are sampled anew, with the prompts that the round draws for them.
Everything here follows from the config and from what the policy before has recorded, so a resumed
run and another machine come to the same artifacts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from opd_stream.config import Config
from opd_stream.config.sections import (
    unserved_by_given,
    unserved_by_jumps,
    unserved_by_own,
    unserved_by_selection,
    unserved_by_temperature,
)
from opd_stream.curriculum import chosen_prompts
from opd_stream.errors import UserError
from opd_stream.outcome import TrainOutcome, UnitRecord
from opd_stream.staleness import UnitDecision, UnitState, decide_unit
from opd_stream.store.artifact import Commit
from opd_stream.store.sealed import load_record
from pipeline.plan import RoundPlan
from pipeline.records import CacheRecord, Origin, RunSummary, UnitDecisionRecord
from pipeline.setup import Setup
from stages.checkpoints import Checkpoint
from stages.levels import prompt_levels
from stages.recipes import (
    extension_recipe,
    given_recipe,
    is_given,
    is_unscored,
    rollouts_recipe,
    scores_recipe,
    unscored_recipe,
)
from stages.step import (
    EXTEND,
    GENERATE,
    GIVEN,
    SCORE,
    TEACHER_GIVEN,
    CacheUnits,
    Slot,
    Step,
    StepKind,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Units of one scores artifact with its rollouts, as a round uses them.

    Example:
        >>> [cache.origin for cache in round_.caches]
        ['kept', 'fresh']
    """

    rollouts: Step
    scores: Step
    origin: Origin
    policy_version: int  # of the oldest tokens in it
    slots: tuple[Slot, ...] = ()  # none: every unit, in its own place
    weight: float = 1.0  # of its terms in the loss

    @property
    def units(self) -> tuple[int, ...] | None:
        """Numbers of the units that train; None: all."""
        return tuple(slot.unit for slot in self.slots) or None

    @property
    def is_given(self) -> bool:
        """Whether the student did not write its rollouts."""
        return is_given(self.rollouts.artifact.recipe)

    @property
    def window_tokens(self) -> int | None:
        """New tokens of its rollouts; None of imported rows."""
        return self.rollouts.artifact.recipe.settings.get("window_tokens")

    def used(self, step: Step) -> list[Commit]:
        """Of its rollouts or scores, the commit records of the units that train."""
        commits = step.shards.listed_commits()
        return [commits[unit] for unit in self.units or commits]

    def is_complete(self) -> bool:
        """Whether it can be trained on."""
        return self.rollouts.is_complete() and self.scores.is_complete()

    def cache_units(self) -> CacheUnits:
        """The same for the train stage; the artifacts exist."""
        scores = self.scores.shards
        slots = self.slots or tuple(
            Slot(unit=unit, first=rows.start, last=rows.stop)
            for unit in scores.units()
            for rows in (scores.unit_rows(unit),)
        )
        return CacheUnits(
            rollouts=self.rollouts.artifact.fingerprint,
            scores=scores.fingerprint,
            policy_version=self.policy_version,
            made_in=self.rollouts.round_index,
            slots=slots,
            weight=self.weight,
        )

    def record(self) -> CacheRecord:
        """For plans and reports."""
        return CacheRecord(
            rollouts=self.rollouts.artifact.fingerprint,
            scores=self.scores.artifact.fingerprint,
            origin=self.origin,
            policy_version=self.policy_version,
            window_tokens=self.window_tokens,
            units=self.units,
            teacher=self.scores.teacher,
            weight=self.weight,
        )


def fresh_caches(
    setup: Setup, plan: RoundPlan, student: Checkpoint, outcome: TrainOutcome | None
) -> tuple[Cache, ...]:
    """Rollouts of the current student on the prompts of the round, with each teacher's scores.

    `outcome` of the round before has the pass rates by which a curriculum chooses them.
    """
    select, chosen = setup.config.rollouts.select, None
    if select is not None and outcome is not None and outcome.levels:
        chosen = chosen_prompts(
            select,
            prompt_levels(setup.prompts),
            outcome.levels,
            seed=setup.config.seed,
            round_index=plan.round_index,
            per_round=setup.config.rollouts.prompts_per_round,
        )
    return tuple(fresh_cache(each, plan, student, chosen=chosen) for each in setup.by_teacher)


def fresh_cache(
    setup: Setup,
    plan: RoundPlan,
    student: Checkpoint,
    ranges: Sequence[tuple[int, int]] | None = None,
    chosen: Sequence[int] | None = None,
) -> Cache:
    """Rollouts of the current student on the prompts of the round, or on some ranges of them.

    `chosen` has the numbers of the round's prompts, where the seed alone does not decide them.
    """
    recipe = rollouts_recipe(
        setup.config,
        prompts=setup.prompts.fingerprint,
        student=student,
        vocabulary=setup.vocabulary,
        round_index=plan.round_index,
        window_tokens=plan.window_tokens,
        ranges=ranges,
        chosen=chosen,
    )
    rollouts = Step(
        kind=GENERATE,
        round_index=plan.round_index,
        artifact=setup.store.artifact(recipe),
        model=student,
    )
    return Cache(
        rollouts=rollouts,
        scores=scores_step(setup, rollouts),
        origin="fresh",
        policy_version=plan.round_index,
        slots=tuple(
            Slot(unit=unit, first=first, last=last)
            for unit, (first, last) in enumerate(ranges or ())
        ),
        weight=setup.weight,
    )


def given_cache(setup: Setup, plan: RoundPlan, student: Checkpoint) -> Cache | None:
    """The round's rollouts that the student does not write; None: it writes all."""
    config = setup.config
    if not config.rollouts.given_prompts:
        return None
    assert setup.teacher is not None
    recipe = given_recipe(
        config,
        prompts=setup.prompts.fingerprint,
        student=setup.student,
        teacher=setup.teacher,
        vocabulary=setup.vocabulary,
        round_index=plan.round_index,
        window_tokens=plan.window_tokens,
    )
    is_sampled = config.rollouts.given_by == "teacher"
    rollouts = Step(
        kind=TEACHER_GIVEN if is_sampled else GIVEN,
        round_index=plan.round_index,
        artifact=setup.store.artifact(recipe),
        model=setup.teacher if is_sampled else student,
    )
    scores = scores_step(setup, rollouts)
    if config.train.given_reads_nothing:
        unscored = unscored_recipe(
            rollouts=rollouts.artifact.fingerprint, keep=config.rollouts.keep
        )
        scores = replace(scores, artifact=setup.store.artifact(unscored))
    return Cache(rollouts=rollouts, scores=scores, origin="given", policy_version=plan.round_index)


def scores_step(
    setup: Setup, rollouts: Step, *, kind: StepKind = SCORE, extends: Step | None = None
) -> Step:
    """The teacher's scores of rollouts; of an extension they continue those of its base."""
    teacher, rendered = _teacher_of(setup, rollouts), setup.teacher_prompts
    assert teacher is not None
    recipe = scores_recipe(
        setup.config,
        rollouts=rollouts.artifact.fingerprint,
        teacher=teacher,
        forced_ids=setup.forced_ids,
        vocabulary=setup.candidates,
        extends=None if extends is None else extends.artifact.fingerprint,
        alignment=setup.alignment,
        prompts=rollouts.artifact.recipe.inputs["prompts"],
        teacher_prompts=None if rendered is None else rendered.fingerprint,
        keep=setup.config.rollouts.keep if kind == SCORE else None,  # probes train nothing
    )
    return Step(
        kind=kind,
        round_index=rollouts.round_index,
        artifact=setup.store.artifact(recipe),
        model=teacher,
        needs=(rollouts,) if extends is None else (rollouts, extends),
        is_new=rollouts.is_new,
        teacher=setup.name,
    )


def _teacher_of(setup: Setup, rollouts: Step) -> Checkpoint | None:
    """Who scores rollouts: the config's teacher, or the policy that sampled them."""
    settings = setup.config.teacher
    return rollouts.model if settings is not None and settings.follows_student else setup.teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What becomes of the units of the round before."""

    caches: tuple[Cache, ...] = ()
    decisions: tuple[UnitDecisionRecord, ...] = ()


def kept_caches(
    setup: Setup, plan: RoundPlan, students: Sequence[Checkpoint], outcome: TrainOutcome
) -> Kept:
    """The caches of a round after the first, where units may outlive their policy.

    Args:
        setup: of the run.
        plan: of the round.
        students: that each round up to this one started from.
        outcome: of the policy before, with its measured units.
    """
    units = sorted(outcome.units, key=lambda unit: unit.first)
    states = [_state(setup, unit, plan) for unit in units]
    config = setup.config
    bounds = config.staleness.fitted(outcome.start.distance, config.train.objective)
    decisions = [
        decide_unit(state, window_tokens=plan.window_tokens, bounds=bounds, floor=outcome.floor)
        for state in states
    ]
    decided = list(zip(units, decisions, strict=True))
    caches = [*_unchanged(setup, students, decided), *_extended(setup, plan, students, decided)]
    lost = [(unit.first, unit.last) for unit, decision in decided if not decision.is_kept]
    if lost:
        caches.append(fresh_cache(setup, plan, students[-1], lost if caches else None))
    records = (
        UnitDecisionRecord(
            first=unit.first,
            last=unit.last,
            floor=outcome.floor,
            distance=outcome.start.distance,
            drift=state.drift,
            **{name: value for name, value in asdict(state).items() if name != "drift"},
            action=decision.action,
            reason=decision.reason,
            is_gated=decision.is_gated,
        )
        for unit, state, decision in zip(units, states, decisions, strict=True)
    )
    return Kept(caches=tuple(caches), decisions=tuple(records))


Decided = list[tuple[UnitRecord, UnitDecision]]


def _state(setup: Setup, unit: UnitRecord, plan: RoundPlan) -> UnitState:
    rollouts = setup.store.by_fingerprint("rollouts", unit.rollouts)
    unfinished = unit.unfinished
    if unfinished is None:  # trained by a version that did not record it
        commit = rollouts.commit_record(unit.unit)
        unfinished = 0 if commit is None else int(commit.counts["length_rows"])
    return UnitState(
        drift=unit.drift,
        student_top_mass=unit.student_top_mass,
        policies=plan.round_index - unit.policy_version,
        window_tokens=rollouts.recipe.settings["window_tokens"],
        unfinished=unfinished,
    )


def _unchanged(setup: Setup, students: Sequence[Checkpoint], decided: Decided) -> list[Cache]:
    """Kept units as they are, by the artifact they belong to."""
    kept = [unit for unit, decision in decided if decision.action in ("train", "gated")]
    caches: list[Cache] = []
    for units in _by_artifact(kept):
        first = units[0]
        rollouts, scores = _stored(setup, first.rollouts, first.scores, students)
        caches.append(
            Cache(
                rollouts=replace(rollouts, round_index=first.made_in),
                scores=replace(scores, round_index=first.made_in),
                origin="kept",
                policy_version=first.policy_version,
                slots=tuple(
                    Slot(unit=unit.unit, first=unit.first, last=unit.last) for unit in units
                ),
            )
        )
    return caches


def _extended(
    setup: Setup, plan: RoundPlan, students: Sequence[Checkpoint], decided: Decided
) -> list[Cache]:
    """Kept units whose unfinished rows are continued, as new artifacts."""
    kept = [unit for unit, decision in decided if decision.action == "extend"]
    caches: list[Cache] = []
    for units in _by_artifact(kept):
        base, base_scores = _stored(setup, units[0].rollouts, units[0].scores, students)
        recipe = extension_recipe(
            base.artifact.recipe,
            units=[unit.unit for unit in units],
            student=students[-1],
            window_tokens=plan.window_tokens,
        )
        rollouts = Step(
            kind=EXTEND,
            round_index=plan.round_index,
            artifact=setup.store.artifact(recipe),
            model=students[-1],
            needs=(base,),
        )
        caches.append(
            Cache(
                rollouts=rollouts,
                scores=scores_step(setup, rollouts, extends=base_scores),
                origin="extended",
                policy_version=units[0].policy_version,
                slots=tuple(
                    Slot(unit=number, first=unit.first, last=unit.last)
                    for number, unit in enumerate(units)
                ),
            )
        )
    return caches


def _stored(
    setup: Setup, rollouts: str, scores: str | None, students: Sequence[Checkpoint]
) -> tuple[Step, Step]:
    """Stored rollouts and scores by their fingerprints, with all that they continue.

    Scores of a teacher with another tokenizer continue none; those of their base are then named by
    their recipe.
    """
    artifact = setup.store.by_fingerprint("rollouts", rollouts)
    recipe = artifact.recipe
    scored = None if scores is None else setup.store.by_fingerprint("scores", scores)
    authors = [student.identity.fingerprint for student in students]
    made_in = authors.index(recipe.inputs["student"])
    needs: tuple[Step, ...] = ()
    continued: tuple[Step, ...] = ()
    if "extends" in recipe.settings:
        before = None if scored is None else scored.recipe.inputs.get("scores")
        base, base_scores = _stored(setup, recipe.inputs["rollouts"], before, students)
        needs, continued = (base,), (base_scores,)
    made = Step(
        kind=EXTEND if needs else GENERATE,
        round_index=made_in,
        artifact=artifact,
        model=students[made_in],
        needs=needs,
        is_new=False,
    )
    if scored is None:
        return made, scores_step(setup, made)
    return made, Step(
        kind=SCORE,
        round_index=made_in,
        artifact=scored,
        model=_teacher_of(setup, made),
        needs=(made, *continued),
        is_new=False,
    )


def _by_artifact(units: list[UnitRecord]) -> list[list[UnitRecord]]:
    """Units of one scores artifact together, oldest artifact first."""
    groups: dict[tuple[int, str], list[UnitRecord]] = {}
    for unit in units:
        groups.setdefault((unit.made_in, unit.scores), []).append(unit)
    return [groups[key] for key in sorted(groups)]


def replayed_caches(setup: Setup) -> list[tuple[Cache, ...]] | None:
    """What each round of a replay trains on: an earlier run's scores, or named ones.

    None where the config is no replay.

    Raises:
        UserError: some of it is not in the store, not complete, or not of one teacher.
    """
    replay, rounds = setup.config.replay, setup.config.rounds
    if replay is None:
        return None
    where, found = (
        "replay.scores",
        [[_replayed(setup, name, index)] for index, name in enumerate(replay.scores[:rounds])],
    )
    if replay.run is not None:
        where, found = str(replay.run), _caches_of_run(setup, replay.run, rounds)
    if len(found) < rounds:
        raise UserError(
            f"{where} has {len(found)} finished rounds; the config asks for {rounds}; lower rounds"
        )
    settings, expected = setup.config.teacher, setup.replayed_teacher
    may_follow = settings is None or settings.follows_student
    for cache, authors in [(c, _authors(caches)) for caches in found[:rounds] for c in caches]:
        for step in (cache.rollouts, cache.scores):
            if not step.is_complete():
                raise UserError(
                    f"{step.artifact.name} of {where} is not complete; finish that run first"
                )
        _check_tokenizer(setup, cache, where)
        if cache.is_given:
            _check_given(setup.config, cache, where)
        else:
            check_own(setup.config, cache, where)
        teacher = cache.scores.artifact.recipe.inputs.get("teacher")  # imported rows have none
        if may_follow and teacher in (authors if cache.is_given else _authors([cache])):
            continue  # each round's policy scored its own rollouts, and those it was given
        if cache.scores.teacher is not None:
            continue  # one of several
        expected = expected or teacher
        if teacher is not None and teacher != expected:
            raise UserError(
                f"{cache.scores.artifact.name} of {where} was scored by teacher {teacher[:12]}; "
                f"expected {str(expected)[:12]}, as the config or an earlier round says; leave "
                "`teacher` out, or replay scores of one teacher"
            )
    return [tuple(caches) for caches in found[:rounds]]


def _check_tokenizer(setup: Setup, cache: Cache, where: str) -> None:
    """Refuse to replay ids that a student reads as other texts."""
    cached = setup.store.tokenizer_of(cache.rollouts.shards)
    own = setup.student.identity.tokenizer_sha256
    if cached not in (None, own):  # None: not known, as of imported rows
        raise UserError(
            f"{cache.rollouts.artifact.name} of {where} is of tokenizer {cached[:16]}, and the "
            f"student's is {own[:16]}: they give texts other ids; use a student with the tokenizer "
            "of the cache"
        )


def _authors(caches: Sequence[Cache]) -> set[str | None]:
    """Fingerprints of the students that wrote their rollouts; None stands for no student."""
    return {cache.rollouts.artifact.recipe.inputs.get("student") for cache in caches}


def check_own(config: Config, cache: Cache, where: str) -> None:
    """Refuse to replay rollouts of a student under an objective that they cannot serve."""
    if (problem := unserved_by_own(config.train)) is not None:
        raise UserError(f"{where} has rollouts that are not given: {problem}")
    temperature = cache.rollouts.artifact.recipe.settings.get("temperature", 1.0)
    if (problem := unserved_by_temperature(config.train, temperature)) is not None:
        raise UserError(f"in {cache.rollouts.artifact.name} of {where} {problem}")
    scores, jump = cache.scores.artifact.recipe.settings, config.train.extrapolation
    codec, is_aligned, select = scores["codec"]["kind"], "alignment" in scores, config.train.select
    if jump is not None and (
        problem := unserved_by_jumps(jump, codec=codec, is_aligned=is_aligned)
    ):
        raise UserError(f"{cache.scores.artifact.name} of {where} cannot score: {problem}")
    if select is not None and (
        problem := unserved_by_selection(select, codec=codec, is_aligned=is_aligned)
    ):
        raise UserError(f"{cache.scores.artifact.name} of {where} cannot choose tokens: {problem}")


def _check_given(config: Config, cache: Cache, where: str) -> None:
    """Refuse to replay given rollouts under an objective that they cannot serve."""
    if (problem := unserved_by_given(config.train)) is not None:
        raise UserError(f"{where} has given rollouts: {problem}")
    if is_unscored(cache.scores.artifact.recipe) and not config.train.given_reads_nothing:
        raise UserError(
            f"{cache.scores.artifact.name} of {where} has no teacher's scores of its given "
            "rollouts, which trained with ce; set train.given_objective={kind: ce}"
        )


def _caches_of_run(setup: Setup, run: Path, rounds: int) -> list[list[Cache]]:
    """What each of the first rounds of an earlier run trained on."""
    path = run / "summary.json"
    if not path.is_file():
        raise UserError(
            f"replay.run {run} has no summary.json; expected the folder of an earlier run; "
            "check the path"
        )
    summary = load_record(RunSummary, path)
    caches = [cache for caches in summary.caches for cache in caches]
    named = sorted({cache.teacher for cache in caches if cache.teacher is not None})
    if named and setup.config.teacher is not None:
        raise UserError(
            f"replay.run {run} trained on scores of teachers {', '.join(named)}, and the config "
            "names a single one; expected none; leave `teacher` out"
        )
    return [
        [
            _replayed(
                setup,
                cache.scores,
                index,
                policy_version=cache.policy_version,
                units=cache.units or (),
                teacher=cache.teacher,
                weight=cache.weight,
            )
            for cache in caches
        ]
        for index, caches in enumerate(summary.caches[:rounds])
    ]


def _replayed(
    setup: Setup,
    name: str,
    round_index: int,
    *,
    policy_version: int | None = None,
    units: Sequence[int] = (),
    teacher: str | None = None,
    weight: float = 1.0,
) -> Cache:
    """Stored scores and their rollouts, only to be read; all units where none is named.

    Scores that are named by themselves have weight 1: what a teacher's weight was, a run says.
    """
    scores = setup.store.by_fingerprint("scores", name.removeprefix("scores/"))
    rollouts = setup.store.by_fingerprint("rollouts", scores.recipe.inputs["rollouts"])
    sampled = Step(
        kind=GENERATE, round_index=round_index, artifact=rollouts, model=None, is_new=False
    )
    return Cache(
        rollouts=sampled,
        scores=replace(sampled, kind=SCORE, artifact=scores, needs=(sampled,), teacher=teacher),
        origin="replayed",
        policy_version=round_index if policy_version is None else policy_version,
        slots=tuple(
            Slot(unit=unit, first=place, last=place + 1) for place, unit in enumerate(units)
        ),
        weight=weight,
    )
