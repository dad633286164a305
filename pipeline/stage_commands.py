"""One stage of one round, for a machine that does only that."""

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from pipeline.rounds import Session, evaluate_policy, has_policy, make_caches, train_policy
from pipeline.run_directory import RunDirectory
from pipeline.setup import open_setup
from pipeline.walk import Round, checkpoint_of, walk
from stages.collect import missing_units
from stages.executors import open_executor
from stages.progress import Progress

STAGES = ("generate", "score", "train", "evaluate")


def run_stage(
    stage: str, config: Config, directory: RunDirectory, *, round_index: int, progress: Progress
) -> str:
    """Do one stage of a round; returns the line to print.

    Raises:
        UserError: an earlier stage has not been run yet, or anything else the user can mend.
    """
    setup = open_setup(config)
    run_id = directory.open(config)
    with open_executor(config) as executor:
        session = Session(
            setup=setup, directory=directory, run_id=run_id, executor=executor, progress=progress
        )
        if stage == "evaluate":
            return _evaluate(session, round_index)
        here = _round(session, round_index)
        directory.write_plan(here)
        if stage == "generate":
            make_caches(session, here, score=False)
            return f"{_names(here, 'rollouts')} complete"
        rollouts = all(cache.rollouts.is_complete() for cache in here.caches)
        _need(rollouts, here, "generate", "rollouts")
        if stage == "score":
            make_caches(session, here)
            return f"{_names(here, 'scores')} complete"
        _need(all(cache.is_complete() for cache in here.caches), here, "score", "scores")
        if not has_policy(session, here):
            damaged = [
                f"unit {unit} of {artifact.name}"
                for cache in here.caches
                for artifact in (cache.rollouts, cache.scores)
                for unit in missing_units(artifact, progress)
            ]
            _need(not damaged, here, "generate and score", ", ".join(damaged))
            try:
                train_policy(session, here)
            except DamagedUnit as error:
                raise UserError(
                    f"{error}; run generate and score again: only it is made"
                ) from error
        directory.add_metrics(here)
        return f"{here.policy.name} is complete: {here.policy.folder()}"


def _names(here: Round, kind: str) -> str:
    names = [getattr(cache, kind).name for cache in here.caches]
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _round(session: Session, round_index: int) -> Round:
    if not 0 <= round_index < session.setup.config.rounds:
        raise UserError(
            f"--round is {round_index}; the config has rounds 0 to "
            f"{session.setup.config.rounds - 1}; choose one of them"
        )
    reached = 0
    for here in walk(session.setup):
        if here.index == round_index:
            return here
        reached = here.index
    raise UserError(
        f"round {round_index} starts from the policy of round {round_index - 1}, which is not "
        f"trained yet; run train --round {reached} first"
    )


def _evaluate(session: Session, round_index: int) -> str:
    """Evaluate the policy that round `round_index` made; -1 is the initial student."""
    if session.setup.config.evaluation is None:
        raise UserError("the config has no evaluation section; add one")
    student = session.setup.student
    if round_index >= 0:
        here = _round(session, round_index)
        _need(here.policy.is_complete(), here, "train", "policy")
        student = checkpoint_of(here.policy)
    result = evaluate_policy(session, student)
    passes = ", ".join(f"{k} {v:.3f}" for k, v in result.items() if k.startswith("pass@"))
    return f"{passes} (standard error {result['standard_error']:.3f})"


def _need(there: bool, here: Round, stage: str, what: str) -> None:
    if not there:
        raise UserError(
            f"round {here.index} has no complete {what} yet; run {stage} --round {here.index} first"
        )
