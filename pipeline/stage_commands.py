"""One stage of one round, for a machine that does only that.

A stage needs the config and the store, nothing else. With `follow` it waits for what the stage
before has not published yet, so generation, scoring and training can be started on three machines
at once; several machines on one stage take the units in orders of their own and so share them.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit, summed_counts
from opd_stream.store.files import publish
from pipeline.caches import Cache, bases_of
from pipeline.evaluation import Evaluator, figure_lines, known_evaluation, open_policy
from pipeline.plan import plan_ahead
from pipeline.rounds import Session, has_policy, make_caches, train_policy
from pipeline.run_directory import RunDirectory
from pipeline.run_records import Records
from pipeline.setup import Setup, check_evaluation, open_setup, open_store
from pipeline.walk import Round, checkpoint_of, named, probe_artifacts, walk
from stages.checkpoints import Checkpoint
from stages.collect import missing_units, start_scores, submit_missing, wait_for
from stages.executors import open_executor
from stages.progress import Progress
from stages.ray_stream import Role

STAGES = ("generate", "score", "train")
POLL_SECONDS = 2.0
_ROLES: dict[str, tuple[Role, ...]] = {"score": ("teacher",)}


def run_stage(
    stage: str,
    config: Config,
    directory: RunDirectory,
    *,
    round_index: int,
    progress: Progress,
    follow: bool = False,
) -> str:
    """Do one stage of a round; returns the line to print.

    Args:
        stage: one of `STAGES`.
        config: the run.
        directory: folder of this machine's notes on the run.
        round_index: from 0.
        progress: told of every unit.
        follow: wait for what is missing instead of refusing.

    Raises:
        UserError: an earlier stage has not been run yet, or anything else the user can mend.
    """
    setup = open_setup(config)
    run_id = directory.open(config)
    roles = _ROLES.get(stage, ("student",))
    with setup.store.watched(), open_executor(config, roles) as executor:
        session = Session(
            setup=setup, directory=directory, run_id=run_id, executor=executor, progress=progress
        )
        here = _round(session, round_index, follow=follow, train=stage == "train")
        records = Records(setup=setup, directory=directory, run_id=run_id)
        records.share(here)
        if stage == "train" or all(cache.origin != "ahead" for cache in here.caches):
            directory.write_plan(here)  # what is made ahead belongs to no policy yet
        if stage == "generate":
            make_caches(session, here, score=False, shuffle=True)
            return f"{_names(here, 'rollouts')} complete"
        if stage == "score":
            return _score(session, here, follow=follow)
        line = _train(session, here, follow=follow)
    records.write()
    return line


def run_evaluation(
    config: Config,
    directory: RunDirectory,
    *,
    policy_version: int | None = None,
    policy: Path | None = None,
    progress: Progress,
    out: Path | None = None,
) -> str:
    """Evaluate one policy; returns the lines to print.

    Args:
        config: the run; its evaluation may be another than that of the run's folder.
        directory: folder of this machine's notes on the run.
        policy_version: 0 is the initial student, R + 1 the policy after round R.
        policy: a Hugging Face folder instead.
        progress: told of every unit.
        out: file to write for `compare`.

    Raises:
        UserError: there is no such policy yet, or anything else the user can mend.
    """
    if config.evaluation is None:
        raise UserError("the config has no evaluation section; expected one; add it")
    if (policy_version is None) == (policy is None):
        raise UserError(
            f"evaluate was given {'neither' if policy is None else 'both'} of --policy-version and "
            "--policy; expected one of them; --policy-version 0 is the initial student"
        )
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    setup, run_id = None, ""
    if policy is None:
        assert policy_version is not None
        setup = open_setup(config)
        student, stop_ids = _policy_of(setup, policy_version), setup.stop_ids
        store, run_id = setup.store, _join(setup, directory, policy_version)
    else:
        store = open_store(config)
        student, stop_ids = open_policy(config, store, policy)
        check_evaluation(config, store, student)
    run_id = run_id or directory.join(config)
    with store.watched(), open_executor(config, ("student",)) as executor:
        # A record of its own: that of the run says what its rounds reach, and no more at its end.
        evaluator = Evaluator(
            config=config,
            store=store,
            executor=executor,
            run_id=run_id,
            progress=progress,
            reach=partial(store.add_to_run, f"{run_id}-evaluate", directory.path),
        )
        evaluator.measure(student, stop_ids)
    found = known_evaluation(config, store, student, stop_ids, store.ids_of_run(run_id))
    assert found is not None  # measured above
    if setup is not None and directory.is_of(config):
        Records(setup=setup, directory=directory, run_id=run_id).write()
    if out is not None:
        record = {
            "policy": str(student.folder),
            "fingerprint": student.identity.fingerprint,
            "store": store.address,
            **{name: value for name, value in found.items() if name != "seconds"},
        }
        publish(out, (json.dumps(record, indent=2) + "\n").encode())
    return "\n".join(figure_lines(found))


def _join(setup: Setup, directory: RunDirectory, policy_version: int) -> str:
    """Join the run of a folder, or begin one for a run of other machines; returns the id."""
    if policy_version == 0 or directory.is_run():
        return directory.join(setup.config)
    run_id = directory.open(setup.config)
    records = Records(setup=setup, directory=directory, run_id=run_id)
    records.share(_find_round(setup, policy_version - 1))
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
    here = _find_round(setup, version - 1)
    _need(here.policy.is_complete(), here, "train", "policy")
    return checkpoint_of(here.policy)


def _score(session: Session, here: Round, *, follow: bool) -> str:
    """Score what the student's machines have published, until the round is scored."""
    for cache in _to_score(session, here, follow=follow):
        if not follow:
            _need(cache.rollouts.is_complete(), here, "generate", "rollouts")
        _wait(session, cache.rollouts.is_started, f"{cache.rollouts.name} to be started")
        scores = start_scores(session.setup.store, cache.scores.recipe, cache.rollouts)
        is_verified = False
        while not scores.is_complete():
            work = submit_missing(
                session.executor,
                cache.rollouts,
                scores,
                student=here.student,
                teacher=session.setup.teacher,
                made_by=session.run_id,
                progress=session.progress,
                generate=False,
                shuffle=True,
                verify=not is_verified,
            )
            is_verified = True
            session.spans += wait_for(session.executor, work, session.progress)
            if not scores.is_complete():
                _check_rollouts(cache, here, follow=follow)
                time.sleep(POLL_SECONDS)
    return f"{_names(here, 'scores')} complete"


def _to_score(session: Session, here: Round, *, follow: bool) -> Iterator[Cache]:
    """The caches that a round needs, each after those it continues, without what is damaged."""
    for cache in _new_caches(session, here):
        bases = () if cache.is_complete() else bases_of(session.setup, cache, here.students)
        for base in bases:
            rollouts, lost = base.rollouts, missing_units(base.rollouts, session.progress)
            if lost and follow:
                _wait(session, rollouts.is_complete, f"units {lost[:8]} of {rollouts.name}")
            what = f"rollouts (units {lost[:8]} of {rollouts.name} are missing)"
            _need(follow or not lost, here, "generate", what)
            missing_units(base.scores, session.progress)
            yield base
        yield cache


def _check_rollouts(cache: Cache, here: Round, *, follow: bool) -> None:
    """Without `follow` nobody else is at work: what is missing has to be made first."""
    missing = [u for u in cache.rollouts.units() if cache.rollouts.commit_record(u) is None]
    _need(follow or not missing, here, "generate", f"rollouts (units {missing[:8]} are missing)")


def _train(session: Session, here: Round, *, follow: bool) -> str:
    for cache in _new_caches(session, here):
        if follow:
            _wait(session, cache.is_complete, f"{cache.scores.name} to be complete")
        _need(cache.rollouts.is_complete(), here, "generate", "rollouts")
        _need(cache.is_complete(), here, "score", "scores")
    if not has_policy(session, here):
        damaged = [
            f"unit {unit} of {artifact.name}"
            for cache in here.caches
            for artifact in (cache.rollouts, cache.scores)
            for unit in missing_units(artifact, session.progress)
        ]
        _need(not damaged, here, "generate and score", ", ".join(damaged))
        try:
            train_policy(session, here)
        except DamagedUnit as error:
            raise UserError(f"{error}; run generate and score again: only it is made") from error
    return f"{here.policy.name} is complete: {here.policy.folder()}"


def _new_caches(session: Session, here: Round) -> Iterator[Cache]:
    """The caches that a round needs, then the audit's: it exists if a rollout was cut.

    Whether one was is known once the rollouts before it are complete, so take the audit's last.
    """
    yield from here.caches
    if here.probe is None or here.fresh is None:
        return
    if summed_counts(here.fresh.rollouts.commits().values()).get("length_rows"):
        rollouts, scores = probe_artifacts(session.setup, here.probe)
        yield replace(here.fresh, rollouts=rollouts, scores=scores, slots=())


def _wait(session: Session, is_there: Callable[[], bool], what: str) -> None:
    """Poll until another machine has published something."""
    if not is_there():
        session.progress.say(f"waiting for {what}")
    while not is_there():
        time.sleep(POLL_SECONDS)


def _names(here: Round, kind: str) -> str:
    names = [getattr(cache, kind).name for cache in here.caches]
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _round(session: Session, round_index: int, *, follow: bool, train: bool) -> Round:
    """A round, waited for with `follow`; but to `train`, as soon as its caches are named."""
    said = False
    while True:
        try:
            return _find_round(session.setup, round_index, train=train)
        except _NotTrained:
            if not follow:
                raise
        if not said:
            session.progress.say(f"waiting for the policy of round {round_index - 1}")
            said = True
        time.sleep(POLL_SECONDS)


class _NotTrained(UserError):
    """The round before has no policy yet."""


def _find_round(setup: Setup, round_index: int, *, train: bool = True) -> Round:
    if not 0 <= round_index < setup.config.rounds:
        raise UserError(
            f"--round is {round_index}; the config has rounds 0 to "
            f"{setup.config.rounds - 1}; choose one of them"
        )
    reached = 0
    for here in walk(setup, opened=named):
        if here.index == round_index:
            return here
        reached = here.index
        if here.ahead is not None and here.index == round_index - 1 and not train:
            return _caches_ahead(setup, here, here.ahead)
    raise _NotTrained(
        f"round {round_index} starts from the policy of round {round_index - 1}, which is "
        f"not trained yet; run train --round {reached} first"
    )


def _caches_ahead(setup: Setup, here: Round, cache: Cache) -> Round:
    """The next round, to make its caches only: its policy cannot be named yet."""
    plan = plan_ahead(setup.config, here.plan)
    return replace(here, plan=plan, caches=(cache,), unit_decisions=(), ahead=None)


def _need(there: bool, here: Round, stage: str, what: str) -> None:
    if not there:
        raise UserError(
            f"round {here.index} has no complete {what} yet; run {stage} --round {here.index} first"
        )
