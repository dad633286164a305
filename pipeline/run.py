"""The loop: generate, score, train, evaluate, report; again until the rounds are done.

Every step first looks for its artifact and makes only what is missing, so the same function starts
a run, resumes one after any kind of stop, and finds that a finished one has nothing to do.
"""

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from opd_stream.config import Config
from opd_stream.curriculum import levels_text, measured_levels
from opd_stream.errors import UserError
from opd_stream.memory import give_back
from opd_stream.outcome import LevelRate
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.garbage import drop_states, old_states
from opd_stream.store.policy import DamagedPolicy, Part, identify
from opd_stream.store.store import Store
from opd_stream.windows import EntropyGatedWindow
from pipeline.accounting import Accounts, Span, busy_seconds, inputs_of
from pipeline.lease import lease
from pipeline.logged import RunLog
from pipeline.plan import is_due
from pipeline.records import RunSummary
from pipeline.rounds import Round, checkpoint_of, rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import Setup, masked_ids, newline_ids, open_setup
from stages.checkpoints import Checkpoint, Vocabulary
from stages.collect import (
    SubmittedWork,
    make_again,
    measure_missing,
    open_teacher,
    start_probe,
    start_rollouts,
    start_scores,
    submit_missing,
    wait_for,
)
from stages.executors import Executor, open_executor
from stages.levels import level_verdicts
from stages.step import PROBE, Progress, Step, of_stage, with_needs
from stages.workers import Role


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
    trains: bool = False  # in this process, which loads what that needs while workers work
    ahead: SubmittedWork | None = None  # of the next round, begun before this one trained
    spans: list[Span] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    reached: set[str] = field(default_factory=set)  # names of artifacts
    recorded: frozenset[str] = frozenset()  # of these, and of earlier calls, in the store
    opened: set[str | None] = field(default_factory=set)  # names of teachers, but the first
    checked: set[tuple[Checkpoint, Part]] = field(default_factory=set)  # that were read whole

    @property
    def log(self) -> RunLog:
        """What the run's loggers are told through."""
        return RunLog(self.config, self.folder.path, self.run_id)

    def reach(self, names: set[str]) -> None:
        """Tell the store what is about to be read or made, so that `gc` leaves it."""
        self.reached |= names
        if not names <= self.recorded:
            name = self.record or self.run_id
            self.recorded = self.store.add_to_run(name, self.folder.path, self.reached)

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
    setup = open_setup(config, works=not folder.is_finished(config))
    folder.check(config)
    with lease(folder.path), setup.store.watched(), open_executor(config) as executor:
        run_id = folder.open(config)
        for line in setup.warnings:
            progress.warn(line)
        earlier = folder.calls()
        accounts = Accounts(setup=setup, folder=folder, run_id=run_id, warn=progress.warn)
        session = Session(
            config=setup.config,
            store=setup.store,
            folder=folder,
            run_id=run_id,
            executor=executor,
            progress=progress,
            trains=not config.pools.trainer.is_on_ray,
            started=started,
        )
        session.reach(inputs_of(setup))
        if not folder.is_finished(config):
            session.log.config()
        evaluate_policy(session, setup.student, setup.vocabulary, version=0, step=0)
        if not folder.has_summary():
            accounts.write_summary(session.call_seconds(earlier))
        damaged_before: set[str] = set()
        while not make_rounds(session, setup, accounts, earlier, damaged_before):
            pass
        there = session.reached & setup.store.there()  # a probe may turn out not to be needed
        setup.store.record_run(run_id, folder.path, there)  # and no more
        return accounts.write_summary(session.call_seconds(earlier))


def make_rounds(
    session: Session,
    setup: Setup,
    accounts: Accounts,
    earlier: dict[str, float],
    damaged_before: set[str],
) -> bool:
    """Make what is missing of all rounds; False: a policy was found damaged, and taken out.

    `damaged_before` names those that this was found of already.

    Raises:
        UserError: a policy is damaged again, right after it was trained again.
    """
    try:
        for round_ in rounds(setup):
            session.reach(round_.names())
            worked = len(session.spans)
            make_round(session, setup, round_)
            is_changed = len(session.spans) > worked
            accounts.write_round(round_, is_changed=is_changed)
            if is_changed:
                if report := session.folder.report(round_.index):
                    session.log.round(report)
                accounts.write_summary(session.call_seconds(earlier))
        accounts.mend_metrics()
    except DamagedPolicy as damaged:
        name = damaged.policy.name
        if name in damaged_before:
            raise UserError(
                f"{name} is damaged ({damaged.reason}), right after it was trained again; the "
                "store does not return what is written to it: check its disk, memory and network, "
                "then run again"
            ) from damaged
        damaged_before.add(name)
        session.progress.warn(f"{name} is damaged ({damaged.reason}); it is trained again")
        damaged.policy.invalidate()
        return False
    return True


def make_round(session: Session, setup: Setup, round_: Round) -> None:
    """Make what is missing of a round, and mend what its records say wrongly."""
    for step in round_.steps:
        if step.model is not None:  # what a replay reads stays as it is
            step.artifact.mend()
    if not is_trained(session, round_, cache=session.store.digests):
        session.folder.write_plan(round_)
        train_round(session, setup, round_)
    elif any(not step.is_complete() for step in round_.steps[:-1]) and all(
        step.shards.is_started() or step.is_void() for step in round_.steps[:-1]
    ):  # units were taken out as damaged
        make_shards(session, round_)
    drop_optimizers(session, round_)
    if is_due(setup.config, round_.index):
        evaluate_policy(
            session,
            checkpoint_of(round_.policy),
            setup.vocabulary,
            version=round_.index + 1,
            step=round_.plan.first_step + round_.policy.manifest().outcome.steps,
        )


def is_trained(session: Session, round_: Round, *, cache: Path | None) -> bool:
    """Whether the round's policy is there and whole; a damaged one is named and taken out.

    `cache` as in `PolicyArtifact.damage`; `check_loaded` reads whole what is about to be loaded.
    """
    if not round_.policy.is_complete():
        return False
    reason = round_.policy.damage(cache=cache)
    if reason is not None:
        session.progress.warn(f"{round_.policy.name} is damaged ({reason}); it is trained again")
        round_.policy.invalidate()
    return reason is None


def check_loaded(session: Session, model: Checkpoint, part: Part = "model") -> None:
    """Read a checkpoint that is about to be loaded whole: remembered digests only name it.

    `part` of a policy is what is loaded.

    Raises:
        DamagedPolicy: a file of a policy is not what was published.
        UserError: the files of another checkpoint are not those that were remembered.
    """
    if (model, part) in session.checked or model.is_served:
        return
    if model.policy is not None:
        policy = session.store.policy_by_fingerprint(model.policy)
        reason = policy.damage(cache=None, part=part)
        if reason is not None:
            raise DamagedPolicy(policy, reason)
        policy.check_alone()
    elif identify(model.folder) != model.identity:
        raise UserError(
            f"the files of {model.folder} changed since they were first read, though their time "
            "stamps did not; restore them; if the change is meant, touch them and run again"
        )
    session.checked.add((model, part))


def drop_optimizers(session: Session, round_: Round) -> None:
    """Once a round is complete, what only the training after earlier ones reads may go."""
    keep = session.config.keep_optimizers
    if keep is not None and (old := old_states(session.store, round_.policy, keep=keep)):
        drop_states(session.store, old, made_by=session.store.ids_of_run(session.run_id))


def restore_state(session: Session, setup: Setup, round_: Round) -> None:
    """Train the round before once more where the state that this one continues was dropped."""
    policy = round_.previous
    assert policy is not None
    lost = policy.manifest().dropped
    if not lost:
        return
    session.progress.say(
        f"round {round_.index} continues the optimizer of {policy.name}, which was dropped "
        f"(keep_optimizers {session.config.keep_optimizers}): round {round_.index - 1} is trained "
        "once more"
    )
    (before,) = islice(rounds(setup), round_.index - 1, round_.index)
    train_round(session, setup, replace(before, ahead=None), again=True)
    if lost.items() - policy.manifest().files.items():
        session.progress.warn(
            f"training once more did not repeat bit for bit on this machine: {policy.name} keeps "
            "its weights, and its optimizer is that of the second training"
        )


def train_round(session: Session, setup: Setup, round_: Round, *, again: bool = False) -> None:
    """Everything up to the policy of a round; a unit found damaged while reading is made again.

    `again`: the policy is there, and its training state is what is wanted.
    """
    made_again: set[tuple[str, int]] = set()
    while True:
        make_shards(session, round_)
        try:
            return train_policy(session, setup, round_, again=again)
        except DamagedUnit as damaged:
            if session.config.replay is not None:
                raise UserError(
                    f"{damaged}; a replay only reads: take it out with `opd-stream cache verify "
                    f"{damaged.artifact.folder.parent.parent} --repair`, resume the run that made "
                    "it, then this"
                ) from damaged
            make_again(damaged, made_again, session.progress)


def make_shards(
    session: Session,
    round_: Round,
    *,
    score: bool = True,
    shuffle: bool = False,
    author: Role | None = None,
) -> None:
    """The generate and score stages of a round, and the begin of the next one's where it may be.

    Args:
        session: of the call.
        round_: the round; a replay has nothing to make.
        score: False: only what the student makes.
        shuffle: in an order of this process's own, to share the work with others.
        author: only what this one samples; None: everything.
    """
    if session.config.replay is not None:
        return
    begun = session.ahead
    if begun is not None and begun.rollouts.name == round_.caches[-1].rollouts.artifact.name:
        session.ahead = None
        _submit_ahead(session, round_)  # the sampler goes on while our last units are scored
        _wait_for(session, begun, "generate")
    session.progress.say(
        f"round {round_.index}: window {round_.window_tokens} tokens, "
        f"policy {round_.student.identity.fingerprint[:12]}"
    )
    due = [step for step in round_.steps[:-1] if step.is_new or not step.is_complete()]
    for rollouts, scores in streams(due):
        if rollouts.is_void() or author not in (None, rollouts.kind.author):
            continue
        scored = scores if score else []
        _open_further(session, rollouts, scored[1:])
        submit = partial(_submit, session, round_, rollouts, shuffle=shuffle, siblings=scored)
        work = submit(scored[0] if scored else None)
        if work.tasks or rollouts.is_new or not all(s.is_complete() for s in (rollouts, *scored)):
            _wait_for(session, work, rollouts.kind.name)
        others = [submit(other, generate=False) for other in scored[1:]]
        for work in others:  # in pools of their own, or in turn
            _wait_for(session, work, rollouts.kind.name)
    _submit_ahead(session, round_)


def streams(steps: list[Step]) -> Iterator[tuple[Step, list[Step]]]:
    """Rollouts with the scores that stream behind them, each after all that it needs."""
    everything = list(with_needs(steps))
    for rollouts in of_stage(everything, "generate"):
        name = rollouts.artifact.name
        scores = of_stage(everything, "score")
        yield rollouts, [step for step in scores if step.rollouts.artifact.name == name]


def _open_further(session: Session, rollouts: Step, scores: list[Step]) -> None:
    """Open each teacher but the first once, so that what it refuses costs no rollouts.

    The first one's tasks stream behind the student's, and open it themselves.
    """
    if rollouts.is_complete():
        return
    for step in scores:
        if step.teacher not in session.opened and not step.is_complete():
            assert step.model is not None
            sampled = start_shards(session, rollouts)
            scored = start_shards(session, step)
            open_teacher(session.executor, sampled, scored, step.model, step.teacher)
            session.opened.add(step.teacher)


def start_shards(session: Session, step: Step) -> Artifact:
    """Join or start the artifact of a step of shards."""
    step.shards.mend()
    recipe, store = step.artifact.recipe, session.store
    if recipe.kind != "rollouts":
        return start_scores(store, recipe, step.rollouts.shards)
    if step.kind == PROBE:
        started = start_probe(store, recipe, step.needs[0].shards)
        assert started is not None  # a void step is never started
        return started
    ranges = recipe.settings["selection"].get("ranges", ())
    size = max((last - first for first, last in ranges), default=session.config.prompts_per_unit)
    return start_rollouts(store, recipe, prompts_per_unit=size)


def _submit(
    session: Session,
    round_: Round | None,
    rollouts: Step,
    scores: Step | None,
    *,
    shuffle: bool = False,
    generate: bool = True,
    siblings: Sequence[Step] = (),
) -> SubmittedWork:
    """Submit what is missing of rollouts, and of scores of them, which has siblings by others."""
    assert rollouts.model is not None
    is_teachers = rollouts.kind.author == "teacher"
    return submit_missing(
        session.executor,
        start_shards(session, rollouts),
        None if scores is None else start_shards(session, scores),
        student=round_.student if round_ and is_teachers else rollouts.model,
        teacher=scores.model if scores is not None else rollouts.model if is_teachers else None,
        teacher_name=None if scores is None else scores.teacher,
        siblings=[s.shards for s in siblings if s is not scores and s.shards.is_started()],
        made_by=session.run_id,
        progress=session.progress,
        generate=generate,
        shuffle=shuffle,
        author=rollouts.kind.author,
        check=partial(check_loaded, session),
    )


def _submit_ahead(session: Session, round_: Round) -> None:
    """Submit the next round's rollouts, unless done or waiting for this round's policy."""
    if round_.ahead is not None and session.ahead is None:
        session.ahead = _submit(session, round_, round_.ahead.rollouts, round_.ahead.scores)


def _wait_for(session: Session, work: SubmittedWork, name: str) -> None:
    """Wait for submitted work; a process that trains gets ready for it once a worker works."""
    ready = partial(importlib.import_module, "stages.train") if session.trains else None
    session.spans += wait_for(session.executor, work, session.progress, name=name, meanwhile=ready)


def train_policy(session: Session, setup: Setup, round_: Round, *, again: bool = False) -> None:
    """The train stage of a round; `again` as in `train_round`.

    Raises:
        UserError: nothing can be trained on, or the loss is not finite.
        DamagedUnit: a shard is not what was committed.
    """
    from stages.train_job import TrainJob

    if session.config.pools.trainer.is_on_ray:
        from stages.train_ray import train_on_ray as train
    else:
        from stages.train import train
    check_loaded(session, round_.student, "training")
    if round_.previous is not None:
        restore_state(session, setup, round_)
        round_.previous.folder("training")
    start, config, scratch = time.time(), session.config, session.folder.scratch(round_)
    if again:  # what was told of the round before stays as it is
        scratch.mkdir(parents=True, exist_ok=True)
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"loggers": ()})}
        )
    session.executor.release()
    tokenizer = setup.student.tokenizer()
    author = round_.caches[-1].rollouts.artifact.recipe.inputs.get("student")
    probe = round_.probe
    audited = None
    if probe is not None and probe.artifact.is_complete():
        audited = (probe.rollouts.artifact.fingerprint, probe.artifact.fingerprint)
    train(
        TrainJob(
            config=config,
            policy=round_.policy.recipe,
            base=str(round_.student.folder),
            initial=str(setup.student.folder),
            is_continued=round_.previous is not None,
            caches=tuple(cache.cache_units() for cache in round_.caches),
            is_fresh=author == round_.student.identity.fingerprint,
            is_gated=any(decision.is_gated for decision in round_.unit_decisions),
            probe=audited,
            earlier_decision=round_.audit,
            levels=_levels(setup, round_),
            window_tokens=round_.window_tokens,
            masked_ids=masked_ids(config, tokenizer),
            newline_ids=newline_ids(config, tokenizer),
            vocabulary=setup.vocabulary,
            prompts=setup.prompts.fingerprint,
            first_step=round_.plan.first_step,
            round_index=round_.index,
            scratch=str(scratch),
            metrics=str(scratch / "metrics.jsonl" if again else session.folder.metrics),
            made_by=session.run_id,
        ),
        session.progress,
    )
    give_back()
    session.spans.append((start, time.time()))
    if not again:
        _say_next(session, round_)


def _say_next(session: Session, round_: Round) -> None:
    """What the round that was trained has decided about the next one."""
    if round_.index == session.config.rounds - 1:
        return
    select, outcome = session.config.rollouts.select, round_.policy.manifest().outcome
    if (audit := outcome.window_decision) is not None:
        session.progress.say(f"next round: {audit.reason}")
    window, entropy = session.config.rollouts.window, outcome.epochs[0].teacher_entropy
    if isinstance(window, EntropyGatedWindow) and entropy is not None:
        session.progress.say(
            f"next round: window {window.after(round_.plan.window_tokens, entropy)}: teacher "
            f"entropy {entropy:.3f} (threshold {window.threshold:g})"
        )
    if select is not None and outcome.levels:
        session.progress.say(f"next round: {levels_text(select, outcome.levels)}")


def _levels(setup: Setup, round_: Round) -> tuple[LevelRate, ...]:
    """The pass rates after a round by which the next one's prompts are chosen, where any are."""
    select, previous = setup.config.rollouts.select, round_.previous
    if select is None:
        return ()
    earlier = () if previous is None else previous.manifest().outcome.levels
    rollouts = round_.own_caches[0].rollouts.shards  # that several teachers may score
    verdicts = level_verdicts(setup.store, rollouts, select.judge, setup.student.tokenizer())
    return measured_levels(earlier, verdicts)


def evaluate_policy(
    session: Session,
    policy: Checkpoint,
    vocabulary: Vocabulary,
    *,
    version: int,
    step: int | None = None,
) -> None:
    """The evaluate stage for one policy, as far as the store does not have it.

    Args:
        session: of the call; without an evaluation section nothing is done.
        policy: answers.
        vocabulary: of its answers.
        version: of the policy; 0 is the initial student.
        step: optimizer steps that it has, under which loggers are told what is new; None: none is.

    Raises:
        UserError: prompts or judge are refused, or a worker met a user's mistake.
    """
    config, evaluation = session.config, session.config.evaluation
    if evaluation is None:
        return
    from pipeline.evaluation import (
        distance_steps,
        evaluation_record,
        evaluation_steps,
        logged_figures,
        make_rendering,
        open_teacher,
    )
    from stages.evaluate import evaluate, evaluation_prompts

    store, worked = session.store, len(session.spans)
    for name, answers in evaluation_steps(config, store, policy, vocabulary, version).items():
        part = evaluation.parts()[name]
        prompts = evaluation_prompts(store, name, part, policy)
        session.reach({prompts.name, answers.artifact.name})
        if part.kind == "distance":
            teacher = open_teacher(config, store, policy, vocabulary)
            make_rendering(config, store, part, prompts, teacher)
            steps = distance_steps(config, store, part, answers, vocabulary, teacher)
            _measure_distance(session, steps)
            continue
        _wait_for(session, _submit(session, None, answers, None), "evaluate")
        evaluate(store, part, answers.shards, policy)
    if step is not None and len(session.spans) > worked and config.train.loggers:
        found = evaluation_record(config, store, policy, vocabulary, ())
        assert found is not None  # measured above
        session.log.figures(logged_figures(found), step)


def _measure_distance(session: Session, steps: dict[str, Step]) -> None:
    """Distances of a policy to the teacher, as far as the store does not have them.

    First whatever text and side of the teacher is missing, then the policy's side.
    """
    from stages.distance import distance_result, mend_figures, write_figures

    session.reach({step.artifact.name for step in with_needs(steps.values())})
    artifacts = {text: step.shards for text, step in steps.items()}
    mend_figures(session.store, artifacts)
    if distance_result(session.store, artifacts) is not None:
        return
    for step in steps.values():
        rollouts, hidden = step.needs
        work = _submit(session, None, rollouts, hidden)
        _wait_for(session, work, "evaluate")
    for step in steps.values():
        assert step.model is not None
        session.spans += measure_missing(
            session.executor,
            start_shards(session, step),
            hidden=step.needs[1].shards,
            student=step.model,
            made_by=session.run_id,
            progress=session.progress,
            check=partial(check_loaded, session),
        )
    write_figures(session.store, artifacts)
