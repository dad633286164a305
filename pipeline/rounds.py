"""The rounds of a run as lists of steps, in order, as far as they can be named.

The recipes of a round name the policy it starts from, so round R + 1 can be named once the policy
of round R exists. `rounds` is therefore lazy: whoever takes a round from it either finds its policy
complete or completes it before asking for the next.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from opd_stream.config import Config
from opd_stream.outcome import TrainOutcome, WindowAudit
from opd_stream.staleness import Staleness, may_run_ahead
from opd_stream.store.policy import Part, PolicyArtifact
from opd_stream.windows import AdaptiveWindow, EntropyGatedWindow
from pipeline.caches import (
    Cache,
    Kept,
    fresh_cache,
    fresh_caches,
    given_cache,
    kept_caches,
    replayed_caches,
    scores_step,
)
from pipeline.plan import RoundPlan, plan_ahead, plan_round
from pipeline.records import UnitDecisionRecord
from pipeline.setup import Setup
from stages.checkpoints import Checkpoint, published_dtype
from stages.recipes import policy_recipe, probe_recipe
from stages.step import PROBE, PROBE_SCORE, TRAIN, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round: what it does, in the order in which it is done."""

    plan: RoundPlan
    student: Checkpoint  # samples the rollouts and is trained
    previous: PolicyArtifact | None  # made `student`; None in round 0
    caches: tuple[Cache, ...]  # what it trains on
    unit_decisions: tuple[UnitDecisionRecord, ...]  # about the units of the round before
    audit: WindowAudit | None  # that decided the window, if one did
    steps: tuple[Step, ...]  # everything but evaluation; the last one trains
    ahead: Cache | None  # of the next round, if its rollouts need not wait for this policy
    is_expected: bool = False  # the policy before is not there yet, so no artifact can be

    @property
    def index(self) -> int:
        """Number of the round, from 0; also the version of the policy it starts from."""
        return self.plan.round_index

    @property
    def policy(self) -> PolicyArtifact:
        """What it trains."""
        return self.steps[-1].policy

    @property
    def own_caches(self) -> tuple[Cache, ...]:
        """Those that the student wrote; all where it wrote none."""
        return tuple(cache for cache in self.caches if not cache.is_given) or self.caches

    @property
    def window_tokens(self) -> int:
        """New tokens of its rollouts; of units kept from earlier rounds, how many may train."""
        newest = self.caches[-1]
        cached = newest.window_tokens if newest.origin in ("ahead", "replayed") else None
        return cached or self.plan.window_tokens

    @property
    def new_steps(self) -> list[Step]:
        """Those that sample or score for this round."""
        return [step for step in self.steps[:-1] if step.is_new]

    @property
    def probe(self) -> Step | None:
        """Scores of the probes of its audit, if it takes one."""
        return next((step for step in self.steps if step.kind == PROBE_SCORE), None)

    def names(self) -> set[str]:
        """The names of its artifacts, and of those that are made ahead."""
        ahead = () if self.ahead is None else (self.ahead.rollouts, self.ahead.scores)
        return {step.artifact.name for step in (*self.steps, *ahead)}


def checkpoint_of(policy: PolicyArtifact, part: Part = "model") -> Checkpoint:
    """The checkpoint that a train stage published; this part of a remote one is on this machine."""
    identity = policy.manifest().checkpoint_identity
    folder = policy.folder(part).resolve()
    return Checkpoint(folder=folder, identity=identity, policy=policy.fingerprint)


# Of a policy that is only named: nothing of a remote one is copied to this machine.
named_checkpoint = partial(checkpoint_of, part="name")


def rounds(
    setup: Setup,
    *,
    opened: Callable[[PolicyArtifact], Checkpoint] = checkpoint_of,
    wait: Callable[[Round], bool] | None = None,
    expected: bool = False,
) -> Iterator[Round]:
    """The rounds; stops after one whose policy is not complete when the next is asked for.

    Args:
        setup: of the run.
        opened: gives the checkpoint of a complete policy.
        wait: called with a round whose policy is not complete; returns whether it is now.
        expected: go on with rounds whose artifacts cannot be named yet, as if every round before
            took all of its planned steps.
    """
    students, previous, first_step = [setup.student], None, 0
    outcome: TrainOutcome | None = None
    audit: WindowAudit | None = None
    window: int | None = None
    ahead: Cache | None = None
    replayed, is_expected = replayed_caches(setup), False
    for round_index in range(setup.config.rounds):
        plan = plan_round(
            setup.config,
            round_index=round_index,
            first_step=first_step,
            decided_window=window,
        )
        if replayed is not None:
            kept = Kept(caches=replayed[round_index])
        else:
            kept = _round_caches(setup, plan, students, outcome, ahead)
        ahead = _ahead(setup, plan, students[-1], outcome)
        round_ = Round(
            plan=plan,
            student=students[-1],
            previous=previous,
            caches=kept.caches,
            unit_decisions=kept.decisions,
            audit=audit,
            steps=round_steps(setup, plan, students[-1], previous, kept.caches),
            ahead=ahead,
            is_expected=is_expected,
        )
        yield round_
        previous = round_.policy
        if round_.policy.is_complete() or (wait is not None and wait(round_)):
            students.append(opened(round_.policy))
            outcome = round_.policy.manifest().outcome
            first_step += outcome.steps
            audit = outcome.window_decision or audit
            window = decided_window(setup.config, outcome, plan.window_tokens) or window
        elif expected:
            students.append(_expected_student(setup, round_index + 1))
            outcome, is_expected = None, True
            first_step += plan.planned_steps
        else:
            return


def decided_window(config: Config, outcome: TrainOutcome, tokens: int) -> int | None:
    """What a round with so many tokens decided about the next one's window; None: nothing."""
    window = config.rollouts.window
    if isinstance(window, EntropyGatedWindow):
        entropy = outcome.epochs[0].teacher_entropy
        return None if entropy is None else window.after(tokens, entropy)
    return None if outcome.window_decision is None else outcome.window_decision.window_tokens


def _round_caches(
    setup: Setup,
    plan: RoundPlan,
    students: Sequence[Checkpoint],
    outcome: TrainOutcome | None,
    ahead: Cache | None,
) -> Kept:
    """What a round trains on, given rollouts first; `outcome` is of the round before."""
    if outcome is not None and outcome.units:
        kept = kept_caches(setup, plan, students, outcome)
    elif setup.config.rollouts.own_prompts:
        fresh = fresh_caches(setup, plan, students[-1], outcome) if ahead is None else (ahead,)
        kept = Kept(caches=fresh)
    else:
        kept = Kept()
    given = given_cache(setup, plan, students[-1])
    return kept if given is None else replace(kept, caches=(given, *kept.caches))


def round_steps(
    setup: Setup,
    plan: RoundPlan,
    student: Checkpoint,
    previous: PolicyArtifact | None,
    caches: Sequence[Cache],
) -> tuple[Step, ...]:
    """Everything that a round consists of but its evaluation, in the order in which it is done.

    A new kind of step is added here, and nowhere else.
    """
    cached: dict[str, Step] = {}  # several teachers score the same rollouts
    for step in (step for cache in caches for step in (cache.rollouts, cache.scores)):
        cached.setdefault(step.artifact.name, step)
    probes = _probe_steps(setup, plan, caches)
    train = Step(
        kind=TRAIN,
        round_index=plan.round_index,
        artifact=setup.store.policy(
            policy_recipe(
                setup.config,
                prompts=setup.prompts.fingerprint,
                vocabulary=setup.vocabulary,
                base=student,
                previous=None if previous is None else previous.fingerprint,
                caches=[
                    (cache.scores.artifact.fingerprint, cache.policy_version, cache.units)
                    for cache in caches
                ],
                round_index=plan.round_index,
                first_step=plan.first_step,
                window_tokens=_own_window(setup.config, plan, caches),
                published=published_dtype(setup.student.folder),
                weights=[cache.weight for cache in caches],
            )
        ),
        model=student,
        needs=(*(cache.scores for cache in caches), *probes[1:]),
    )
    return (*cached.values(), *probes, train)


def _probe_steps(setup: Setup, plan: RoundPlan, caches: Sequence[Cache]) -> tuple[Step, ...]:
    """Probes of fresh rollouts and their scores, in rounds that audit the window."""
    window = setup.config.rollouts.window
    fresh = next((cache.rollouts for cache in caches if cache.origin == "fresh"), None)
    is_last = plan.round_index == setup.config.rounds - 1
    if not isinstance(window, AdaptiveWindow) or fresh is None:
        return ()
    if is_last and window.audit_steps is None:
        return ()
    if plan.round_index % window.every_rounds:
        return ()
    probe = Step(
        kind=PROBE,
        round_index=plan.round_index,
        artifact=setup.store.artifact(probe_recipe(window, fresh.artifact.recipe)),
        model=fresh.model,
        needs=(fresh,),
    )
    return probe, scores_step(setup, probe, kind=PROBE_SCORE)


def _own_window(config: Config, plan: RoundPlan, caches: Sequence[Cache]) -> int | None:
    """The decided window, where none of the round's rollouts was made with it."""
    if not config.rollouts.window.is_decided or config.replay is not None:
        return None
    return None if caches[-1].window_tokens == plan.window_tokens else plan.window_tokens


def _ahead(
    setup: Setup, plan: RoundPlan, student: Checkpoint, outcome: TrainOutcome | None
) -> Cache | None:
    """The next round's cache, by the student of this one; `outcome` is of the round before."""
    config = setup.config
    is_last = plan.round_index == config.rounds - 1
    samples = config.rollouts.ahead and config.rollouts.own_prompts
    if not samples or is_last or outcome is None:
        return None
    drift, bounds = outcome.epochs[-1].policy_drift, _bounds(config, outcome)
    if not may_run_ahead(drift, bounds=bounds, floor=outcome.floor):
        return None
    cache = fresh_cache(setup, plan_ahead(config, plan), student)
    return replace(cache, origin="ahead", policy_version=plan.round_index)


def _bounds(config: Config, outcome: TrainOutcome) -> Staleness:
    return config.staleness.fitted(outcome.start.distance, config.train.objective)


def _expected_student(setup: Setup, version: int) -> Checkpoint:
    """Stands for a policy that is not there yet: no artifact of it exists."""
    identity = replace(setup.student.identity, weights_sha256=f"policy version {version}")
    return Checkpoint(folder=setup.student.folder, identity=identity)
