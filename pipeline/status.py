"""How far a run is: the pace of each step, read from the store; of training also from its folder.

Any machine that reaches the store can ask, whichever machines the stages run on: units carry the
time they were made, and rounds are named as the run itself names them.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_stream.store.artifact import Artifact, Commit, summed_counts
from opd_stream.store.policy import PolicyArtifact
from pipeline.accounting import Span, busy_seconds
from pipeline.evaluation import distance_steps, evaluation_steps
from pipeline.lease import holder
from pipeline.plan import is_due
from pipeline.rounds import Round, named_checkpoint, rounds
from pipeline.run_folder import RunFolder
from pipeline.runs import worked_at
from pipeline.setup import Setup
from pipeline.verdict import age_of, verdict
from stages.checkpoints import Checkpoint
from stages.distance import distance_result
from stages.evaluate import evaluation_result
from stages.recipes import is_given
from stages.step import PROBE, PROBE_SCORE, Step, of_stage, with_needs

QUIET_SECONDS = 60.0  # a stage is quiet when nothing came for this long
QUIET_UNITS = 3.0  # and as long again as this many of its longest units took


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """A stage of a round; None stands for what is not known.

    Example:
        >>> Pace(done=3, total=8, is_complete=False, tokens=9_216, busy_seconds=12.0,
        ...      units_per_second=0.25, tokens_per_second=768.0, eta_seconds=20.0,
        ...      idle_seconds=1.2, is_quiet=False, facts={})
    """

    done: int  # units; optimizer steps in training
    total: int | None
    is_complete: bool
    tokens: int = 0  # of completions
    busy_seconds: float | None = None  # in which at least one worker was at it
    units_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None  # None also where it is complete or quiet
    idle_seconds: float | None = None  # since the latest unit
    is_quiet: bool = False  # not complete, and nothing came for long
    facts: dict[str, float] = field(default_factory=dict)  # loss, policy_drift, pass@1, …


def pace_of_units(
    commits: Sequence[Commit], *, total: int | None, is_complete: bool, now: float
) -> Pace:
    """The pace of the units of one stage, over all machines that make them.

    Rates are per second in which at least one worker was busy, so pauses do not count; `now` is in
    seconds since the epoch.
    """
    timed = [commit for commit in commits if commit.made_at]
    tokens = int(summed_counts(commits).get("completion_tokens", 0))
    pace = Pace(done=len(commits), total=total, is_complete=is_complete, tokens=tokens)
    busy = busy_seconds(spans_of(timed))
    if not busy:
        return pace
    return _with_rates(
        replace(pace, busy_seconds=busy),
        units=len(timed) / busy,
        tokens=summed_counts(timed).get("completion_tokens", 0) / busy,
        idle=max(0.0, now - max(commit.made_at for commit in timed)),
        longest=max(commit.seconds for commit in timed),
    )


def pace_of_steps(
    lines: Sequence[dict[str, Any]], *, total: int, is_complete: bool, now: float, latest: float
) -> Pace:
    """The pace of training, from its lines of metrics.jsonl; `latest` is when the last was written.

    The steps that are planned are at most done: drift may stop the round earlier.
    """
    seconds = [line["seconds"] for line in lines]
    tokens, done, busy = sum(line["trained_tokens"] for line in lines), len(lines), sum(seconds)
    total = done if is_complete else total
    pace = Pace(done=done, total=total, is_complete=is_complete, tokens=tokens)
    if not busy:
        return pace
    facts = {name: lines[-1][name] for name in ("loss", "policy_drift")}
    return _with_rates(
        replace(pace, busy_seconds=busy, facts=facts),
        units=done / busy,
        tokens=tokens / busy,
        idle=max(0.0, now - latest),
        longest=max(seconds),
    )


def spans_of(commits: Iterable[Commit]) -> list[Span]:
    """When each unit was being made, seconds since the epoch, where that is known."""
    return [(each.made_at - each.seconds, each.made_at) for each in commits if each.made_at]


def after(pace: Pace, earlier: Pace) -> Pace:
    """A stage that works on what an earlier one makes cannot end before it."""
    if pace.eta_seconds is None or earlier.is_complete:
        return pace
    if earlier.eta_seconds is None:
        return replace(pace, eta_seconds=None)
    return replace(pace, eta_seconds=max(pace.eta_seconds, earlier.eta_seconds))


def _with_rates(pace: Pace, *, units: float, tokens: float, idle: float, longest: float) -> Pace:
    is_quiet = not pace.is_complete and idle > QUIET_SECONDS + QUIET_UNITS * longest
    is_known = pace.total is not None and not pace.is_complete and not is_quiet
    return replace(
        pace,
        units_per_second=units,
        tokens_per_second=tokens,
        idle_seconds=idle,
        is_quiet=is_quiet,
        eta_seconds=((pace.total or 0) - pace.done) / units if is_known else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatus:
    """A round with the pace of each of its stages; `evaluate` only where it is due."""

    round: int | None  # from 0; None: the initial student, which is only evaluated
    policy_version: int  # of the policy that is evaluated: 0, or the round's number + 1
    window_tokens: int | None = None
    busy_seconds: float = 0.0  # in generate, score and train
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
    age_seconds: float | None = None  # since anything was made
    verdict: str | None = None  # a sentence; None: of settings that are not the run's


class StatusReader:
    """Reads the status again and again; what is complete is read once."""

    def __init__(self, setup: Setup, folder: RunFolder, *, is_own: bool = True) -> None:
        self._setup, self._folder, self._is_own = setup, folder, is_own
        self._complete: dict[str, list[Commit]] = {}  # fingerprint -> records
        self._rounds: dict[str, RoundStatus] = {}  # fingerprint of the policy -> complete round
        self._lines: dict[int, list[dict[str, Any]]] = {}  # of training, by round

    def read(self) -> RunStatus:
        """The status now."""
        now, setup = time.time(), self._setup
        named = list(rounds(setup, opened=named_checkpoint))
        new = [each for each in named if each.policy.fingerprint not in self._rounds]
        self._lines = self._folder.training_lines(new)
        statuses = [self._round(round_, now) for round_ in named]
        start: list[RoundStatus] = []
        if setup.config.evaluation is not None:
            stages = {"evaluate": self._evaluate(setup.student, 0, now)}
            start = [RoundStatus(round=None, policy_version=0, stages=stages)]
        complete = sum(round_.policy.is_complete() for round_ in named)
        status = RunStatus(
            run=str(self._folder.path),
            time=now,
            is_finished=complete == setup.config.rounds and all(s.is_complete for s in statuses),
            rounds_complete=complete,
            rounds_planned=setup.config.rounds,
            eta_seconds=_eta(setup, statuses),
            rounds=(*start, *statuses),
            age_seconds=age_of((*start, *statuses), now - worked_at(self._folder.path)),
        )
        said = verdict(status, holder(self._folder.path)) if self._is_own else None
        return replace(status, verdict=said)

    def _round(self, round_: Round, now: float) -> RoundStatus:
        known = self._rounds.get(round_.policy.fingerprint) or self._read_round(round_, now)
        if known.is_complete:
            self._rounds[round_.policy.fingerprint] = known
            for step in round_.steps:  # not asked for again, and of many rounds they are many
                self._complete.pop(step.artifact.fingerprint, None)
        return known

    def _read_round(self, round_: Round, now: float) -> RoundStatus:
        made = [
            s for s in round_.steps[:-1] if (s.is_new or not s.is_complete()) and not s.is_void()
        ]
        stages: dict[str, Pace] = {}
        for stage in ("generate", "score"):
            steps = of_stage(made, stage)
            pace = self._units(steps, now)
            stages[stage] = after(pace, stages["generate"]) if stages else pace
            for step in (step for step in steps if step.teacher is not None):
                own = self._units([step], now)
                stages[f"{stage} {step.teacher}"] = after(own, stages["generate"])
        stages["train"] = self._train(round_, now)
        if is_due(self._setup.config, round_.index):
            stages["evaluate"] = Pace(done=0, total=None, is_complete=False)
            if round_.policy.is_complete():
                policy = named_checkpoint(round_.policy)
                stages["evaluate"] = self._evaluate(policy, round_.index + 1, now)
        spans: list[Span] = []
        if self._setup.config.replay is None:  # else another run's time
            spans = [span for step in made for span in spans_of(self._commits(step))]
        return RoundStatus(
            round=round_.index,
            policy_version=round_.index + 1,
            window_tokens=round_.window_tokens,
            busy_seconds=busy_seconds(spans) + (stages["train"].busy_seconds or 0.0),
            stages=stages,
        )

    def _units(self, steps: Sequence[Step], now: float) -> Pace:
        return pace_of_units(
            [commit for step in steps for commit in self._commits(step)],
            total=sum(self._planned_units(step) for step in steps),
            is_complete=all(step.is_complete() for step in steps),
            now=now,
        )

    def _planned_units(self, step: Step) -> int:
        """Units of a step, as this config would cut those of one that nobody has started."""
        if step.shards.is_started():
            return len(step.shards.units())
        if step.kind.stage == "score":
            return self._planned_units(step.rollouts)
        settings, config = step.artifact.recipe.settings, self._setup.config
        if "probe" in settings:
            return 0  # it is not known yet whether there is one
        ranges = settings.get("selection", {}).get("ranges")
        units = settings.get("extends", ranges)
        if units is not None:
            return len(units)
        rollouts = config.rollouts
        prompts = rollouts.given_prompts if is_given(step.artifact.recipe) else rollouts.own_prompts
        return -(-prompts // config.prompts_per_unit)

    def _commits(self, step: Step) -> list[Commit]:
        known = self._complete.get(step.artifact.fingerprint)
        if known is not None and step.artifact.is_complete():
            return known
        commits = step.commits()
        if step.artifact.is_complete():
            self._complete[step.artifact.fingerprint] = commits
        return commits

    def _train(self, round_: Round, now: float) -> Pace:
        lines = self._lines.get(round_.index, [])
        pace = Pace(done=0, total=round_.plan.planned_steps, is_complete=False)
        if lines:
            pace = pace_of_steps(
                lines,
                total=round_.plan.planned_steps,
                is_complete=round_.policy.is_complete(),
                now=now,
                latest=self._folder.metrics.stat().st_mtime,
            )
        if not round_.policy.is_complete():
            kept = self._folder.checkpoint_steps(round_)
            return replace(pace, facts=pace.facts | ({} if kept is None else {"checkpoint": kept}))
        outcome = round_.policy.manifest().outcome
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

    def _evaluate(self, policy: Checkpoint, version: int, now: float) -> Pace:
        setup, evaluation = self._setup, self._setup.config.evaluation
        assert evaluation is not None
        parts = evaluation.parts()
        answers = evaluation_steps(setup.config, setup.store, policy, setup.vocabulary, version)
        steps, passed, known = list[Step](), list[float](), list[bool]()
        facts: dict[str, float] = {}
        for name, step in answers.items():
            if parts[name].kind == "distance":
                args = (setup.config, setup.store, parts[name], step, setup.vocabulary)
                distances = distance_steps(*args)
                steps += with_needs(distances.values())
                found = distance_result(
                    setup.store, {text: each.shards for text, each in distances.items()}
                )
                known.append(found is not None)
                if found is not None:
                    facts.setdefault("reverse_kl", found[1].texts["samples"].reverse_kl)
                continue
            steps.append(step)
            result = evaluation_result(setup.store, parts[name], step.shards)
            known.append(result is not None)
            passed += [] if result is None else [result[1].passes["pass@1"]]
        is_complete = all(known)
        if passed and is_complete:
            facts["pass@1"] = sum(passed) / len(passed)
        started = [step for step in steps if step.shards.is_started()]
        pace = self._units(started, now)
        total = pace.total if len(started) == len(steps) else None
        facts = facts if is_complete else {}
        return replace(pace, total=total, is_complete=is_complete, facts=facts)


def _eta(setup: Setup, named: Sequence[RoundStatus]) -> float | None:
    """Seconds that are left, if a token of the window takes as long as in the complete rounds."""
    done = [status for status in named if status.stages["train"].is_complete]
    windows = sum(status.window_tokens or 0 for status in done)
    busy = sum(status.busy_seconds for status in done)
    if not windows or not busy:
        return None
    left, per_token = 0.0, busy / windows
    for number, round_ in enumerate(rounds(setup, opened=named_checkpoint, expected=True)):
        if not round_.is_expected and round_.policy.is_complete():
            continue
        spent = named[number].busy_seconds if number < len(named) else 0.0
        left += max(0.0, per_token * round_.window_tokens - spent)
    return left


def status_lines(setup: Setup) -> list[str]:
    """One line a round, and for the first missing artifact how it differs from the nearest one."""
    lines: list[str] = []
    named = 0
    for round_ in rounds(setup, opened=named_checkpoint):
        named += 1
        lines.append(
            f"round {round_.index}: window {round_.plan.window_tokens}; "
            f"generate {_progress_text([cache.rollouts for cache in round_.caches])}; "
            f"score {_progress_text([cache.scores for cache in round_.caches])}; "
            f"train {'complete' if round_.policy.is_complete() else 'not complete'}"
        )
        # A probe may turn out not to be needed.
        needed = (step for step in round_.steps if step.kind not in (PROBE, PROBE_SCORE))
        missing = next((step for step in needed if not step.is_complete()), None)
        if missing is not None:
            lines += _nearest(setup, missing.artifact)
    waiting = setup.config.rounds - named
    if waiting:
        later = "1 more round waits" if waiting == 1 else f"{waiting} more rounds wait"
        lines.append(f"{later} for the policy of the round before")
    return lines


def _progress_text(steps: Iterable[Step]) -> str:
    artifacts = [step.shards for step in steps]
    if all(artifact.is_complete() for artifact in artifacts):
        return "complete"
    started = [artifact for artifact in artifacts if artifact.is_started()]
    if not started:
        return "not started"
    done = sum(len(artifact.commits()) for artifact in started)
    return f"{done} of {sum(len(artifact.units()) for artifact in started)} units"


def _nearest(setup: Setup, artifact: Artifact | PolicyArtifact) -> list[str]:
    found = setup.store.nearest(artifact.recipe)
    if found is None:
        return [f"  {artifact.name} is not complete; the store has no other {artifact.recipe.kind}"]
    other, fields = found
    return [
        f"  {artifact.name} is not complete; the nearest is "
        f"{other.kind}/{other.fingerprint[:16]}, which differs in:",
        *(
            f"    {name}: {_short(old)} there, {_short(new)} here"
            for name, (old, new) in fields.items()
        ),
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 20 else f"{text[:16]}…{text[-1]}"
