r"""Where a text says its answer: behind its thoughts, in its last box, behind its last mark.

A completion may be cut off, repeat itself or hold half a formula, so nothing here raises and each
function reads its text once.
"""

import re
import unicodedata

MARK = "####"  # before the answer, in GSM8K
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_TERM = re.compile(r"-?[\d.,]*\d|\\?[A-Za-z]+|\S")  # what a box without braces holds
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|hbox)\s*\{([^{}]*)\}")
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d))?"  # of a unit
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"))


def spoken(completion: str) -> str:
    r"""What a completion says: behind its last `</think>`, and before a `<think>` or box left open.

    A completion that was cut inside its thoughts has said nothing, and one cut inside its box has
    no answer there. Where the prompt opened the thoughts and nothing closes them they cannot be
    told from an answer, and are taken for one.

    Example:
        >>> spoken("<think>5? 6?</think>It is 6."), spoken("<think>5?"), spoken(r"So \boxed{1")
        ('It is 6.', '', 'So ')
    """
    text = completion.rpartition("</think>")[2].partition("<think>")[0]
    close = _closing_braces(text)
    for found in _BOX.finditer(text):
        if text[found.end() : found.end() + 1] == "{" and found.end() not in close:
            return text[: found.start()]
    return text


def last_box(text: str) -> str | None:
    r"""What the last box with something in it holds; None: there is none.

    Read are `\boxed{}` and `\fbox{}` with braces in braces, and `\boxed 3`. A box that nothing
    closes is no box.

    Example:
        >>> last_box(r"\boxed{2}, no, \boxed{\frac{1}{3}}. \boxed{}")
        '\\frac{1}{3}'
    """
    return _last_box(text)[1]


def marked(text: str) -> str | None:
    """The first line behind the last `####` that has something behind it; None: there is none."""
    return _last_mark(text)[1]


def named(text: str) -> str | None:
    """What the text itself names as its answer: the last box or mark, whichever comes later."""
    return max(_last_mark(text), _last_box(text), key=lambda found: found[0])[1]


def _last_box(text: str) -> tuple[int, str | None]:
    """Its place in the text and what it holds; (-1, None): there is none."""
    close = _closing_braces(text)
    for found in reversed(list(_BOX.finditer(text))):
        start = found.end()
        if text[start : start + 1] == "{":
            inner = text[start + 1 : close[start]] if start in close else ""
        else:
            one = _TERM.match(text, start)
            inner = one.group() if one is not None else ""
        if inner.strip(" {}$\n\t"):
            return start, inner.strip()
    return -1, None


def _last_mark(text: str) -> tuple[int, str | None]:
    """The place of the mark, and what it marks; (-1, None): there is none."""
    end = len(text)
    while (start := text.rfind(MARK, 0, end)) >= 0:
        lines = [line.strip() for line in text[start + 4 : end].splitlines() if line.strip()]
        if lines:
            return start, lines[0]
        end = start
    return -1, None


def in_plain_signs(text: str) -> str:
    """Digits of other scripts as 0 to 9, and every dash that may be a minus sign as `-`."""
    if text.isascii():
        return text
    found = text.translate(_MINUS)
    return "".join(
        str(unicodedata.decimal(sign)) if not sign.isascii() and sign.isdecimal() else sign
        for sign in found
    )


def without_words(latex: str) -> str:
    r"""The same without `\text{...}` and the power of a unit, as in `5 \text{ cm}^2`."""
    return re.sub(_WORDS.pattern + _POWER, " ", latex)


def words_opened(latex: str) -> str:
    r"""The same with what stands in `\text{...}` as plain text."""
    return _WORDS.sub(r" \1 ", latex)


def is_balanced(latex: str, deepest: int) -> bool:
    """Whether every brace is closed, none that was not opened, and none lies too deep."""
    depth = 0
    for found in _BRACES.finditer(latex):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if not 0 <= depth <= deepest:
            return False
    return depth == 0


def _closing_braces(text: str) -> dict[int, int]:
    """Place of each opening brace -> place of the one that closes it; `\\{` is none."""
    waiting: list[int] = []
    close: dict[int, int] = {}
    for found in _BRACES.finditer(text):
        if found.group() == "{":
            waiting.append(found.start())
        elif found.group() == "}" and waiting:
            close[waiting.pop()] = found.start()
    return close
