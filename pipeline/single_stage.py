"""One stage of one round, for a machine that does only that.

A stage needs the config and the store, nothing else. With `follow` it waits for what the stage
before has not published yet, so generation, scoring and training can be started on three machines
at once; several machines on one stage take the units in orders of their own and so share them.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from opd_stream.store.files import publish
from opd_stream.store.sealed import publish_record
from opd_stream.store.store import Store
from pipeline.accounting import Accounts
from pipeline.evaluation import evaluation_record, evaluation_steps, figure_lines, open_policy
from pipeline.lease import lease
from pipeline.plan import plan_ahead
from pipeline.records import Answers, EvaluationFile
from pipeline.rounds import Round, checkpoint_of, named_checkpoint, rounds
from pipeline.run import (
    Session,
    drop_optimizers,
    evaluate_policy,
    is_trained,
    make_shards,
    start_shards,
    train_policy,
)
from pipeline.run_folder import RunFolder
from pipeline.setup import Setup, check_evaluation, open_setup, open_store
from stages.checkpoints import Checkpoint, Vocabulary
from stages.collect import missing_units, submit_missing, wait_for
from stages.evaluate import judged_answers
from stages.executors import open_executor
from stages.step import Progress, Stage, Step, of_stage, with_needs
from stages.workers import Role

POLL_SECONDS = 2.0
_ROLES: dict[str, tuple[Role, ...]] = {"score": ("teacher",)}


def run_stage(
    stage: Stage,
    config: Config,
    folder: RunFolder,
    *,
    round_index: int,
    progress: Progress,
    follow: bool = False,
    author: Role = "student",
) -> str:
    """Do one stage of a round; returns the line to print.

    Args:
        stage: generate, score or train.
        config: the run.
        folder: of this machine's notes on the run.
        round_index: from 0.
        progress: told of every unit.
        follow: wait for what is missing instead of refusing.
        author: whose rollouts stage generate samples; this pool is opened.

    Raises:
        UserError: an earlier stage has not been run yet, or anything else the user can mend.
    """
    setup = open_setup(config, works=not folder.is_finished(config))
    folder.check(config)
    _check_author(config, author)
    alone, roles = lease(folder.path) if stage == "train" else nullcontext(), _ROLES.get(stage)
    with alone, setup.store.watched(), open_executor(config, roles or (author,)) as executor:
        run_id = folder.open(config)
        session = Session(
            config=config,
            store=setup.store,
            folder=folder,
            run_id=run_id,
            executor=executor,
            progress=progress,
        )
        round_ = _find_round(
            setup, round_index, needs_policy=stage == "train", session=session if follow else None
        )
        accounts = Accounts(setup=setup, folder=folder, run_id=run_id, warn=progress.warn)
        accounts.share(round_)
        if stage == "train" or all(cache.origin != "ahead" for cache in round_.caches):
            folder.write_plan(round_)  # what is made ahead belongs to no policy yet
        if stage == "generate":
            whole = replace(round_, ahead=None)
            make_shards(session, whole, score=False, shuffle=True, author=author)
            return _completed(round_, stage, author)
        if stage == "score":
            _score(session, round_, follow=follow)
            return _completed(round_, stage)
        line = _train(session, setup, round_, follow=follow)
        accounts.write(changed=round_index)
    return line


def _check_author(config: Config, author: Role) -> None:
    """Refuse a teacher that has nothing to write."""
    if author == "teacher" and not (
        config.rollouts.given_prompts and config.rollouts.given_by == "teacher"
    ):
        raise UserError(
            "generate --by teacher: the config has no rollouts that the teacher writes; set "
            "rollouts.given_share and rollouts.given_by=teacher"
        )


def run_evaluation(
    config: Config,
    folder: RunFolder,
    *,
    policy_version: int | None = None,
    policy: Path | None = None,
    progress: Progress,
    out: Path | None = None,
    answers: Path | None = None,
) -> str:
    """Evaluate one policy; returns the lines to print.

    Args:
        config: the run; its evaluation may be another than that of the run's folder.
        folder: of this machine's notes on the run.
        policy_version: 0 is the initial student, R + 1 the policy after round R.
        policy: a Hugging Face folder instead.
        progress: told of every unit.
        out: file to write for `compare`.
        answers: file to write the answers and their verdicts to, as JSON lines.

    Raises:
        UserError: there is no such policy yet, or anything else the user can mend.
    """
    _check_question(config, policy_version, policy, {"--out": out, "--answers": answers})
    setup, version = None, policy_version or 0
    if policy is None:
        setup = open_setup(config)
        store, vocabulary, student = setup.store, setup.vocabulary, _policy_of(setup, version)
        run_id, lost = _join(setup, folder, version, progress), setup.lost
    else:
        store = open_store(config)
        student, vocabulary = open_policy(config, store, policy)
        lost = check_evaluation(config, store, student, vocabulary)
        run_id = folder.join(config)
    for line in lost:
        progress.warn(line)
    own, config = config, config if setup is None else setup.config
    with store.watched(), open_executor(config, _evaluation_roles(config)) as executor:
        session = Session(
            config=config,
            store=store,
            folder=folder,
            run_id=run_id,
            executor=executor,
            progress=progress,
            record=f"{run_id}-evaluate",  # that of the run says what its rounds reach
        )
        evaluate_policy(session, student, vocabulary, version=version)
    run_ids = store.ids_of_run(run_id)
    found = evaluation_record(config, store, student, vocabulary, run_ids, is_first=version == 0)
    assert found is not None  # measured above
    if setup is not None and folder.is_of(own):
        accounts = Accounts(setup=setup, folder=folder, run_id=run_id, warn=progress.warn)
        accounts.write(changed=version - 1)
    if out is not None:
        _write_out(out, found, student, store)
    if answers is not None:
        _write_answers(answers, config, store, student, vocabulary)
    return "\n".join(figure_lines(found))


def _evaluation_roles(config: Config) -> tuple[Role, ...]:
    """The pools of an evaluation; the teacher's only where policies are compared with it.

    Raises:
        UserError: nothing is to be evaluated.
    """
    if config.evaluation is None:
        raise UserError("the config has no evaluation section; expected one; add it")
    return ("student", "teacher") if config.evaluation.has_distance() else ("student",)


def _check_question(
    config: Config,
    policy_version: int | None,
    policy: Path | None,
    files: Mapping[str, Path | None],
) -> None:
    if config.evaluation is None and policy is not None:
        raise UserError("the config has no evaluation section; expected one; add it")
    if (policy_version is None) == (policy is None):
        raise UserError(
            f"evaluate was given {'neither' if policy is None else 'both'} of --policy-version and "
            "--policy; expected one of them; --policy-version 0 is the initial student"
        )
    for option, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{option} {file}: there is no folder {file.parent}; make it first")
        if file is not None and file.is_dir():
            raise UserError(
                f"{option} {file} is a folder; expected the name of a file; name another one"
            )


def _write_out(out: Path, evaluation: Answers, student: Checkpoint, store: Store) -> None:
    """An evaluation as a file that `compare` reads."""
    record = EvaluationFile(
        policy=str(student.folder),
        fingerprint=student.identity.fingerprint,
        store=store.address,
        **{name: getattr(evaluation, name) for name in Answers.model_fields},
    )
    publish_record(out, record, is_pretty=True)


def _write_answers(
    file: Path, config: Config, store: Store, student: Checkpoint, vocabulary: Vocabulary
) -> None:
    """Every answer that the figures are of, with its verdict, as a line of JSON."""
    assert config.evaluation is not None
    parts, lines = config.evaluation.parts(), list[str]()
    for name, step in evaluation_steps(config, store, student, vocabulary, 0).items():
        if parts[name].kind == "distance":
            continue
        for answer in judged_answers(store, parts[name], step.shards, student):
            lines.append(json.dumps({"benchmark": name, **asdict(answer)}, ensure_ascii=False))
    publish(file, "".join(f"{line}\n" for line in lines).encode())


def _join(setup: Setup, folder: RunFolder, policy_version: int, progress: Progress) -> str:
    """Join the run of a folder, or begin one for a run of other machines; returns the id."""
    if policy_version == 0 or folder.is_run():
        return folder.join(setup.config)
    run_id = folder.open(setup.config)
    accounts = Accounts(setup=setup, folder=folder, run_id=run_id, warn=progress.warn)
    accounts.share(_find_round(setup, policy_version - 1))
    return run_id


def _policy_of(setup: Setup, version: int) -> Checkpoint:
    """The policy of a version: 0 is the initial student, R + 1 the policy after round R."""
    if version == 0:
        return setup.student
    if not 0 < version <= setup.config.rounds:
        raise UserError(
            f"--policy-version is {version}; the config has policies 0 (the initial student) to "
            f"{setup.config.rounds}; choose one of them"
        )
    round_ = _find_round(setup, version - 1)
    _need(round_.policy.is_complete(), round_, "train", "policy")
    return checkpoint_of(round_.policy)


def _score(session: Session, round_: Round, *, follow: bool) -> None:
    """Score what the student's machines have published, until the round is scored."""
    due = [step for step in of_stage(round_.steps, "score") if not step.is_complete()]
    for step in of_stage(with_needs(due), "score"):
        rollouts = step.rollouts
        if not step.is_new:  # what an extension continues
            _mend_base(session, round_, step, follow=follow)
        if not follow:
            _need(rollouts.is_complete(), round_, _making(rollouts), "rollouts")
        _wait(
            session,
            lambda rollouts=rollouts: rollouts.shards.is_started() or rollouts.is_void(),
            f"{rollouts.artifact.name} to be started",
        )
        if not step.is_void():
            _score_step(session, round_, step, follow=follow)


def _score_step(session: Session, round_: Round, step: Step, *, follow: bool) -> None:
    """Score units as they are published, until all are."""
    rollouts, scores = step.rollouts.shards, start_shards(session, step)
    is_verified = False
    while not scores.is_complete():
        work = submit_missing(
            session.executor,
            rollouts,
            scores,
            student=round_.student,
            teacher=step.model,
            teacher_name=step.teacher,
            made_by=session.run_id,
            progress=session.progress,
            generate=False,
            shuffle=True,
            verify=not is_verified,
        )
        is_verified = True
        session.spans += wait_for(session.executor, work, session.progress)
        if not scores.is_complete():
            missing = sorted({*rollouts.units()} - {*rollouts.committed()})
            what = f"rollouts (units {missing[:8]} are missing)"
            _need(follow or not missing, round_, _making(step.rollouts), what)
            time.sleep(POLL_SECONDS)


def _mend_base(session: Session, round_: Round, step: Step, *, follow: bool) -> None:
    """Take damaged units out of what an extension continues, and wait until they are sampled."""
    rollouts = step.rollouts.shards
    lost = missing_units(rollouts, session.progress)
    if lost and follow:
        _wait(session, rollouts.is_complete, f"units {lost[:8]} of {rollouts.name}")
    what = f"rollouts (units {lost[:8]} of {rollouts.name} are missing)"
    _need(follow or not lost, round_, "generate", what)
    missing_units(step.shards, session.progress)


def _train(session: Session, setup: Setup, round_: Round, *, follow: bool) -> str:
    shards = round_.steps[:-1]
    for step in shards:
        if follow:
            _wait(session, step.is_complete, f"{step.artifact.name} to be complete")
        what = "scores" if step.kind.stage == "score" else "rollouts"
        _need(step.is_complete(), round_, _making(step), what)
    if not is_trained(session, round_, cache=None):
        damaged = [
            f"unit {unit} of {step.artifact.name}"
            for step in shards
            if not step.is_void()
            for unit in missing_units(step.shards, session.progress)
        ]
        _need(not damaged, round_, "generate and score", ", ".join(damaged))
        try:
            train_policy(session, setup, round_)
        except DamagedUnit as error:
            error.artifact.invalidate(error.unit)
            raise UserError(f"{error}; run generate and score again: only it is made") from error
    drop_optimizers(session, round_)
    return f"{round_.policy.name} is complete: {round_.policy.folder()}"


def _wait(session: Session, is_there: Callable[[], bool], what: str) -> None:
    """Poll until another machine has published something."""
    if not is_there():
        session.progress.say(f"waiting for {what}")
    while not is_there():
        time.sleep(POLL_SECONDS)


def _completed(round_: Round, stage: Stage, author: Role | None = None) -> str:
    done = [step for step in of_stage(round_.steps, stage) if not step.is_void()]
    names = [step.artifact.name for step in done if author in (None, step.kind.author)]
    if not names:
        return f"round {round_.index} has nothing for {author} to {stage}"
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} complete"


def _find_round(
    setup: Setup, round_index: int, *, needs_policy: bool = True, session: Session | None = None
) -> Round:
    """A round by its number.

    Args:
        setup: of the run.
        round_index: its number, from 0.
        needs_policy: False: its rollouts are enough, which may be made ahead.
        session: of a call that waits for the policy of the round before; None: do not wait.

    Raises:
        UserError: there is no such round, or the round before has no policy yet.
    """
    if not 0 <= round_index < setup.config.rounds:
        raise UserError(
            f"--round is {round_index}; the config has rounds 0 to "
            f"{setup.config.rounds - 1}; choose one of them"
        )

    def wait(round_: Round) -> bool:
        is_ahead = round_.ahead is not None and round_.index == round_index - 1
        if session is None or (is_ahead and not needs_policy):
            return False
        _wait(session, round_.policy.is_complete, f"the policy of round {round_.index}")
        return True

    last = None
    for round_ in rounds(setup, opened=named_checkpoint, wait=wait):
        last = round_
        if round_.index == round_index:
            return round_
    assert last is not None
    if last.ahead is not None and last.index == round_index - 1 and not needs_policy:
        return _round_ahead(setup, last)
    raise UserError(
        f"round {round_index} starts from the policy of round {round_index - 1}, which is "
        f"not trained yet; run train --round {last.index} first"
    )


def _round_ahead(setup: Setup, round_: Round) -> Round:
    """The next round, to make its shards only: its policy cannot be named yet."""
    assert round_.ahead is not None
    return replace(
        round_,
        plan=plan_ahead(setup.config, round_.plan),
        caches=(round_.ahead,),
        steps=(round_.ahead.rollouts, round_.ahead.scores, round_.steps[-1]),
        unit_decisions=(),
        ahead=None,
    )


def _making(step: Step) -> str:
    """The command that makes a step's shards."""
    return f"{step.kind.stage} --by teacher" if step.kind.author == "teacher" else step.kind.stage


def _need(there: bool, round_: Round, command: str, what: str) -> None:
    if not there:
        raise UserError(
            f"round {round_.index} has no complete {what} yet; run {command} --round "
            f"{round_.index} first"
        )
