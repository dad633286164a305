"""Two tokenizations of one text: where they meet, byte by byte.

A teacher with another tokenizer reads what the student wrote in tokens of its own:

1. A completion is its bytes. The teacher tokenises their text anew, and the prompt's text too.
2. A chunk is a shortest stretch at whose end both tokenizations end. The teacher's log-probability
   of a chunk is shared out equally to the student's tokens in it, so its sum is conserved.
3. Chunks of too many tokens do not train, nor those with a replacement character or a token that is
   not the bytes of the text, nor an uneven chunk where a window cut the row.
4. Where a chunk is one and the same token on both sides, the teacher's candidates are the student's
   ids of the same bytes; the mass of all others joins the tail. Candidates train there alone.
5. Terminators are no text: to stop is one outcome, after the last byte.

Shapes: T tokens of the student, U tokens of the teacher, C chunks, V ids of the teacher.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.cross_tokenizer.byte_tokenizer import ByteTokenizer, Reading, fallback_byte

REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """A completion without its terminator, in both tokenizations."""

    teacher_ids: NDArray[np.int64]  # [U]
    student_chunk: NDArray[np.int64]  # [T], from 0; -1: in none
    teacher_chunk: NDArray[np.int64]  # [U], the same
    trains: NDArray[np.bool_]  # [C]
    same: NDArray[np.int64]  # [T], place of the same token among the teacher's; -1: none

    def shares(self, logprobs_U: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The sum of each chunk, shared out equally to the student's tokens in it [T], nats."""
        chunks = len(self.trains)
        inside = self.teacher_chunk >= 0
        sums = np.bincount(self.teacher_chunk[inside], weights=logprobs_U[inside], minlength=chunks)
        shares = sums / np.maximum(_sizes(self.student_chunk, chunks), 1)
        return np.where(self.student_chunk >= 0, np.append(shares, 0.0)[self.student_chunk], 0.0)


def align(
    student: ByteTokenizer,
    teacher: ByteTokenizer,
    completion_ids: NDArray[np.integer[Any]],
    *,
    student_ids_V: NDArray[np.int64],
    max_chunk_tokens: int,
    is_cut: bool,
) -> Alignment:
    """Where the teacher's tokens of a completion meet the student's.

    Args:
        student: wrote the ids.
        teacher: reads them.
        completion_ids: without a terminator at the end [T].
        student_ids_V: from `matching_ids`.
        max_chunk_tokens: tokens of the student in a chunk that may train.
        is_cut: the window ended the row, perhaps in the middle of a token of the teacher's.
    """
    text, student_ends, reading = _both(student, teacher, completion_ids)
    common = np.intersect1d(student_ends, reading.ends)
    count = len(common)
    student_chunk, teacher_chunk = (
        np.where(places < count, places, -1)
        for places in (np.searchsorted(common, ends) for ends in (student_ends, reading.ends))
    )
    sizes, teacher_sizes = _sizes(student_chunk, count), _sizes(teacher_chunk, count)
    trains = sizes <= max_chunk_tokens
    trains[teacher_chunk[~reading.exact & (teacher_chunk >= 0)]] = False
    broken = np.searchsorted(common, _replaced_bytes(text), side="right")
    trains[broken[broken < count]] = False
    place = np.zeros(count, np.int64)
    place[teacher_chunk[teacher_chunk >= 0]] = np.flatnonzero(teacher_chunk >= 0)
    alone = (sizes == 1) & (teacher_sizes == 1) & trains
    same = np.full(len(student_chunk), -1, np.int64)
    single = np.flatnonzero(student_chunk >= 0)
    single = single[alone[student_chunk[single]]]
    places = place[student_chunk[single]]
    equal = student_ids_V[reading.ids[places]] == np.asarray(completion_ids)[single]
    same[single[equal]] = places[equal]
    if is_cut and len(same) and same[-1] < 0 and count:
        trains[count - 1] = False
    return Alignment(
        teacher_ids=reading.ids,
        student_chunk=student_chunk,
        teacher_chunk=teacher_chunk,
        trains=trains,
        same=same,
    )


def matching_ids(
    student: ByteTokenizer,
    teacher: ByteTokenizer,
    *,
    vocab_size: int,
    student_stops: Collection[int],
    teacher_stops: Collection[int],
) -> NDArray[np.int64]:
    """The student's id for each id of the teacher [V], -1 where it has none.

    Same bytes, exactly; of several ids the one written the same way, then one that is no single
    byte's fall-back, then the lowest. Special tokens match by name. Every terminator of the teacher
    stands for one of the student's: the one of its name if there is, else the lowest.
    """
    by_bytes: dict[bytes, list[int]] = {}
    for number, spelled in sorted(student.bytes_of.items()):
        if number not in student_stops:
            by_bytes.setdefault(spelled, []).append(number)
    matches = np.full(vocab_size, -1, np.int64)
    for number, spelled in teacher.bytes_of.items():
        same = by_bytes.get(spelled)
        if same and number < vocab_size:
            piece = teacher.pieces.get(number)
            matches[number] = min(
                same,
                key=lambda each, piece=piece: (
                    student.pieces.get(each) != piece,
                    fallback_byte(student.pieces.get(each, "")) is not None,
                    each,
                ),
            )
    stops = {student.special.get(number): number for number in sorted(student_stops, reverse=True)}
    for number, content in teacher.special.items():
        own = student.special_ids.get(content, -1)
        if number < vocab_size:
            matches[number] = -1 if own in student_stops else own
    for number in teacher_stops:
        matches[number] = stops.get(teacher.special.get(number), min(student_stops))
    return matches


def _both(
    student: ByteTokenizer, teacher: ByteTokenizer, ids: NDArray[np.integer[Any]]
) -> tuple[str, NDArray[np.int64], Reading]:
    """The text of ids, where the student's tokens end in it, and the teacher's reading.

    A special token is read as the teacher's of that name, or as text that does not train.
    """
    texts: list[str] = []
    ends: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    readings: list[Reading] = [
        Reading(ids=np.zeros(0, np.int64), ends=ends[0], exact=np.zeros(0, np.bool_))
    ]
    position = 0
    for content, run in _runs(student, ids):
        if content is not None:
            text, run_ends = content, np.array([len(content.encode())])
        else:
            spelled = [student.bytes_of.get(token, REPLACEMENT.encode()) for token in run]
            lengths = np.cumsum([len(part) for part in spelled], dtype=np.int64)
            text, run_ends = readable(b"".join(spelled), lengths)
        special = None if content is None else teacher.special_ids.get(content)
        if special is not None:
            reading = Reading(ids=np.array([special]), ends=run_ends, exact=np.ones(1, np.bool_))
        else:
            reading = teacher.read(text)
        may_train = content is None or special is not None
        ends.append(run_ends + position)
        readings.append(
            Reading(ids=reading.ids, ends=reading.ends + position, exact=reading.exact & may_train)
        )
        texts.append(text)
        position += len(text.encode())
    whole = Reading(
        ids=np.concatenate([part.ids for part in readings]),
        ends=np.concatenate([part.ends for part in readings]),
        exact=np.concatenate([part.exact for part in readings]),
    )
    return "".join(texts), np.concatenate(ends), whole


def _runs(
    student: ByteTokenizer, ids: NDArray[np.integer[Any]]
) -> Iterator[tuple[str | None, list[int]]]:
    """Special tokens one by one with their content, and runs of text (None) between them."""
    for is_special, group in groupby(ids.tolist(), key=lambda token: token in student.special):
        if is_special:
            yield from ((student.special[token], [token]) for token in group)
        else:
            yield None, list(group)


def readable(data: bytes, ends: NDArray[np.int64]) -> tuple[str, NDArray[np.int64]]:
    """The text of bytes, and where byte positions went.

    A stretch that is no UTF-8 becomes one replacement character; positions inside it stay inside.
    """
    parts: list[str] = []
    old, new, start, length = [0], [0], 0, 0
    while True:
        try:
            parts.append(data[start:].decode())
            break
        except UnicodeDecodeError as error:
            good, bad_end = start + error.start, start + error.end
            parts.append(data[start:good].decode() + REPLACEMENT)
            length += good - start
            old += [good, bad_end]
            new += [length, length + 3]
            start, length = bad_end, length + 3
    old.append(len(data))
    new.append(length + len(data) - start)
    return "".join(parts), np.interp(ends, old, new).astype(np.int64)


def _replaced_bytes(text: str) -> NDArray[np.int64]:
    """Places of all bytes of replacement characters."""
    places = [place for place, char in enumerate(text) if char == REPLACEMENT]
    starts = np.array([len(text[:place].encode()) for place in places], np.int64)
    return (starts[:, None] + np.arange(3)).reshape(-1)


def _sizes(chunk: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return np.bincount(chunk[chunk >= 0], minlength=count)
