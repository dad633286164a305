r"""Whether a completion's answer equals the reference, as mathematics.

Numbers, choices and words are compared here, exactly and at once; what is left goes to the library
math-verify in a process of its own (`opd_stream.tasks.algebra`). Which part of the text is the
answer is decided here alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from opd_stream.tasks.answers import in_plain_signs, is_balanced, named, spoken, words_opened
from opd_stream.tasks.numbers import in_one_notation, numbers_in, whole_number

LONGEST = 1000  # characters of an expression; what is longer is not read
DEEPEST = 20  # braces in braces; the time that math-verify takes doubles with each

Equal = Callable[[str, str], bool]  # (found, expected) as LaTeX -> whether math-verify says so

_SPANS = re.compile(
    r"\$\$(.{1,1000}?)\$\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)"
    r"|(?<![\\$\d])\$(?![\s$])([^$\n]{1,500}?)(?<![\s\\])\$(?![\d$])",
    re.DOTALL,
)
_ANSWER = re.compile(
    r"(?i:\banswers?\b(?:[^.\n=:]{0,60}?\b(?:is|are|be)\b|\W{0,4}[:=])(?:\s+(?:choice|option)\b)?)"
)
_END = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?![A-Za-z}])|[.;](?=\s|$)|,(?=\s)|\n")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree(?![A-Za-z])")
_SPACES = re.compile(r"(?<!\\)\\(?:quad|qquad|hspace\{[^{}]*\}|[,;: ])|~")
_UNIT = r"(?:cm|mm|km|kg|mg|ml|mL|ft|in|lb|oz|pm|am|hr|yd|mi|mph|kph|sq|[A-Za-z]{3,})"
_UNITS = re.compile(
    rf"(?<=[\d\s.)}}])(?!(?:xyz|abc|thousand|[mbtr]+illion)\b)(?<!\\){_UNIT}\b"
    r"(?:\s*/\s*[A-Za-z]+|\s+[A-Za-z]{2,})*\s*\.?\s*(?:\^\s*\{?\d\}?|[²³])?$"
)
_WORDED_UNIT = re.compile(
    r"(?<=\S)\s*\\(?:text|textrm|textbf|mathrm|mbox|operatorname)\s*\{[^{}]*\}"
    r"(?:\s*/?\s*\\(?:text|mathrm)\s*\{[^{}]*\})*(?:\s*\^\s*(?:\{-?\d\}|\d))?\s*$"
)
_NAMED = re.compile(r"[A-Za-z]\w?(?:_\{?\w+\}?)?'?(?:\([a-z0-9]\))?|\\[a-z]+|[\d\s.,+*/()$-]+")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*(?:\)|[.:](?=\s|$)|$)\s*(.*)", re.DOTALL)
_BASED = re.compile(r"([0-9A-F]+)(?:\s*_\s*\{?(\d+)\}?)?")  # digits in some base
_CONNECTED = re.compile(
    r"\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<=[\d}])\s*,?\s+(?:and|or)\s+(?=[-\d\\])"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer in one notation.

    Example:
        >>> read_answer("x = 12 cm").number
        Fraction(12, 1)
    """

    latex: str  # of one notation, without units, sizes and the signs of currencies
    number: Fraction | None  # its value, if it is one number
    is_percent: bool
    choice: str | None  # A to J
    words: str | None  # where it is plain text


def is_equal_mathematics(completion: str, reference: str, equal: Equal) -> bool:
    r"""Whether the completion's answer equals the reference.

    Of the completion counts the last `\boxed{}` or `####`; where there is none, what follows the
    last "answer"; else the last formula or number. Decimals are exact: 0.333 is not 1/3.

    Args:
        completion: as sampled.
        reference: bare LaTeX as in MATH-500, or a text that marks its answer likewise.
        equal: asked where comparing numbers, choices or words does not decide.
    """
    found = answer_of(completion)
    return found is not None and _is_same(
        read_answer(found), read_answer(reference_answer(reference)), equal
    )


def can_read(reference: str, is_expression: Callable[[str], bool]) -> bool:
    """Whether a reference can be compared with: a number, a choice, words, or an expression.

    Args:
        reference: as for `is_equal_mathematics`.
        is_expression: asked of other LaTeX.
    """
    answer = read_answer(reference_answer(reference))
    if answer.number is not None or answer.choice is not None or answer.words is not None:
        return True
    return _is_asked(answer.latex) and is_expression(answer.latex)


def _is_asked(latex: str) -> bool:
    return 0 < len(latex) <= LONGEST and is_balanced(latex, DEEPEST)


def reference_answer(reference: str) -> str:
    """The part of a reference that is the answer."""
    said = named(reference)
    return reference.strip() if said is None else said


def answer_of(completion: str) -> str | None:
    """The part of a completion that is its answer; None: there is none."""
    text = spoken(completion)
    said = named(text)
    if said is not None:
        return said
    text = text.replace("\\$", "")
    for found in reversed(list(_ANSWER.finditer(text))[-3:]):
        if said := _first_answer(text[found.end() : found.end() + LONGEST]):
            return said
    last = text.rstrip().rpartition("\n")[2].strip(" .!*$")
    if len(last) < 100 and re.match(r"[-+.\w\\({\[|=]", last) and not _END.search(last):
        return last
    spans = list(_SPANS.finditer(text))
    numbers = _numbers(text[spans[-1].end() :] if spans else text)
    return numbers[-1] if numbers else _content(spans[-1]) if spans else None


def read_answer(text: str) -> Answer:
    """An answer in one notation, and what it is; one that is too long is nothing."""
    if len(text) > LONGEST:
        return Answer(latex="", number=None, is_percent=False, choice=None, words=None)
    latex, is_percent = _cleaned(text)
    choice = _CHOICE.fullmatch(words_opened(latex).strip())
    if choice is not None and choice.group(2):
        latex, is_percent = _cleaned(choice.group(2))
    words = " ".join(words_opened(latex).split())
    is_words = re.fullmatch(r"[A-Za-z][A-Za-z' ,-]*[A-Za-z]", words) and "\\" not in words
    return Answer(
        latex=latex,
        number=_number_of(latex),
        is_percent=is_percent,
        choice=None if choice is None else choice.group(1),
        words=words.casefold() if is_words else None,
    )


def _is_same(found: Answer, expected: Answer, equal: Equal) -> bool:
    if expected.choice is not None and not expected.words and len(expected.latex) <= 3:
        return found.choice == expected.choice
    is_equation = "=" in found.latex and "=" in expected.latex
    if found.number is not None and expected.number is not None and not is_equation:
        values = {found.number}
        if found.is_percent != expected.is_percent:
            values.add(found.number / 100 if found.is_percent else found.number * 100)
        return expected.number in values
    bases = _BASED.fullmatch(found.latex), _BASED.fullmatch(expected.latex)
    if all(bases) and any(each and each.group(2) for each in bases):
        (digits, base), (digits_too, base_too) = (each.groups() for each in bases if each)
        return digits == digits_too and (base == base_too or None in (base, base_too))
    if found.words is not None and expected.words is not None:
        return found.words == expected.words
    if not _is_asked(found.latex) or not _is_asked(expected.latex):
        return False
    if found.latex.replace(" ", "") == expected.latex.replace(" ", ""):
        return True
    if _is_set(found.latex) and _is_interval(expected.latex):
        return False
    if _is_interval(found.latex) and _is_set(expected.latex):
        return False
    return equal(found.latex, expected.latex)


def _first_answer(text: str) -> str:
    """What a text begins with, or the first formula or number of its first sentence."""
    text = text.lstrip(" *:_=\n\t")
    start = _END.search(text)
    if start is None or start.start() > 0:
        return text[: None if start is None else start.start()].strip(" *!")
    sentence = re.split(r"\n\s*\n|\.(?=\s|$)", text, maxsplit=1)[0]
    span, numbers = _SPANS.search(sentence), _numbers(sentence)
    if span is not None:
        return _content(span)
    return numbers[0] if numbers else sentence.strip(" *")


def _content(span: re.Match[str]) -> str:
    return next(filter(None, span.groups()), "")


def _numbers(text: str) -> list[str]:
    text = in_one_notation(text)
    return [text[found.start : found.end] for found in numbers_in(text)]


def _cleaned(text: str) -> tuple[str, bool]:
    """A piece of LaTeX in one notation, and whether a percent sign was taken off it."""
    text = in_plain_signs(text).replace("\\!", "")
    text = re.sub(r"\\?[$€£¥]|\\[()\[\]]|\\displaystyle", "", text)
    text = re.sub(
        r"(?<=\d)(?:\{,\}|,\\!|\\[,;: ]|[\u00a0\u2007\u2009\u202f])(?=\d{3}(?!\d))", ",", text
    )
    text = _SPACES.sub(" ", _DEGREES.sub("", _SIZES.sub("", text)))
    text = re.sub(r"\\text\s*\{\s*(thousand|[mbtr]+illion)\s*\}", r" \1", text)
    text = _CONNECTED.sub(" , ", re.sub(r"\\[dtc]frac", r"\\frac", text))
    whole = re.fullmatch(r"\s*\\(?:text\w*|math\w+|mbox|operatorname)\s*\{([^{}]*)\}\s*", text)
    text = (whole.group(1) if whole is not None else text).strip(" \t\n*").rstrip(" .,;:*\\")
    is_percent = bool(re.search(r"%|\bpercent\b", text))
    text = re.sub(r"\\?%|\s*\bpercent\b", "", text)
    for _ in range(3):
        text = _UNITS.sub("", _WORDED_UNIT.sub("", text)) if re.search(r"\d", text) else text
    return text.strip(" \t\n").rstrip(" .,;:"), is_percent


def _number_of(latex: str) -> Fraction | None:
    """The value of a number, or of the last side of an equation of names and numbers."""
    *names, last = latex.removeprefix("=").split("=")
    if all(_NAMED.fullmatch(name.strip()) for name in names):
        return whole_number(last)
    return None


def _is_set(latex: str) -> bool:
    return latex.startswith("\\{") and latex.endswith("\\}")


def _is_interval(latex: str) -> bool:
    return latex[0] in "([" and latex[-1] in ")]"
