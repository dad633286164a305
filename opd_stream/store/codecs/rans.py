"""Integers of bell-shaped channels in nearly as few bits as their entropy: rANS in many lanes.

Each integer comes with a width: the standard deviation of its channel in steps, as quarter octaves.
Of wide ones a coarse part is coded by the table of its width, and low bits as if all were equally
likely. A lane is a stretch of integers with a coder of its own: 32 bits of state, 16-bit words. All
lanes take a step at a time, so that a step is a few operations on columns.

Source: asymmetric numeral systems (1311.2540); interleaved streams (1402.3392).
Shapes: L lanes, N integers of all lanes, one lane after another.
"""

from decimal import Context, Decimal, localcontext
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PRECISION = 14  # bits of a frequency
WORD = 16  # bits
LARGEST = 63  # coarse part with a symbol; those beyond stand apart, behind a symbol that says so
BEYOND = 2 * LARGEST + 1
NARROWEST, WIDEST = -12, 11  # quarter octaves of a coarse part: 1 / 8 to 6.7 steps

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
SURE = 7  # from here on 1 - erf is below 1e-22, which no frequency sees

Integers = NDArray[np.integer[Any]]


class Coded(NamedTuple):
    """The words of lanes, and what has no symbol."""

    words: NDArray[np.uint16]  # one lane after another
    counts: NDArray[np.uint16]  # [L], words of a lane
    places: Integers  # among the N integers, rising
    values: NDArray[np.int32]  # there


class _Tables(NamedTuple):
    frequency: NDArray[np.uint32]  # [widths, symbols]
    start: NDArray[np.uint32]  # [widths, symbols]
    symbol: NDArray[np.uint8]  # [widths, 2 ** PRECISION]


@cache
def _tables() -> _Tables:
    """Frequencies of the coarse parts of normal channels; every symbol has one.

    In decimals, since libraries differ in the last bit of a floating-point erf: one frequency that
    is another on another machine, and what was written here means something else there.
    """
    rows: list[list[int]] = []
    for width in range(NARROWEST, WIDEST + 1):
        with localcontext(Context(prec=60)):
            spread = Decimal(2) ** ((Decimal(width) + 2) / 4)
            above = [_erf((place + Decimal("0.5")) / spread) for place in range(LARGEST + 1)]
            edges = [*(-edge for edge in reversed(above)), *above]
            free = (1 << PRECISION) - BEYOND - 1
            row = [1 + int(free * (high - low) / 2) for low, high in pairwise(edges)] + [1]
        row[LARGEST] += (1 << PRECISION) - sum(row)  # what rounding down left goes to 0
        rows.append(row)
    frequency = np.array(rows, np.uint32)
    symbols = [np.repeat(np.arange(BEYOND + 1), row).astype(np.uint8) for row in rows]
    start = frequency.cumsum(1, dtype=np.uint32) - frequency
    return _Tables(frequency, start, np.stack(symbols))


def _erf(z: Decimal) -> Decimal:
    """2 / sqrt(pi) times the sum of (-1)^n z^(2n + 1) / (n! (2n + 1)), for z of at least 0."""
    if z > SURE:
        return Decimal(1)
    power, total, n = z, z, 0
    while abs(power) > Decimal("1e-30"):
        n += 1
        power *= -z * z / n
        total += power / (2 * n + 1)
    return 2 / PI.sqrt() * total


def encode(values: Integers, widths: Integers, lengths: Integers) -> Coded:
    """The words of lanes with these lengths [L]; a value may have any width, it only costs bits."""
    rows, shifts = _classes(widths)
    wide = values.astype(np.int64)
    moved = wide + ((1 << shifts) >> 1)
    coarse = moved >> shifts
    low = moved - (coarse << shifts)
    beyond = np.abs(coarse) > LARGEST
    symbols = np.where(beyond, BEYOND, coarse + LARGEST)
    low[beyond] = 0
    frequency, start = _tables().frequency[rows, symbols], _tables().start[rows, symbols]
    order, columns = _columns(lengths)
    state = np.full(len(lengths), 1 << WORD, np.uint64)
    sent = np.zeros((2 * len(columns), len(lengths)), np.bool_)
    out = np.zeros(sent.shape, np.uint16)

    def push(step: int, f: NDArray[np.uint64], c: NDArray[np.uint64]) -> None:
        x, lanes = state[: len(f)], len(f)
        full = x >= f << np.uint64(2 * WORD - PRECISION)
        out[step, :lanes], sent[step, :lanes] = x & np.uint64(0xFFFF), full
        x = np.where(full, x >> np.uint64(WORD), x)
        quotient = x // f
        state[:lanes] = (quotient << np.uint64(PRECISION)) + (x - quotient * f) + c

    for number in range(len(columns) - 1, -1, -1):
        places = columns[number]
        shift = shifts[places]
        if shift.any():
            spare = (PRECISION - shift).astype(np.uint64)
            push(2 * number + 1, np.uint64(1) << spare, low[places].astype(np.uint64) << spare)
        push(2 * number, frequency[places].astype(np.uint64), start[places].astype(np.uint64))
    heads = np.stack([state & np.uint64(0xFFFF), state >> np.uint64(WORD)], 1).astype(np.uint16)
    lanes = [np.concatenate([heads[n], out[sent[:, n], n]]) for n in np.argsort(order)]
    return Coded(
        words=np.concatenate(lanes) if lanes else np.zeros(0, np.uint16),
        counts=np.array([len(lane) for lane in lanes], np.uint16),
        places=np.flatnonzero(beyond).astype(np.uint32),
        values=wide[beyond].astype(np.int32),
    )


def decode(coded: Coded, widths: Integers, lengths: Integers) -> NDArray[np.int32]:
    """The integers [N] of lanes with these lengths; as many as the lengths say, whatever the words.

    Raises:
        ValueError: the words are not those of such lanes.
    """
    counts = coded.counts.astype(np.int64)
    if len(counts) != len(lengths) or counts.sum() != len(coded.words) or (counts < 2).any():
        raise ValueError("the words of hidden states are not as many as their lanes need")
    rows, shifts = _classes(widths)
    order, columns = _columns(lengths)
    ends = np.cumsum(counts)
    end, at = ends[order], (ends - counts)[order]
    words = np.append(coded.words, np.uint16(0)).astype(np.uint64)
    state = words[at] | (words[at + 1] << np.uint64(WORD))
    at += 2
    frequency, start, symbol = _tables()
    found = np.zeros(len(rows), np.int32)
    mask = np.uint64((1 << PRECISION) - 1)

    def pop(x: NDArray[np.uint64]) -> None:
        short, lanes = x < 1 << WORD, len(x)
        following = words[np.minimum(at[:lanes], len(words) - 1)]
        state[:lanes] = np.where(short, (x << np.uint64(WORD)) | following, x)
        at[:lanes] += short

    for places in columns:
        x, row = state[: len(places)], rows[places]
        slot = x & mask
        drawn = symbol[row, slot.astype(np.int64)]
        pop(frequency[row, drawn] * (x >> np.uint64(PRECISION)) + slot - start[row, drawn])
        value, shift = drawn.astype(np.int64) - LARGEST, shifts[places]
        if shift.any():
            spare = (PRECISION - shift).astype(np.uint64)
            x = state[: len(places)]
            low = (x & mask) >> spare
            pop(
                ((x >> np.uint64(PRECISION)) << spare)
                + (x & ((np.uint64(1) << spare) - np.uint64(1)))
            )
            value = (value << shift) + low.astype(np.int64) - ((1 << shift) >> 1)
        found[places] = value
    if not np.array_equal(at, end) or (state != 1 << WORD).any():
        raise ValueError("the words of hidden states do not end where their lanes do")
    if len(coded.places) != len(coded.values) or (coded.places >= len(found)).any():
        raise ValueError("hidden states name values at places that they do not have")
    found[coded.places] = coded.values
    return found


def _classes(widths: Integers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row of the tables and number of low bits [N]."""
    widths = widths.astype(np.int64)
    shifts = np.clip(-((WIDEST - widths) // 4), 0, PRECISION)
    return np.clip(widths - 4 * shifts, NARROWEST, WIDEST) - NARROWEST, shifts


def _columns(lengths: Integers) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Lanes by falling length, and where the s-th integers of those that have one stand."""
    lengths = lengths.astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    starts = (np.cumsum(lengths) - lengths)[order]
    longest = int(lengths.max(initial=0))
    active = np.searchsorted(-lengths[order], -np.arange(longest), side="left")
    return order, [starts[:count] + step for step, count in enumerate(active.tolist())]
