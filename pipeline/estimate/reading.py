"""What an estimate reads: the setup of a run and the lengths of its prompts, without torch.

Nothing is written: prompts are named, not made, and no digest is remembered.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from opd_stream.config import Config, Evaluation
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.files import is_remote
from opd_stream.store.policy import UNREAD, known_identity
from opd_stream.store.store import Store
from pipeline.estimate.prompts import (
    FastTokenizer,
    MeasuredPrompts,
    SourceLengths,
    TeacherPrompts,
    measure_prompts,
    measure_teacher_prompts,
)
from pipeline.setup import (
    Setup,
    check_context,
    check_extras,
    check_given,
    check_problems,
    check_prompt_ids,
    check_rounds,
    check_routes,
    of_teacher,
    prompt_judges,
    setup_of,
    with_default_distance,
)
from stages.checkpoints import Checkpoint, weight_shapes
from stages.prompts import prompts_artifact

if TYPE_CHECKING:
    from opd_stream.tasks.judges import AnyJudge

MOST_BYTES = 2**30  # of weights, read for their digest
MOST_ANSWERS = 256  # whose reference the judge has to read


class Problems(NamedTuple):
    """A set of problems that policies are evaluated on."""

    settings: Evaluation
    artifact: Artifact
    lengths: SourceLengths


@dataclass(slots=True, kw_only=True)
class RunInputs:
    """The setup of a run, and the lengths of its prompts."""

    setup: Setup
    prompts: SourceLengths
    teacher_prompts: dict[str | None, TeacherPrompts]  # by teacher, of those with prompts of own
    problems: tuple[Problems, ...]
    compared: Checkpoint | None  # the teacher that policies are compared with, if they are
    notes: list[str]  # what was assumed


def read_inputs(config: Config) -> RunInputs:
    """Open what a run needs, without changing anything."""
    check_extras(config)
    store = Store(config.store, replayed=config.replayed_store)
    _check_store(store)
    notes: list[str] = []
    tokenizer = FastTokenizer.of(config.student.folder)

    def token_id(model: Checkpoint, token: str) -> int | None:
        return None if tokenizer is None else tokenizer.text_id(token)

    setup = setup_of(config, store, partial(_checkpoint, store, notes), token_id, make=False)
    for model in (setup.student, *(each.teacher for each in setup.by_teacher)):
        if model is not None:
            weight_shapes(model.folder)  # their headers can be read
    problems: list[Problems] = []
    from stages.evaluate import evaluation_field

    parts = {} if config.evaluation is None else config.evaluation.parts()
    for name, part in parts.items():
        assert part.prompts is not None  # validated
        field = evaluation_field(name)
        held_out = prompts_artifact(store, part.prompts, setup.student, field=field)
        measured = measure_prompts(field, held_out, part.prompts, setup.student.folder, notes)
        check_problems(field, config, part, setup.student, measured.table, setup.vocabulary)
        if part.kind == "judged":
            assert part.judge is not None  # validated
            _check_answers(field, part.judge, measured, notes)
        problems.append(Problems(part, held_out, measured.lengths))
    compared = None
    if config.evaluation is not None and config.evaluation.has_distance():
        assert config.teacher is not None  # checked
        compared = setup.teacher or _checkpoint(store, notes, config.teacher.folder)
    prompts = measure_prompts("prompts", setup.prompts, config.prompts, setup.student.folder, notes)
    _check_prompts(setup, prompts, notes)
    settled, line = with_default_distance(config, prompts.lengths.rows)
    notes += [] if line is None else [line]
    if settled is not config and settled.evaluation is not None:
        compared, setup = setup.teacher, replace(setup, config=settled)
        lengths = replace(prompts.lengths, rows=settled.evaluation.held_out)
        problems.append(Problems(settled.evaluation, setup.prompts, lengths))
    return RunInputs(
        setup=setup,
        prompts=prompts.lengths,
        teacher_prompts=_teacher_prompts(setup, prompts),
        problems=tuple(problems),
        compared=compared,
        notes=notes,
    )


def _check_prompts(setup: Setup, prompts: MeasuredPrompts, notes: list[str]) -> None:
    """Refuse training prompts as the run does, as far as they were read."""
    check_prompt_ids(prompts.table, setup.vocabulary)
    if (rows := prompts.lengths.rows) is not None:
        check_rounds(setup.config, rows)
    if prompts.lengths.is_whole:
        check_given(setup, [prompts.table])
    for judge in prompt_judges(setup.config):
        _check_answers("prompts", judge, prompts, notes)


def _teacher_prompts(setup: Setup, prompts: MeasuredPrompts) -> dict[str | None, TeacherPrompts]:
    """What each teacher reads, and refuse what it cannot hold, and prompts that go to none."""
    found: dict[str | None, TeacherPrompts] = {}
    longest = int(prompts.lengths.tokens.max())
    for each in setup.by_teacher:
        with of_teacher(each.name):
            own = measure_teacher_prompts(each, prompts)
            found |= {} if own is None else {each.name: own}
            most = None if own is None else int(own.lengths.tokens.max())
            check_context(each.config, setup.student, each.teacher, longest, most)
    read = [found.get(each.name) for each in setup.several]
    check_routes(setup.config, prompts.table, [None if own is None else own.table for own in read])
    return found


def _check_answers(
    field: str, judge: "AnyJudge", measured: MeasuredPrompts, notes: list[str]
) -> None:
    """Refuse a judge that can read no reference, as the run does, and note what it cannot read."""
    from opd_stream.tasks.judges import open_judge
    from stages.evaluate import unjudged_line

    table = measured.table.slice(0, MOST_ANSWERS)
    is_whole = table.num_rows == measured.lengths.rows
    try:
        line = unjudged_line(field, table, open_judge(judge), judge.kind)
    except UserError as error:
        if is_whole:
            raise
        line = str(error)
    read = "" if is_whole else f" (references of the first {table.num_rows:,} were read)"
    notes += [] if line is None else [f"{line}{read}"]


def _checkpoint(store: Store, notes: list[str], folder: Path) -> Checkpoint:
    identity = known_identity(folder, cache=store.digests, most_bytes=MOST_BYTES)
    if identity.weights_sha256 == UNREAD:
        notes.append(
            f"the weights of {folder} have not been read by a run on this machine, and are too "
            "large to read now: what the store has for them is not counted"
        )
    return Checkpoint(folder=folder.resolve(), identity=identity)


def _check_store(store: Store) -> None:
    """Refuse what the run would refuse, by looking alone."""
    if is_remote(store.root):
        return
    if not (folder := existing_folder(store.root)).is_dir():
        raise UserError(f"store {store.root} is a file; expected a folder; set store=DIR")
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"cannot write {store.root}; expected a writable folder; choose another one "
            "(--set store=DIR)"
        )


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())
