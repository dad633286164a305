"""The text of single tokens, as it stands in its sentence."""

import unicodedata
from collections.abc import Sequence
from typing import Any

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

        Args:
            ids: in order.
            before: the id in front of the first, if any.
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
