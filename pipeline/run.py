"""The loop: generate, score, train, evaluate, report; again until the rounds are done.

Every step first looks for its artifact and makes only what is missing, so the same function starts
a run, resumes one after any kind of stop, and finds that a finished one has nothing to do.
"""

import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.store import Store
from pipeline.accounting import Accounts, Span, busy_seconds, inputs_of
from pipeline.evaluation import evaluation_steps
from pipeline.plan import is_due
from pipeline.records import RunSummary
from pipeline.rounds import Round, checkpoint_of, rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import Setup, open_setup
from stages.checkpoints import Checkpoint
from stages.collect import (
    SubmittedWork,
    make_again,
    start_probe,
    start_rollouts,
    start_scores,
    submit_missing,
    wait_for,
)
from stages.evaluate import evaluate, evaluation_prompts
from stages.executors import Executor, open_executor
from stages.step import PROBE, Progress, Step, of_stage, with_needs


@dataclass(slots=True, kw_only=True)
class Session:
    """One call of a command: what it works with, and when it was busy."""

    config: Config
    store: Store
    folder: RunFolder
    run_id: str
    record: str | None = None  # id under which the store is told what is reached; None: the run's
    executor: Executor
    progress: Progress
    ahead: SubmittedWork | None = None  # of the next round, begun before this one trained
    spans: list[Span] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    reached: set[str] = field(default_factory=set)  # names of artifacts

    def reach(self, names: set[str]) -> None:
        """Tell the store what is about to be read or made, so that `gc` leaves it."""
        self.reached |= names
        self.store.add_to_run(self.record or self.run_id, self.folder.path, self.reached)

    def call_seconds(self, earlier: dict[str, float]) -> dict[str, float]:
        """Seconds of all calls of the run so far, as a summary has them."""
        wall = time.time() - self.started if self.spans else 0.0  # nothing done: no time spent
        return {
            "wall": earlier.get("wall", 0.0) + wall,
            "other": earlier.get("other", 0.0) + wall - busy_seconds(self.spans),
        }


def run(config: Config, folder: RunFolder, progress: Progress) -> RunSummary:
    """Start or resume the whole loop; returns the summary.

    Raises:
        UserError: anything the user can mend, told in one line.
    """
    started = time.time()
    setup = open_setup(config)
    run_id = folder.open(config)
    for line in setup.warnings:
        progress.warn(line)
    earlier = folder.calls()
    accounts = Accounts(setup=setup, folder=folder, run_id=run_id)
    with setup.store.watched(), open_executor(config) as executor:
        session = Session(
            config=config,
            store=setup.store,
            folder=folder,
            run_id=run_id,
            executor=executor,
            progress=progress,
            started=started,
        )
        session.reach(inputs_of(setup))
        evaluate_policy(session, setup.student, setup.stop_ids, version=0)
        if folder.summary() is None:
            accounts.write_summary(session.call_seconds(earlier))
        for here in rounds(setup):
            session.reach(here.names())
            worked = len(session.spans)
            if not is_trained(session, here):
                folder.write_plan(here)
                train_round(session, setup, here)
            if is_due(config, here.index):
                policy = checkpoint_of(here.policy)
                evaluate_policy(session, policy, setup.stop_ids, version=here.index + 1)
            accounts.write_round(here, is_changed=len(session.spans) > worked)
            accounts.write_summary(session.call_seconds(earlier))
        setup.store.record_run(run_id, folder.path, session.reached)  # and no more
    return accounts.write_summary(session.call_seconds(earlier))


def is_trained(session: Session, here: Round) -> bool:
    """Whether the round's policy is there and whole; a damaged one is named and taken out."""
    if not here.policy.is_complete():
        return False
    reason = here.policy.damage(cache=session.store.digests)
    if reason is not None:
        session.progress.warn(f"{here.policy.name} is damaged ({reason}); it is trained again")
        here.policy.invalidate()
    return reason is None


def train_round(session: Session, setup: Setup, here: Round) -> None:
    """Everything up to the policy of a round; a unit found damaged while reading is made again."""
    made_again: set[tuple[str, int]] = set()
    while True:
        make_shards(session, here)
        try:
            return train_policy(session, setup, here)
        except DamagedUnit as damaged:
            if session.config.replay is not None:
                raise UserError(
                    f"{damaged}; a replay only reads: resume the run that made it, then this one"
                ) from damaged
            make_again(damaged, made_again, session.progress)


def make_shards(
    session: Session, here: Round, *, score: bool = True, shuffle: bool = False
) -> None:
    """The generate and score stages of a round, and the begin of the next one's where it may be.

    Args:
        session: of the call.
        here: the round; a replay has nothing to make.
        score: False: only what the student makes.
        shuffle: in an order of this process's own, to share the work with others.
    """
    if session.config.replay is not None:
        return
    begun = session.ahead
    if begun is not None and begun.rollouts.name == here.caches[-1].rollouts.artifact.name:
        session.ahead = None
        _begin_ahead(session, here)  # the sampler goes on while our last units are scored
        _finish(session, begun, "generate")
    session.progress.say(
        f"round {here.index}: window {here.window_tokens} tokens, "
        f"policy {here.student.identity.fingerprint[:12]}"
    )
    due = [step for step in here.steps[:-1] if step.is_new or not step.is_complete()]
    for rollouts, scores in streams(due):
        if rollouts.is_void():
            continue
        scored = scores if score else []
        work = _begin(session, rollouts, scored[0] if scored else None, shuffle=shuffle)
        if work.tasks or rollouts.is_new:
            _finish(session, work, rollouts.kind.name)
        for other in scored[1:]:
            work = _begin(session, rollouts, other, shuffle=shuffle, generate=False)
            _finish(session, work, rollouts.kind.name)
    _begin_ahead(session, here)


def streams(steps: list[Step]) -> Iterator[tuple[Step, list[Step]]]:
    """Rollouts with the scores that stream behind them, each after all that it needs."""
    everything = list(with_needs(steps))
    for rollouts in of_stage(everything, "generate"):
        name = rollouts.artifact.name
        scores = of_stage(everything, "score")
        yield rollouts, [step for step in scores if step.rollouts.artifact.name == name]


def start_shards(session: Session, step: Step) -> Artifact:
    """Join or start the artifact of a step of shards."""
    recipe, store = step.artifact.recipe, session.store
    if step.kind.stage == "score":
        return start_scores(store, recipe, step.rollouts.shards)
    if step.kind == PROBE:
        started = start_probe(store, recipe, step.needs[0].shards)
        assert started is not None  # a void step is never started
        return started
    ranges = recipe.settings["selection"].get("ranges", ())
    size = max((last - first for first, last in ranges), default=session.config.prompts_per_unit)
    return start_rollouts(store, recipe, prompts_per_unit=size)


def _begin(
    session: Session,
    rollouts: Step,
    scores: Step | None,
    *,
    shuffle: bool = False,
    generate: bool = True,
) -> SubmittedWork:
    """Submit what is missing of rollouts, and of scores of them."""
    assert rollouts.model is not None
    return submit_missing(
        session.executor,
        start_shards(session, rollouts),
        None if scores is None else start_shards(session, scores),
        student=rollouts.model,
        teacher=None if scores is None else scores.model,
        made_by=session.run_id,
        progress=session.progress,
        generate=generate,
        shuffle=shuffle,
    )


def _begin_ahead(session: Session, here: Round) -> None:
    """Submit the next round's rollouts, unless done or waiting for this round's policy."""
    if here.ahead is not None and session.ahead is None:
        session.ahead = _begin(session, here.ahead.rollouts, here.ahead.scores)


def _finish(session: Session, work: SubmittedWork, name: str) -> None:
    """Wait for submitted work; this process gets ready for training while the workers start."""
    if work.tasks:
        _import_training()
    session.spans += wait_for(session.executor, work, session.progress, name=name)


def _import_training() -> None:
    """Load what training needs while workers start."""
    importlib.import_module("stages.train")


def train_policy(session: Session, setup: Setup, here: Round) -> None:
    """The train stage of a round.

    Raises:
        UserError: nothing can be trained on, or the loss is not finite.
        DamagedUnit: a shard is not what was committed.
    """
    from stages.train import OPTIMIZER, train
    from stages.train_job import TrainJob

    start = time.time()
    optimizer = None if here.previous is None else here.previous.folder("training") / OPTIMIZER
    author = here.caches[-1].rollouts.artifact.recipe.inputs.get("student")
    probe = here.probe
    audited = None
    if probe is not None and probe.artifact.is_complete():
        audited = (probe.rollouts.artifact.fingerprint, probe.artifact.fingerprint)
    train(
        TrainJob(
            config=session.config,
            policy=here.policy.recipe,
            base=str(here.student.folder),
            initial=str(setup.student.folder),
            optimizer_state=None if optimizer is None else str(optimizer),
            caches=tuple(cache.cache_units() for cache in here.caches),
            is_fresh=author == here.student.identity.fingerprint,
            is_gated=any(decision.action == "gated" for decision in here.unit_decisions),
            probe=audited,
            earlier_decision=here.audit,
            window_tokens=here.window_tokens,
            masked_ids=setup.masked_ids,
            newline_ids=setup.newline_ids,
            stop_ids=setup.stop_ids,
            prompts=setup.prompts.fingerprint,
            first_step=here.plan.first_step,
            round_index=here.index,
            scratch=str(session.folder.scratch(here)),
            metrics=str(session.folder.metrics),
            made_by=session.run_id,
        ),
        session.progress,
    )
    session.spans.append((start, time.time()))
    audit = here.policy.manifest().outcome.window_decision
    if audit is not None:
        session.progress.say(f"next round: {audit.reason}")


def evaluate_policy(
    session: Session, policy: Checkpoint, stop_ids: tuple[int, ...], *, version: int
) -> None:
    """The evaluate stage for one policy, as far as the store does not have it.

    Args:
        session: of the call; without an evaluation section nothing is done.
        policy: answers.
        stop_ids: terminators of its answers.
        version: of the policy; 0 is the initial student.

    Raises:
        UserError: prompts or judge are refused, or a worker met a user's mistake.
    """
    config, evaluation = session.config, session.config.evaluation
    if evaluation is None:
        return
    for name, step in evaluation_steps(config, session.store, policy, stop_ids, version).items():
        part = evaluation.parts()[name]
        prompts = evaluation_prompts(session.store, part, policy)
        session.reach({prompts.name, step.artifact.name})
        _finish(session, _begin(session, step, None), "evaluate")
        evaluate(session.store, part, step.shards, policy)
