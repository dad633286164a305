"""Whether prompts can be read, are enough, have the answers a judge needs, and fit."""

from collections.abc import Iterator

import pyarrow as pa

from opd_stream.config import Config, Evaluation
from opd_stream.errors import UserError
from opd_stream.prompts import prompts_table, shuffled_rows, source_settings
from opd_stream.tasks.judges import Judge, open_judge
from pipeline.contexts import context_of, largest_window
from pipeline.doctor.findings import Check, Finding
from pipeline.doctor.models import Models
from stages.checkpoints import Checkpoint

PROMPTS = Check(
    name="prompts",
    why="every stage starts from them; a source that cannot be read stops the run",
)
ANSWERS = Check(
    name="answers",
    why="a judge compares with the reference answer, after the rollouts were sampled and paid for",
)
CONTEXT = Check(
    name="context",
    why="a prompt and a full window that do not fit stop the worker that meets them, in any round",
)
Tables = dict[str, pa.Table]  # field of the config that holds the source -> table
SHOWN = 3  # prompts named in a finding


def read(config: Config, student: Checkpoint) -> tuple[Tables, list[Finding]]:
    """The prompts as the run will have them; a source that is refused is left out."""
    sources = {"prompts": config.prompts}
    for name, part in held_out(config).items():
        assert part.prompts is not None  # validated
        sources[name] = part.prompts
    tables, findings = Tables(), list[Finding]()
    for name, source in sources.items():
        try:
            source_settings(source)  # its files are there
            table = tables[name] = prompts_table(source, student.tokenizer())
        except UserError as error:
            findings.append(PROMPTS.refused(error))
            continue
        lengths = _lengths(table)
        findings.append(
            PROMPTS.ok(
                f"{name}: {table.num_rows:,} prompts of {min(lengths)} to {max(lengths)} tokens"
            )
        )
    return tables, findings


def enough(config: Config, tables: Tables) -> list[Finding]:
    """Prompts for a round, and none of them held out for evaluation."""
    findings: list[Finding] = []
    if "prompts" in tables and config.replay is None:
        rows = tables["prompts"].num_rows
        try:
            shuffled_rows(
                rows=rows,
                seed=config.seed,
                round_index=0,
                per_round=config.rollouts.prompts_per_round,
            )
        except UserError as error:
            findings.append(PROMPTS.refused(error))
    for name in held_out(config):
        if not {name, "prompts"} <= tables.keys():
            continue
        train, asked = (set(tables[source]["text"].to_pylist()) for source in ("prompts", name))
        if train & asked:
            findings.append(
                PROMPTS.warning(
                    f"{name}: {len(train & asked)} of {len(asked)} are training prompts too",
                    "take other prompts for evaluation: pass@k should be of new ones",
                )
            )
    return findings


def answers(config: Config, tables: Tables) -> list[Finding]:
    """Reference answers where something judges, and whether the judge accepts them."""
    judged = {name: part for name, part in _judged(config).items() if name in tables}
    if not judged:
        return [ANSWERS.ok("nothing is judged")]
    findings: list[Finding] = []
    for name, part in judged.items():
        assert part.judge is not None  # validated
        try:
            is_right = open_judge(part.judge)
        except UserError as error:
            findings.append(ANSWERS.refused(error))
            continue
        table = tables[name]
        missing = table.filter(table["answer"].is_null())["prompt_id"].to_pylist()
        if missing:
            findings.append(
                ANSWERS.error(
                    f"{name}: {len(missing)} of {table.num_rows} prompts have no reference answer "
                    f"({', '.join(missing[:SHOWN])})",
                    f"set {name}.answer_field, or leave out what judges them",
                )
            )
            continue
        pairs = zip(table["prompt_id"].to_pylist(), table["answer"].to_pylist(), strict=True)
        # A right solution ends with its answer, in either task's form.
        lost = [place for place, answer in pairs if not _accepts(is_right, answer)]
        if lost:
            findings.append(
                ANSWERS.error(
                    f"{name}: {len(lost)} of {table.num_rows} reference answers are wrong answers "
                    f"to judge {part.judge.kind} ({', '.join(lost[:SHOWN])})",
                    f"mend those answers, {name}.answer_field, or the judge's kind",
                )
            )
        else:
            findings.append(
                ANSWERS.ok(
                    f"{name}: {table.num_rows:,} answers, each accepted by judge {part.judge.kind}"
                )
            )
    return findings


def context(config: Config, tables: Tables, models: Models) -> list[Finding]:
    """The longest prompt with the largest window against what each model reads."""
    findings: list[Finding] = []
    for what, longest, window, roles in _spans(config, tables):
        for role in roles:
            if role not in models:
                continue
            reads = context_of(config, role, models[role])
            need = f"{what}: {longest} tokens of prompt and {window} of window"
            if reads is None:
                findings.append(CONTEXT.ok(f"{need}; the {role} names no limit"))
            elif longest + window > reads:
                findings.append(
                    CONTEXT.error(
                        f"{need}, together {longest + window}; the {role} reads {reads}",
                        "lower the window or max_prompt_tokens (long_prompts=skip leaves longer "
                        "prompts out)",
                    )
                )
            else:
                findings.append(CONTEXT.ok(f"{need}; the {role} reads {reads}"))
    return findings


def _spans(config: Config, tables: Tables) -> Iterator[tuple[str, int, int, tuple[str, ...]]]:
    """What is read at once: name, longest prompt, window, and the roles that read it."""
    if "prompts" in tables and config.replay is None:
        longest = max(_lengths(tables["prompts"]))
        yield "rollouts", longest, largest_window(config), ("student", "teacher")
    for name, part in held_out(config).items():
        if name in tables:
            yield name, max(_lengths(tables[name])), part.max_new_tokens, ("student",)


def held_out(config: Config) -> dict[str, Evaluation]:
    """Field of the config -> a set of problems that policies are evaluated on."""
    if config.evaluation is None:
        return {}
    if config.evaluation.benchmarks is None:
        return {"evaluation.prompts": config.evaluation}
    parts = config.evaluation.parts()
    return {f"evaluation.benchmarks.{name}.prompts": part for name, part in parts.items()}


def _judged(config: Config) -> dict[str, Evaluation]:
    """Sources whose answers somebody asks for, and how they are judged."""
    wanted, jump = held_out(config), config.train.extrapolation
    if wanted and jump is not None and jump.signal != "kl":
        wanted["prompts"] = next(iter(wanted.values()))
    return wanted


def _accepts(is_right: Judge, answer: str) -> bool:
    try:
        return is_right(f"Answer: {answer}", answer)
    except UserError:  # nothing can be read from the reference
        return False


def _lengths(table: pa.Table) -> list[int]:
    return [len(ids) for ids in table["prompt_ids"]]
