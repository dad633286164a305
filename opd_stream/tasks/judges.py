"""Judges: a program that says whether a completion answers the problem."""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Literal

from opd_stream.tasks import ledger

JudgeName = Literal["ledger", "final_number"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def judge(name: JudgeName) -> Callable[[str, str], bool]:
    """The function (completion text, reference answer) -> verdict of a judge."""
    return {"ledger": ledger.is_correct, "final_number": is_final_number}[name]


def is_final_number(completion: str, answer: str) -> bool:
    """Whether the completion's final number equals the reference's.

    Both sides may be worked solutions: the number after the last `####` counts where there is one
    (the GSM8K format), else the last number of the text.
    """
    found, expected = final_number(completion), final_number(answer)
    return found is not None and found == expected


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
