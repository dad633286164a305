"""The loop: generate, score, train, evaluate, report; again until the rounds are done.

Every step first looks for its artifact and makes only what is missing, so the same function starts
a run, continues one after any kind of stop, and finds that a finished one has nothing to do.
"""

import importlib
import time
from dataclasses import dataclass, field
from typing import Any

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from pipeline.caches import Cache, bases_of, scores_of
from pipeline.evaluation import Evaluator
from pipeline.plan import is_due
from pipeline.reports import Span, busy_seconds
from pipeline.run_directory import RunDirectory
from pipeline.run_records import Records, given, reached
from pipeline.setup import Setup, open_setup
from pipeline.walk import (
    Round,
    checkpoint_of,
    probe_artifacts,
    walk,
)
from stages.checkpoints import Checkpoint
from stages.collect import (
    SubmittedWork,
    start_probe,
    start_rollouts,
    start_scores,
    submit_missing,
    wait_for,
)
from stages.executors import Executor, open_executor
from stages.progress import Progress


@dataclass(slots=True, kw_only=True)
class Session:
    """One call of the command: what it works with, and when it was busy."""

    setup: Setup
    directory: RunDirectory
    run_id: str
    executor: Executor
    progress: Progress
    ahead: SubmittedWork | None = None  # of the next round, begun before this one trained
    spans: list[Span] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    reached: set[str] = field(default_factory=set)  # names of artifacts

    def reach(self, names: set[str]) -> None:
        """Tell the store what is about to be read or made, so that `gc` leaves it."""
        self.reached |= names
        self.setup.store.add_to_run(self.run_id, self.directory.path, self.reached)


def run(config: Config, directory: RunDirectory, progress: Progress) -> dict[str, Any]:
    """Run or continue the whole loop; returns the summary.

    Raises:
        UserError: anything the user can mend, told in one line.
    """
    started = time.time()
    setup = open_setup(config)
    run_id = directory.open(config)
    for line in setup.warnings:
        progress.warn(line)
    earlier = directory.calls()
    records = Records(setup=setup, directory=directory, run_id=run_id)
    reports: list[dict[str, Any]] = []
    with setup.store.watched(), open_executor(config) as executor:
        session = Session(
            setup=setup,
            directory=directory,
            run_id=run_id,
            executor=executor,
            progress=progress,
            started=started,
        )
        session.reach(given(setup))
        if config.evaluation is not None:
            evaluate_policy(session, setup.student)
        if not directory.summary():
            records.write_summary(reports, _calls(session, earlier))
        for here in walk(setup):
            session.reach(reached(setup, here))
            directory.write_plan(here)
            if not has_policy(session, here):
                train_round(session, here)
            if is_due(config, here.index):
                evaluate_policy(session, checkpoint_of(here.policy))
            reports.append(records.write_round(here))
            records.write_summary(reports, _calls(session, earlier))
        setup.store.record_run(run_id, directory.path, session.reached)  # and no more
    return records.write_summary(reports, _calls(session, earlier))


def has_policy(session: Session, here: Round) -> bool:
    """Whether the round's policy is there and whole; a damaged one is named and taken out."""
    if not here.policy.is_complete():
        return False
    reason = here.policy.damage(cache=session.setup.store.digests)
    if reason is not None:
        session.progress.warn(f"{here.policy.name} is damaged ({reason}); it is trained again")
        here.policy.invalidate()
    return reason is None


def train_round(session: Session, here: Round) -> None:
    """Everything up to the policy of a round; a unit found damaged while reading is made again."""
    while True:
        make_caches(session, here)
        _begin_ahead(session, here)
        try:
            return train_policy(session, here)
        except DamagedUnit as damaged:
            if session.setup.config.replay is not None:
                raise UserError(
                    f"{damaged}; a replay only reads: continue the run that made it, then this one"
                ) from damaged
            session.progress.warn(f"{damaged}; it is made again")
            damaged.artifact.invalidate(damaged.unit)


def make_caches(
    session: Session, here: Round, *, score: bool = True, shuffle: bool = False
) -> None:
    """The generate and score stages of a round (a replay has nothing to make).

    Without `score` only the student's side; with `shuffle` in an order of this process's own.
    """
    setup = session.setup
    if setup.config.replay is not None:
        return
    mine = session.ahead
    if mine is not None and mine.rollouts.name in {cache.rollouts.name for cache in here.caches}:
        session.ahead = None
        _begin_ahead(session, here)  # the sampler goes on while our last units are scored
        _finish(session, mine, "generate")
    session.progress.say(
        f"round {here.index}: window {here.window_tokens} tokens, "
        f"policy {here.student.identity.fingerprint[:12]}"
    )
    for cache in here.caches:
        if cache.made_in == here.index or not cache.is_complete():
            _mend_bases(session, here, cache, score=score)
            name = "extend" if cache.origin == "extended" else "generate"
            _finish(session, _begin(session, cache, score=score, shuffle=shuffle), name)
    if here.probe is not None:
        _make_probe(session, here, score=score)


def _mend_bases(session: Session, here: Round, cache: Cache, *, score: bool) -> None:
    """Make again what is damaged of what an extension continues, by who made it."""
    for base in bases_of(session.setup, cache, here.students):
        work = _begin(session, base, score=score, shuffle=False)
        if work.tasks:
            _finish(session, work, "generate")


def _begin_ahead(session: Session, here: Round) -> None:
    """Order the next round's rollouts, unless that is done or they wait for this round's policy."""
    if here.ahead is not None and session.ahead is None:
        session.ahead = _begin(session, here.ahead, score=True, shuffle=False)


def _begin(session: Session, cache: Cache, *, score: bool, shuffle: bool) -> SubmittedWork:
    """Order what is missing of a cache."""
    setup = session.setup
    assert cache.student is not None
    rollouts = start_rollouts(
        setup.store,
        cache.rollouts.recipe,
        prompts_per_unit=cache.prompts_per_unit(setup.config.prompts_per_unit),
    )
    return submit_missing(
        session.executor,
        rollouts,
        start_scores(setup.store, cache.scores.recipe, rollouts) if score else None,
        student=cache.student,
        teacher=setup.teacher,
        made_by=session.run_id,
        progress=session.progress,
        shuffle=shuffle,
    )


def _make_probe(session: Session, here: Round, *, score: bool) -> None:
    """Probes of the round's rollouts, continued and scored; counted in every figure of cost."""
    setup = session.setup
    assert here.probe is not None
    assert here.fresh is not None
    probe = start_probe(setup.store, here.probe, here.fresh.rollouts)
    if probe is None:
        return
    work = submit_missing(
        session.executor,
        probe,
        start_scores(setup.store, scores_of(setup, here.probe), probe) if score else None,
        student=here.student,
        teacher=setup.teacher,
        made_by=session.run_id,
        progress=session.progress,
    )
    _finish(session, work, "probe")


def _finish(session: Session, work: SubmittedWork, name: str) -> None:
    """Wait for a collection; this process gets ready for training while the workers start."""
    if work.tasks:
        _import_training()
    session.spans += wait_for(session.executor, work, session.progress, name=name)


def _import_training() -> None:
    """Load what training needs while workers start."""
    importlib.import_module("stages.train")


def train_policy(session: Session, here: Round) -> None:
    """The train stage of a round.

    Raises:
        UserError: nothing can be trained on, or the loss is not finite.
        DamagedUnit: a shard is not what was committed.
    """
    from stages.train import OPTIMIZER, train
    from stages.train_job import TrainJob

    config, start = session.setup.config, time.time()
    optimizer = None if here.previous is None else here.previous.folder("training") / OPTIMIZER
    author = here.caches[-1].rollouts.recipe.inputs.get("student")
    train(
        TrainJob(
            config=config,
            policy=here.policy.recipe,
            base=str(here.student.folder),
            initial=str(session.setup.student.folder),
            optimizer_state=None if optimizer is None else str(optimizer),
            caches=tuple(cache.cache_units() for cache in here.caches),
            is_fresh=author == here.student.identity.fingerprint,
            is_gated=any(decision["action"] == "gated" for decision in here.unit_decisions),
            probe=_complete_probe(session, here),
            earlier_decision=here.decision,
            window_tokens=here.window_tokens,
            masked_ids=session.setup.masked_ids,
            newline_ids=session.setup.newline_ids,
            stop_ids=session.setup.stop_ids,
            prompts=session.setup.prompts.fingerprint,
            first_step=here.plan.first_step,
            round_index=here.index,
            scratch=str(session.directory.scratch(here)),
            metrics=str(session.directory.metrics),
            made_by=session.run_id,
        ),
        session.progress,
    )
    session.spans.append((start, time.time()))
    if (decided := here.policy.manifest().outcome.window_decision) is not None:
        session.progress.say(f"next round: {decided.reason}")


def _complete_probe(session: Session, here: Round) -> tuple[str, str] | None:
    if here.probe is None:
        return None
    found = probe_artifacts(session.setup, here.probe)
    if not all(artifact.is_complete() for artifact in found):
        return None
    rollouts, scores = found
    return rollouts.fingerprint, scores.fingerprint


def evaluate_policy(session: Session, student: Checkpoint) -> None:
    """The evaluate stage for one policy."""
    evaluator = Evaluator(
        config=session.setup.config,
        store=session.setup.store,
        executor=session.executor,
        run_id=session.run_id,
        progress=session.progress,
        reach=session.reach,
    )
    evaluator.measure(student, session.setup.stop_ids, _import_training)
    session.spans += evaluator.spans


def _calls(session: Session, earlier: dict[str, float]) -> dict[str, float]:
    """Seconds of all calls of the run so far."""
    wall = time.time() - session.started if session.spans else 0.0  # nothing done: no time spent
    return {
        "wall": earlier.get("wall", 0.0) + wall,
        "other": earlier.get("other", 0.0) + wall - busy_seconds(session.spans),
    }
