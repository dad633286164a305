"""A reference answer that is a list, as one text: any of its answers is right, or all have to be.

Prompts hold the reference as text. A list is the JSON object {"any": [...]} or {"all": [...]},
written and read here alone; a judge of one answer never sees it.
"""

import json
from collections.abc import Callable, Sequence
from typing import Literal, cast

from opd_stream.section import is_list, is_object

Match = Literal["any", "all"]


def reference_text(answers: Sequence[str], match: Match) -> str | None:
    """A list of right answers as one reference; one alone stands as it is, none is None."""
    if len(answers) < 2:
        return answers[0] if answers else None
    return json.dumps({match: list(answers)}, ensure_ascii=False)


def answers_of(reference: str) -> tuple[Match, tuple[str, ...]]:
    """The right answers of a reference, and whether any will do or all are asked for.

    Example:
        >>> answers_of('{"all": ["2", "3"]}'), answers_of("4")
        (('all', ('2', '3')), ('any', ('4',)))
    """
    if reference.startswith(('{"any": [', '{"all": [')):
        try:
            value = json.loads(reference)
        except ValueError:
            return "any", (reference,)
        if is_object(value) and len(value) == 1:
            ((match, answers),) = value.items()
            if is_list(answers) and answers and all(isinstance(each, str) for each in answers):
                return cast(Match, match), tuple(answers)
    return "any", (reference,)


def judge_of_lists(judge: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    """A judge of one right answer as one that reads lists of them too."""

    def verdict(completion: str, reference: str) -> bool:
        match, answers = answers_of(reference)
        verdicts = (judge(completion, answer) for answer in answers)
        return any(verdicts) if match == "any" else all(verdicts)

    return verdict


def reader_of_lists(can_read: Callable[[str], bool]) -> Callable[[str], bool]:
    """Whether a judge can read one of any answers, or each of all."""

    def readable(reference: str) -> bool:
        match, answers = answers_of(reference)
        return (any if match == "any" else all)(map(can_read, answers))

    return readable


def right_answer(reference: str) -> str:
    """What a right answer may say: the first of any, or all of them."""
    match, answers = answers_of(reference)
    return answers[0] if match == "any" else ", ".join(answers)
