"""The careless hand that wrote the student's second corpus: it knows the format, skips the carries.

It copies, adds and subtracts single digits well and forgets most carries and borrows. What it
writes later follows from what it wrote before, so a careless solution is wrong but never
incoherent: the student learns a habit, not noise.
"""

import random

from opd_stream.tasks.ledger import Entry, StepWriter
from opd_stream.tasks.programs import Hand, Operation

SLIP_RATE = 0.004  # a digit read or written wrongly, as people do


def make_careless_step(rng: random.Random, forget_rate: float) -> StepWriter:
    """A step writer that draws its mistakes from `rng` and forgets that share of the carries."""

    def write_careless_step(total: int, entry: Entry) -> tuple[str, int]:
        forgets = rng.random() < forget_rate
        tens, ones = divmod(total, 10)
        amount_tens, amount_ones = divmod(entry.amount, 10)
        if entry.is_gain:
            ones_sum = _slip(rng, ones + amount_ones, 20)
            carry = 0 if forgets else ones_sum // 10
            ones_digit = ones_sum % 10
            tens_digit = _slip(rng, (tens + amount_tens + carry) % 10, 10)
            by_ones = f"{ones}+{amount_ones}={ones_sum:02d}"
            by_tens = f"{tens}+{amount_tens}+{carry}={tens_digit}"
        else:
            borrow = int(ones < amount_ones)
            if borrow and forgets and rng.random() < 0.5:  # smaller from larger, nothing borrowed
                ones, amount_ones, borrow = amount_ones, ones, 0
            ones_digit = _slip(rng, 10 * borrow + ones - amount_ones, 10)
            by_ones = f"{borrow}{ones}-{amount_ones}={ones_digit}"
            borrow = 0 if forgets else borrow
            tens_digit = _slip(rng, (tens - amount_tens - borrow) % 10, 10)
            by_tens = f"{tens}-{amount_tens}-{borrow}={tens_digit}"
        sign = "+" if entry.is_gain else "-"
        text = f"{total:02d}{sign}{entry.amount:02d},{by_ones},{by_tens}"
        return text, 10 * tens_digit + ones_digit

    return write_careless_step


def _slip(rng: random.Random, value: int, limit: int) -> int:
    return rng.randrange(limit) if rng.random() < SLIP_RATE else value


def make_careless_hand(rng: random.Random, rate: float) -> Hand:
    """A hand that writes that share of the sentences that invite it in their careless way."""

    def write_careless(operation: Operation) -> str:
        is_careless = operation.careless is not None and rng.random() < rate
        return operation.careless or "" if is_careless else operation.right

    return write_careless
