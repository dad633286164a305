"""The `hidden` codec: a teacher's hidden states, of which its head makes whole distributions.

A state h [H] stands as integers q of its coordinates in a basis: h = mean + step * q @ inverse. In
the basis the average Fisher metric of the teacher is the identity and channels are uncorrelated, so
equal steps are best, and the KL that rounding costs is about step^2 H / 24. The step of a token is
its own: each token loses the same, which is the best use of the bits where tokens differ in how
much a state may move before the distribution does. Integers are coded by `rans`, in lanes of a few
tokens, with the spread that each channel has in the shard.

Beside them stand the columns of codec `compact`, of a few candidates: what reads rows without a
head finds them there. Shapes: R rows, T tokens of a row, N of all rows, H hidden, L lanes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.store.codecs.columns import (
    flat_values,
    lengths_of,
    list_column,
    offsets_of,
    row_offsets,
    unrounded,
    widened,
)
from opd_stream.store.codecs.laws import Column
from opd_stream.store.codecs.rans import Coded, decode, encode
from opd_stream.store.files import sha256

LANE = 2304  # integers of a lane, about
AT_ONCE = 2**21  # integers that are packed or unpacked together
SCALES_KEY = b"hidden_scales"  # int8 of each channel: its spread in quarter octaves
WIDTH_KEY = b"hidden_width"
BASIS_KEY = b"hidden_basis"  # digest of the basis that rounded ones stand in
PER_OCTAVE = 4  # codes of steps and spreads


PLAIN_COLUMNS = {
    "hidden": Column(types=("float", "halffloat", "uint16"), entries="multiple"),
}
COLUMNS = {
    "hidden_steps": Column(types=("int8",)),
    "hidden_words": Column(types=("uint16",), entries="any"),
    "hidden_lanes": Column(types=("uint16",), entries="any"),
    "hidden_places": Column(types=("uint32",), entries="any"),
    "hidden_values": Column(types=("int32",), entries="any"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBasis:
    """Where the coordinates of hidden states lie."""

    mean_H: NDArray[np.float32]
    inverse_HH: NDArray[np.float32]  # a row for each coordinate
    largest_step: float = 1.0  # beyond, what a step costs a token is not known

    @property
    def digest(self) -> str:
        """Names its numbers: one that is made again has others, as signs and order of axes do."""
        return sha256(self.mean_H.tobytes() + self.inverse_HH.tobytes())


class PackedStates(NamedTuple):
    """Rounded states of T tokens."""

    steps_T: NDArray[np.int8]  # codes
    scales_H: NDArray[np.int8]  # of the shard
    coded: Coded


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStates:
    """The hidden states of some tokens as a shard has them; `states_of` unpacks them.

    Example:
        >>> states_of([row.teacher_states])[0].shape
        (151, 576)
    """

    tokens: int
    width: int
    plain: NDArray[Any] | None = None  # unrounded [T * H]
    packed: PackedStates | None = None  # or rounded
    basis: StateBasis | None = None  # of rounded ones; None: only `integers_of` unpacks them

    @property
    def nbytes(self) -> int:
        """Bytes of what is the row's own."""
        packed = [] if self.packed is None else [self.packed.steps_T, *self.packed.coded]
        return sum(part.nbytes for part in [self.plain, *packed] if part is not None)


def basis_table(basis: StateBasis) -> pa.Table:
    """A basis as a shard of one row."""
    parts = {
        "mean": basis.mean_H,
        "inverse": basis.inverse_HH.reshape(-1),
        "largest_step": [basis.largest_step],
    }
    return pa.table(
        {name: pa.array([part], pa.list_(pa.float32())) for name, part in parts.items()}
    )


def basis_of(table: pa.Table) -> StateBasis:
    """The basis of a shard."""
    mean_H, inverse, steps = (
        table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for name in ("mean", "inverse", "largest_step")
    )
    return StateBasis(
        mean_H=mean_H,
        inverse_HH=inverse.reshape(len(mean_H), len(mean_H)),
        largest_step=float(steps[0]),
    )


def step_of(codes: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Steps of their codes."""
    return np.exp2(codes.astype(np.float32) / PER_OCTAVE)


def encode_states(
    rows: Sequence[NDArray[Any]], basis: StateBasis | None = None
) -> tuple[dict[str, Any], dict[bytes, bytes]]:
    """Columns and schema metadata.

    Args:
        rows: R x [T, H] float32, kept unrounded; or R x [T, 1 + H] int32, the code of a token's
            step before its integers.
        basis: of the integers.
    """
    offsets, whole = offsets_of(lengths_of(rows)), np.concatenate(rows)
    if not np.issubdtype(whole.dtype, np.integer):
        values = unrounded(whole.reshape(-1).astype(np.float32, copy=False))
        width = whole.shape[1]
        return {"hidden": list_column(values, offsets * width)}, {WIDTH_KEY: str(width).encode()}
    steps_N, values_NH = whole[:, 0].astype(np.int8), whole[:, 1:]
    width, scales_H = values_NH.shape[1], _scales(values_NH, steps_N)
    lanes_L = _lanes(np.diff(offsets), width)
    parts = [
        encode(
            values_NH[group.tokens].reshape(-1),
            _widths(scales_H, steps_N[group.tokens]).reshape(-1),
            lanes_L[group.lanes] * width,
        )
        for group in _groups(lanes_L, width)
    ]
    coded = _joined(parts, lanes_L, width)
    of_lanes = np.searchsorted(np.append(0, np.cumsum(lanes_L)), offsets)
    of_words = np.append(0, np.cumsum(coded.counts.astype(np.int64)))[of_lanes]
    of_places = _found(coded.places, offsets * width)
    row_of_place = np.searchsorted(offsets * width, coded.places, side="right") - 1
    within = (coded.places - (offsets * width)[row_of_place]).astype(np.uint32)
    columns = {
        "hidden_steps": list_column(steps_N, offsets),
        "hidden_words": list_column(coded.words, of_words),
        "hidden_lanes": list_column(coded.counts, of_lanes),
        "hidden_places": list_column(within, of_places),
        "hidden_values": list_column(coded.values, of_places),
    }
    metadata = {WIDTH_KEY: str(width).encode(), SCALES_KEY: scales_H.tobytes()}
    return columns, metadata if basis is None else {**metadata, BASIS_KEY: basis.digest.encode()}


def stored_states(
    batch: pa.RecordBatch, lengths: NDArray[np.int64], basis: StateBasis | None
) -> tuple[StoredStates, ...]:
    """The states of each row of a record batch, still packed.

    Raises:
        ValueError: a column does not have what rows of these lengths need, or states were rounded
            in another basis.
    """
    metadata: dict[bytes, bytes] = batch.schema.metadata or {}
    width = int(metadata[WIDTH_KEY])

    def rows(name: str) -> list[NDArray[Any]]:
        column = batch.column(name)
        values = flat_values(column)
        return [values[first:last] for first, last in pairwise(row_offsets(column).tolist())]

    is_plain = "hidden" in batch.schema.names
    first = rows("hidden" if is_plain else "hidden_steps")
    if [len(row) for row in first] != (lengths * (width if is_plain else 1)).tolist():
        raise ValueError("hidden states are not those of as many tokens as the row has")
    if is_plain:
        return tuple(
            StoredStates(tokens=int(tokens), width=width, plain=row)
            for tokens, row in zip(lengths, first, strict=True)
        )
    scales_H = np.frombuffer(metadata[SCALES_KEY], np.int8)
    if len(scales_H) != width or (basis is not None and basis.inverse_HH.shape != (width, width)):
        raise ValueError(f"hidden states of width {width} with a basis of another")
    written = metadata.get(BASIS_KEY)
    if basis is not None and written is not None and written.decode() != basis.digest:
        raise ValueError("hidden states were rounded in a basis that was made again since")
    parts = [rows(f"hidden_{name}") for name in ("words", "lanes", "places", "values")]
    return tuple(
        StoredStates(
            tokens=len(steps_T),
            width=width,
            packed=PackedStates(steps_T, scales_H, Coded(*part)),
            basis=basis,
        )
        for steps_T, *part in zip(first, *parts, strict=True)
    )


def integers_of(rows: Sequence[StoredStates]) -> list[NDArray[Any]]:
    """The rows as `encode_states` takes them, so that nothing is rounded again.

    Raises:
        ValueError: the words are not those of so many tokens.
    """
    if not rows or rows[0].packed is None:  # one shard has one kind
        return states_of(rows)
    found = [np.empty((row.tokens, 1 + row.width), np.int32) for row in rows]
    for row, tokens, integers in _unpacked(rows):
        found[row][tokens] = integers
    return found


def states_of(rows: Sequence[StoredStates]) -> list[NDArray[np.float32]]:
    """The hidden states R x [T, H]; beside them only a bounded part is unpacked at one time.

    Raises:
        ValueError: the words are not those of so many tokens, or the basis is not there.
    """
    found = [
        np.empty((row.tokens, row.width), np.float32)
        if row.plain is None
        else widened(row.plain).reshape(-1, row.width)
        for row in rows
    ]
    places = [place for place, row in enumerate(rows) if row.packed is not None]
    for number, tokens, integers in _unpacked([rows[place] for place in places]):
        basis = rows[places[number]].basis
        if basis is None:
            raise ValueError("rounded hidden states need the basis that their scores name")
        scaled = integers[:, 1:] * step_of(integers[:, 0])[:, None]
        found[places[number]][tokens] = scaled @ basis.inverse_HH + basis.mean_H
    return found


class _Group(NamedTuple):
    """Lanes that are packed together, and their tokens."""

    lanes: slice
    tokens: slice


def _unpacked(rows: Sequence[StoredStates]) -> Iterator[tuple[int, slice, NDArray[np.int32]]]:
    """(row, tokens of it, their integers [n, 1 + H]), all lanes of all rows in a few groups."""
    if not rows:
        return
    width, packed = rows[0].width, [row.packed for row in rows if row.packed is not None]
    lengths_R = np.array([row.tokens for row in rows], np.int64)
    offsets, lanes_L = offsets_of(lengths_R), _lanes(lengths_R, width)
    steps_N = np.concatenate([row.steps_T for row in packed])
    coded = [row.coded for row in packed]
    words = np.concatenate([part.words for part in coded])
    counts_L = np.concatenate([part.counts for part in coded])
    if len(counts_L) != len(lanes_L):
        raise ValueError(f"hidden states in {len(counts_L)} lanes; expected {len(lanes_L)}")
    ends_L = np.append(0, np.cumsum(counts_L.astype(np.int64)))
    places = np.concatenate(
        [part.places + start * width for part, start in zip(coded, offsets[:-1], strict=True)]
    )
    values = np.concatenate([part.values for part in coded])
    row_N = np.repeat(np.arange(len(rows)), lengths_R)
    scales_RH = np.stack([row.scales_H for row in packed])
    for group in _groups(lanes_L, width):
        first, last = group.tokens.start, group.tokens.stop
        chosen = slice(*np.searchsorted(places, [first * width, last * width]).tolist())
        part = Coded(
            words=words[ends_L[group.lanes.start] : ends_L[group.lanes.stop]],
            counts=counts_L[group.lanes],
            places=places[chosen] - first * width,
            values=values[chosen],
        )
        widths = _widths(scales_RH[row_N[group.tokens]], steps_N[group.tokens])
        found = decode(part, widths.reshape(-1), lanes_L[group.lanes] * width)
        integers = np.concatenate(
            [steps_N[group.tokens, None].astype(np.int32), found.reshape(-1, width)], axis=1
        )
        for row in np.unique(row_N[group.tokens]).tolist():
            start, end = max(first, int(offsets[row])), min(last, int(offsets[row + 1]))
            tokens = slice(start - int(offsets[row]), end - int(offsets[row]))
            yield row, tokens, integers[start - first : end - first]


def _joined(parts: list[Coded], lanes_L: NDArray[np.int64], width: int) -> Coded:
    """What groups of lanes were coded as, with places counted from the first token."""
    starts = [group.tokens.start * width for group in _groups(lanes_L, width)]
    return Coded(
        words=np.concatenate([np.zeros(0, np.uint16), *(part.words for part in parts)]),
        counts=np.concatenate([np.zeros(0, np.uint16), *(part.counts for part in parts)]),
        places=np.concatenate(
            [
                np.zeros(0, np.int64),
                *(part.places + start for part, start in zip(parts, starts, strict=True)),
            ]
        ),
        values=np.concatenate([np.zeros(0, np.int32), *(part.values for part in parts)]),
    )


def _lanes(lengths_R: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Tokens of each lane [L]: rows are cut from their first token on."""
    most = max(1, LANE // width)
    return np.array(
        [
            min(most, length - start)
            for length in lengths_R.tolist()
            for start in range(0, length, most)
        ],
        np.int64,
    )


def _groups(lanes_L: NDArray[np.int64], width: int) -> list[_Group]:
    """Lanes in stretches of a bounded number of integers; a lane of more is one of its own."""
    ends = np.append(0, np.cumsum(lanes_L))
    found: list[_Group] = []
    first = 0
    while first < len(lanes_L):
        most = ends[first : first + 1] + AT_ONCE // width + 1
        last = max(int(_found(ends, most)[0]) - 1, first + 1)
        found.append(_Group(slice(first, last), slice(int(ends[first]), int(ends[last]))))
        first = last
    return found


def _found(rising: NDArray[np.integer[Any]], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of the first are below each value."""
    return cast(Any, np.searchsorted(rising, values))


def _widths(scales: NDArray[np.int8], steps_N: NDArray[np.int8]) -> NDArray[np.int16]:
    """Spread of each integer in quarter octaves [N, H]."""
    return scales.astype(np.int16) - steps_N.astype(np.int16)[:, None]


def _scales(values_NH: NDArray[np.int32], steps_N: NDArray[np.int8]) -> NDArray[np.int8]:
    """Spread of each channel in the shard."""
    squares_H = np.zeros(values_NH.shape[1])
    for start in range(0, len(values_NH), 1024):
        part = values_NH[start : start + 1024] * step_of(steps_N[start : start + 1024])[:, None]
        squares_H += np.square(part, dtype=np.float64).sum(0)
    spread_H = np.sqrt(squares_H / max(1, len(values_NH)))
    codes_H = np.rint(PER_OCTAVE * np.log2(np.maximum(spread_H, 1e-30)))
    return codes_H.clip(-128, 127).astype(np.int8)
