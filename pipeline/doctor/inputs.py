"""Checks of what a run reads: checkpoints, tokenizers, templates and prompts; loads no weights."""

import json
from collections.abc import Iterator

import pyarrow as pa

from opd_stream.config import Evaluation
from opd_stream.errors import UserError
from opd_stream.prompts import lost_rows
from opd_stream.rendering import ChatTemplate, Prompt, Renderer
from opd_stream.store.tokenizer_folder import misread_line
from opd_stream.store.tokenizer_identity import TokenizerComparison
from opd_stream.tasks.judges import Judge, open_judge
from opd_stream.tasks.references import right_answer
from pipeline.doctor.findings import Finding, check
from pipeline.doctor.subject import Subject
from pipeline.rounds import named_checkpoint, rounds
from pipeline.setup import (
    ContextUse,
    check_environment,
    check_rounds,
    evaluation_context,
    stop_token_ids,
    training_contexts,
)
from stages.checkpoints import Checkpoint, check_pair, compare_pair, tokenizer_size
from stages.evaluate import SHOWN, judged_rows, unjudged_line
from stages.prompts import table_lengths


@check("a cut off or missing file of a checkpoint ends a worker when it loads it")
def weights(subject: Subject) -> Iterator[Finding]:
    """Folders that are no checkpoint, and files of weights that are missing or cut off."""
    from opd_stream.engines.loading import check_files

    for role in subject.roles:
        try:
            folder = subject.model(role).folder
            if subject.model(role).is_served:
                yield weights.ok(f"{role}: a server has them; config and tokenizer in {folder}")
                continue
            count = subject.parameters(role)
            if role == "student" or subject.engines[role].engine == "transformers":
                check_files(folder)  # as the run does, which trains the student with transformers
            yield weights.ok(f"{role}: {count:,} parameters in {folder}")
        except UserError as error:
            yield weights.refused(error)


@check(
    "the teacher scores the ids that the student drew; if ids mean other text to it, every score "
    "is noise"
)
def tokenizers(subject: Subject) -> Iterator[Finding]:
    """Ids that would not mean the same to both models, or to other programs."""
    for model in subject.models.values():
        for line in misread_line(model.folder):
            yield tokenizers.warning(line, "write it into the model card of what you publish")
    if "teacher" not in subject.roles:
        return
    student, teacher = subject.model("student"), subject.model("teacher")
    if not student.terminators():
        return  # the check of terminators says it
    aligns = subject.config.scores.alignment is not None
    check_pair(student, teacher, aligns=aligns)
    compared = compare_pair(student, teacher)
    if compared.difference is not None:
        yield tokenizers.ok("two tokenizers, whose texts scores.alignment brings together")
        return
    size = tokenizer_size(student.folder)
    yield tokenizers.ok(f"ids mean the same to both, {size} ids{_more_ids(compared)}")
    for remark in compared.remarks:
        yield tokenizers.warning(
            f"ids mean the same to both, but {remark}",
            "make sure that the teacher was trained on texts as the student's tokenizer writes "
            "them: prompts are tokenised once",
        )
    logits = {"student": student.config.vocabulary, "teacher": teacher.config.vocabulary}
    for role, most in logits.items():
        if size > most:
            yield tokenizers.warning(
                f"the tokenizer has {size} ids, the {role} has logits for {most}",
                f"no id from {most} on is drawn, and a prompt that holds one is refused; resize "
                f"the {role}'s embeddings if it should know them",
            )


def _more_ids(compared: TokenizerComparison) -> str:
    """What a tokenizer has that the other one lacks."""
    more = {"student": compared.student_only, "teacher": compared.teacher_only}
    return "".join(
        f"; {len(ids):,} more in the {role}'s tokenizer, from {ids[0]} on"
        for role, ids in more.items()
        if ids
    )


@check(
    "generation stops on these ids and nothing else; an end that is not among them makes every "
    "rollout run on to its window, and an end that only one side uses is unlearnt"
)
def terminators(subject: Subject) -> Iterator[Finding]:
    """Ids that end a text: do a model's own files, and the two models, agree."""
    student, models, alike = subject.model("student"), subject.models, _alike(subject)
    ends = {role: set(model.terminators()) for role, model in models.items()}
    stop_ids = _stop_ids(subject)
    found = [
        finding
        for role, model in models.items()
        for finding in _own_ends(role, model, stop_ids if role in alike else ends[role])
    ]
    if "teacher" in alike and ends["student"] != ends["teacher"]:
        is_merged = subject.config.train.guards.merge_terminators
        said = (
            f"the student ends with {_named(student, ends['student'])}, the teacher with "
            f"{_named(models['teacher'], ends['teacher'])}"
        )
        if is_merged or ends["student"] & ends["teacher"]:
            one = terminators.warning(
                f"{said}; train.guards.merge_terminators is {str(is_merged).lower()}",
                "leave merge_terminators on, and compare generation_config.json of both",
            )
        else:
            one = terminators.error(
                f"{said}, none is shared, and train.guards.merge_terminators is false",
                "set train.guards.merge_terminators=true, or give both the same eos_token_id",
            )
        found.append(one)
    known = min(model.known_ids for model in alike.values())
    drawn = {token for token in stop_ids if token < known}
    if drawn < stop_ids:
        found.append(
            terminators.warning(
                f"a model lacks {_named(student, stop_ids - drawn)}, so that no text ends with it",
                "give both a tokenizer with that token, if texts should",
            )
        )
    if drawn and not any(finding.level == "error" for finding in found):
        yield terminators.ok(f"the run stops on {_named(student, drawn)}")
    yield from found


def _alike(subject: Subject) -> dict[str, Checkpoint]:
    """Role -> model, of those that read the ids which the student draws."""
    models = subject.models
    student, teacher = models["student"], models.get("teacher")
    if teacher is None or compare_pair(student, teacher).difference is not None:
        return {"student": student}
    return models


def _stop_ids(subject: Subject) -> set[int]:
    """Ids that the run stops on, where the models know them."""
    asked = stop_token_ids(subject.config, subject.model("student"))
    return set(asked).union(*(model.terminators() for model in _alike(subject).values()))


def _own_ends(role: str, model: Checkpoint, stop_ids: set[int]) -> Iterator[Finding]:
    """Whether files of one checkpoint name the same ends, and ids that exist."""
    declared = model.config.terminators
    if not declared:
        yield terminators.error(
            f"{role} {model.folder} names no eos_token_id", "add it to generation_config.json"
        )
        return
    if len(set(declared.values())) > 1:
        said = ", ".join(f"{_named(model, ids)} in {name}" for name, ids in declared.items())
        yield terminators.warning(
            f"the {role}'s files disagree: {said}; the run stops on all of them",
            "make eos_token_id of the files agree, unless every one of them ends a text",
        )
    eos = model.tokenizer().eos_token_id
    if eos is not None and eos not in stop_ids:
        yield terminators.error(
            f"the {role}'s tokenizer ends texts with {_named(model, {eos})}, on which the run does "
            f"not stop (it stops on {_named(model, stop_ids)})",
            "add that id to eos_token_id in generation_config.json",
        )


@check("prompts are written once, with the student's template, and the teacher reads the same ids")
def templates(subject: Subject) -> Iterator[Finding]:
    """Chat templates where prompts use them."""
    models, teacher = subject.models, subject.config.teacher
    has_own = teacher is not None and teacher.template is not None
    sources = {name: source.template for name, source in subject.sources.items()}
    chats = {name: each for name, each in sources.items() if isinstance(each, ChatTemplate)}
    if not chats:
        has_one = [role for role, model in models.items() if model.tokenizer().chat_template]
        unused = f"; chat template of {' and '.join(has_one)} not used" if has_one else ""
        yield templates.ok(f"prompts are raw text{unused}")
    for name, chat in chats.items():
        if chat in [*chats.values()][: [*chats].index(name)]:
            continue  # as another source
        yield from templates.or_ok(
            _template_problems(subject, models, chat, has_own=has_own),
            f"{name}: a chat template writes {'the' if has_own else 'the same'} turns for "
            f"{'the student, teacher.template for the teacher' if has_own else 'all models'}",
        )


def _template_problems(
    subject: Subject, models: dict[str, Checkpoint], chat: ChatTemplate, *, has_own: bool
) -> Iterator[Finding]:
    """An answer that ends with nothing generation stops on; a teacher that writes other turns.

    A teacher that `has_own` template is meant to.
    """
    student, stop_ids = subject.model("student"), _stop_ids(subject)
    example = Prompt(prompt_id="example", text="How much is 2 + 3?", answer=None)
    try:
        renderer = Renderer(chat, student.tokenizer())
        left, text = renderer.text(example), renderer.answered(example, "ANSWER")
    except UserError as error:
        yield templates.refused(error)
        return
    after = text.rpartition("ANSWER")[2]
    if not stop_ids & set(student.tokenizer().encode(after, add_special_tokens=False)):
        yield templates.warning(
            f"the template ends an answer with {after!r}, which holds none of the ids the run "
            f"stops on ({_named(student, stop_ids)})",
            "add the id that ends a turn to eos_token_id in generation_config.json",
        )
    if "teacher" not in models or has_own:
        return
    try:
        right = Renderer(chat, models["teacher"].tokenizer()).text(example)
    except UserError as error:
        yield templates.warning(
            f"the teacher's own tokenizer does not write these turns: {error}",
            "make sure that the teacher was trained on this format; a base model was not",
        )
        return
    if left != right:
        pairs = enumerate(zip(left, right, strict=False))
        at = next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))
        yield templates.warning(
            "student and teacher write the same turns differently: "
            f"{left[at : at + 40]!r} against {right[at : at + 40]!r}",
            "use one chat template for both, unless the teacher reads the student's well",
        )


@check("every stage starts from them; a source that cannot be read stops the run")
def prompts(subject: Subject) -> Iterator[Finding]:
    """Sources that cannot be read, too few prompts, and problems that are trained on."""
    config = subject.config
    for name in subject.sources:
        try:
            lengths = table_lengths(subject.table(name))
            said = f"{len(lengths):,} prompts of {min(lengths)} to {max(lengths)} tokens"
            yield prompts.ok(f"{name}: {said}")
            for line in lost_rows(name, len(lengths), subject.prompts(name).lost):
                yield prompts.warning(line)
            if name == "prompts":
                check_rounds(config, len(lengths))
        except UserError as error:
            yield prompts.refused(error)
    try:
        if "prompts" in subject.tables and (rendered := subject.teacher_table()) is not None:
            lengths = table_lengths(rendered)
            has_view = config.teacher is not None and config.teacher.view is not None
            field = "teacher.view" if has_view else "teacher.template"
            yield prompts.ok(f"{field}: {min(lengths)} to {max(lengths)} tokens")
    except UserError as error:
        yield prompts.refused(error)
    tables = subject.tables
    for name in subject.problems:
        if not {name, "prompts"} <= tables.keys():
            continue
        train, asked = (set(tables[source]["text"].to_pylist()) for source in ("prompts", name))
        if train & asked:
            yield prompts.warning(
                f"{name}: {len(train & asked)} of {len(asked)} are training prompts too",
                "take other prompts for evaluation: its figures should be of new ones",
            )


@check("a judge compares with the reference answer, after the rollouts were sampled and paid for")
def answers(subject: Subject) -> Iterator[Finding]:
    """Reference answers where something judges, and whether the judge accepts them."""
    judged = {name: part for name, part in subject.problems.items() if part.kind == "judged"}
    extrapolation = subject.config.train.extrapolation
    if judged and extrapolation is not None and extrapolation.signal != "kl":
        judged["prompts"] = next(iter(judged.values()))  # its reward judges training prompts
    if not judged:
        yield answers.ok("nothing is judged")
    for name, part in judged.items():
        if name in subject.tables:
            try:
                yield from _judged_answers(name, part, subject.table(name))
            except UserError as error:
                yield answers.refused(error)


@check("an environment that fails does so after the student was asked, turn by turn")
def environment(subject: Subject) -> Iterator[Finding]:
    """What answers the student's turns, tried on the first prompt of each source."""
    asked, student = subject.config.rollouts.environment, subject.model("student")
    if asked is None:
        yield environment.ok("nothing answers the student's turns")
        return
    vocabulary = subject.setup.vocabulary
    for name, source in subject.sources.items():
        if name in subject.tables:
            try:
                check_environment(subject.config, student, vocabulary, source, subject.table(name))
                yield environment.ok(f"{name}: environment {asked.kind} answers an empty turn")
            except UserError as error:
                yield environment.refused(error)


def _judged_answers(name: str, part: Evaluation, table: pa.Table) -> Iterator[Finding]:
    assert part.judge is not None  # validated
    judge, kind = open_judge(part.judge), part.judge.kind
    line = unjudged_line(name, table, judge, kind)
    if line is not None:
        yield answers.warning(line, f"mend these answers, or set {name}.answer_field")
    rows, _ = judged_rows(table, judge)
    if kind == "code":
        yield answers.ok(f"{name}: {rows.num_rows:,} tests, each read by judge code")
        return
    pairs = zip(rows["prompt_id"].to_pylist(), rows["answer"].to_pylist(), strict=True)
    lost = [place for place, answer in pairs if not _accepts(judge, answer)]
    if lost:
        yield answers.error(
            f"{name}: {len(lost)} of {rows.num_rows} reference answers are wrong answers to judge "
            f"{kind} ({', '.join(lost[:SHOWN])})",
            f"correct those answers, {name}.answer_field, or the judge's kind",
        )
    else:
        yield answers.ok(f"{name}: {rows.num_rows:,} answers, each accepted by judge {kind}")


def _accepts(judge: Judge, answer: str) -> bool:
    """A right solution ends with its answer, or is it."""
    right = right_answer(answer)
    return judge(f"Answer: {right}", answer) or judge(right, answer)


@check("a prompt and a full window that do not fit stop the worker that meets them, in any round")
def context(subject: Subject) -> Iterator[Finding]:
    """The longest prompt with the largest window against what each model reads."""
    config, tables, student = subject.config, subject.tables, subject.model("student")
    uses: list[tuple[str, ContextUse]] = []
    if "prompts" in tables:
        longest, teacher = max(table_lengths(tables["prompts"])), subject.models.get("teacher")
        rendered = subject.teacher_table()
        teachers = None if rendered is None else max(table_lengths(rendered))
        found = training_contexts(config, student, teacher, longest, teachers)
        uses += [("rollouts", use) for use in found]
    for name in (name for name in subject.problems if name in tables):
        uses.append(
            (name, evaluation_context(config, subject.problems[name], student, tables[name]))
        )
    todo = "lower the window or max_prompt_tokens (long_prompts=skip leaves longer prompts out)"
    for name, use in uses:
        said = f"{name}: {use}"
        yield context.ok(said) if use.fits else context.error(said, todo)


@check("a run refuses what cannot work before it begins, and says the rest as a warning")
def setup(subject: Subject) -> Iterator[Finding]:
    """Whatever else the run itself would refuse or warn of."""
    opened = subject.setup
    done = sum(each.policy.is_complete() for each in rounds(opened, opened=named_checkpoint))
    for line in opened.warnings:
        yield setup.warning(line)
    yield setup.ok(f"{done} of {subject.config.rounds} rounds are trained in the store")


def _named(model: Checkpoint, ids: set[int] | frozenset[int]) -> str:
    """Ids with the tokens they stand for."""
    tokens = model.tokenizer().convert_ids_to_tokens(sorted(ids))
    pairs = zip(sorted(ids), map(json.dumps, tokens), strict=True)
    return ", ".join(f"{number} ({token})" for number, token in pairs) or "nothing"
