"""Everything that is the same in all rounds, checked before any work."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from opd_stream.config import Config, Evaluation, OneTeacher
from opd_stream.config.sections import DISTANCE
from opd_stream.engines import engine_recipe, gives_hidden
from opd_stream.engines.base import ScoringSettings
from opd_stream.errors import UserError, named
from opd_stream.fetching import fetch, local_folder
from opd_stream.prompts import shuffled_rows
from opd_stream.rendering import Rendering
from opd_stream.sources import Prompts
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs import HiddenCodec
from opd_stream.store.policy import UNREAD
from opd_stream.store.shards import COMPLETIONS
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import misread_line, open_vocabulary
from opd_stream.windows import AdaptiveWindow, EntropyGatedWindow
from stages.checkpoints import (
    Checkpoint,
    Vocabulary,
    check_pair,
    open_checkpoint,
    open_served_checkpoint,
    shared_vocabulary,
)
from stages.prompts import (
    answered_rows,
    make_prompts,
    make_teacher_prompts,
    own_prompts,
    prompt_lengths,
    prompts_artifact,
    round_prompts,
    rows_left_out,
    selected_rows,
    table_lengths,
    teacher_prompts_artifact,
)

if TYPE_CHECKING:
    from opd_stream.engines.server_engine import ServerEngine
    from opd_stream.tasks.judges import AnyJudge
    from stages.cross_tokenizer import AlignmentRecipe

Opener = Callable[[Path], Checkpoint]  # identifies a checkpoint folder
TokenId = Callable[[Checkpoint, str], int | None]  # of a token; None: the checkpoint has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A checked config with its checkpoints and prompts opened."""

    config: Config  # with the distance that a run has by default
    store: Store
    student: Checkpoint  # policy 0
    teacher: Checkpoint | None  # None in a replay
    alignment: "AlignmentRecipe | None"  # of a teacher with another tokenizer
    replayed_teacher: str | None  # identity of the teacher that a replay's config names
    warnings: tuple[str, ...]  # what may be wrong, a line each
    vocabulary: Vocabulary  # ids that may be drawn, and those that end a completion
    lost: tuple[str, ...] = ()  # those of `warnings` that say what is left out of evaluation
    forced_ids: tuple[int, ...]  # always scored
    prompts: Artifact
    teacher_prompts: Artifact | None  # where the teacher reads the prompts in its own rendering
    name: str | None = None  # of the teacher, where it is one of several
    several: tuple["Setup", ...] = ()  # of several teachers: the same with each; `teacher` is None

    @property
    def by_teacher(self) -> tuple["Setup", ...]:
        """The setup with each teacher, `config` as if it were the only one."""
        return self.several or (self,)

    @property
    def weight(self) -> float:
        """Of the terms of its teacher in the loss."""
        teacher = self.config.teacher
        return teacher.weight if isinstance(teacher, OneTeacher) else 1.0

    @property
    def candidates(self) -> int | None:
        """The first id that is no candidate of the teacher; None: its head has none."""
        assert self.teacher is not None
        known = self.teacher.known_ids if self.alignment is not None else self.vocabulary.size
        return known if known < self.teacher.config.vocabulary else None


def open_setup(config: Config, *, make: bool = True, works: bool = True) -> Setup:
    """Open what a run needs.

    Args:
        config: the run.
        make: the prompts artifacts; False: only name the run's, and leave evaluation out.
        works: False: of a finished run, whose models are not looked at; torch stays unloaded.

    Raises:
        UserError: the store cannot be written, a checkpoint is none, the pair does not fit
            together, K is larger than the vocabulary, or the prompts are refused.
    """
    check_extras(config)
    fetch_checkpoints(config)
    store = open_store(config)
    setup = setup_of(config, store, partial(open_checkpoint, store), token_id_of, make=make)
    if make:
        lengths: list[int] = []
        for table in setup.prompts.tables():
            check_prompt_ids(table, setup.vocabulary)
            lengths += table_lengths(table)
        for each in setup.by_teacher:
            with of_teacher(each.name):
                if works:
                    check_weights(each.config, setup.student, each.teacher)
                own = None if each.teacher_prompts is None else prompt_lengths(each.teacher_prompts)
                teachers = None if own is None else max(own)
                check_context(each.config, setup.student, each.teacher, max(lengths), teachers)
        check_rounds(config, len(lengths))
        check_given(setup, setup.prompts.tables())
        _check_routes(setup)
        lost = [*rows_left_out(setup.prompts, "prompts"), *_check_judged(config, setup.prompts)]
        if works and config.replay is None:
            first = next(setup.prompts.tables())
            check_environment(config, setup.student, setup.vocabulary, config.prompts, first)
        asked = check_evaluation(config, store, setup.student, setup.vocabulary, works=works)
        setup = replace(setup, warnings=(*setup.warnings, *lost, *asked), lost=tuple(asked))
    if not works:
        return setup
    if config.train.lora is not None:
        from stages.student_model import check_lora

        check_lora(setup.student.folder, config.train.lora)
    return replace(setup, warnings=(*setup.warnings, *misread_line(setup.student.folder)))


def open_to_look(config: Config) -> Setup:
    """As `open_setup`, for commands that work on nothing: prompts are named and not made.

    What only training reads is left out, and so is torch; nothing is written."""
    store = Store(config.store, remembers=False, replayed=config.replayed_store)
    return setup_of(config, store, partial(open_checkpoint, store), token_id_of, make=False)


def fetch_checkpoints(config: Config) -> None:
    """Fetch hub models and convert GGUF files that are not here yet.

    Raises:
        UserError: one cannot be had; a replay does without its teacher, unless it is compared with.
    """
    fetch(config.student.path, config.student.revision)
    compares = config.evaluation is not None and config.evaluation.has_distance()
    for teacher in config.all_teachers.values() if config.replay is None or compares else ():
        fetch(teacher.path, teacher.revision, weights=teacher.engine != "server")


def open_store(config: Config) -> Store:
    """The store of a run, patient from its first answer on.

    Raises:
        UserError: it cannot be written; of a replay, how to read from such a one.
    """
    try:
        Store(config.store).check_writable()
    except UserError as error:
        if config.replay is None or config.replayed_store is not None:
            raise
        raise UserError(
            f"{error}; to replay from a store that cannot be written, name it in replay.store, and "
            "in store one for the new policies"
        ) from error
    waits = config.store_seconds
    return Store(config.store, retry_timeout=waits, replayed=config.replayed_store)


def setup_of(
    config: Config,
    store: Store,
    opened: Opener,
    token_id: TokenId,
    *,
    make: bool,
) -> Setup:
    """The setup without what only training reads (masked and newline ids).

    Args:
        config: the run.
        store: of the run.
        opened: identifies a checkpoint folder.
        token_id: the id of a token in a checkpoint's vocabulary; None: it has none.
        make: the prompts artifacts; False: only name them."""
    check_engines(config)
    student = opened(config.student.folder)
    if student.config.is_quantised and config.train.lora is None:
        raise UserError(
            f"student {student.folder} is quantised, and quantised weights cannot be trained; set "
            "train.lora, or use a checkpoint that is not quantised"
        )
    teacher, alignment, rendered = None, None, None
    if config.teacher is not None and config.replay is None:
        teacher = _open_teacher(opened, config, store, make=make)
        check_pair(student, teacher, aligns=config.scores.alignment is not None)
        _check_top_k(config, teacher)
    prompts = (make_prompts if make else prompts_artifact)(store, config.prompts, student)
    if teacher is not None:
        rendered = _teacher_prompts(config, store, prompts, teacher, make=make)
        if config.scores.alignment is not None:
            from stages.cross_tokenizer import open_alignment

            alignment = open_alignment(
                store, config, student, teacher, rendered=rendered, make=make
            )
    reads_alike = [student] if teacher is None or alignment is not None else [student, teacher]
    vocabulary = shared_vocabulary(reads_alike, stops=stop_token_ids(config, student, token_id))
    forced = _named_ids("scores.forced_tokens", config.scores.forced_tokens, student, token_id)
    rows = prompts.layout().rows if prompts.is_started() else None
    setup = Setup(
        config=with_default_distance(config, rows)[0],
        store=store,
        student=student,
        teacher=teacher,
        alignment=alignment,
        replayed_teacher=_replayed_teacher(opened, config, store),
        warnings=_warnings(opened, config, student, teacher),
        vocabulary=vocabulary,
        forced_ids=tuple(sorted({*vocabulary.stop_ids, *forced})),
        prompts=prompts,
        teacher_prompts=rendered,
    )
    several = [_with_teacher(name, setup, opened, token_id, make=make) for name in config.teachers]
    lines = [line for each in several for line in each.warnings]
    warnings = tuple(dict.fromkeys((*setup.warnings, *lines)))
    return replace(setup, several=tuple(several), warnings=warnings)


def of_teacher(name: str | None) -> AbstractContextManager[None]:
    """Say of errors inside which of several teachers they are about."""
    return nullcontext() if name is None else named(f"teachers.{name}")


def _with_teacher(
    name: str, setup: Setup, opened: Opener, token_id: TokenId, *, make: bool
) -> Setup:
    """The setup of a run with one of its several teachers.

    What the student may draw is its own affair, so that another teacher makes no other rollouts.

    Raises:
        UserError: the teacher lacks ids that the student may draw, or ends texts in its own way.
    """
    config, known = setup.config.with_teacher(name), setup.vocabulary
    with of_teacher(name):
        alone = setup_of(config, setup.store, opened, token_id, make=make)
        teacher = alone.teacher
        assert teacher is not None  # several teachers are no replay
        if alone.alignment is None and teacher.known_ids < known.size:
            raise UserError(
                f"{teacher.folder} knows ids below {teacher.known_ids}, and the student may draw "
                f"those below {known.size}; use a teacher with all of the student's ids"
            )
        if alone.alignment is None and (lost := set(teacher.terminators()) - set(known.stop_ids)):
            raise UserError(
                f"{teacher.folder} ends texts with id {min(lost)}, which ends no rollout; name "
                "that token in rollouts.stop_tokens"
            )
    return replace(alone, config=config, name=name, vocabulary=known, forced_ids=setup.forced_ids)


def _check_routes(setup: Setup) -> None:
    """Refuse prompts that go to no teacher, before any work."""
    routed = [each.teacher_prompts for each in setup.several]
    tables = [None if each is None else own_prompts(each) for each in routed]
    check_routes(setup.config, setup.prompts.read_all(), tables)


def check_routes(config: Config, prompts: pa.Table, tables: Sequence[pa.Table | None]) -> None:
    """Refuse prompts that go to no teacher.

    Args:
        config: of the run.
        prompts: of the student.
        tables: those of each of several teachers; None: all.
    """
    read = [set(table["prompt_id"].to_pylist()) for table in tables if table is not None]
    if not config.teachers or len(read) < len(tables):
        return
    names = prompts["prompt_id"].to_pylist()
    lost = [name for name in names if not any(name in each for each in read)]
    if lost:
        raise UserError(
            f"{len(lost):,} of {len(names):,} prompts go to no teacher, the first {lost[0]!r}; "
            "expected each in some teachers.NAME.when; add its value, or a teacher without when"
        )


def _open_teacher(opened: Opener, config: Config, store: Store, *, make: bool) -> Checkpoint:
    """The teacher; one that is served is asked who it is, where the store does not know it yet."""
    teacher = config.teacher
    assert teacher is not None  # validated with the config
    if teacher.server is None:
        return opened(teacher.folder)

    def try_scores(engine: "ServerEngine") -> None:
        own = config.rollouts.student_top_k or config.rollouts.extra_draws
        asked = ScoringSettings(top_k=config.scores.stored_candidates, forced_ids=(0,))
        engine.check(asked, own_ids=bool(own))

    return open_served_checkpoint(store, teacher, first_contact=try_scores if make else None)


def _teacher_prompts(
    config: Config, store: Store, prompts: Artifact, teacher: Checkpoint, *, make: bool
) -> Artifact | None:
    """The prompts that the teacher reads, if it has a rendering of its own or not all of them."""
    rendering = teacher_rendering(config)
    if rendering is None:
        return None
    if not make:
        return teacher_prompts_artifact(store, rendering, prompts, teacher)
    rendered = make_teacher_prompts(store, config.prompts, rendering, prompts, teacher)
    for table in rendered.tables():
        check_prompt_ids(table, shared_vocabulary([teacher]))
    return rendered


def teacher_rendering(config: Config) -> Rendering | None:
    """How the one teacher of a config reads the prompts; None: as the student does, all of them."""
    rendering = None if config.teacher is None else config.teacher.rendering(config.prompts)
    if rendering is not None and rendering.template is None and config.scores.alignment is not None:
        return replace(rendering, template=config.prompts.template)  # under its own tokenizer
    return rendering


def check_extras(config: Config) -> None:
    """Refuse what needs a library that is not installed, before any work."""
    named = [logger.kind for logger in config.train.loggers if logger.is_named]
    wanted = [("train.loggers", name, name) for name in named]
    if config.train.lora is not None:
        wanted.append(("train.lora", "peft", "peft"))
        if config.train.lora.base != "stored":
            field = f"train.lora.base={config.train.lora.base}"
            wanted.append((field, "bitsandbytes", "bitsandbytes"))
    if config.train.optimizer == "adamw-8bit":
        wanted.append(("train.optimizer=adamw-8bit", "bitsandbytes", "bitsandbytes"))
    for field, library, package in wanted:
        if find_spec(library) is None:
            raise UserError(
                f"{field} needs the library {library}, which is not installed; "
                f"pip install {package}, or take it out"
            )
    if config.train.loggers:
        from stages.loggers import check_loggers

        check_loggers(config.train.loggers)


def check_distance(config: Config) -> None:
    """Refuse a distance to a teacher that cannot be measured, before any work.

    Raises:
        UserError: there is no teacher, it reads other tokens, or an engine gives no hidden states.
    """
    if config.evaluation is None or not config.evaluation.has_distance():
        return
    if config.teacher is None:
        raise UserError(
            "evaluation of kind distance, but the config has no teacher; expected the one to "
            "compare with; add teacher, or use a judge"
        )
    if config.scores.alignment is not None:
        raise UserError(
            "evaluation of kind distance with scores.alignment, whose teacher has another "
            "tokenizer: the two distributions are not over the same tokens; use a judge"
        )
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if not gives_hidden(model.engine):
            raise UserError(
                f"evaluation of kind distance needs hidden states, which {role}.engine "
                f"{model.engine} does not give; set {role}.engine=transformers, or use a judge"
            )


def with_default_distance(config: Config, rows: int | None) -> tuple[Config, str | None]:
    """The config of a run without evaluation, with the distance on prompts that no round reads.

    Also a line that says so, or why nothing is measured; None: the config decides itself.

    Args:
        config: the run.
        rows: training prompts; None: it is not known how many.
    """
    wanted, read = config.held_out_prompts, config.rounds * config.rollouts.prompts_per_round
    if config.evaluation is not None or not wanted or config.replay is not None or rows is None:
        return config, None
    roles = ("student", config.student), ("teacher", config.teacher)
    mute = [role for role, model in roles if model is None or not gives_hidden(model.engine)]
    why = None
    if config.scores.alignment is not None:
        why = "the teacher has another tokenizer"
    elif config.teachers:
        why = "there are several teachers"
    elif config.teacher is not None and config.teacher.follows_student:
        why = "the teacher is another one each round"
    elif mute:
        why = f"{mute[0]}.engine gives no hidden states"
    elif config.rollouts.select is not None:
        why = "rollouts.select may read any of the prompts"
    elif read + wanted > rows:
        why = f"the rounds read {read:,} of {rows:,} prompts, which leaves fewer than {wanted}"
    if why is not None:
        return config, f"no policy is evaluated: there is no evaluation section, and {why}"
    evaluation = Evaluation(
        kind="distance",
        held_out=wanted,
        prompts=config.prompts,
        max_new_tokens=min(DISTANCE["max_new_tokens"], largest_window(config)),
    )
    return config.model_copy(update={"evaluation": evaluation}), (
        f"no evaluation section: the distance to the teacher is measured on {wanted} training "
        "prompts that no round reads (held_out_prompts=0: not)"
    )


def check_engines(config: Config) -> None:
    """Refuse engines that are not there, or do not give what the config needs of them.

    Raises:
        UserError: names the engine.
    """
    for model in (config.student, config.teacher):
        if model is not None:
            engine_recipe(model.engine)  # one of the user's own can be imported
    check_distance(config)
    check_states(config)


def check_states(config: Config) -> None:
    """Refuse codec hidden with an engine that gives no hidden states, before any work.

    Raises:
        UserError: names the engine.
    """
    if config.teacher is None or not isinstance(config.scores.codec, HiddenCodec):
        return
    if not gives_hidden(config.teacher.engine):
        raise UserError(
            f"scores.codec hidden stores the teacher's hidden states, which teacher.engine "
            f"{config.teacher.engine} does not give; set teacher.engine=transformers, or use codec "
            "compact"
        )


def check_environment(
    config: Config, student: Checkpoint, vocabulary: Vocabulary, source: Prompts, table: pa.Table
) -> None:
    """Refuse an environment, or a template, that fails on the first prompt of a source."""
    environment = config.rollouts.environment
    if environment is None:
        return
    from stages.trajectories import Trajectories, trajectories_recipe

    Trajectories(
        trajectories_recipe(environment, source.template),
        stop_ids=vocabulary.stop_ids,
        tokenizer=student.tokenizer(),
        placed=environment,
    ).try_out(table)


def check_evaluation(
    config: Config,
    store: Store,
    student: Checkpoint,
    vocabulary: Vocabulary,
    *,
    works: bool = True,
) -> list[str]:
    """Refuse what cannot be judged, before any work; returns what is left out, a line each.

    `works` as in `open_setup`.
    """
    if config.evaluation is None:
        return []
    from opd_stream.tasks.judges import open_judge
    from stages.evaluate import evaluation_field, evaluation_prompts, unjudged_line

    lost: list[str] = []
    check_distance(config)
    for name, part in config.evaluation.parts().items():
        field, prompts = evaluation_field(name), evaluation_prompts(store, name, part, student)
        lost += rows_left_out(prompts, field)
        table = prompts.read_all()
        check_problems(field, config, part, student, table, vocabulary)
        assert part.prompts is not None
        if works:
            with named(field):
                check_environment(config, student, vocabulary, part.prompts, table)
        if part.kind == "distance":
            continue
        assert part.judge is not None
        judge = open_judge(part.judge)
        line = unjudged_line(field, table, judge, part.judge.kind)
        lost += [] if line is None else [line]
    return lost


def prompt_judges(config: Config) -> "list[AnyJudge]":
    """Judges of answers to the training prompts: of a filter, a curriculum and a reward."""
    keep, extrapolation = config.rollouts.keep, config.train.extrapolation
    judges = [] if keep is None or config.replay is not None else [keep.judge]
    judges += [] if config.rollouts.select is None else [config.rollouts.select.judge]
    if config.evaluation is not None and extrapolation is not None and extrapolation.signal != "kl":
        judged = config.evaluation.judged()
        assert judged is not None  # the config asks for one
        judges.append(judged.judge)
    return [judge for judge in judges if judge is not None]


def _check_judged(config: Config, prompts: Artifact) -> list[str]:
    """As `check_evaluation`, of the training prompts."""
    lines: list[str] = []
    for judge in prompt_judges(config):
        from opd_stream.tasks.judges import open_judge
        from stages.evaluate import unjudged_line

        line = unjudged_line("prompts", prompts.read_all(), open_judge(judge), judge.kind)
        lines += [] if line is None else [line]
    return lines


def _check_top_k(config: Config, teacher: Checkpoint) -> None:
    """Refuse more candidates than there are tokens."""
    if config.scores.stored_candidates > teacher.known_ids:
        raise UserError(
            f"scores.top_k is {config.scores.top_k} but the teacher has {teacher.known_ids} "
            "tokens; lower scores.top_k"
        )
    if config.rollouts.student_top_k > teacher.known_ids:
        raise UserError(
            f"rollouts.student_top_k is {config.rollouts.student_top_k} but the teacher has "
            f"{teacher.known_ids} tokens; lower rollouts.student_top_k"
        )


def check_weights(config: Config, student: Checkpoint, teacher: Checkpoint | None) -> None:
    """Refuse weights that transformers cannot load whole, before any work."""
    from opd_stream.engines.loading import check_files

    check_files(student.folder)  # transformers trains it, whatever samples
    settings = config.teacher
    if teacher is not None and settings is not None and settings.engine == "transformers":
        check_files(teacher.folder)


def check_rounds(config: Config, rows: int) -> None:
    """Refuse rounds of more prompts than there are; a replay draws none."""
    if config.replay is None:
        per_round = config.rollouts.prompts_per_round
        shuffled_rows(rows=rows, seed=0, round_index=0, per_round=per_round)


def check_given(setup: Setup, tables: Iterable[pa.Table]) -> None:
    """Refuse given completions that are too few, too long, or do not end as the student ends.

    `tables` have all prompts of the run.

    Raises:
        UserError: names the prompt, or the round.
    """
    config, rollouts = setup.config, setup.config.rollouts
    if config.replay is not None or rollouts.given_by == "teacher" or not rollouts.given_prompts:
        return
    answered: list[bool] = []
    for table in tables:
        _check_completions(setup, table)
        answered += answered_rows(table) or []
    for index in () if all(answered) else range(config.rounds):
        drawn = selected_rows(
            round_prompts(
                seed=config.seed, round_index=index, per_round=rollouts.prompts_per_round
            ),
            len(answered),
        )
        found = sum(answered[row] for row in drawn)
        if found < rollouts.given_prompts:
            raise UserError(
                f"rollouts.given_share asks for {rollouts.given_prompts} given rollouts a round, "
                f"and {found} of the {len(drawn)} prompts of round {index} have a completion "
                f"({sum(answered):,} of all {len(answered):,}); lower given_share, or add "
                "completions"
            )


def _check_completions(setup: Setup, table: pa.Table) -> None:
    """Refuse completions that no model could read whole, or that a chat template does not end."""
    column = table[COMPLETIONS].combine_chunks()
    row_C = np.repeat(np.arange(table.num_rows), column.value_lengths().to_pylist())
    lengths_C = np.array(column.flatten().value_lengths().to_pylist(), np.int64)
    prompts_C = np.array(table_lengths(table), np.int64)[row_C]
    limit = context_of(setup.config, "student", setup.student)
    too_long = np.flatnonzero(prompts_C + lengths_C > (limit or np.inf))
    if len(too_long):
        tokens, prompt = int(lengths_C[too_long[0]]), int(prompts_C[too_long[0]])
        raise UserError(
            f"a completion of prompt {table['prompt_id'][int(row_C[too_long[0]])].as_py()!r} has "
            f"{tokens} tokens and the prompt {prompt}, together {tokens + prompt}; the student "
            f"reads {limit}; shorten it, or leave the row out"
        )
    ids = column.flatten().flatten().to_numpy()
    stops = np.cumsum(np.append(0, np.isin(ids, setup.vocabulary.stop_ids)))
    ends = np.cumsum(lengths_C)
    endless = np.flatnonzero(stops[ends] == stops[ends - lengths_C])
    if setup.config.prompts.template.kind == "chat" and len(endless):
        raise UserError(
            "the chat template ends the completion of prompt "
            f"{table['prompt_id'][int(row_C[endless[0]])].as_py()!r} with no terminator of the "
            f"student ({list(setup.vocabulary.stop_ids)}); expected one; set "
            "rollouts.stop_tokens, or template.file to a template that writes it"
        )


def check_prompt_ids(prompts: pa.Table, vocabulary: Vocabulary) -> None:
    """Refuse prompts with ids that a model lacks, before any work."""
    for batch in prompts.to_batches():
        column = batch.column("prompt_ids")
        largest = pc.call_function("max", [column.flatten()]).as_py()  # to_numpy loads pandas
        if largest is None or largest < vocabulary.size:
            continue
        beyond = np.flatnonzero(column.flatten().to_numpy() >= vocabulary.size)
        starts = column.offsets.to_numpy() - column.offsets[0].as_py()
        row = int(np.searchsorted(starts, beyond[0], side="right")) - 1
        found = column.flatten()[int(beyond[0])].as_py()
        raise UserError(
            f"prompt {batch.column('prompt_id')[row].as_py()!r} holds id {found}, and the models "
            f"share ids below {vocabulary.size}; leave out what the larger vocabulary writes "
            "(special tokens of a template), or use models with the same vocabulary"
        )


def token_id_of(model: Checkpoint, token: str) -> int | None:
    """The id of a text that is one token, also as it stands in the vocabulary; None: it is none."""
    vocabulary = open_vocabulary(model.folder)
    found = vocabulary.convert_tokens_to_ids(token)
    if found is not None and found != vocabulary.unk_token_id:
        return found
    ids = vocabulary.encode(token, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and vocabulary.decode(ids) == token else None


def stop_token_ids(
    config: Config, student: Checkpoint, token_id: TokenId = token_id_of
) -> list[int]:
    """Ids of `rollouts.stop_tokens`.

    Raises:
        UserError: the student has no such token.
    """
    return _named_ids("rollouts.stop_tokens", config.rollouts.stop_tokens, student, token_id)


def _named_ids(
    field: str, tokens: Sequence[str], student: Checkpoint, token_id: TokenId
) -> list[int]:
    found: list[int] = []
    for token in tokens:
        number = token_id(student, token)
        if number is None or number >= student.known_ids:
            raise UserError(
                f"{field} names {token!r}, which is no token of {student.folder}; "
                "use a text that is one token, or a token as it stands in tokenizer.json"
            )
        found.append(number)
    return found


def masked_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """Ids of `train.guards.mask_first`; what the tokenizer lacks cannot occur."""
    vocabulary = tokenizer.get_vocab()
    names = config.train.guards.mask_first
    return tuple(sorted(vocabulary[name] for name in names if name in vocabulary))


def newline_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that hold a newline, if the drift gate asks for them."""
    if config.train.gate is None or config.train.gate.blocks != "spans":
        return ()
    marks = ("\n", "Ċ", "<0x0A>")  # as it is, in byte-level and in byte-fallback vocabularies
    vocabulary = tokenizer.get_vocab()
    return tuple(
        sorted(number for token, number in vocabulary.items() if any(m in token for m in marks))
    )


def _replayed_teacher(opened: Opener, config: Config, store: Store) -> str | None:
    """The identity of the teacher that a replay's config names; of a served one, if it is known."""
    if config.replay is None or config.teacher is None or not config.teacher.is_here:
        return None
    found = _open_teacher(opened, config, store, make=False)
    is_unknown = found.is_served and found.identity.weights_sha256 == UNREAD
    return None if is_unknown else found.identity.fingerprint


def _warnings(
    opened: Opener, config: Config, student: Checkpoint, teacher: Checkpoint | None
) -> tuple[str, ...]:
    """Offline distillation inherits a bias if another model taught the student (Lightning OPD)."""
    if config.rounds > 1 or teacher is None or teacher.identity == student.identity:
        return ()
    taught_by = config.student.taught_by
    if taught_by is None:
        return (
            "one round trains offline: its gradient is biased unless this teacher wrote the "
            "student's fine-tuning data; that is unknown; set student.taught_by to the folder of "
            "the model that wrote it",
        )
    is_named = config.teacher is not None and config.teacher.path == taught_by
    if is_named or opened(local_folder(taught_by)).identity == teacher.identity:
        return ()
    return (
        f"one round trains offline, and another model ({taught_by}) taught the student: the "
        "gradient is biased; use that teacher, or `opd-stream cache residual` on the scores",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextUse:
    """The longest text that a model reads at once, and the most that it can.

    Example:
        >>> ContextUse(role="student", prompt_tokens=70, window_tokens=208, limit=2048).fits
        True
    """

    role: str
    prompt_tokens: int  # of the longest prompt
    window_tokens: int
    limit: int | None  # tokens; None: the checkpoint names none
    kept: int = 0  # tokens of the limit that the engine keeps for itself

    @property
    def fits(self) -> bool:
        """Whether the text can be read whole."""
        longest = self.prompt_tokens + self.window_tokens + self.kept
        return self.limit is None or longest <= self.limit

    def __str__(self) -> str:
        together = self.prompt_tokens + self.window_tokens
        limit = "names no limit" if self.limit is None else f"reads {self.limit}"
        return (
            f"a prompt has {self.prompt_tokens} tokens and a window {self.window_tokens}, together "
            f"{together}; the {self.role} {limit}{', of which one is kept' if self.kept else ''}"
        )


def training_contexts(
    config: Config,
    student: Checkpoint,
    teacher: Checkpoint | None,
    longest: int,
    teachers: int | None = None,
) -> Iterator[ContextUse]:
    """What each model of a run reads at once; a teacher with another tokenizer is left out.

    `longest` is of the prompts; `teachers` of those in the teacher's own rendering, if it has one.
    """
    if config.replay is not None:
        return
    window = largest_window(config)
    for role, model in (("student", student), ("teacher", teacher)):
        if model is None or (role == "teacher" and config.scores.alignment is not None):
            continue
        teacher_engine = None if config.teacher is None else config.teacher.engine
        yield ContextUse(
            role=role,
            prompt_tokens=longest if role == "student" or teachers is None else teachers,
            window_tokens=window,
            limit=context_of(config, role, model),
            kept=int(role == "teacher" and teacher_engine in ("vllm", "server")),
        )


def check_context(
    config: Config,
    student: Checkpoint,
    teacher: Checkpoint | None,
    longest: int,
    teachers: int | None = None,
) -> None:
    """Refuse a window that some rollout could not fill or be scored with, before any work."""
    for use in training_contexts(config, student, teacher, longest, teachers):
        if not use.fits:
            raise UserError(f"{use}; lower the window or max_prompt_tokens")


def evaluation_context(
    config: Config, part: Evaluation, student: Checkpoint, table: pa.Table
) -> ContextUse:
    """What a policy reads at once while it answers a table of problems."""
    return ContextUse(
        role="student",
        prompt_tokens=max(table_lengths(table)),
        window_tokens=part.max_new_tokens,
        limit=context_of(config, "student", student),
    )


def check_problems(
    field: str,
    config: Config,
    part: Evaluation,
    student: Checkpoint,
    table: pa.Table,
    vocabulary: Vocabulary,
) -> None:
    """Refuse problems that a policy could not read, or not answer at full length."""
    with named(field):
        check_prompt_ids(table, vocabulary)
        use = evaluation_context(config, part, student, table)
        if not use.fits:
            raise UserError(f"{use}; lower max_new_tokens or max_prompt_tokens")


def largest_window(config: Config) -> int:
    """New tokens that a rollout of any round may have, if no drift ends a round early.

    Each of several teachers may score every row: which prompts their routes share is not known.
    """
    window = config.rollouts.window
    if isinstance(window, AdaptiveWindow | EntropyGatedWindow):
        return window.max_window_tokens
    planned = config.steps_of(len(config.teachers))
    return window.tokens_of_round((config.rounds - 1) * planned, planned)


def context_of(config: Config, role: str, model: Checkpoint) -> int | None:
    """Tokens that the student or the teacher reads at once; None: the checkpoint names no limit."""
    found = model.config.context
    settings = config.student if role == "student" else config.teacher
    if settings is not None and settings.engine == "vllm" and settings.vllm.max_context:
        return min(settings.vllm.max_context, found or settings.vllm.max_context)
    return found
