"""What a cache alone says about each drawn token, and its text: no model is read.

Shapes: T completion tokens, K teacher candidates.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.store.reader import ScoredRow

Values = NDArray[np.float64]  # [T]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number a token, and the scale it is coloured by."""

    name: str
    unit: str
    edges: tuple[float, ...]  # between levels 0, 1, ..., of the absolute value
    needs_ranks: bool  # ids drawn from the teacher do not tell it
    meaning: str

    def level(self, value: float) -> int:
        """Level of a value: 0 to `len(edges)`, negative for negative values."""
        level = int(np.searchsorted(self.edges, abs(value), side="right"))
        return -level if value < 0 else level


_NATS = (0.1, 0.5, 2.0, 5.0, 10.0)
_ENTROPIES = (0.05, 0.2, 0.5, 1.0, 2.0)
_PLACES = (2, 3, 5, 9, 17)
_SHARES = (0.001, 0.01, 0.05, 0.1, 0.5)
_MEANINGS = {
    "reverse_kl": "log-probability of the drawn token, student's minus teacher's: its mean over "
    "draws is KL(student || teacher)",
    "teacher_nll": "minus the teacher's log-probability of the drawn token",
    "entropy": "the teacher's over its candidates and the rest as one outcome: at most its entropy "
    "over the vocabulary",
    "logprob_gap": "the teacher's log-probability of its first candidate minus that of the drawn "
    "token",
    "rank": "place of the drawn token among the teacher's candidates, from 1; outside them it "
    "counts as one more than there are",
    "tail_mass": "the teacher's probability outside its candidates: 1 minus the retained mass",
}
FIGURES = {
    name: Figure(name, unit, edges, needs_ranks, _MEANINGS[name])
    for name, unit, edges, needs_ranks in (
        ("reverse_kl", "nats", _NATS, False),
        ("teacher_nll", "nats", _NATS, False),
        ("entropy", "nats", _ENTROPIES, True),
        ("logprob_gap", "nats", _NATS, True),
        ("rank", "", _PLACES, True),
        ("tail_mass", "", _SHARES, True),
    )
}


def token_figures(row: ScoredRow, *, has_ranks: bool) -> dict[str, Values]:
    """Every figure of a row by name.

    Without ranks of its candidates (codec `sampled`, or none at all) those that need them are left
    out.
    """
    teacher = row.teacher_logprobs.astype(np.float64)
    found = {
        "reverse_kl": row.behavior_logprobs.astype(np.float64) - teacher,
        "teacher_nll": -teacher,
    }
    if not has_ranks:
        return found
    outside, place = drawn_places(row)
    first = row.teacher_top_logprobs[:, 0].astype(np.float64)
    gap = np.where(place == 0, 0.0, np.maximum(first - teacher, 0.0))
    return {
        **found,
        "entropy": entropy_bound(row),
        "logprob_gap": gap,
        "rank": np.where(outside, candidate_counts(row), place) + 1.0,
        "tail_mass": np.exp(row.teacher_tail_logprobs.astype(np.float64)),
    }


def entropy_bound(row: ScoredRow) -> Values:
    """Entropy of the teacher's K + 1 outcomes: merging outcomes can only lower it [T], nats."""
    outcomes = np.concatenate(
        [row.teacher_top_logprobs, row.teacher_tail_logprobs[:, None]], axis=1
    ).astype(np.float64)
    present = np.isfinite(outcomes)
    finite = np.where(present, outcomes, 0.0)
    return -(np.exp(finite) * finite * present).sum(1)


def candidate_counts(row: ScoredRow) -> NDArray[np.int64]:
    """Candidates that each position has [T]; what fills it up is not counted."""
    return np.isfinite(row.teacher_top_logprobs).sum(1)


def drawn_places(row: ScoredRow) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Whether the drawn token is outside the candidates, and its place among them [T]."""
    same = row.teacher_top_ids == np.asarray(row.completion_ids)[:, None]
    same &= np.isfinite(row.teacher_top_logprobs)
    outside = ~same.any(1)
    return outside, np.where(outside, -1, same.argmax(1))


_SPELLED_OUT = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, surrogates, separators of lines
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders put for bytes of an unfinished character


class TokenText:
    """Decodes ids one by one with the tokenizer that made them.

    A tokenizer may drop the space before a first token and may need several tokens for one
    character, so a token is read as what it adds to the tokens before it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def whole(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of ids, with or without special tokens."""
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )

    def pieces(self, ids: Sequence[int], *, before: int | None = None) -> list[str]:
        """What each id adds to the text; empty where a later id ends the character.

        `before` is the id in front of the first, if any.
        """
        known = [] if before is None else [before]
        all_ids = [*known, *ids]
        start, read = 0, len(known)
        found: list[str] = []
        for end in range(len(known) + 1, len(all_ids) + 1):
            old, new = self.whole(all_ids[start:read]), self.whole(all_ids[start:end])
            is_last = end == len(all_ids)
            if new.endswith(UNFINISHED) and not is_last and end - read < 4:
                found.append("")
                continue
            found.append(new[len(old) :])
            start, read = read, end
        return found

    def after(self, before: int, token: int) -> str:
        """What an id would add behind another."""
        return self.pieces([token], before=before)[0]


def visible(text: str) -> str:
    """Text whose control and format characters, but newlines, are spelled out.

    A rollout may hold anything, and a terminal or a page would obey it.
    """
    return "".join(_shown(character) for character in text)


def quoted(text: str) -> str:
    """One line: visible text in quotation marks, newlines spelled out."""
    return '"' + visible(text).replace("\n", "\\n") + '"'


def _shown(character: str) -> str:
    if character == "\n" or unicodedata.category(character) not in _SPELLED_OUT:
        return character
    return character.encode("unicode_escape").decode()
