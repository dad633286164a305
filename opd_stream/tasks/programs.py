"""The embedded code task: small Python functions, judged by their tests.

A question names a value for each letter; a solution is a function with a line for each of them:

    Write f(n). Let a be 7 less than n. Let b be a but at least 5. Let c be b plus 2. Return c.

    def f(n):
        a = n - 7
        b = max(a, 5)
        c = b + 2
        return c

Every line follows from one sentence of the question, so that a model of 400 thousand parameters can
learn it. Some sentences invite a habit (`7 - n`, `min`, a range without its end), which is what the
student of the embedded pair has and distillation corrects.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "abcdef"
MIN_LINES, MAX_LINES = 3, 5
INPUTS = (3, 8, 14, 25, 61)  # of the tests


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One sentence, the expression that it asks for, and what a careless hand writes.

    `{v}` is the value before, `{k}` a number.
    """

    sentence: str
    right: str
    value: Callable[[int, int], int]
    careless: str | None = None  # None: nobody goes wrong here
    numbers: tuple[int, int] = (2, 9)


OPERATIONS = (
    Operation(sentence="{v} plus {k}", right="{v} + {k}", value=lambda v, k: v + k),
    Operation(
        sentence="{v} times {k}", right="{v} * {k}", value=lambda v, k: v * k, numbers=(2, 4)
    ),
    Operation(
        sentence="{k} less than {v}",
        right="{v} - {k}",
        value=lambda v, k: v - k,
        careless="{k} - {v}",
    ),
    Operation(
        sentence="the sum of the numbers from {k} to {v}",
        right="sum(range({k}, {v} + 1))",
        value=lambda v, k: sum(range(k, v + 1)),
        careless="sum(range({k}, {v}))",
    ),
    Operation(
        sentence="the rest of {v} divided by {k}",
        right="{v} % {k}",
        value=lambda v, k: v % k,
        careless="{v} // {k}",
        numbers=(6, 9),
    ),
    Operation(
        sentence="{v} but at most {k}",
        right="min({v}, {k})",
        value=min,
        careless="max({v}, {k})",
        numbers=(10, 40),
    ),
    Operation(
        sentence="{v} but at least {k}",
        right="max({v}, {k})",
        value=max,
        careless="min({v}, {k})",
        numbers=(5, 30),
    ),
)
MOST = 10**4  # a value that grows above it is drawn again


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A value: an operation with its number on the value before."""

    operation: Operation
    number: int


# Writes the expression of an operation with `{v}` and `{k}` in it.
Hand = Callable[[Operation], str]


def write_right(operation: Operation) -> str:
    """The careful hand."""
    return operation.right


def draw_lines(rng: random.Random) -> tuple[Line, ...]:
    """A random function whose values stay small, and differ for three inputs of the tests."""
    while True:
        count = rng.randint(MIN_LINES, MAX_LINES)
        lines = tuple(
            Line(operation=each, number=rng.randint(*each.numbers))
            for each in (rng.choice(OPERATIONS) for _ in range(count))
        )
        found = [value_of(lines, start) for start in INPUTS]
        if len(set(found)) >= 3 and max(map(abs, found)) <= MOST:
            return lines


def value_of(lines: tuple[Line, ...], start: int) -> int:
    """What the function returns."""
    for line in lines:
        start = line.operation.value(start, line.number)
        if abs(start) > MOST:
            return start
    return start


def write_question(lines: tuple[Line, ...]) -> str:
    """The sentences, in one line."""
    names = ("n", *LETTERS)
    sentences = [
        f"Let {names[at + 1]} be {line.operation.sentence.format(v=names[at], k=line.number)}."
        for at, line in enumerate(lines)
    ]
    return " ".join(["Write f(n).", *sentences, f"Return {names[len(lines)]}."])


def write_program(lines: tuple[Line, ...], hand: Hand = write_right) -> str:
    """The function; a careless hand makes a wrong one."""
    names = ("n", *LETTERS)
    body = [
        f"    {names[at + 1]} = {hand(line.operation).format(v=names[at], k=line.number)}"
        for at, line in enumerate(lines)
    ]
    return "\n".join(["def f(n):", *body, f"    return {names[len(lines)]}"])


def write_tests(lines: tuple[Line, ...]) -> str:
    """Assertions, as judge `code` reads them."""
    return "\n".join(f"assert f({start}) == {value_of(lines, start)}" for start in INPUTS)
