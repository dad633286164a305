"""What a tokenizer means, whatever its files look like, and whether two read each other's tokens.

The library that reads `tokenizer.json` writes it again in one form: merges, legacy fields and
defaults look the same, and ids are those that it really gives. What changes no token (truncation,
padding, offsets, order of keys) is left out. So a tokenizer that was saved again stays the same.

The identity holds all that changes ids or text. A pair needs less: the ids that both have must
stand for the same, and both must cut the inside of a text alike. How a text begins and ends is the
student's alone, since prompts are tokenised once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from opd_stream.cross_tokenizer.byte_tokenizer import Json, drops_spaces, without_edges
from opd_stream.errors import UserError
from opd_stream.store.files import canonical_json, sha256

MOST_ID = 2**24 - 1  # the library walks through all ids up to the largest
CUTS_TOKENS = ("single_word", "lstrip", "rstrip", "normalized")  # flags of added tokens
PROBES = (
    "The quick brown fox doesn't jump; it'll've RUN. I'M WE'RE don’t",
    "1234567890 3.14 12,345 1e-9 0x1F ½ ² ٣٤ 2024-01-31 5 + 7 = 12",
    "  two  spaces   three\tab\n\nline\r\nend \n x  ",
    "def f(x):\n    return x[0] != {'a': 1}  # ok\n\n\n\tpass",
    "naïve café cafe\u0301 Größe ﬁ Å Å İ ß ＡＢ１２ ™ … — “quoted”",
    "漢字かなカナ 한국어 кириллица עברית العربية हिन्दी ไทย",
    "😀 👩‍👩‍👧 🇩🇪 \u200b\u00a0\u3000\ufeff\x00\x7f",
    "https://example.org/a_b?c=d&e=%20 user@host <tag/> ▁ Ġ ## </w> _x_ $a^2$ \\frac{1}{2}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerMeaning:
    """A tokenizer in one form.

    Example:
        >>> read_meaning(Path("models/student/tokenizer.json")).pieces["Ġthe"]
        279
    """

    kind: str  # BPE, Unigram, WordPiece or WordLevel
    pieces: Mapping[str, int]  # of the model's vocabulary; an added token may be one
    scores: tuple[float, ...]  # of the pieces, in their order; Unigram alone
    merges: tuple[tuple[str, str], ...]  # best first; BPE alone
    added: Mapping[str, Json]  # content -> id, special and CUTS_TOKENS
    options: Json  # of the model, those that are set
    normalizer: tuple[Json, ...]  # steps
    pre_tokenizer: tuple[Json, ...]
    decoder: tuple[Json, ...]
    before: tuple[int, ...]  # ids that are put in front of a text
    after: tuple[int, ...]
    specification: Json = field(repr=False)  # what all this was read from

    @property
    def names(self) -> dict[int, str]:
        """Id -> what it stands for."""
        own = {number: piece for piece, number in self.pieces.items()}
        return own | {token["id"]: content for content, token in self.added.items()}

    @property
    def digest(self) -> str:
        """The identity of the tokenizer."""
        parts = [
            *(self.kind, self.pieces, self.scores, self.merges, self.added, self.options),
            *(self.normalizer, self.pre_tokenizer, self.decoder, self.before, self.after),
        ]
        return sha256(canonical_json(parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerComparison:
    """Whether ids mean the same to a student and a teacher.

    Example:
        >>> compare_tokenizers(qwen, llama).difference
        'id 0 is "!" for the student and "<unk>" for the teacher (31,990 of 32,000 shared ids ...'
    """

    difference: str | None = None  # the first that matters; None: each reads the other's tokens
    aligns: bool = True  # both can be read as bytes
    remarks: tuple[str, ...] = ()  # what differs and changes no id inside a text
    student_only: tuple[int, ...] = ()  # ids that the teacher's tokenizer lacks
    teacher_only: tuple[int, ...] = ()


def reads_otherwise(tokenizer: Any, path: Path) -> bool:
    """Whether a tokenizer of transformers cuts texts otherwise than the file that it was read from.

    Classes of some families build their parts anew, and keep of the file only the vocabulary.
    """
    from tokenizers import Tokenizer

    written: Any = Tokenizer.from_file(str(path))
    written.no_truncation()
    written.no_padding()
    try:
        own: list[list[int]] = tokenizer(list(PROBES), add_special_tokens=False)["input_ids"]
    except Exception:  # parts of another family's, without a token that they need
        return True
    if own == [each.ids for each in written.encode_batch(list(PROBES), add_special_tokens=False)]:
        return False
    found = compare_tokenizers(read_meaning(path), tokenizer_meaning(tokenizer.backend_tokenizer))
    return found.difference is not None


def read_meaning(path: Path) -> TokenizerMeaning:
    """Read a `tokenizer.json`.

    Raises:
        UserError: it is no tokenizer that the library reads.
    """
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        tokenizer, written = Tokenizer.from_str(text), json.loads(text)
        _check_ids(written)
        return tokenizer_meaning(tokenizer, named=written.get("added_tokens"))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is no readable tokenizer ({reason}); copy the checkpoint again"
        ) from error


def tokenizer_meaning(tokenizer: Any, *, named: Sequence[Json] | None = None) -> TokenizerMeaning:
    """The meaning of a `tokenizers.Tokenizer`.

    Args:
        tokenizer: to read.
        named: added tokens of its file; the library passes over an id that is taken there.

    Raises:
        ValueError: a post-processor puts what is no token.
    """
    found: Json = json.loads(tokenizer.to_str())
    model: Json = dict(found["model"])
    vocabulary, merges = model.pop("vocab"), model.pop("merges", ())
    scores: tuple[float, ...] = ()
    if isinstance(vocabulary, list):
        scored = cast("list[tuple[str, float]]", vocabulary)
        scores = tuple(score for _, score in scored)
        vocabulary = {piece: number for number, (piece, _) in enumerate(scored)}
    pieces: dict[str, int] = vocabulary
    added: dict[str, Json] = {
        token["content"]: {name: value for name, value in token.items() if name != "content"}
        for token in found["added_tokens"]
    }
    for token in named or ():
        if token["content"] in added:
            added[token["content"]]["id"] = token["id"]
    before, after = _around(found["post_processor"])
    return TokenizerMeaning(
        kind=model.pop("type"),
        pieces=pieces,
        scores=scores,
        merges=tuple((left, right) for left, right in merges),
        added=added,
        options=_set_fields(model),
        normalizer=_steps(found["normalizer"]),
        pre_tokenizer=_steps(found["pre_tokenizer"]),
        decoder=tuple(map(_decoding, _steps(found["decoder"]))),
        before=before,
        after=after,
        specification={key: part for key, part in found.items() if key != "post_processor"},
    )


def _check_ids(written: Json) -> None:
    """Refuse ids that no model has; what else may be wrong the library has seen."""
    vocabulary = written["model"]["vocab"]
    ids = [token["id"] for token in written.get("added_tokens", ())]
    ids += vocabulary.values() if isinstance(vocabulary, dict) else ()
    if ids and max(ids) > MOST_ID:
        raise ValueError(f"it names id {max(ids)}; no model has more than {MOST_ID + 1}")


def compare_tokenizers(student: TokenizerMeaning, teacher: TokenizerMeaning) -> TokenizerComparison:
    """Whether each reads the other's tokens; one may have more added tokens."""
    one, other = student.names, teacher.names
    difference = next(_differences(student, teacher, one, other), None)
    return TokenizerComparison(
        difference=difference,
        aligns=not any(drops_spaces(each.specification) for each in (student, teacher)),
        remarks=() if difference else tuple(_remarks(student, teacher)),
        student_only=tuple(sorted(one.keys() - other.keys())),
        teacher_only=tuple(sorted(other.keys() - one.keys())),
    )


def _differences(
    student: TokenizerMeaning, teacher: TokenizerMeaning, one: dict[int, str], other: dict[int, str]
) -> Iterator[str]:
    """What makes ids mean other things, the plainest first."""
    shared = one.keys() & other.keys()
    unlike = [number for number in shared if one[number] != other[number]]
    if unlike:
        first = min(unlike)
        rest = f" ({len(unlike):,} of {len(shared):,} shared ids differ)" if unlike[1:] else ""
        yield f"id {first} is {_quoted(one[first])} for the student and " + (
            f"{_quoted(other[first])} for the teacher{rest}"
        )
    ids = {name: number for number, name in other.items()}
    for number, name in one.items():
        if ids.get(name, number) != number:
            yield f"{_quoted(name)} is id {number} for the student and {ids[name]} for the teacher"
    for role, mine, theirs in (("student", student, other), ("teacher", teacher, one)):
        known = set(theirs.values())
        lacking = {n: p for p, n in mine.pieces.items() if p not in known and p not in mine.added}
        if lacking:
            first = min(lacking)
            yield f"id {first}, {_quoted(lacking[first])}, is a piece of the {role}'s alone"
    if student.kind != teacher.kind:
        yield f"the student's tokenizer is {student.kind}, the teacher's {teacher.kind}"
    yield from _first_unlike("merge", student.merges, teacher.merges)
    yield from _first_unlike("score", student.scores, teacher.scores)
    dropouts = [each.options.get("dropout", 0) for each in (student, teacher)]
    if dropouts[0] != dropouts[1]:
        yield f"the student leaves out merges at a rate of {dropouts[0]}, the teacher {dropouts[1]}"
    if written := _written_differently(student, teacher):
        yield from _cut_differently(student, teacher, " and ".join(written))
        yield from _unlike_steps(student, teacher)


def _first_unlike(what: str, student: Sequence[Any], teacher: Sequence[Any]) -> Iterator[str]:
    for place, (left, right) in enumerate(zip(student, teacher, strict=False)):
        if left != right:
            said = [_quoted(" ".join(x) if what == "merge" else str(x)) for x in (left, right)]
            yield f"{what} {place} is {said[0]} for the student and {said[1]} for the teacher"
            return
    if len(student) != len(teacher):
        yield f"the student has {len(student):,} {what}s, the teacher {len(teacher):,}"


def _written_differently(student: TokenizerMeaning, teacher: TokenizerMeaning) -> list[str]:
    """Parts that decide where a text is cut, and do not look the same."""
    parts = {
        "normalizers": (student.normalizer, teacher.normalizer),
        "pre-tokenizers": (student.pre_tokenizer, teacher.pre_tokenizer),
        "options of the model": (student.options, teacher.options),
    }
    return [name for name, (left, right) in parts.items() if left != right]


def _cut_differently(
    student: TokenizerMeaning, teacher: TokenizerMeaning, what: str
) -> Iterator[str]:
    """The first text that is not cut alike: of some that are hard to cut, and of all pieces."""
    left, right = _inner_tokenizer(student), _inner_tokenizer(teacher)
    names, added = student.names, student.added.keys() | teacher.added.keys()
    pieces = [[number] for number, name in names.items() if name not in added]
    own: list[str] = left.decode_batch(pieces)
    words = [word for text in PROBES for word in text.split()]
    for texts in ([*words, *PROBES], [*own, *(f"a {text} b" for text in own)]):
        cut = [each.encode_batch_fast(texts, add_special_tokens=False) for each in (left, right)]
        for text, one, other in zip(texts, *cut, strict=True):
            if one.ids != other.ids:
                said = [_said([names.get(n, str(n)) for n in ids]) for ids in (one.ids, other.ids)]
                yield f"the {what} differ: {_quoted(text)} is {said[0]} for the student and " + (
                    f"{said[1]} for the teacher"
                )
                return


def _unlike_steps(student: TokenizerMeaning, teacher: TokenizerMeaning) -> Iterator[str]:
    """The first step that only one has; no text shows it, but there may be one that would."""
    for what in ("normalizer", "pre_tokenizer"):
        steps = [_inner_steps(getattr(each, what)) for each in (student, teacher)]
        for role, mine, theirs in (("student", *steps), ("teacher", *reversed(steps))):
            for step in mine:
                if step not in theirs:
                    told = " ".join(map(str, _leaves(step)))
                    yield f"only the {role}'s {what} has the step {told:.80}"
        if steps[0] != steps[1]:
            yield f"the {what}s have the same steps in another order"


def _inner_steps(steps: Sequence[Json]) -> list[Json]:
    """Steps but for marks of spaces, which a tokenizer may write in either of two parts."""
    inner: list[Json] = []
    for step in steps:
        marks = step["type"] == "Prepend" or step.get("pattern") == {"String": " "}
        if step["type"] == "Metaspace" and "split" in step:
            inner.append({"type": "Metaspace", "split": True})
        elif step["type"] != "Metaspace" and not marks:
            inner.append({name: part for name, part in step.items() if name != "add_prefix_space"})
    return inner


def _leaves(part: Any) -> Iterator[Any]:
    for value in cast(Json, part).values() if isinstance(part, dict) else (part,):
        yield from _leaves(value) if isinstance(value, dict) else (value,)


def _inner_tokenizer(meaning: TokenizerMeaning) -> Any:
    """The tokenizer of what stands inside a text; without dropout."""
    from tokenizers import Tokenizer

    inner = without_edges(meaning.specification)
    model = {name: value for name, value in inner["model"].items() if name != "dropout"}
    tokenizer: Any = Tokenizer.from_str(json.dumps({**inner, "model": model}))
    tokenizer.encode_special_tokens = True  # what only looks like one is text
    return tokenizer


def _remarks(student: TokenizerMeaning, teacher: TokenizerMeaning) -> Iterator[str]:
    """What differs between two tokenizers that read each other's tokens."""
    for what in ("before", "after"):
        left, right = (
            _said([each.names.get(n, str(n)) for n in getattr(each, what)]) or "nothing"
            for each in (student, teacher)
        )
        if left != right:
            yield f"the student's tokenizer puts {left} {what} a text, the teacher's {right}"
    if written := _written_differently(student, teacher):
        yield f"the {' and '.join(written)} are written differently, and cut texts alike"
    for content in student.added.keys() & teacher.added.keys():
        flags = [
            [name for name in CUTS_TOKENS if each.added[content][name]]
            for each in (student, teacher)
        ]
        if flags[0] != flags[1]:
            said = [" and ".join(each) or "no flag" for each in flags]
            yield f"{content} has {said[0]} for the student, {said[1]} for the teacher"
    if student.decoder != teacher.decoder:
        yield "the decoders differ; completions are read with the student's"


def _steps(part: Any) -> tuple[Json, ...]:
    """The steps of a normaliser, a pre-tokenizer or a decoder, with the fields that are set."""
    if part is None:
        return ()
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in part:
            return tuple(step for inner in part[name] for step in _steps(inner))
    return (_set_fields(part),)


def _set_fields(part: Json) -> Json:
    """Fields that change a token: null, false and empty ones are as good as missing."""
    return {
        name: value
        for name, value in part.items()
        if name != "trim_offsets" and value is not None and value is not False and value != ""
    }


def _decoding(step: Json) -> Json:
    """A step of a decoder with what it reads; all kinds keep the fields of their pre-tokenizer."""
    unread = {"ByteLevel": ("add_prefix_space", "use_regex"), "Metaspace": ("split",)}
    return {name: value for name, value in step.items() if name not in unread.get(step["type"], ())}


def _around(processor: Json | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a post-processor puts in front of a single text, and behind it."""
    before: list[int] = []
    after: list[int] = []
    steps: list[Json] = [] if processor is None else processor.get("processors", [processor])
    for step in steps:
        first: list[int] = []
        last: list[int] = []
        if step["type"] == "TemplateProcessing":
            put = first
            for part in step["single"]:
                if "Sequence" in part:
                    put = last
                elif (name := part["SpecialToken"]["id"]) in step["special_tokens"]:
                    put += step["special_tokens"][name]["ids"]
                else:
                    raise ValueError(f"its post-processor puts {name!r}, which has no id")
        elif "cls" in step:
            first, last = [step["cls"][1]], [step["sep"][1]]
        before, after = first + before, after + last
    return tuple(before), tuple(after)


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else text[:60] + "…", ensure_ascii=False)


def _said(tokens: Sequence[str]) -> str:
    return " ".join(_quoted(token) for token in tokens[:12]) + (" …" if tokens[12:] else "")
