"""What a round trains on: units of rollouts and scores, fresh, kept from earlier rounds, continued.

A round has a place for each of its prompts. Where a unit of an earlier round is kept, it holds the
places it had; the other places are sampled anew, with the prompts that the round draws for them.
Everything here follows from the config and from what the policy before has recorded, so a resumed
run and another machine come to the same artifacts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from opd_stream.drift import DriftSums
from opd_stream.outcome import TrainOutcome, UnitRecord
from opd_stream.staleness import Staleness, UnitDecision, UnitState, decide_unit
from opd_stream.store.artifact import Artifact
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from pipeline.plan import RoundPlan
from pipeline.setup import Setup
from stages.cache_units import CacheUnits, Slot
from stages.checkpoints import Checkpoint
from stages.recipes import extension_recipe, rollouts_recipe, scores_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Units of one scores artifact with its rollouts, as a round uses them.

    Example:
        >>> [cache.origin for cache in here.caches]
        ['kept', 'fresh']
    """

    rollouts: Artifact
    scores: Artifact
    origin: Literal["fresh", "ahead", "extended", "kept", "replayed"]
    policy_version: int  # of the oldest tokens in it
    made_in: int  # the round that made it
    student: Checkpoint | None  # sampled it; None: not known here, it must be there
    slots: tuple[Slot, ...] = ()  # none: every unit, in its own place

    @property
    def units(self) -> tuple[int, ...] | None:
        """Numbers of the units that train; None: all."""
        return tuple(slot.unit for slot in self.slots) or None

    @property
    def window_tokens(self) -> int | None:
        """New tokens of its rollouts; None of imported rows."""
        return self.rollouts.recipe.settings.get("window_tokens")

    def prompts_per_unit(self, wanted: int) -> int:
        """How many prompts a unit holds: those of a place, where the cache has places."""
        return max((slot.last - slot.first for slot in self.slots), default=wanted)

    def is_complete(self) -> bool:
        """Whether it can be trained on."""
        return self.rollouts.is_complete() and self.scores.is_complete()

    def cache_units(self) -> CacheUnits:
        """The same for the train stage; the artifacts exist."""
        slots = self.slots or tuple(
            Slot(unit=unit, first=rows.start, last=rows.stop)
            for unit in self.scores.units()
            for rows in (self.scores.unit_rows(unit),)
        )
        return CacheUnits(
            rollouts=self.rollouts.fingerprint,
            scores=self.scores.fingerprint,
            policy_version=self.policy_version,
            made_in=self.made_in,
            slots=slots,
        )

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        return {
            "rollouts": self.rollouts.fingerprint,
            "scores": self.scores.fingerprint,
            "origin": self.origin,
            "policy_version": self.policy_version,
            "window_tokens": self.window_tokens,
            "units": self.units,
        }


def fresh_cache(
    setup: Setup,
    plan: RoundPlan,
    student: Checkpoint,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> Cache:
    """Rollouts of the current student on the prompts of the round, or on some ranges of them."""
    recipe = rollouts_recipe(
        setup.config,
        prompts=setup.prompts.fingerprint,
        student=student,
        stop_ids=setup.stop_ids,
        round_index=plan.round_index,
        window_tokens=plan.window_tokens,
        ranges=ranges,
    )
    return Cache(
        rollouts=setup.store.artifact(recipe),
        scores=setup.store.artifact(scores_of(setup, recipe)),
        origin="fresh",
        policy_version=plan.round_index,
        made_in=plan.round_index,
        student=student,
        slots=tuple(
            Slot(unit=unit, first=first, last=last)
            for unit, (first, last) in enumerate(ranges or ())
        ),
    )


def bases_of(setup: Setup, cache: Cache, students: Sequence[Checkpoint]) -> tuple[Cache, ...]:
    """What an extension continues, what that continues, and so on; the first rollouts first.

    Args:
        setup: of the run.
        cache: of a round of it.
        students: that each round up to that one started from.
    """
    recipe = cache.rollouts.recipe
    if "extends" not in recipe.settings:
        return ()
    rollouts = setup.store.by_fingerprint("rollouts", recipe.inputs["rollouts"])
    continued = cache.scores.recipe.inputs.get("scores")
    scores = (
        setup.store.artifact(scores_of(setup, rollouts.recipe))  # aligned ones continue none
        if continued is None
        else setup.store.by_fingerprint("scores", continued)
    )
    authors = [student.identity.fingerprint for student in students]
    made_in = authors.index(rollouts.recipe.inputs["student"])
    base = replace(
        cache,
        rollouts=rollouts,
        scores=scores,
        origin="kept",
        made_in=made_in,
        student=students[made_in],
        slots=(),
    )
    return (*bases_of(setup, base, students), base)


def scores_of(setup: Setup, rollouts: Recipe, *, extends: str | None = None) -> Recipe:
    """The scores of rollouts."""
    assert setup.teacher is not None
    return scores_recipe(
        setup.config,
        rollouts=rollouts.fingerprint,
        teacher=setup.teacher,
        forced_ids=setup.forced_ids,
        extends=extends,
        alignment=setup.alignment,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What becomes of the units of the round before."""

    caches: tuple[Cache, ...]
    decisions: tuple[dict[str, Any], ...]  # one a unit, for the report


def refreshed_caches(
    setup: Setup,
    plan: RoundPlan,
    students: Sequence[Checkpoint],
    outcome: TrainOutcome,
    bounds: Staleness,
) -> Kept:
    """The caches of a round after the first, where units may outlive their policy.

    Args:
        setup: of the run.
        plan: of the round.
        students: that each round up to this one started from.
        outcome: of the policy before, with its measured units.
        bounds: of staleness.
    """
    floor = outcome.floor
    states = [
        (unit, _state(setup.store, unit, plan))
        for unit in sorted(outcome.units, key=lambda unit: unit.first)
    ]
    decided = [
        (
            unit,
            decide_unit(state, window_tokens=plan.window_tokens, bounds=bounds, floor=floor),
        )
        for unit, state in states
    ]
    caches = [*_same(setup, students, decided), *_extended(setup, plan, students, decided)]
    lost = [(unit.first, unit.last) for unit, decision in decided if not decision.is_kept]
    if lost:
        caches.append(fresh_cache(setup, plan, students[-1], lost if caches else None))
    record = [
        {
            "first": unit.first,
            "last": unit.last,
            "floor": floor,
            **asdict(state),
            **asdict(decision),
        }
        for (unit, state), (_, decision) in zip(states, decided, strict=True)
    ]
    return Kept(caches=tuple(caches), decisions=tuple(record))


Decided = list[tuple[UnitRecord, UnitDecision]]


def _state(store: Store, unit: UnitRecord, plan: RoundPlan) -> UnitState:
    rollouts = store.by_fingerprint("rollouts", unit.rollouts)
    commit = rollouts.commit_record(unit.unit)
    return UnitState(
        drift=DriftSums(**unit.drift.as_json()),
        student_top_mass=unit.student_top_mass,
        policies=plan.round_index - unit.policy_version,
        window_tokens=rollouts.recipe.settings["window_tokens"],
        unfinished=0 if commit is None else int(commit.counts["length_rows"]),
    )


def _same(setup: Setup, students: Sequence[Checkpoint], decided: Decided) -> list[Cache]:
    """Kept units as they are, by the artifact they belong to."""
    kept = [unit for unit, decision in decided if decision.action in ("train", "gated")]
    caches: list[Cache] = []
    for units in _by_artifact(kept):
        caches.append(
            Cache(
                rollouts=setup.store.by_fingerprint("rollouts", units[0].rollouts),
                scores=setup.store.by_fingerprint("scores", units[0].scores),
                origin="kept",
                policy_version=units[0].policy_version,
                made_in=units[0].made_in,
                student=students[units[0].made_in],
                slots=tuple(
                    Slot(unit=unit.unit, first=unit.first, last=unit.last) for unit in units
                ),
            )
        )
    return caches


def _extended(
    setup: Setup, plan: RoundPlan, students: Sequence[Checkpoint], decided: Decided
) -> list[Cache]:
    """Kept units whose unfinished rows go on, as new artifacts."""
    kept = [unit for unit, decision in decided if decision.action == "extend"]
    caches: list[Cache] = []
    for units in _by_artifact(kept):
        base = setup.store.by_fingerprint("rollouts", units[0].rollouts)
        recipe = extension_recipe(
            base.recipe,
            units=[unit.unit for unit in units],
            student=students[-1],
            window_tokens=plan.window_tokens,
        )
        scores = scores_of(setup, recipe, extends=units[0].scores)
        caches.append(
            Cache(
                rollouts=setup.store.artifact(recipe),
                scores=setup.store.artifact(scores),
                origin="extended",
                policy_version=units[0].policy_version,
                made_in=plan.round_index,
                student=students[-1],
                slots=tuple(
                    Slot(unit=number, first=unit.first, last=unit.last)
                    for number, unit in enumerate(units)
                ),
            )
        )
    return caches


def _by_artifact(units: list[UnitRecord]) -> list[list[UnitRecord]]:
    """Units of one scores artifact together, oldest artifact first."""
    groups: dict[tuple[int, str], list[UnitRecord]] = {}
    for unit in units:
        groups.setdefault((unit.made_in, unit.scores), []).append(unit)
    return [groups[key] for key in sorted(groups)]
