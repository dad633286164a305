"""Judges: a program that says whether a completion answers the problem."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from opd_stream.errors import UserError
from opd_stream.section import ImportPath, Section, import_path, is_object, own_path, source_sha256
from opd_stream.tasks import ledger, mathematics
from opd_stream.tasks.algebra import Algebra
from opd_stream.tasks.answers import in_plain_signs, marked, spoken
from opd_stream.tasks.code import program_of, read_task
from opd_stream.tasks.isolation import Isolation, Limits, check_isolation, passes
from opd_stream.tasks.numbers import final_number
from opd_stream.tasks.references import judge_of_lists, reader_of_lists

RULES = 3  # how answers and references are read; verdicts by other rules are no verdicts of these
CODE_RULES = 3  # the same, of programs
_RULED = ("final_number", "exact", "math")
_VERDICTS: Any = (bool, int, float, np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What says whether a completion is right.

    Example:
        >>> judge = open_judge(BuiltInJudge(kind="final_number"))
        >>> judge("It is 18.", "#### 18"), judge.can_read("see below")
        (True, False)
    """

    is_right: Callable[[str, str], bool]  # (completion, reference); False where it cannot read it
    can_read: Callable[[str], bool]  # whether any completion could be right by a reference
    at_once: int = 1  # verdicts that are worked out at the same time

    def __call__(self, completion: str, reference: str) -> bool:
        """Whether a completion is right."""
        return self.is_right(completion, reference)

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether completions are right by their references, in order."""
        if self.at_once == 1:
            return [self.is_right(*pair) for pair in pairs]
        with ThreadPoolExecutor(self.at_once) as threads:
            return list(threads.map(self.is_right, *zip(*pairs, strict=True))) if pairs else []

    def unreadable(self, references: Iterable[str | None]) -> list[int]:
        """Places of references that are missing, or that the judge cannot read."""
        return [
            place
            for place, reference in enumerate(references)
            if reference is None or not self.can_read(reference)
        ]


class BuiltInJudge(Section):
    """How an answer is checked."""

    kind: Literal["ledger", "final_number", "exact", "math"] = Field(
        description="ledger: the embedded tasks; final_number: the number of the last box or "
        "GSM8K's ####, else the last one, as a value; exact: the text after ####, or all of it; "
        "math: the last box, else the answer, up to mathematical equality (library math-verify); "
        "or yours: docs/extend.md"
    )


class CodeJudge(Section):
    """The program of a completion passes its tests, run in a child process with limits."""

    kind: Literal["code"]
    allow_code_execution: bool = Field(
        default=False, description="programs that a model wrote run only where this is true"
    )
    isolation: Isolation = Field(
        default="namespaces",
        description="namespaces: no network, other processes or files; limits: no network, and the "
        "limits below, where a container may make no namespaces (docs/judges.md)",
    )
    cpu_seconds: int = Field(
        default=10, ge=1, le=86_400, description="of each process of a program"
    )
    wall_seconds: int = Field(default=60, ge=1, le=86_400, description="of a program and its tests")
    memory_mib: int = Field(
        default=1024, ge=64, le=2**20, description="address space of each process"
    )
    files_mib: int = Field(
        default=64, ge=1, le=2**20, description="of all files; of each, with limits"
    )
    processes: int = Field(default=16, ge=1, le=4096, description="and threads, of a program")
    at_once: int = Field(
        default=4, ge=1, le=1024, description="programs that run at once; placement only"
    )


class FunctionJudge(Section):
    """Your own function (completion, reference) -> bool, imported and run: only code you trust.

    `kind: package.module:function` says the same in one word.
    """

    kind: Literal["function"] = "function"
    path: ImportPath = Field(description="as my_package.my_module:my_function")


def _function(raw: Any) -> Any:
    """A kind that is an import path, or an entry point's name, is a function."""
    kind = raw.get("kind") if is_object(raw) else None
    path = own_path(kind, "opd_stream.judges") if isinstance(kind, str) else None
    return raw if path is None else {**raw, "kind": "function", "path": path}


AnyJudge = Annotated[
    BuiltInJudge | CodeJudge | FunctionJudge,
    Field(discriminator="kind"),
    BeforeValidator(_function),
]


def open_judge(settings: BuiltInJudge | CodeJudge | FunctionJudge) -> Judge:
    """The judge that a config asks for; of a reference that is a list, it is asked for each.

    Raises:
        UserError: its library is not installed, or the function cannot be imported.
    """
    if isinstance(settings, CodeJudge):
        return _code_judge(settings)
    judge = _judge(settings)
    return Judge(is_right=judge_of_lists(judge.is_right), can_read=reader_of_lists(judge.can_read))


def embedded_judge(task: ledger.Task) -> Judge:
    """The judge of an embedded task."""
    if task == "programs":
        return open_judge(CodeJudge(kind="code", allow_code_execution=True))
    return open_judge(BuiltInJudge(kind="ledger"))


def _code_judge(settings: CodeJudge) -> Judge:
    if not settings.allow_code_execution:
        raise UserError(
            "judge code runs programs that a model wrote, and allow_code_execution of the judge is "
            "false; set it to true to allow that (docs/judges.md says what they can reach)"
        )
    limits = Limits(**settings.model_dump(include={each.name for each in fields(Limits)}))
    check_isolation(limits)

    def is_right(completion: str, reference: str) -> bool:
        task = read_task(reference)
        return task is not None and passes(program_of(completion, task), limits)

    return Judge(
        is_right=is_right,
        can_read=lambda reference: read_task(reference) is not None,
        at_once=settings.at_once,
    )


def _judge(settings: BuiltInJudge | FunctionJudge) -> Judge:
    """The judge of one right answer."""
    if isinstance(settings, FunctionJudge):
        function = _checked(settings.path, _imported(settings.path))
        return Judge(is_right=function, can_read=lambda _: True)
    if settings.kind == "math":
        _need_math_verify()
        return Judge(is_right=is_equal_mathematics, can_read=_is_mathematics)
    return {
        "ledger": Judge(is_right=ledger.is_correct, can_read=_is_ledger_answer),
        "final_number": Judge(
            is_right=is_final_number, can_read=lambda text: final_number(text) is not None
        ),
        "exact": Judge(is_right=is_exact, can_read=lambda text: _marked(text) != ""),
    }[settings.kind]


def judge_recipe(settings: BuiltInJudge | CodeJudge | FunctionJudge) -> dict[str, Any]:
    """What decides the verdicts: the settings, and which code of others does.

    Raises:
        UserError: as `open_judge`.
    """
    if isinstance(settings, CodeJudge):
        limits = settings.model_dump(mode="json", exclude={"allow_code_execution", "at_once"})
        return {**limits, "rules": CODE_RULES, "python": ".".join(map(str, sys.version_info[:2]))}
    recipe = settings.model_dump(mode="json")
    if isinstance(settings, FunctionJudge):
        _imported(settings.path)
        return recipe | source_sha256(settings.path)
    if settings.kind in _RULED:
        recipe |= {"rules": RULES}
    if settings.kind == "math":
        _need_math_verify()
        recipe |= {"math_verify": version("math-verify")}
    return recipe


def is_final_number(completion: str, reference: str) -> bool:
    """Whether the completion's final number has the value of the reference's.

    Both sides may be worked solutions: the number of the last `####` (the GSM8K format) or box
    counts, else the last number of the text; of a completion, of what follows its thoughts.
    """
    found = final_number(spoken(completion))
    return found is not None and found == final_number(reference)


def is_exact(completion: str, reference: str) -> bool:
    """Whether both say the same text after the last `####`, or in all where there is none.

    White space around it, commas between thousands, a dollar sign and a final full stop do not
    count, as in GSM8K's own marking; nor does the script of digits and minus signs.
    """
    found = _marked(spoken(completion))
    return found != "" and found == _marked(reference)


def is_equal_mathematics(completion: str, reference: str) -> bool:
    """Whether the completion's answer equals the reference (`mathematics.is_equal_mathematics`).

    Raises:
        UserError: math-verify cannot be started.
    """
    return mathematics.is_equal_mathematics(completion, reference, _algebra().is_equal)


def _is_mathematics(reference: str) -> bool:
    return mathematics.can_read(reference, _algebra().can_read)


@cache
def _algebra() -> Algebra:
    return Algebra()


def _is_ledger_answer(reference: str) -> bool:
    return ledger.is_correct(f"Answer: {reference}", reference)


def _marked(text: str) -> str:
    said = marked(text)
    last = in_plain_signs(text if said is None and "####" not in text else said or "")
    return re.sub(r"(?<=\d),(?=\d{3})", "", last.strip().removesuffix(".").removeprefix("$"))


def _need_math_verify() -> None:
    if find_spec("math_verify") is None:
        raise UserError(
            "judge math needs the library math-verify, which is not installed; "
            "pip install math-verify, or use judge final_number"
        )


def _imported(path: str) -> Callable[..., Any]:
    """The function at `package.module:name`; importing runs the module."""
    expected = "a function of completion and reference"
    return import_path(path, "judge function", callable, expected)


def _checked(path: str, function: Callable[..., Any]) -> Callable[[str, str], bool]:
    def verdict(completion: str, answer: str) -> bool:
        try:
            found = function(completion, answer)
        except Exception as error:  # whatever the user's function raises
            raise UserError(
                f"judge function {path} raised {type(error).__name__}: {_one_line(error)} on "
                f"completion {completion[:60]!r} and reference {answer[:60]!r}; mend the function"
            ) from error
        if not isinstance(found, _VERDICTS) or found not in (0, 1):
            raise UserError(
                f"judge function {path} returned {found!r:.60}; expected True or False; mend it"
            )
        return bool(found == 1)

    return verdict


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
