"""Lists of messages in rows, as chat templates read them, and special tokens in their text."""

import json
import re
from collections.abc import Sequence
from typing import Any

from opd_stream.errors import UserError
from opd_stream.section import is_list, is_object

Turn = dict[str, Any]  # role, content, and what else a chat template reads, such as tool_calls

_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def is_turns(value: object) -> bool:
    """Whether a value has the shape of messages: a list of objects with `role` or `from`."""
    return (
        is_list(value)
        and bool(value)
        and all(is_object(turn) and ("role" in turn or "from" in turn) for turn in value)
    )


def turns_of(value: Any, place: str) -> tuple[Turn, ...]:
    """The turns of messages: `content` is text or null, and fields that are null are left out.

    Raises:
        UserError: a turn has no role, or holds something else than text (names the turn).
    """
    if not is_turns(value):
        raise UserError(
            f"{place} is no list of messages; expected objects with role and content, or with from "
            "and value; mend the row, or name another field"
        )
    return tuple(_turn(turn, f"{place}: turn {number}") for number, turn in enumerate(value))


def tools_of(value: Any, place: str) -> tuple[dict[str, Any], ...] | None:
    """The tool schemas of a row, a list or the JSON text of one; None: there are none.

    Raises:
        UserError: it is something else.
    """
    try:
        found = json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        found = value
    if not found:
        return None
    if not is_list(found) or not all(map(is_object, found)):
        raise UserError(
            f"{place} holds no list of tool schemas; expected JSON objects; mend the row, or set "
            "tools_field"
        )
    return tuple(found)


def with_objects(turns: Sequence[Turn]) -> list[Turn]:
    """Turns whose tool calls hold their arguments as objects, where rows have them as JSON text.

    Most chat templates write arguments as JSON; text would be quoted once more.
    """
    return [
        {**turn, "tool_calls": [_with_object(call) for call in turn["tool_calls"]]}
        if is_list(turn.get("tool_calls"))
        else turn
        for turn in turns
    ]


def _with_object(call: Any) -> Any:
    if not is_object(call):
        return call
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    text = call.get("arguments")
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": found} if is_object(found) else call


def turns_text(turns: tuple[Turn, ...]) -> str:
    """Messages as one text, the same for the same messages."""
    return json.dumps(turns, ensure_ascii=False, default=str)  # tables hold dates, and more


def check_unicode(place: str, text: str) -> None:
    """Refuse what JSON can escape and UTF-8 cannot write.

    Raises:
        UserError: says what it is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{place} holds {half} alone, half a surrogate pair; expected text that UTF-8 can "
            "write; mend or remove the line"
        ) from error


def _turn(turn: Turn, place: str) -> Turn:
    if "role" not in turn:
        speaker = turn["from"]
        role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
        turn = {"role": role, "content": turn.get("value")}
    if not isinstance(turn["role"], str):
        raise UserError(
            f"{place} has the role {turn['role']!r}; expected text such as user; mend it"
        )
    kept = {name: value for name, value in turn.items() if value is not None or name == "content"}
    content = kept.get("content")
    if is_list(content):
        content = kept["content"] = _joined(content, place)
    calls = kept.get("tool_calls")
    if calls is not None and not (is_list(calls) and all(map(is_object, calls))):
        raise UserError(f"{place} has tool_calls that are no list of objects; mend it")
    is_call = content is None and kept["role"] == "assistant" and bool(calls)
    if not isinstance(content, str) and not is_call:
        found = "has no content" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{place} {found}; expected text; mend it")
    check_unicode(place, turns_text((kept,)))
    return kept


def _joined(parts: list[Any], place: str) -> str:
    """Content that is a list of parts, as one text."""
    found = [part.get("text") if is_object(part) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        kinds = sorted({str(part.get("type")) if is_object(part) else "?" for part in parts})
        raise UserError(
            f"{place} holds parts of type {', '.join(kinds)}; expected text alone; leave the row "
            "out, or mend it"
        )
    return "".join(texts)


def said_by_others(turn: Turn) -> str:
    """The text of a turn that somebody else than the model wrote."""
    return "" if turn["role"] == "assistant" else turn.get("content") or ""


class ControlTokens:
    """The special tokens of a tokenizer, looked for in text that only quotes them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = [each for each in tokenizer.added_tokens_decoder.items() if each[1].special]
        self._spelled: dict[int, str] = {number: token.content for number, token in special}
        words = map(re.escape, sorted(self._spelled.values(), key=len, reverse=True))
        pattern = "|".join(word for word in words if word)
        self._pattern = re.compile(pattern or r"(?!)")

    @property
    def words(self) -> tuple[str, ...]:
        """How they are spelled."""
        return tuple(self._spelled.values())

    def found(self, text: str) -> list[str]:
        """Special tokens that a text spells and the tokenizer would read as such."""
        if not self._pattern.search(text):
            return []
        ids = set(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return sorted(
            word for number, word in self._spelled.items() if number in ids and word in text
        )

    def escaped(self, turn: Turn, prompt_id: str) -> Turn:
        """A turn whose special tokens have a space behind their first character."""
        text = said_by_others(turn)
        for word in sorted(self.found(text), key=len, reverse=True):
            text = text.replace(word, f"{word[0]} {word[1:]}")
        if left := self.found(text):
            raise UserError(
                f"prompt {prompt_id!r} spells {left[0]!r}, which no space keeps from being a "
                "control token; set template.control_tokens=skip, or mend the row"
            )
        return turn if turn["role"] == "assistant" else {**turn, "content": text}
