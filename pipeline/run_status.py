"""How far a run is, read from the store; training steps also from the run's folder, where they are.

Any machine that reaches the store can ask, whichever machines the stages run on: units carry the
time they were made, and rounds are named as the run itself names them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd_stream.store.artifact import Artifact, Commit
from pipeline.caches import Cache
from pipeline.pace import Pace, after, pace_of_steps, pace_of_units, spans_of
from pipeline.plan import is_due, plan_round
from pipeline.reports import busy_seconds
from pipeline.run_directory import RunDirectory
from pipeline.setup import Setup
from pipeline.walk import Round, named, probe_artifacts, walk
from stages.checkpoints import Checkpoint
from stages.evaluate import evaluation_result, evaluation_rollouts
from stages.prompts import prompts_artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatus:
    """A round with the pace of each of its stages; `evaluate` only where it is due."""

    round: int | None  # from 0; None: the initial student, which is only evaluated
    policy_version: int  # of the policy that is evaluated: 0, or the round's number + 1
    window_tokens: int | None
    busy_seconds: float  # in generate, score and train
    stages: dict[str, Pace]

    @property
    def is_complete(self) -> bool:
        """Whether nothing of it is left to do."""
        return all(pace.is_complete for pace in self.stages.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run at one moment."""

    run: str
    time: float  # seconds since the epoch
    is_finished: bool
    rounds_complete: int
    rounds_planned: int
    eta_seconds: float | None  # of the whole run, without evaluations
    rounds: tuple[RoundStatus, ...]  # as far as they can be named


class StatusReader:
    """Reads the status again and again; what is complete is read once."""

    def __init__(self, setup: Setup, directory: RunDirectory) -> None:
        self._setup, self._directory = setup, directory
        self._complete: dict[str, list[Commit]] = {}  # fingerprint -> records
        self._rounds: dict[str, RoundStatus] = {}  # fingerprint of the policy -> complete round

    def read(self) -> RunStatus:
        """The status now."""
        now, setup = time.time(), self._setup
        rounds: list[RoundStatus] = []
        heres = list(walk(setup, opened=named))
        if setup.config.evaluation is not None:
            first = self._evaluate(setup.student, now)
            rounds.append(
                RoundStatus(
                    round=None,
                    policy_version=0,
                    window_tokens=None,
                    busy_seconds=0.0,
                    stages={"evaluate": first},
                )
            )
        rounds += [self._round(here, now) for here in heres]
        complete = sum(here.policy.is_complete() for here in heres)
        return RunStatus(
            run=str(self._directory.path),
            time=now,
            is_finished=complete == setup.config.rounds
            and all(status.is_complete for status in rounds if status.round is not None),
            rounds_complete=complete,
            rounds_planned=setup.config.rounds,
            eta_seconds=_eta(setup, heres, [r for r in rounds if r.round is not None]),
            rounds=tuple(rounds),
        )

    def _round(self, here: Round, now: float) -> RoundStatus:
        known = self._rounds.get(here.policy.fingerprint) or self._read_round(here, now)
        if known.is_complete:
            self._rounds[here.policy.fingerprint] = known
        return known

    def _read_round(self, here: Round, now: float) -> RoundStatus:
        new = [c for c in here.caches if c.made_in == here.index or not c.is_complete()]
        rollouts, scores = [c.rollouts for c in new], [c.scores for c in new]
        if here.probe is not None:
            probe = probe_artifacts(self._setup, here.probe)
            rollouts += [artifact for artifact in probe[:1] if artifact.is_started()]
            scores += [artifact for artifact in probe[1:] if artifact.is_started()]
        planned = _planned_units(self._setup, new)
        generate = self._units(rollouts, planned, now)
        stages = {
            "generate": generate,
            "score": after(self._units(scores, generate.total, now), generate),
            "train": self._train(here, now),
        }
        if is_due(self._setup.config, here.index):
            is_there = here.policy.is_complete()
            stages["evaluate"] = (
                self._evaluate(named(here.policy), now)
                if is_there
                else Pace(done=0, total=None, is_complete=False)
            )
        spans = [span for a in (*rollouts, *scores) for span in spans_of(self._commits(a))]
        if self._setup.config.replay is not None:
            spans = []  # another run's time
        return RoundStatus(
            round=here.index,
            policy_version=here.index + 1,
            window_tokens=here.window_tokens,
            busy_seconds=busy_seconds(spans) + (stages["train"].busy_seconds or 0.0),
            stages=stages,
        )

    def _units(self, artifacts: Sequence[Artifact], planned: int | None, now: float) -> Pace:
        started = [artifact for artifact in artifacts if artifact.is_started()]
        total = planned
        if len(started) == len(artifacts):
            total = sum(len(artifact.units()) for artifact in started)
        return pace_of_units(
            [commit for artifact in started for commit in self._commits(artifact)],
            total=total,
            is_complete=all(artifact.is_complete() for artifact in artifacts),
            now=now,
        )

    def _commits(self, artifact: Artifact) -> list[Commit]:
        known = self._complete.get(artifact.fingerprint)
        if known is not None and artifact.is_complete():
            return known
        commits = list(artifact.listed_commits().values())
        if artifact.is_complete():
            self._complete[artifact.fingerprint] = commits
        return commits

    def _train(self, here: Round, now: float) -> Pace:
        lines = self._directory.training_lines(here)
        pace = Pace(done=0, total=here.plan.planned_steps, is_complete=False)
        if lines:
            pace = pace_of_steps(
                lines,
                total=here.plan.planned_steps,
                is_complete=here.policy.is_complete(),
                now=now,
                latest=self._directory.metrics.stat().st_mtime,
            )
        if not here.policy.is_complete():
            kept = self._directory.checkpoint_steps(here)
            return replace(pace, facts=pace.facts | ({} if kept is None else {"checkpoint": kept}))
        outcome = here.policy.manifest().outcome
        last = outcome.epochs[-1]
        facts = {"loss": last.loss, "policy_drift": last.policy_drift}
        if lines:
            return replace(pace, facts=facts)
        return Pace(
            done=outcome.steps,
            total=outcome.steps,
            is_complete=True,
            tokens=int(outcome.trained.tokens),
            busy_seconds=outcome.seconds,
            units_per_second=outcome.steps / outcome.seconds,
            tokens_per_second=outcome.trained.tokens / outcome.seconds,
            facts=facts,
        )

    def _evaluate(self, student: Checkpoint, now: float) -> Pace:
        evaluation = self._setup.config.evaluation
        assert evaluation is not None
        store, rollouts, passed = self._setup.store, list[Artifact](), list[float]()
        for part in evaluation.parts().values():
            assert part.prompts is not None  # validated
            artifact = evaluation_rollouts(
                store,
                self._setup.config,
                part,
                prompts=prompts_artifact(store, part.prompts, student),
                student=student,
                stop_ids=self._setup.stop_ids,
            )
            known = evaluation_result(store, part, artifact)
            rollouts.append(artifact)
            passed += [] if known is None else [known[1]["pass@1"]]
        is_complete = len(passed) == len(rollouts)
        facts = {"pass@1": sum(passed) / len(passed)} if is_complete else {}
        return replace(self._units(rollouts, None, now), is_complete=is_complete, facts=facts)


def _planned_units(setup: Setup, caches: Sequence[Cache]) -> int | None:
    """Units of a round that nobody has started, as this config would cut them."""
    prompts = setup.config.rollouts.prompts_per_round
    return sum(
        len(cache.slots) or -(-prompts // cache.prompts_per_unit(setup.config.prompts_per_unit))
        for cache in caches
    )


def _eta(setup: Setup, heres: Sequence[Round], rounds: Sequence[RoundStatus]) -> float | None:
    """Seconds that are left, if a token of the window takes as long as in the complete rounds."""
    done = [s for here, s in zip(heres, rounds, strict=True) if here.policy.is_complete()]
    windows = sum(status.window_tokens or 0 for status in done)
    if not windows or not sum(status.busy_seconds for status in done):
        return None
    per_token = sum(status.busy_seconds for status in done) / windows
    left = 0.0
    for here, status in zip(heres, rounds, strict=True):
        if not here.policy.is_complete():
            left += max(0.0, per_token * here.window_tokens - status.busy_seconds)
    last = heres[-1].plan
    decided = None if heres[-1].decision is None else heres[-1].window_tokens
    for index in range(len(heres), setup.config.rounds):
        steps = last.first_step + last.planned_steps * (index - last.round_index)
        plan = plan_round(setup.config, round_index=index, first_step=steps, decided_window=decided)
        left += per_token * plan.window_tokens
    return left
