"""The embedded tasks: keep a ledger for some days, digit by digit; a program marks the answer.

A model of 400 thousand parameters can learn `ledger` on a CPU, because every token of a solution
follows from tokens already written. Two decisions make that true. Each line repeats the verb of its
day ("Monday receives:"), so that the choice between + and - needs no look-up in the question at the
moment of writing. And carries and borrows are written down, so that forgetting them is a *habit*
that distillation can correct, not a circuit that the student would have to grow.

`routine` repeats one week 3 to 5 times: prompts stay short while solutions have 400 to 800 tokens,
so a full rollout costs what it costs on real reasoning tasks, most of everything. Its lines are
those of `ledger`, each week under a heading of its own.

The text given to a model is exactly `question + "\\n"`, preceded by the id of the bos token; the
completion is `solution` followed by the id of the eos token. The two are tokenised apart.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from opd_stream.tasks import programs

# Two strings, because a list of forty words would take forty lines. Each word becomes one token.
NAMES = (  # noqa: SIM905
    "Ken Ana Tom Mia Leo Zoe Max Eva Sam Ida Ben Amy Jon Liv Dan Kim Rob Sue Tim Joy "
    "Pat Meg Ray Fay Lou Bea Guy Peg Art Dot Gus Liz Hal May Ned Nan Roy Sal Vic Una"
).split()
THINGS = (  # noqa: SIM905
    "cards coins books shells stamps pens cups keys rings balls apples pears plums nuts eggs "
    "boxes bags hats socks shoes stones beads bells dolls kites marbles buttons candles cookies "
    "tickets bottles pencils ribbons badges flowers leaves feathers magnets puzzles stickers"
).split()
GAIN_VERBS = ["receives", "gains", "finds", "earns", "collects", "wins", "buys", "gets"]
LOSS_VERBS = ["loses", "spends", "gives", "sells", "drops", "donates", "uses"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
MIN_ENTRIES = 4
MAX_ENTRIES_OF_WEEK = 5
WEEKS = (3, 4, 5)  # of a routine
MAX_NET = 6  # how far a whole week may move the total, up or down

_ANSWER = re.compile(r"Answer: (\d\d)\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerProblem:
    """One problem with its worked solution.

    Example:
        LedgerProblem(
            problem_id="ledger-0-7",  # problem 7 of seed 0
            question="Ken has 42 cards. On Monday Ken receives 38 cards. ... How many cards ...?",
            solution="Ken starts with 42.\\nMonday receives: 42+38,2+8=10,4+3+1=8,so 80.\\n...",
            answer="68",  # always two digits, 00 to 99
        )
    """

    problem_id: str
    question: str
    solution: str
    answer: str  # of a program: its tests


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What happens on one day: `verb` moves `amount` things in (`is_gain`) or out."""

    day: str
    verb: str
    is_gain: bool
    amount: int

    @property
    def change(self) -> int:
        """What the day adds to the total."""
        return self.amount if self.is_gain else -self.amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The story behind a problem, before it is written out as text."""

    name: str
    thing: str
    start: int
    entries: tuple[Entry, ...]
    weeks: int | None = None  # how often the entries are repeated; None: no routine


Task = Literal["ledger", "routine", "programs"]  # programs: opd_stream/tasks/programs.py
# Writes one calculation: (total before, entry) -> (its text, total after).
StepWriter = Callable[[int, Entry], tuple[str, int]]


def make_problems(*, count: int, seed: int, task: Task = "ledger") -> list[LedgerProblem]:
    """The first `count` problems of `seed`; problem i of a seed is the same whatever the count."""
    return [_make_problem(task, seed, index) for index in range(count)]


def _make_problem(task: str, seed: int, index: int) -> LedgerProblem:
    rng = random.Random(f"{task}/{seed}/{index}")
    if task == "programs":
        return _make_program(f"programs-{seed}-{index}", rng)
    ledger = draw_routine(rng, rng.choice(WEEKS)) if task == "routine" else draw_ledger(rng)
    solution, answer = write_solution(ledger)
    return LedgerProblem(
        problem_id=f"{task}-{seed}-{index}",
        question=write_question(ledger),
        solution=solution,
        answer=answer,
    )


def _make_program(problem_id: str, rng: random.Random) -> LedgerProblem:
    lines = programs.draw_lines(rng)
    return LedgerProblem(
        problem_id=problem_id,
        question=programs.write_question(lines),
        solution=programs.write_program(lines),
        answer=programs.write_tests(lines),
    )


def prompt_text(problem: LedgerProblem) -> str:
    """The text to tokenise, without special tokens, after the bos id."""
    return problem.question + "\n"


def is_correct(completion_text: str, answer: str) -> bool:
    """Whether the completion ends in "Answer: DD" with DD equal to `answer`.

    Strict on purpose: a completion cut off before its last line has no answer and is wrong.
    """
    found = _ANSWER.search(completion_text)
    return found is not None and found.group(1) == answer


def draw_ledger(rng: random.Random) -> Ledger:
    """A random story of 4 to 6 days whose totals never leave 0..99.

    Every number of the question has two digits, so that a model reads them all in the same place.
    """
    start = rng.randint(10, 99)
    entries, _ = _draw_days(rng, start, DAYS[: rng.randint(MIN_ENTRIES, len(DAYS))])
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return Ledger(name=name, thing=thing, start=start, entries=entries)


def draw_routine(rng: random.Random, weeks: int) -> Ledger:
    """A random week whose totals never leave 0..99, however often up to `weeks` it is repeated.

    The last day of the week brings the total back to near where it was.
    """
    while True:
        start = rng.randint(10, 99)
        days = DAYS[: rng.randint(MIN_ENTRIES, MAX_ENTRIES_OF_WEEK)]
        entries, total = _draw_days(rng, start, days[:-1])
        change = start + rng.choice((-1, 1)) * rng.randint(1, MAX_NET) - total
        if not 10 <= abs(change) <= 99:
            continue
        entries = (*entries, _draw_entry(rng, days[-1], change))
        totals = accumulate((entry.change for entry in entries * weeks), initial=start)
        if all(0 <= total <= 99 for total in totals):
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            return Ledger(name=name, thing=thing, start=start, entries=entries, weeks=weeks)


def _draw_days(
    rng: random.Random, total: int, days: Sequence[str]
) -> tuple[tuple[Entry, ...], int]:
    """An entry for each day, and the total after them."""
    entries: list[Entry] = []
    for day in days:
        can_gain, can_lose = total <= 89, total >= 10
        is_gain = rng.random() < 0.5 if can_gain and can_lose else can_gain
        amount = rng.randint(10, 99 - total if is_gain else total)
        entries.append(_draw_entry(rng, day, amount if is_gain else -amount))
        total += entries[-1].change
    return tuple(entries), total


def _draw_entry(rng: random.Random, day: str, change: int) -> Entry:
    verb = rng.choice(GAIN_VERBS if change > 0 else LOSS_VERBS)
    return Entry(day=day, verb=verb, is_gain=change > 0, amount=abs(change))


def write_question(ledger: Ledger) -> str:
    """The story in one line of plain English."""
    name, thing, weeks = ledger.name, ledger.thing, ledger.weeks
    on, last = ("On", "?") if weeks is None else ("Every", f" after {weeks} weeks?")
    days = [f"{on} {e.day} {name} {e.verb} {e.amount} {thing}." for e in ledger.entries]
    return " ".join(
        [f"{name} has {ledger.start} {thing}.", *days, f"How many {thing} does {name} have{last}"]
    )


def write_step(total: int, entry: Entry) -> tuple[str, int]:
    """One correct calculation, ones before tens: "42+38,2+8=10,4+3+1=8" and its result."""
    tens, ones = divmod(total, 10)
    amount_tens, amount_ones = divmod(entry.amount, 10)
    if entry.is_gain:
        carry, ones_digit = divmod(ones + amount_ones, 10)
        tens_digit = tens + amount_tens + carry
        by_ones = f"{ones}+{amount_ones}={carry}{ones_digit}"
        by_tens = f"{tens}+{amount_tens}+{carry}={tens_digit}"
    else:
        borrow = int(ones < amount_ones)
        ones_digit = 10 * borrow + ones - amount_ones
        tens_digit = tens - amount_tens - borrow
        by_ones = f"{borrow}{ones}-{amount_ones}={ones_digit}"
        by_tens = f"{tens}-{amount_tens}-{borrow}={tens_digit}"
    sign = "+" if entry.is_gain else "-"
    text = f"{total:02d}{sign}{entry.amount:02d},{by_ones},{by_tens}"
    return text, 10 * tens_digit + ones_digit


def write_solution(ledger: Ledger, step_writer: StepWriter = write_step) -> tuple[str, str]:
    """The worked solution and its two-digit answer; each line continues from the line before.

    `step_writer` is the hand that calculates: a careless one makes a careless solution.
    """
    total = ledger.start
    lines = [f"{ledger.name} starts with {total:02d}."]
    for week in range(ledger.weeks or 1):
        if ledger.weeks is not None:
            lines.append(f"Week {week + 1} of {ledger.weeks}.")
        for entry in ledger.entries:
            text, total = step_writer(total, entry)
            lines.append(f"{entry.day} {entry.verb}: {text},so {total:02d}.")
    answer = f"{total:02d}"
    return "\n".join([*lines, f"Answer: {answer}"]), answer
