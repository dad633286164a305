"""Judges: a program that says whether a completion answers the problem."""

import importlib
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from opd_stream.errors import UserError
from opd_stream.section import IMPORT_PATH, Section, import_path, is_object, own_path, source_sha256
from opd_stream.tasks import ledger
from opd_stream.tasks.references import judge_of_lists

Judge = Callable[[str, str], bool]  # (completion text, reference answer) -> verdict

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_VERDICTS: Any = (bool, int, float, np.bool_)
_SECONDS = 5  # math-verify's limit for one expression and for one comparison


class BuiltInJudge(Section):
    """How an answer is checked."""

    kind: Literal["ledger", "final_number", "exact", "math"] = Field(
        description="ledger: the embedded tasks; final_number: the number after GSM8K's ####, else "
        "the last one, as a value; exact: the text after ####, or all of it; math: the last LaTeX "
        "or boxed expression, up to mathematical equality (library math-verify); or yours: "
        "docs/extend.md"
    )


class FunctionJudge(Section):
    """Your own function (completion, reference) -> bool, imported and run: only code you trust.

    `kind: package.module:function` says the same in one word.
    """

    kind: Literal["function"] = "function"
    path: str = Field(pattern=IMPORT_PATH, description="as my_package.my_module:my_function")


def _function(raw: Any) -> Any:
    """A kind that is an import path, or an entry point's name, is a function."""
    kind = raw.get("kind") if is_object(raw) else None
    path = own_path(kind, "opd_stream.judges") if isinstance(kind, str) else None
    return raw if path is None else {**raw, "kind": "function", "path": path}


AnyJudge = Annotated[
    BuiltInJudge | FunctionJudge, Field(discriminator="kind"), BeforeValidator(_function)
]


def open_judge(settings: BuiltInJudge | FunctionJudge) -> Judge:
    """The judge that a config asks for; of a reference that is a list, it is asked for each.

    Raises:
        UserError: its library is not installed, or the function cannot be imported.
    """
    return judge_of_lists(_judge(settings))


def _judge(settings: BuiltInJudge | FunctionJudge) -> Judge:
    """The judge of one right answer."""
    if isinstance(settings, FunctionJudge):
        return _checked(settings.path, _imported(settings.path))
    if settings.kind == "math":
        _need_math_verify()
        return is_equal_mathematics
    return {
        "ledger": ledger.is_correct,
        "final_number": is_final_number,
        "exact": is_exact,
    }[settings.kind]


def judge_recipe(settings: BuiltInJudge | FunctionJudge) -> dict[str, Any]:
    """What decides the verdicts: the settings, and which code of others does.

    Raises:
        UserError: as `open_judge`.
    """
    recipe = settings.model_dump(mode="json")
    if isinstance(settings, FunctionJudge):
        _imported(settings.path)
        return recipe | source_sha256(settings.path)
    if settings.kind == "math":
        _need_math_verify()
        return {**recipe, "math_verify": version("math-verify")}
    return recipe


def is_final_number(completion: str, answer: str) -> bool:
    """Whether the completion's final number equals the reference's.

    Both sides may be worked solutions: the number after the last `####` counts where there is one
    (the GSM8K format), else the last number of the text.
    """
    found, expected = final_number(completion), final_number(answer)
    return found is not None and found == expected


def is_exact(completion: str, answer: str) -> bool:
    """Whether both say the same text after the last `####`, or in all where there is none.

    White space around it, commas between digits, a dollar sign and a final full stop do not count,
    as in GSM8K's own marking.
    """
    found = _marked(completion)
    return found != "" and found == _marked(answer)


def is_equal_mathematics(completion: str, answer: str) -> bool:
    r"""Whether the completion's last expression equals the reference, by `math-verify`.

    Of the completion the last `\boxed{}` counts, else the last LaTeX, else the last plain number.
    The reference is bare LaTeX as in MATH-500, or a text that marks it with `####`, `\boxed{}` or
    dollar signs. What takes longer than 5 seconds to read or compare is wrong. It measures time by
    SIGALRM and so runs in a process's main thread only.

    Raises:
        UserError: nothing can be read from the reference.
    """
    library: Any = importlib.import_module("math_verify")
    parse, verify = library.parse, library.verify
    marked = answer.rpartition("####")[2].strip()
    is_wrapped = "\\boxed" in marked or "$" in marked.replace("\\$", "")
    text = marked if is_wrapped else f"\\boxed{{{marked}}}"
    expected: list[Any] = parse(text, parsing_timeout=_SECONDS) if marked else []
    if not expected:
        raise UserError(
            f"reference answer {answer[:60]!r} holds no mathematics that judge math can read; "
            "expected LaTeX or a number; mend it, or use another judge"
        )
    found = parse(completion, parsing_timeout=_SECONDS)
    return verify(expected, found, timeout_seconds=_SECONDS)


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or the last number of a text without it."""
    marked = text.rpartition("####")
    numbers: list[str] = _NUMBER.findall(marked[2])
    if not numbers:
        return None
    chosen = numbers[0] if marked[1] else numbers[-1]
    try:
        return Decimal(chosen.replace(",", ""))
    except InvalidOperation:
        return None


def _marked(text: str) -> str:
    last = text.rpartition("####")[2].strip().removesuffix(".").removeprefix("$")
    return re.sub(r"(?<=\d),(?=\d)", "", last)


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


def _checked(path: str, function: Callable[..., Any]) -> Judge:
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
