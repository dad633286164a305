r"""Numbers as people and models write them, read exactly and as a whole.

Read are signs, thousands (`1,234`, `1{,}234`, `1\,234`), decimals (`.5`), fractions (`3/4`,
`\frac{3}{4}`, `1 1/2`, `½`), powers and scientific notation (`2^{10}`, `3e8`, `3\times10^8`), and
`0.\overline{3}`. What is part of something else (`3.1.2`, `12:30`, `3,14`, `\sqrt{2}`) has no
value, rather than that of the part.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from opd_stream.tasks.answers import in_plain_signs, named, without_words, words_opened

MOST_DIGITS = 1000  # of a number or of its power; what is longer has no value

_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_LARGE = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_FRACTION = "\x01"  # in front of one, until it is known whether a whole number is
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}%])[+-]|(?<=[=:])\s*[+-]\s)?(?:\\?[$€£¥]\s?)?
    (?P<base>{_INTEGER}(?:\.\d*\\overline\{{(?P<again>\d+)\}}|\.\d+)?|(?<![\w.)}}])\.\d+)
    (?:\^(?P<power>[+-]?\d+)|[eE](?P<e>[+-]?\d+)(?!\w))?
    (?:\ ?[*x]\ ?10\^(?P<ten>[+-]?\d+)|(?:\ (?P<over>\d+))?\ ?/\ ?(?P<under>-?{_INTEGER}))?
    (?P<more>(?:[.,:/]\d[\d,]*)+)?""",
    re.VERBOSE | re.ASCII,
)
_PART_BEFORE = re.compile(r"(?:\\sqrt\s*(?:\[\d+\])?\s*\{?|√|\}\s*\{|[A-Za-z)}]\s*/)\s*$")
_NAME_BEFORE = re.compile(r"(?:(?<![\\A-Za-z])[A-Za-z]+|[_^]\s*\{?-?)$")
_PART_AFTER = re.compile(r"\s*(?:\\sqrt|\\pi(?![A-Za-z])|\\frac|[√π]|\)?\s*\^)")
_LIST = re.compile(r"\s*(?:,|and|or|[-+*/])\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberIn:
    """A number of a text.

    Example:
        >>> [each.value for each in numbers_in("1/2 of 3.1.2 is .25")]
        [Fraction(1, 2), None, Fraction(1, 4)]
    """

    start: int  # place in the text after `in_one_notation`
    end: int
    value: Fraction | None  # None: it is part of something else, or too long


def final_number(text: str) -> Fraction | None:
    """The number that a text ends in: that of its last box or `####`, else the last one.

    A list or a sum is no number; of an equation the last side counts. None: there is no number.
    """
    said = named(text)
    if said is None:
        found = numbers_in(text)
        return found[-1].value if found else None
    for part in (without_words(said), words_opened(said)):
        for side in (part.rpartition("=")[2], part):
            if found := numbers_in(side):
                between = in_one_notation(side)[found[0].end : found[1].start] if found[1:] else ""
                return None if _LIST.fullmatch(between) else found[0].value
    return None


def whole_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else; None: it is not.

    Example:
        >>> whole_number(r"-1{,}234.50"), whole_number("8 apples")
        (Fraction(-2469, 2), None)
    """
    found = _NUMBER.fullmatch(in_one_notation(text).strip())
    return None if found is None else _value(found)


def numbers_in(text: str) -> list[NumberIn]:
    """The numbers of a text, in order; not the digits of names and units (`H2O`, `cm^2`)."""
    return list(_numbers(in_one_notation(text)))


def in_one_notation(text: str) -> str:
    r"""The same text with its numbers in one notation: `\frac{1}{2}` as 1/2, `10^{8}` as 10^8."""
    text = in_plain_signs(text).replace(_FRACTION, "")
    if not text.isascii():
        text = re.sub(f"[{_VULGAR}]", lambda found: _FRACTION + _plain(found.group()), text)
        text = re.sub("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + m.group().translate(_SUPERSCRIPT), text)
        text = re.sub(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))", ",", text)
        text = text.replace("×", "*").replace("·", "*")
    if "\\" in text or "{" in text:
        text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\[,;: ])(?=\d{3}(?!\d))", ",", text)
        text = re.sub(r"\\!", "", text)
        text = re.sub(
            rf"\\[dtc]?frac\s*\{{\s*(-?{_INTEGER})\s*\}}\s*\{{\s*(-?{_INTEGER})\s*\}}",
            rf"{_FRACTION}\1/\2 ",
            text,
        )
        text = re.sub(r"\\[dtc]?frac\s*(\d)\s*(\d)", rf"{_FRACTION}\1/\2 ", text)
        text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "*", text)
    text = re.sub(r"\s+", lambda found: "\n" if "\n" in found.group() else " ", text)
    text = re.sub(rf"(?<=\d) ?{_FRACTION}", " ", text).replace(_FRACTION, "")  # 1\frac{1}{2}
    for word, power in _LARGE.items():
        text = re.sub(rf"(?<=\d) ?{word}s?\b", f"*10^{power}", text) if word in text else text
    text = re.sub(r"(?<=[\w)\]}])\*\*(?=[-+(]?\d)", "^", text)
    return re.sub(r" ?\^ ?(?:\{ ?([+-]?\d+) ?\}|\(([+-]?\d+)\)|([+-]?\d+))", r"^\1\2\3", text)


def _plain(vulgar: str) -> str:
    return unicodedata.normalize("NFKC", vulgar).replace("\u2044", "/")


def _numbers(text: str) -> Iterator[NumberIn]:
    for found in _NUMBER.finditer(text):
        before = text[max(0, found.start() - 20) : found.start()]
        if _NAME_BEFORE.search(before):
            continue
        is_part = _PART_BEFORE.search(before) or _PART_AFTER.match(text, found.end())
        is_part = is_part or before.endswith("-(")
        yield NumberIn(
            start=found.start(), end=found.end(), value=None if is_part else _value(found)
        )


def _value(found: re.Match[str]) -> Fraction | None:
    base, power, ten = found["base"], found["power"], found["ten"] or found["e"]
    longest = len(base) * max(1, abs(_small(power))) + abs(_small(ten)) + len(found["under"] or "")
    if found["more"] or longest > MOST_DIGITS:
        return None
    value = _decimal(base, found["again"])
    if not value and "-" in (power or ""):
        return None
    value = value ** int(power or 1) * Fraction(10) ** int(ten or 0)
    if found["under"]:
        under, over = _decimal(found["under"], None), Fraction(found["over"] or 0)
        if under == 0 or (found["over"] and (value.denominator != 1 or over >= under)):
            return None
        value = value + over / under if found["over"] else value / under
    return -value if "-" in (found["sign"] or "") else value


def _decimal(text: str, again: str | None) -> Fraction:
    """A decimal number, whose last digits `again` repeat without end."""
    digits = text.partition("\\")[0].replace(",", "")
    value = Fraction(digits.removesuffix(".") or 0)
    if again is None:
        return value
    places = len(digits.partition(".")[2])
    return value + Fraction(int(again), (10 ** len(again) - 1) * 10**places)


def _small(digits: str | None) -> int:
    """An exponent, or one that is too large where it has many digits."""
    if digits is None:
        return 0
    return int(digits) if len(digits) < 8 else 10**8
