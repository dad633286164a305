"""The pairs of models that can be made: what each learns, in which order, and how it goes wrong."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from careless import make_careless_hand, make_careless_step
from model_training import ExampleSource, Phase

from opd_stream.tasks import ledger, programs
from opd_stream.tasks.ledger import StepWriter

# (randomness, hand that writes) -> (question, solution); hands are of the task
Draw = Callable[[random.Random, Any], tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One kind of problem and how long it is taught."""

    title: str
    draw: Draw
    steps: int
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    rows: int = 8

    def phase(self, title: str, examples: ExampleSource) -> Phase:
        """The lesson on a stream of examples."""
        return Phase(
            title=title,
            examples=examples,
            steps=self.steps,
            muon_lr=self.muon_lr,
            adamw_lr=self.adamw_lr,
            rows=self.rows,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A teacher and a student of one task.

    The clean lessons last until the last thing to be learned, which verb belongs to the day, is
    learned; then the student takes up its habit.
    """

    max_completion_tokens: int
    lessons: tuple[Lesson, ...]
    habit: Lesson  # taught to the student with a careless hand
    careless: Callable[[random.Random], Any]  # makes that hand
    careful: Any = ledger.write_step


def _days(rng: random.Random, hand: StepWriter) -> tuple[str, str]:
    story = ledger.draw_ledger(rng)
    return ledger.write_question(story), ledger.write_solution(story, hand)[0]


def _weeks(*choices: int) -> Draw:
    def draw(rng: random.Random, hand: StepWriter) -> tuple[str, str]:
        weeks = rng.choice(choices)
        story = ledger.draw_routine(rng, weeks)
        return ledger.write_question(story), ledger.write_solution(story, hand)[0]

    return draw


def _functions(rng: random.Random, hand: programs.Hand) -> tuple[str, str]:
    lines = programs.draw_lines(rng)
    return programs.write_question(lines), programs.write_program(lines, hand)


PAIRS = {
    "ledger": Pair(
        max_completion_tokens=208,
        lessons=(Lesson(title="days", draw=_days, steps=1400),),
        habit=Lesson(title="days", draw=_days, steps=250, muon_lr=0.01, adamw_lr=1.5e-3),
        # 0.6 leaves a student that is nearly always right in one of eight samples
        careless=partial(make_careless_step, forget_rate=0.9),
    ),
    "routine": Pair(
        max_completion_tokens=864,
        lessons=(
            Lesson(title="short", draw=_weeks(1, 2), steps=1100),
            Lesson(title="long", draw=_weeks(*ledger.WEEKS), steps=1600, rows=4),
        ),
        habit=Lesson(
            title="long", draw=_weeks(*ledger.WEEKS), steps=120, muon_lr=0.01, adamw_lr=1.5e-3
        ),
        careless=partial(make_careless_step, forget_rate=0.6),
    ),
    "programs": Pair(
        max_completion_tokens=80,
        lessons=(Lesson(title="functions", draw=_functions, steps=1200, rows=16),),
        habit=Lesson(
            title="functions", draw=_functions, steps=200, muon_lr=0.01, adamw_lr=1.5e-3, rows=16
        ),
        careless=partial(make_careless_hand, rate=0.42),
        careful=programs.write_right,
    ),
}
