"""The rounds of a run as artifacts, in order, as far as they can be named.

A round's recipes name the policy it starts from, so round R + 1 can be named once the policy of
round R exists. `walk` is therefore lazy: whoever takes a round from it either finds its policy
complete or completes it before asking for the next. Running, single stages and status all walk the
same way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from opd_stream.config import Config, Replay
from opd_stream.errors import UserError
from opd_stream.outcome import TrainOutcome, WindowAudit
from opd_stream.staleness import may_run_ahead
from opd_stream.store.artifact import Artifact
from opd_stream.store.files import read_json
from opd_stream.store.policy import Identity, Part, PolicyArtifact
from opd_stream.store.recipe import Recipe
from opd_stream.windows import AdaptiveWindow
from pipeline.caches import Cache, Kept, fresh_cache, refreshed_caches, scores_of
from pipeline.plan import RoundPlan, plan_ahead, plan_round
from pipeline.setup import Setup
from stages.cache_units import Slot
from stages.checkpoints import Checkpoint
from stages.recipes import policy_recipe, probe_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round's artifacts, whether they exist or not."""

    plan: RoundPlan
    student: Checkpoint  # samples the rollouts and is trained
    students: tuple[Checkpoint, ...]  # that each round up to this one started from
    previous: PolicyArtifact | None  # made `student`; None in round 0
    caches: tuple[Cache, ...]  # what it trains on
    unit_decisions: tuple[dict[str, Any], ...]  # about the units of the round before
    probe: Recipe | None  # of the audit's rollouts; None: this round takes none
    decision: WindowAudit | None  # of the audit before
    policy: PolicyArtifact
    ahead: Cache | None  # of the next round, if its rollouts need not wait for this policy

    @property
    def index(self) -> int:
        """Number of the round, from 0; also the policy_version of its rollouts."""
        return self.plan.round_index

    @property
    def window_tokens(self) -> int:
        """New tokens of its rollouts; of units kept from earlier rounds, how many may train."""
        made = self.caches[-1]
        given = made.window_tokens if made.origin in ("ahead", "replayed") else None
        return given or self.plan.window_tokens

    @property
    def fresh(self) -> Cache | None:
        """The rollouts that the current student samples, if the round needs any."""
        return next((cache for cache in self.caches if cache.origin == "fresh"), None)


def checkpoint_of(policy: PolicyArtifact, part: Part = "model") -> Checkpoint:
    """The checkpoint that a train stage published; this part of a remote one is on this machine."""
    folder = policy.folder(part).resolve()
    return Checkpoint(folder=folder, identity=identity_of(policy), policy=policy.fingerprint)


named = partial(checkpoint_of, part="name")


def walk(
    setup: Setup, *, opened: Callable[[PolicyArtifact], Checkpoint] = checkpoint_of
) -> Iterator[Round]:
    """The rounds; stops after one whose policy is not complete when the next is asked for.

    `opened` gives the checkpoint of a complete policy.
    """
    config = setup.config
    students, previous, first_step = [setup.student], None, 0
    outcome: TrainOutcome | None = None
    decision: WindowAudit | None = None
    window, bounds = config.rollouts.window, config.staleness
    source = None if config.replay is None else ReplaySource(setup, config.replay)
    ahead: Cache | None = None
    for round_index in range(config.rounds):
        plan = plan_round(
            config,
            round_index=round_index,
            first_step=first_step,
            decided_window=None if decision is None else decision.window_tokens,
        )
        student, kept = students[-1], Kept(caches=(), decisions=())
        if source is not None:
            caches = source.caches(round_index)
        elif outcome is not None and outcome.units:
            kept = refreshed_caches(setup, plan, students, outcome, bounds)
            caches = kept.caches
        elif ahead is not None:
            caches = (ahead,)
        else:
            caches = (fresh_cache(setup, plan, student),)
        policy = setup.store.policy(
            policy_recipe(
                config,
                prompts=setup.prompts.fingerprint,
                stop_ids=setup.stop_ids,
                base=student,
                previous=None if previous is None else previous.fingerprint,
                caches=[
                    (cache.scores.fingerprint, cache.policy_version, cache.units)
                    for cache in caches
                ],
                round_index=round_index,
                first_step=first_step,
                window_tokens=_own_window(config, plan, caches),
            )
        )
        fresh = next((cache for cache in caches if cache.origin == "fresh"), None)
        probe = None
        if isinstance(window, AdaptiveWindow) and fresh is not None:
            is_last = round_index == config.rounds - 1
            if not is_last and round_index % window.every_rounds == 0:
                probe = probe_recipe(window, fresh.rollouts.recipe)
        ahead = _ahead(setup, plan, student, outcome)
        yield Round(
            plan=plan,
            ahead=ahead,
            probe=probe,
            decision=decision,
            student=student,
            students=tuple(students),
            previous=previous,
            caches=caches,
            unit_decisions=kept.decisions,
            policy=policy,
        )
        if not policy.is_complete():
            return
        students.append(opened(policy))
        previous, outcome = policy, policy.manifest().outcome
        first_step += outcome.steps
        decision = outcome.window_decision or decision


def _own_window(config: Config, plan: RoundPlan, caches: Sequence[Cache]) -> int | None:
    """The decided window, where none of the round's rollouts was made with it."""
    is_decided = isinstance(config.rollouts.window, AdaptiveWindow)
    if not is_decided or config.replay is not None:
        return None
    return None if caches[-1].window_tokens == plan.window_tokens else plan.window_tokens


def _ahead(
    setup: Setup, plan: RoundPlan, student: Checkpoint, outcome: TrainOutcome | None
) -> Cache | None:
    """The next round's cache, by the student of this one; `outcome` is of the round before."""
    config = setup.config
    is_last = plan.round_index == config.rounds - 1
    if not config.rollouts.ahead or is_last or outcome is None:
        return None
    drift = outcome.epochs[-1].policy_drift
    if not may_run_ahead(drift, bounds=config.staleness, floor=outcome.floor):
        return None
    cache = fresh_cache(setup, plan_ahead(config, plan), student)
    return replace(cache, origin="ahead", policy_version=plan.round_index)


def identity_of(policy: PolicyArtifact) -> Identity:
    """What a train stage published is."""
    return policy.manifest().checkpoint_identity


def probe_artifacts(setup: Setup, probe: Recipe) -> tuple[Artifact, Artifact]:
    """Rollouts and scores of a probe, whether they exist or not."""
    return setup.store.artifact(probe), setup.store.artifact(scores_of(setup, probe))


class ReplaySource:
    """Scores that are in the store already: an earlier run's, or named ones."""

    def __init__(self, setup: Setup, replay: Replay) -> None:
        self._store, rounds = setup.store, setup.config.rounds
        if replay.run is None:
            named = [[{"scores": name, "units": None}] for name in replay.scores]
            self._where, self._rounds = "replay.scores", named
        else:
            self._where, self._rounds = str(replay.run), _caches_of(replay.run)
        self._teacher = setup.replayed_teacher
        if len(self._rounds) < rounds:
            raise UserError(
                f"{self._where} has {len(self._rounds)} finished rounds; the config asks for "
                f"{rounds}; lower rounds"
            )

    def caches(self, round_index: int) -> tuple[Cache, ...]:
        """What a round trained on."""
        return tuple(self._cache(named, round_index) for named in self._rounds[round_index])

    def _cache(self, named: dict[str, Any], round_index: int) -> Cache:
        fingerprint = named["scores"].removeprefix("scores/")
        scores = self._store.by_fingerprint("scores", fingerprint)
        rollouts = self._store.by_fingerprint("rollouts", scores.recipe.inputs["rollouts"])
        for artifact in (rollouts, scores):
            if not artifact.is_complete():
                raise UserError(
                    f"{artifact.name} of {self._where} is not complete; finish that run first"
                )
        self._check_teacher(scores)
        return Cache(
            rollouts=rollouts,
            scores=scores,
            origin="replayed",
            policy_version=named.get("policy_version", round_index),
            made_in=round_index,
            student=None,
            slots=tuple(
                Slot(unit=unit, first=place, last=place + 1)
                for place, unit in enumerate(named["units"] or ())
            ),
        )

    def _check_teacher(self, scores: Artifact) -> None:
        """All scores of a run are of one teacher: the config's, if it names one."""
        found = scores.recipe.inputs.get("teacher")  # imported rows have none
        self._teacher = self._teacher or found
        if found is not None and found != self._teacher:
            raise UserError(
                f"{scores.name} of {self._where} was scored by teacher {found[:12]}; expected "
                f"{str(self._teacher)[:12]}, as the config or an earlier round says; leave "
                "`teacher` out, or replay scores of one teacher"
            )


def _caches_of(run: Path) -> list[list[dict[str, Any]]]:
    """What each round of an earlier run trained on.

    Raises:
        UserError: the folder is no run.
    """
    summary = run / "summary.json"
    if not summary.is_file():
        raise UserError(
            f"replay.run {run} has no summary.json; expected the folder of an earlier run; "
            "check the path"
        )
    return read_json(summary)["caches"]
