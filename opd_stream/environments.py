"""Environments: who answers the student's turns, as a function of the messages so far.

    answers = open_environment(Environment(kind="my_tools:step")).answers([asked])

A function of the user's own is called in the student's workers, each call with a limit of time. It
is a function and has no state, so that a unit of rollouts that is made again is the same.
"""

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from opd_stream.errors import UserError
from opd_stream.messages import Turn, turns_of
from opd_stream.section import Section, import_path, is_list, own_path, source_sha256
from opd_stream.tasks.calculator import calculator

Step = Callable[..., Any]  # (messages, reference, **options) -> turns, or None

BUILT_IN: dict[str, Step] = {"calculator": calculator}
RULES = 1  # of the built-in ones


def _named(kind: str) -> str:
    path = kind if kind in BUILT_IN else own_path(kind, "opd_stream.environments")
    if path is None:
        raise PydanticCustomError(
            "unknown_environment",
            "expected {names}, or the import path package.module:function",
            {"names": ", ".join(BUILT_IN)},
        )
    return path


class Environment(Section):
    """What answers the student's turns (docs/trajectories.md)."""

    kind: Annotated[str, AfterValidator(_named)] = Field(
        description="calculator: of the embedded task; or your own function, imported and run: "
        "package.module:function (docs/interfaces.md)"
    )
    options: dict[str, JsonValue] = Field(
        default={}, description="what the function is told beside messages and reference"
    )
    max_turns: int = Field(
        default=8, ge=1, le=1000, description="turns of the student in one trajectory"
    )
    seconds: float = Field(
        default=10, gt=0, le=86_400, description="that one call may take; placement only"
    )
    at_once: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="calls at the same time, in threads of a worker; placement only",
    )


class Asked(NamedTuple):
    """A trajectory that the student has just written a turn of."""

    prompt_id: str
    sample_index: int
    turn: int  # of the student, from 1
    messages: Sequence[Turn]  # the last one is the assistant's
    reference: str | None  # answer of the prompt's row

    def __str__(self) -> str:
        return f"prompt {self.prompt_id!r}, sample {self.sample_index}, turn {self.turn}"


@dataclass(frozen=True, slots=True)
class OpenEnvironment:
    """An environment that can be asked."""

    settings: Environment
    step: Step

    def answers(self, asked: Sequence[Asked]) -> list[tuple[Turn, ...] | None]:
        """The next turns of each trajectory, in order; None: it ends.

        Raises:
            UserError: the function raises, takes too long or returns no turns (names it, the
                prompt and the turn).
        """
        found: list[tuple[Turn, ...] | None] = []
        for first in range(0, len(asked), self.settings.at_once):
            some = asked[first : first + self.settings.at_once]
            calls = [_Call(self, each) for each in some]
            found += [call.turns() for call in calls]
        return found


class _Call:
    """A call of an environment's function, in a thread that nothing waits for."""

    def __init__(self, environment: OpenEnvironment, asked: Asked) -> None:
        self._settings, self._asked = environment.settings, asked
        self._end = time.monotonic() + self._settings.seconds
        self._found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        messages = copy.deepcopy(list(asked.messages))

        def run() -> None:
            try:
                turns = environment.step(messages, asked.reference, **self._settings.options)
            except BaseException as error:  # whatever the user's function raises
                self._found.put((None, error))
            else:
                self._found.put((turns, None))

        threading.Thread(target=run, name="environment", daemon=True).start()

    def turns(self) -> tuple[Turn, ...] | None:
        """What it returned, checked."""
        place = f"environment {self._settings.kind} on {self._asked}"
        try:
            found, error = self._found.get(timeout=max(0.0, self._end - time.monotonic()))
        except queue.Empty as late:
            raise UserError(
                f"{place} took longer than {self._settings.seconds:g} s; expected turns or None by "
                "then; mend the function, or raise rollouts.environment.seconds"
            ) from late
        if error is not None:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{place} raised {type(error).__name__}: {reason}; mend the function"
            ) from error
        if found is None or found == []:
            return None
        if not is_list(found):
            raise UserError(
                f"{place} returned {found!r:.60}; expected a list of turns with role and content, "
                "or None to end; mend the function"
            )
        turns = turns_of(found, place)
        if any(turn["role"] == "assistant" for turn in turns):
            raise UserError(
                f"{place} returned an assistant's turn, which the student writes; expected turns "
                "of others; mend the function"
            )
        return turns


def open_environment(settings: Environment) -> OpenEnvironment:
    """The environment that a config asks for.

    Raises:
        UserError: its function cannot be imported.
    """
    if settings.kind in BUILT_IN:
        return OpenEnvironment(settings, BUILT_IN[settings.kind])
    expected = "a function of messages and reference"
    step = import_path(settings.kind, "environment function", callable, expected)
    return OpenEnvironment(settings, step)


def environment_recipe(settings: Environment) -> dict[str, Any]:
    """What of an environment decides the rollouts.

    Raises:
        UserError: as `open_environment`.
    """
    open_environment(settings)
    recipe = settings.model_dump(mode="json", include={"kind", "options", "max_turns"})
    if settings.kind in BUILT_IN:
        return {**recipe, "rules": RULES}
    return recipe | source_sha256(settings.kind)
