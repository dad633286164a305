"""A Hugging Face tokenizer as a table of bytes: what a token is, and where it ends in a text.

Shapes: U tokens.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opd_stream.errors import UserError

Json = dict[str, Any]  # of tokenizer.json
SPACES_LOST = ("WordPiece", "BPEDecoder", "CTC")  # decoders that put spaces where tokens have none
FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A text in the tokens of one tokenizer."""

    ids: NDArray[np.int64]  # [U]
    ends: NDArray[np.int64]  # [U], byte of the text behind the token, never falling
    exact: NDArray[np.bool_]  # [U], the token stands for just these bytes


class ByteTokenizer:
    """A fast tokenizer as a table of bytes: byte-level, or metaspace with or without fall-back.

    Example:
        >>> ByteTokenizer(AutoTokenizer.from_pretrained(folder), "models/teacher").read("Hi").ends
        array([2])
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Read the vocabulary of a Hugging Face tokenizer; `name` is for messages.

        Raises:
            UserError: it is not fast, or its tokens do not say which bytes they are.
        """
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"the tokenizer of {name} is not a fast one (tokenizer.json), which alignment "
                "reads; save it with a fast tokenizer"
            )
        spec: Json = json.loads(backend.to_str())
        if drops_spaces(spec):
            raise UserError(
                f"the tokenizer of {name} ({spec['model']['type']}) drops spaces between its "
                "tokens; scores.alignment of kind bytes reads byte-level and metaspace "
                "tokenizers; use another model"
            )
        added = backend.get_added_tokens_decoder()
        self.name = name
        self.special = {number: token.content for number, token in added.items() if token.special}
        self.special_ids = {content: number for number, content in self.special.items()}
        self.pieces: dict[int, str] = {n: p for p, n in backend.get_vocab().items()}
        self.bytes_of = _bytes_of_pieces(spec, self.pieces)
        for number, token in added.items():
            self.bytes_of[number] = token.content.encode()
        for number in self.special:
            del self.bytes_of[number]
        self._raw: Any = backend.__class__.from_str(json.dumps(without_edges(spec)))
        self._raw.encode_special_tokens = True  # what only looks like a special token is text

    def read(self, text: str) -> Reading:
        """Tokenise a text that stands behind another one: nothing is put in front."""
        encoding, data = self._raw.encode(text, add_special_tokens=False), text.encode()
        ids = np.array(encoding.ids, np.int64)
        parts = [self.bytes_of.get(token) for token in ids.tolist()]
        spelled = [part for part in parts if part is not None]
        if len(spelled) == len(parts) and b"".join(spelled) == data:
            ends = np.cumsum([len(part) for part in spelled], dtype=np.int64)
            return Reading(ids=ids, ends=ends, exact=np.ones(len(ids), np.bool_))
        marks = np.cumsum([0, *(len(char.encode()) for char in text)], dtype=np.int64)
        ends = np.maximum.accumulate(marks[[end for _, end in encoding.offsets]])
        ends[-1:] = len(data)
        starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
        exact = [
            part == data[start:end] for part, start, end in zip(parts, starts, ends, strict=True)
        ]
        return Reading(ids=ids, ends=ends, exact=np.array(exact, np.bool_))


def drops_spaces(spec: Json) -> bool:
    """Whether tokens of a tokenizer do not say where spaces are."""
    model = spec["model"]
    kinds = {part["type"] for part in _parts(spec["decoder"])}
    suffix = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return bool(suffix) or model["type"] == "WordPiece" or bool(kinds & set(SPACES_LOST))


def _bytes_of_pieces(spec: Json, pieces: dict[int, str]) -> dict[int, bytes]:
    """The bytes of each piece of a vocabulary; the unknown token and odd pieces have none."""
    model = spec["model"]
    parts = [*_parts(spec["decoder"]), *_parts(spec["pre_tokenizer"]), *_parts(spec["normalizer"])]
    unknown = model.get("unk_token")
    if isinstance(model.get("unk_id"), int):
        unknown = pieces[model["unk_id"]]
    space = {part["replacement"] for part in parts if part["type"] == "Metaspace"} | {
        part["pattern"].get("String")
        for part in parts
        if part["type"] == "Replace" and part.get("content") == " "
    }
    byte_level = any(part["type"] == "ByteLevel" for part in parts)
    falls_back = model.get("byte_fallback") or any(p["type"] == "ByteFallback" for p in parts)
    alphabet = _byte_alphabet()
    spelled: dict[int, bytes] = {}
    for number, piece in pieces.items():
        byte = fallback_byte(piece) if falls_back else None
        if piece == unknown:
            continue
        if byte_level:
            if all(char in alphabet for char in piece):
                spelled[number] = bytes(alphabet[char] for char in piece)
        elif byte is not None:
            spelled[number] = bytes([byte])
        else:
            for mark in space:
                piece = piece.replace(mark, " ") if mark else piece
            spelled[number] = piece.encode()
    return spelled


def without_edges(spec: Json) -> Json:
    """A tokenizer that puts nothing in front of a text, behind it or around it."""
    inner = {name: _without_prefix(spec[name]) for name in ("normalizer", "pre_tokenizer")}
    return {**spec, "post_processor": None, "truncation": None, "padding": None, **inner}


def _without_prefix(part: Any) -> Any:
    """The same, for a part of the tokenizer's JSON."""
    if isinstance(part, list):
        items = cast(list[Any], part)
        return [_without_prefix(item) for item in items if not _prepends(item)]
    if not isinstance(part, dict):
        return part
    if _prepends(part):
        return None
    changed = {key: _without_prefix(value) for key, value in cast(Json, part).items()}
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return changed


def _prepends(part: Any) -> bool:
    return isinstance(part, dict) and cast(Json, part).get("type") == "Prepend"


def _parts(part: Json | None) -> list[Json]:
    """The steps of a decoder, a pre-tokenizer or a normaliser."""
    if part is None:
        return []
    inner = part.get("decoders") or part.get("pretokenizers") or part.get("normalizers")
    return [part] if inner is None else [step for item in inner for step in _parts(item)]


def fallback_byte(piece: str) -> int | None:
    """The byte of `<0x0A>`; None of any other piece."""
    found = FALLBACK.fullmatch(piece)
    return None if found is None else int(found.group(1), 16)


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {
        **{chr(byte): byte for byte in plain},
        **{chr(256 + place): byte for place, byte in enumerate(others)},
    }
