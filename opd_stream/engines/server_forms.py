"""The forms in which servers are asked for the log-probabilities of a text, and their answers.

Token ids in and out, never text. An answer at K = 64 is 5 kB of JSON a token, so the bytes are
scanned for numbers as columns: a third of the time that building Python objects takes
(`python -m benchmarks.served parse`). What the scan does not recognise is parsed as JSON.

Shapes: L tokens of a text, T of its end that are scored, K candidates, J given ids of a position.
"""

import base64
import binascii
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic_core import from_json

from opd_stream.engines.base import Ids
from opd_stream.engines.server_client import BrokenAnswer, ServerOptions
from opd_stream.errors import UserError
from opd_stream.section import is_list, is_object

Bytes = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]

LOWEST = -9998.0  # JSON has no infinity: vLLM writes -9999 for it
ENTRY_BYTES = 300  # of a candidate, with the text of its token
ECHO_BYTES = 16  # of a token that is named again
ROOM = 40  # bytes behind an answer that windows may look into


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked about a text.

    Example:
        >>> Question(ids_L=np.array([7, 8, 9]), first=1, top_k=64).tokens
        2
    """

    ids_L: Ids
    first: int  # position of the first token that is scored; at least 1
    top_k: int  # candidates of a position
    given_TJ: Ids | None = None  # ids whose log-probability is wanted

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.ids_L) - self.first


class Answer(NamedTuple):
    """Log-probabilities of the last T tokens of a text, nats."""

    drawn_T: NDArray[np.float32]
    top_ids_TK: NDArray[np.int32]  # the most probable first
    top_TK: NDArray[np.float32]
    given_TJ: NDArray[np.float32] | None = None


class Form(Protocol):
    """An endpoint: its path, its questions and its answers."""

    path: str
    gives_ids: bool  # whether any id can be asked for at any position

    def question(self, asked: Question) -> dict[str, Any]:
        """The JSON to send."""
        ...

    def read(self, data: bytes, asked: Question) -> Answer:
        """Read an answer.

        Raises:
            BrokenAnswer: it is not whole, or not of what was asked.
            UserError: the endpoint gives no log-probabilities of prompts.
        """
        ...


def open_form(options: ServerOptions) -> Form:
    """The form that a config names."""
    kinds = {"completions": Completions, "vllm": VllmTokens, "sglang": Sglang}
    return cast(Form, kinds[options.api](options.model))


def most_bytes(asked: Question) -> int:
    """More than any whole answer has."""
    given = 0 if asked.given_TJ is None else asked.given_TJ.shape[1]
    return 2**20 + len(asked.ids_L) * (asked.top_k + given + 2) * ENTRY_BYTES


class Completions:
    """POST /v1/completions with prompt_logprobs: vLLM, and what follows it."""

    path, gives_ids = "/v1/completions", False

    def __init__(self, model: str) -> None:
        self._model = model

    def question(self, asked: Question) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": asked.ids_L.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": asked.top_k,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
        }

    def read(self, data: bytes, asked: Question) -> Answer:
        return _answer_of_prompt(data, asked, self.path)


class VllmTokens:
    """vLLM's own endpoint, which scores given ids, too (model runner V2)."""

    path, gives_ids = "/inference/v1/generate", True

    def __init__(self, model: str) -> None:
        self._model = model

    def question(self, asked: Question) -> dict[str, Any]:
        params: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": asked.top_k,
            "detokenize": False,
        }
        if asked.given_TJ is not None and asked.given_TJ.size:
            params["prompt_logprob_token_ids"] = asked.given_TJ.tolist()
            params["prompt_logprob_start"] = asked.first - 1
        return {
            "model": self._model,
            "token_ids": asked.ids_L.tolist(),
            "sampling_params": params,
            "return_token_ids": True,
        }

    def read(self, data: bytes, asked: Question) -> Answer:
        answer = _answer_of_prompt(data, asked, self.path)
        if asked.given_TJ is None or not asked.given_TJ.size:
            return answer
        found = re.search(rb'"prompt_token_id_logprobs": ?"([A-Za-z0-9+/=]*)"', data)
        if found is None:
            raise UserError(_lacks(self.path, "prompt_token_id_logprobs"))
        try:
            stored = io.BytesIO(base64.b64decode(found[1], validate=True))
            given_TJ = np.load(stored, allow_pickle=False)
        except (binascii.Error, ValueError, EOFError, OSError) as error:
            raise BrokenAnswer("prompt_token_id_logprobs is no array") from error
        if given_TJ.shape != asked.given_TJ.shape:
            raise BrokenAnswer(f"given ids of shape {[*given_TJ.shape]}; {_sent(asked)}")
        return answer._replace(given_TJ=given_TJ.astype(np.float32))


class Sglang:
    """SGLang's own endpoint; ids are given for the whole text, and answered at each position."""

    path, gives_ids = "/generate", True

    def __init__(self, model: str) -> None:
        del model  # a server has one

    def question(self, asked: Question) -> dict[str, Any]:
        given = {} if asked.given_TJ is None else {"token_ids_logprob": _all_ids(asked.given_TJ)}
        return {
            "input_ids": asked.ids_L.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": asked.first - 1,
            "top_logprobs_num": asked.top_k,
            "return_text_in_logprobs": False,
            **(given if given.get("token_ids_logprob") else {}),
        }

    def read(self, data: bytes, asked: Question) -> Answer:
        pairs, rest = _scan_pairs(data, asked)
        meta = _parsed(rest).get("meta_info")
        meta = meta if is_object(meta) else {}
        drawn = _positions(meta, "input_token_logprobs", asked, self.path)
        if pairs is None:
            top = _positions(meta, "input_top_logprobs", asked, self.path)
            pairs = _pairs(top, asked.top_k, "candidates")
        values = _pairs([[each] for each in drawn], 1, "token")[:, 0]
        sent = asked.ids_L[asked.first :]
        # SGLang writes 0 for its largest id and what lies beyond.
        if ((values[:, 1] != sent) & (values[:, 1] != 0)).any():
            raise BrokenAnswer("it speaks of other ids than were sent")
        given_TJ = None
        if asked.given_TJ is not None and asked.given_TJ.size:
            rows = _positions(meta, "input_token_ids_logprobs", asked, self.path)
            given_TJ = _looked_up(rows, asked.given_TJ)
        ids, top = pairs[..., 1].astype(np.int32), pairs[..., 0]
        return Answer(_floats(values[:, 0]), *_by_rank(ids, top), given_TJ)


def _answer_of_prompt(data: bytes, asked: Question, path: str) -> Answer:
    """From `prompt_logprobs`: of each position the token itself, and its K candidates."""
    entries = _scan_entries(data) or _entries(data, path)
    ids_E, logprobs_E, starts = entries
    positions = len(starts) - 1
    if positions not in (asked.tokens, len(asked.ids_L) - 1):
        raise BrokenAnswer(f"log-probabilities of {positions} positions; {_sent(asked)}")
    echoed = _echoed(data, len(asked.ids_L))
    if echoed is not None and not np.array_equal(echoed, asked.ids_L):
        raise BrokenAnswer("it speaks of other ids than were sent")
    starts, widths = starts[:-1][-asked.tokens :], np.diff(starts)[-asked.tokens :]
    if ((widths != asked.top_k) & (widths != asked.top_k + 1)).any():
        raise BrokenAnswer(
            f"{int(widths.min())} to {int(widths.max())} candidates of a position, and "
            f"{asked.top_k} were asked for"
        )
    place_TK = starts[:, None] + np.arange(asked.top_k + 1)
    is_there = np.arange(asked.top_k + 1) < widths[:, None]
    place_TK = np.where(is_there, place_TK, 0)
    ids_TK = np.where(is_there, ids_E[place_TK], -1)
    logprobs_TK = np.where(is_there, logprobs_E[place_TK], -np.inf)
    is_drawn = ids_TK == asked.ids_L[asked.first :, None]
    if not is_drawn.any(1).all():
        raise BrokenAnswer("it speaks of other ids than were sent")
    rows, drawn = np.arange(len(ids_TK)), is_drawn.argmax(1)
    drawn_T = logprobs_TK[rows, drawn].astype(np.float32)
    is_beside = widths > asked.top_k  # the token is none of the candidates
    logprobs_TK[rows[is_beside], drawn[is_beside]] = -np.inf
    ids_TK[rows[is_beside], drawn[is_beside]] = -1
    ids_TK, top_TK = _by_rank(ids_TK, logprobs_TK)
    top = slice(asked.top_k)
    return Answer(_floats(drawn_T), ids_TK[:, top], top_TK[:, top])


def _by_rank(ids_TK: Ids, logprobs_TK: Floats) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Candidates, the most probable first; what stands for no candidate (id -1) last."""
    key = np.where(ids_TK < 0, np.inf, -logprobs_TK)
    order = np.argsort(key, axis=1, kind="stable")
    ids = np.take_along_axis(ids_TK, order, axis=1).astype(np.int32)
    return ids, _floats(np.take_along_axis(logprobs_TK, order, axis=1))


def _floats(values: Floats) -> NDArray[np.float32]:
    return np.where(values <= LOWEST, -np.inf, values).astype(np.float32)


Entries = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


def _scan_entries(data: bytes) -> Entries | None:
    """Ids and log-probabilities [E], and where each position starts and the last one ends.

    Each entry is `"ID":{"logprob":NUMBER,`, without spaces; inside a text of JSON every quote has a
    backslash before it, so no text looks like one. None: there is nothing of this form.
    """
    if len(data) + ROOM >= 2**31:  # places are of 32 bits
        return None
    padded = np.frombuffer(data + b" " * ROOM, np.uint8)
    colons = np.flatnonzero((padded[:-1] == ord(":")) & (padded[1:] == ord("{")))
    colons = colons[(colons >= 12) & (colons < len(data))]
    is_entry = (padded[colons - 1] == ord('"')) & (padded[colons + 2] == ord('"'))
    colons = colons[is_entry & (padded[colons + 3] == ord("l"))]
    if not len(colons) or not data.rstrip().endswith(b"}"):
        return None
    values = colons + len(':{"logprob":')
    is_comma = np.lib.stride_tricks.sliding_window_view(padded, ROOM - 8)[values] == ord(",")
    before = np.lib.stride_tricks.sliding_window_view(padded, 11)[colons - 12][:, ::-1]
    digits = ((before < ord("0")) | (before > ord("9"))).argmax(1)
    starts = colons - 1 - digits
    try:
        ids = _numbers(padded, starts, colons - 1, pa.int64())
        logprobs = _numbers(padded, values, values + is_comma.argmax(1), pa.float64())
    except pa.ArrowInvalid:
        return None
    firsts = np.flatnonzero(padded[starts - 2] == ord("{"))
    return ids, logprobs, np.append(firsts, len(ids))


def _numbers(
    padded: Bytes, starts: NDArray[np.int64], ends: NDArray[np.int64], kind: pa.DataType
) -> NDArray[Any]:
    """The numbers in stretches of bytes."""
    arrow: Any = pa.Array
    lengths: NDArray[np.int64] = ends - starts
    offsets = np.zeros(len(starts) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    places: NDArray[np.int32] = np.repeat((starts - offsets[:-1]).astype(np.int32), lengths)
    places += np.arange(len(places), dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(padded[places])]
    return arrow.from_buffers(pa.string(), len(starts), buffers).cast(kind).to_numpy()


def _entries(data: bytes, path: str) -> Entries:
    """The same of any JSON."""
    whole = _parsed(data)
    choices = whole.get("choices")
    holder: Any = whole
    if "prompt_logprobs" not in whole and is_list(choices) and choices:
        holder = choices[0]
    found = holder.get("prompt_logprobs") if is_object(holder) else None
    if not is_list(found):
        raise UserError(_lacks(path, "prompt_logprobs"))
    ids, logprobs, starts = list[int](), list[float](), list[int]()
    for position in found[1:]:
        if not is_object(position):
            raise BrokenAnswer("a position without log-probabilities")
        starts.append(len(ids))
        for token, value in position.items():
            number = value.get("logprob") if is_object(value) else value
            try:
                ids.append(int(token))
                logprobs.append(np.nan if number is None else float(cast(float, number)))
            except (TypeError, ValueError) as error:
                raise BrokenAnswer(f"the candidate {token!r:.40} is no token id") from error
    return np.array(ids, np.int64), np.array(logprobs), np.array([*starts, len(ids)], np.int64)


def _echoed(data: bytes, tokens: int) -> NDArray[np.int64] | None:
    """The ids that the server says it read, where it does."""
    name, end = b'"prompt_token_ids"', max(0, len(data) - ECHO_BYTES * tokens - 2**16)
    place = data.rfind(name, end)  # to find that it is nowhere takes as long as to read it all
    place = data.find(name, 0, end) if place < 0 else place
    found = re.compile(rb'"prompt_token_ids": ?\[([\d, ]*)\]').match(data, max(place, 0))
    if found is None:
        return None
    return np.array(found[1].replace(b",", b" ").split(), np.int64)


def _scan_pairs(data: bytes, asked: Question) -> tuple[Floats | None, bytes]:
    """[T, K, 2] log-probabilities and ids of `input_top_logprobs`, and the answer without them.

    None, and the whole answer: they are not written as `[[NUMBER,ID,null],…]` throughout.
    """
    name = b'"input_top_logprobs":'
    start = data.find(name)
    end = data.find(b"]]]", start)
    if start < 0 or end < 0:
        return None, data
    body = data[start + len(name) : end].translate(None, b"[] ")
    body = body.removeprefix(b"null,").replace(b",null", b"")
    padded = np.frombuffer(body, np.uint8)
    commas = np.flatnonzero(padded == ord(","))
    if len(commas) + 1 != asked.tokens * asked.top_k * 2:
        return None, data
    try:
        starts, ends = np.append(0, commas + 1), np.append(commas, len(body))
        numbers = _numbers(padded, starts, ends, pa.float64())
    except pa.ArrowInvalid:
        return None, data
    rest = data[: start + len(name)] + b"null" + data[end + 3 :]
    return numbers.reshape(asked.tokens, asked.top_k, 2), rest


def _positions(meta: dict[str, Any], name: str, asked: Question, path: str) -> list[Any]:
    """What SGLang says of each of the T positions."""
    found = meta.get(name)
    if not is_list(found):
        raise UserError(_lacks(path, name))
    if len(found) != asked.tokens + 1:
        raise BrokenAnswer(f"{name} of {len(found) - 1} positions; {_sent(asked)}")
    return found[1:]


def _pairs(rows: Sequence[Any], width: int, what: str) -> Floats:
    """[T, width, 2] from `[[NUMBER, ID, …], …]` of each position."""
    try:
        pairs = [[(each[0], each[1]) for each in row] for row in rows]
        found = np.array(pairs, np.float64).reshape(len(rows), -1, 2)
    except (TypeError, ValueError, LookupError) as error:
        raise BrokenAnswer(f"{what} that are no pairs of a number and an id") from error
    if found.shape[1] != width:
        raise BrokenAnswer(f"{found.shape[1]} {what} of a position; {width} were asked for")
    return found


def _looked_up(rows: Sequence[Any], given_TJ: Ids) -> NDArray[np.float32]:
    """The answers of given ids [T, J] among those of all ids of the text."""
    found = _pairs(rows, len(_all_ids(given_TJ)), "given ids")
    ids, values = found[..., 1].astype(np.int64), found[..., 0]
    order = np.argsort(ids, axis=1)
    if (np.take_along_axis(ids, order, axis=1) != np.array(_all_ids(given_TJ))).any():
        raise BrokenAnswer("it speaks of other given ids than were sent")
    place = np.searchsorted(np.array(_all_ids(given_TJ)), given_TJ)
    return _floats(np.take_along_axis(np.take_along_axis(values, order, axis=1), place, axis=1))


def _all_ids(given_TJ: Ids) -> list[int]:
    return np.unique(given_TJ).tolist()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = from_json(data)
    except ValueError as error:
        raise BrokenAnswer(f"no JSON: {' '.join(str(error).split())[:80]}") from error
    if not is_object(found):
        raise BrokenAnswer("JSON that is no object")
    return found


def _lacks(path: str, name: str) -> str:
    return (
        f"the served teacher answers {path} without {name}; expected log-probabilities of the "
        "prompt's tokens; use a server that gives them (vLLM, SGLang), or correct "
        "teacher.server.api"
    )


def _sent(asked: Question) -> str:
    return f"{asked.tokens} of {len(asked.ids_L)} tokens were to be scored"
