"""The long task: a week of the ledger, lived through several times; chains of 400 to 800 tokens.

The question names one week and how often it repeats, so prompts stay short while solutions grow
long, and a full rollout costs what it costs on real reasoning tasks: most of everything. Each line
is calculated like a line of the embedded task (`opd_stream.tasks.ledger`), each week begins with a
heading that says which of how many it is, and the answer is right only if every line before it is.
"""

import random

from opd_stream.tasks.ledger import (
    DAYS,
    GAIN_VERBS,
    LOSS_VERBS,
    NAMES,
    THINGS,
    Entry,
    Ledger,
    LedgerProblem,
    StepWriter,
    write_step,
)

MIN_ENTRIES, MAX_ENTRIES = 4, 5  # of a week
WEEKS = (3, 4, 5)
MAX_NET = 6  # most that a whole week moves the total, up or down


def make_problems(*, count: int, seed: int) -> list[LedgerProblem]:
    """The first `count` problems of `seed`; problem i of a seed is the same whatever the count."""
    return [_make_problem(seed, index) for index in range(count)]


def draw_routine(rng: random.Random, weeks: int) -> Ledger:
    """A random week whose totals never leave 0..99, however often up to `weeks` it is repeated."""
    while True:
        start = rng.randint(10, 99)
        entries = _draw_week(rng, start)
        if entries is not None and _stays_in_range(start, entries, weeks):
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            return Ledger(name=name, thing=thing, start=start, entries=entries)


def write_question(routine: Ledger, weeks: int) -> str:
    """The story in one line of plain English."""
    name, thing = routine.name, routine.thing
    days = [f"Every {e.day} {name} {e.verb} {e.amount} {thing}." for e in routine.entries]
    last = f"How many {thing} does {name} have after {weeks} weeks?"
    return " ".join([f"{name} has {routine.start} {thing}.", *days, last])


def write_solution(
    routine: Ledger, weeks: int, step_writer: StepWriter = write_step
) -> tuple[str, str]:
    """The worked solution and its two-digit answer; each line continues from the line before."""
    total = routine.start
    lines = [f"{routine.name} starts with {total:02d}."]
    for week in range(1, weeks + 1):
        lines.append(f"Week {week} of {weeks}.")
        for entry in routine.entries:
            text, total = step_writer(total, entry)
            lines.append(f"{entry.day} {entry.verb}: {text},so {total:02d}.")
    answer = f"{total:02d}"
    return "\n".join([*lines, f"Answer: {answer}"]), answer


def _draw_week(rng: random.Random, start: int) -> tuple[Entry, ...] | None:
    """Days that move the total at random; the last one brings it back to near where it was."""
    total, entries = start, list[Entry]()
    days = DAYS[: rng.randint(MIN_ENTRIES, MAX_ENTRIES)]
    for day in days[:-1]:
        can_gain, can_lose = total <= 89, total >= 10
        is_gain = rng.random() < 0.5 if can_gain and can_lose else can_gain
        amount = rng.randint(10, 99 - total if is_gain else total)
        entries.append(_entry(rng, day, amount if is_gain else -amount))
        total += amount if is_gain else -amount
    change = start + rng.choice((-1, 1)) * rng.randint(1, MAX_NET) - total
    if not 10 <= abs(change) <= 99:
        return None
    return (*entries, _entry(rng, days[-1], change))


def _entry(rng: random.Random, day: str, change: int) -> Entry:
    verb = rng.choice(GAIN_VERBS if change > 0 else LOSS_VERBS)
    return Entry(day=day, verb=verb, is_gain=change > 0, amount=abs(change))


def _stays_in_range(start: int, entries: tuple[Entry, ...], weeks: int) -> bool:
    total = start
    for entry in entries * weeks:
        total += entry.amount if entry.is_gain else -entry.amount
        if not 0 <= total <= 99:
            return False
    return True


def _make_problem(seed: int, index: int) -> LedgerProblem:
    rng = random.Random(f"routine/{seed}/{index}")
    weeks = rng.choice(WEEKS)
    routine = draw_routine(rng, weeks)
    solution, answer = write_solution(routine, weeks)
    return LedgerProblem(
        problem_id=f"routine-{seed}-{index}",
        question=write_question(routine, weeks),
        solution=solution,
        answer=answer,
    )
