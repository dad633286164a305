"""From a completion and a reference to a program and its tests.

A reference is the text of the tests; a list of them; or a JSON object with the fields of a
HumanEval row (`prompt`, `entry_point`, `test`) or of an MBPP row (`test_list`, `test_setup_code`,
`test_imports`).
"""

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opd_stream.section import is_list, is_object
from opd_stream.tasks.answers import spoken
from opd_stream.tasks.isolation import Program

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_LANGUAGES = {"", "python", "python3", "py"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a program has to do.

    Example:
        >>> read_task("assert double(2) == 4").names
        frozenset({'double'})
    """

    tests: str
    names: frozenset[str]  # of functions that the tests call
    before: str = ""  # code in front of the program
    prompt: str | None = None  # code that a completion may continue
    check: str | None = None  # a function of the tests, called with the candidate
    candidate: str | None = None


def read_task(reference: str) -> Task | None:
    """The task of a reference; None: Python can read no assertion in it."""
    fields = _fields(reference)
    lists = [fields.get(name) for name in ("any", "all", "test_list")]
    if any(lists):
        fields["test"] = "\n".join(_lines(next(filter(None, lists))))
    tests, entry = fields.get("test"), fields.get("entry_point")
    tree = None if not isinstance(tests, str) else _parsed(tests)
    if tree is None or not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        return None
    if entry is None:
        before = [*_lines(fields.get("test_imports")), *_lines(fields.get("test_setup_code"))]
        return Task(tests=str(tests), names=_called(tree), before="\n".join(before))
    defines_check = any(
        isinstance(each, ast.FunctionDef) and each.name == "check" for each in tree.body
    )
    if not defines_check or not isinstance(entry, str) or not entry.isidentifier():
        return None
    prompt = fields.get("prompt")
    return Task(
        tests=str(tests),
        names=frozenset({entry}),
        prompt=prompt if isinstance(prompt, str) else None,
        check="check",
        candidate=entry,
    )


def program_of(completion: str, task: Task) -> Program:
    """The program that a completion answers a task with.

    It is the last block of Python that defines a function the tests call, else what stands before
    the first fence if that is the program, else the last block, else the whole text. Where a prompt
    is to be continued and its function is not defined, the prompt stands in front, and the text
    counts up to its first line that is not indented.
    """
    text = spoken(completion)
    blocks = [block for language, block in _BLOCK.findall(text) if language.lower() in _LANGUAGES]
    fitting = [block for block in blocks if task.names & _defined(block)]
    code = [text, *blocks, *_before_fence(text, task), *fitting][-1]
    if task.prompt is not None:
        code = _with_prompt(code, task.prompt, task.names)
    return Program(
        code=f"{task.before}\n{code}",
        tests=task.tests,
        check=task.check,
        candidate=task.candidate,
    )


def _before_fence(text: str, task: Task) -> list[str]:
    """Code in front of a fence that only closes, as where the model goes on from the prompt."""
    head, *rest = re.split(r"^[ \t]*```", text, maxsplit=1, flags=re.MULTILINE)
    code = head.strip("\n")
    is_body = task.prompt is not None and code[:1].isspace()
    whole = (
        _parsed(_with_prompt(code, task.prompt, task.names)) if is_body and task.prompt else None
    )
    is_program = bool(task.names & _defined(code)) or whole is not None
    return [code] if rest and is_program else []


def _with_prompt(code: str, prompt: str, names: frozenset[str]) -> str:
    if names & _defined(code):
        alone = f"{prompt}\n    pass\n\n{code}"  # its imports and helpers; the function is replaced
        return alone if _parsed(alone) is not None else code
    body = re.split(r"\n(?=[^\s)\]}])", code.strip("\n"), maxsplit=1)[0]
    return f"{prompt.rstrip()}\n{body if body[:1].isspace() else f'    {body}'}"


def _fields(reference: str) -> dict[str, Any]:
    try:
        value: object = json.loads(reference)
    except (ValueError, RecursionError):
        value = None
    if is_object(value):
        return dict(value)
    return {"test_list": value} if is_list(value) else {"test": reference}


def _lines(value: object) -> Iterable[str]:
    return map(str, value) if is_list(value) else [value] if isinstance(value, str) else []


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _called(tree: ast.Module) -> frozenset[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return frozenset(each.id for each in calls if isinstance(each, ast.Name))


def _defined(code: str) -> set[str]:
    """Names of functions and classes at the top of a program; none where it cannot be read."""
    tree = _parsed(code)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return set() if tree is None else {each.name for each in tree.body if isinstance(each, kinds)}
