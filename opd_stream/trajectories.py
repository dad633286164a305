"""Conversations of many turns as ids: what the assistant wrote trains, all else is context.

The ids are those of the chat template's text. The assistant's part of it is what stands between two
renderings, of the turns before with the next one opened and of the turns up to its end, so that a
template has to write the beginning of a conversation as it writes it alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_stream.errors import UserError
from opd_stream.messages import Turn, tools_of, turns_of, turns_text
from opd_stream.rendering import ChatTemplate, Prompt, Renderer

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A conversation; `completion_ids` begin with the assistant's first token.

    Example:
        >>> Trajectory(prompt_ids=np.array([2, 9]), completion_ids=np.array([7, 1, 5, 7, 1]),
        ...            loss_mask=np.array([True, True, False, True, True]))
    """

    prompt_ids: Ids  # [P], of everything before
    completion_ids: Ids  # [T]
    loss_mask: NDArray[np.bool_]  # [T], tokens that the assistant wrote


class TrajectoryReader:
    """Makes rows with `messages` into rows with ids.

    Example:
        >>> TrajectoryReader(ChatTemplate(), tokenizer).row("line 1", {"messages": [...], ...})
        {'prompt_ids': [...], 'completion_ids': [...], 'loss_mask': [...], ...}

    Raises:
        UserError: the template leaves prompts out, or writes the beginning of an answer.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Any) -> None:
        refuse_unfit(template, "cache import of messages")
        self._renderer, self._tokenizer = Renderer(template, tokenizer), tokenizer

    def row(self, place: str, row: dict[str, Any]) -> dict[str, Any]:
        """A row with ids and mask in place of its messages and tools.

        Raises:
            UserError: its messages are none, no assistant's turn answers anything, or the template
                does not take them (names the place).
        """
        if found := sorted({"prompt_ids", "completion_ids", "loss_mask"} & {*row}):
            raise UserError(
                f"{place} has messages and {', '.join(found)}; expected one of the two, since both "
                "say what the tokens are; leave one out"
            )
        turns = turns_of(row["messages"], f"{place}: messages")
        prompt = Prompt(
            prompt_id=place,
            text=turns_text(turns),
            answer=None,
            turns=turns,
            tools=tools_of(row.get("tools"), f"{place}: tools"),
        )
        found = trajectory_of(self._renderer, self._tokenizer, prompt)
        rest = {name: each for name, each in row.items() if name not in ("messages", "tools")}
        is_ended = turns[-1]["role"] == "assistant"
        return {
            "finish_reason": "stop" if is_ended else "length",
            **rest,
            "prompt_ids": found.prompt_ids.tolist(),
            "completion_ids": found.completion_ids.tolist(),
            "loss_mask": found.loss_mask.tolist(),
        }


def refuse_unfit(template: ChatTemplate, what: str) -> None:
    """Refuse settings of a template that conversations of many turns cannot have.

    Raises:
        UserError: names the setting.
    """
    against = {
        "prefill": (template.prefill is not None, "leave it out"),
        "control_tokens=skip": (template.control_tokens == "skip", "set escape or allow"),
        "add_generation_prompt=false": (not template.add_generation_prompt, "leave it out"),
        f"final_answer={template.final_answer}": (
            template.final_answer != "refuse",
            "leave it out",
        ),
    }
    for setting, (is_set, way) in against.items():
        if is_set:
            raise UserError(
                f"template.{setting} is set with {what}, where the assistant writes several whole "
                f"turns; {way}"
            )


def trajectory_of(renderer: Renderer, tokenizer: Any, prompt: Prompt) -> Trajectory:
    """The ids of a prompt whose turns are a whole conversation, and which of them train.

    The template's own generation marks say it, where it has some; else a token trains that lies
    wholly in what the assistant wrote, the end of its turn included.

    Raises:
        UserError: the assistant says nothing, or speaks first; a turn spells control tokens; or the
            template does not take the conversation.
    """
    turns = list(prompt.turns or ())
    first = next((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), None)
    if not first:
        found = "have no assistant's turn" if first is None else "begin with the assistant's turn"
        raise UserError(
            f"{prompt.prompt_id}: messages {found}; expected an answer to something, which trains; "
            "mend or remove the row"
        )
    turns = renderer.guarded(turns, prompt.prompt_id)
    before, more = replace(prompt, turns=tuple(turns[:first])), turns[first:]
    text = renderer.continued(before, more, opened=False)
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(read["input_ids"], np.int64)
    mask = renderer.marked(before, more)
    if mask is None:
        mask = _inside(read["offset_mapping"], _spans(renderer, before, more, text), text)
    if len(mask) != len(ids) or not mask.any() or mask[0]:
        raise UserError(
            f"{prompt.prompt_id}: the chat template marks no token as the assistant's, or all; "
            "expected some behind a prompt; set template.file to another template"
        )
    start = int(np.argmax(mask))
    return Trajectory(prompt_ids=ids[:start], completion_ids=ids[start:], loss_mask=mask[start:])


def _spans(
    renderer: Renderer, before: Prompt, more: Sequence[Turn], text: str
) -> list[tuple[int, int]]:
    """Places of the text that the assistant wrote, from where to where."""
    spans: list[tuple[int, int]] = []
    for number, turn in enumerate(more):
        if turn["role"] != "assistant":
            continue
        opened = renderer.continued(before, more[:number], opened=True)
        ended = renderer.continued(before, more[: number + 1], opened=False)
        if not (ended.startswith(opened) and text.startswith(ended)):
            raise UserError(
                f"{before.prompt_id}: {rewrites(opened, ended, text)}; expected one that only adds "
                "to what it wrote, so that the assistant's part can be told; set template.file to "
                "one, or to one with generation marks"
            )
        spans.append((len(opened), len(opened) + renderer.turn_length(ended[len(opened) :])))
    return spans


def rewrites(*texts: str) -> str:
    """How a template does not extend what it wrote, of texts that should extend one another."""
    short, long = next(pair for pair in pairwise(texts) if not pair[1].startswith(pair[0]))
    same = next((n for n, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(long))
    return (
        f"the chat template writes {short[same : same + 40]!r} with {short[:same][-20:]!r} before "
        f"it, and with what follows {long[same : same + 40]!r}"
    )


def _inside(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], text: str
) -> NDArray[np.bool_]:
    """Tokens that lie wholly in one of some spans of the text; white space in front counts."""
    mask = np.zeros(len(offsets), np.bool_)
    number = last = 0
    for place, (start, end) in enumerate(offsets):
        begin = last if text[last:start].isspace() else start
        last = max(last, end)
        while number < len(spans) and begin >= spans[number][1]:
            number += 1
        if number < len(spans):
            mask[place] = begin >= spans[number][0] and end <= spans[number][1]
    return mask


_USER = {"role": "user", "content": "A question."}
_REPLIES = ("An answer.", "<think>\nA thought.\n</think>\n\nAn answer.")


class TurnWriter:
    """Writes what stands between two turns of the student, as ids.

    What the student drew stays as it was drawn: only what others say is tokenised, behind the token
    that ended the student's turn.
    """

    def __init__(self, renderer: Renderer, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        self._renderer, self._tokenizer = renderer, tokenizer
        spelled = {tokenizer.decode([token]): token for token in stop_ids}
        self._stops = {text: token for text, token in spelled.items() if text}
        self._stops = dict(sorted(self._stops.items(), key=lambda each: each[0].isspace()))

    def check(self) -> None:
        """Try the template on a few turns, with thoughts and without.

        Raises:
            UserError: it writes earlier turns anew, or ends the assistant's turn with no terminator
                of the student.
        """
        prompt = Prompt(prompt_id="(a trial)", text="", answer=None, turns=(_USER,))
        for reply in _REPLIES:
            said: list[Turn] = [{"role": "assistant", "content": reply}]
            opened = self._renderer.text(prompt)
            ended = self._renderer.continued(prompt, said, opened=False)
            if not ended.startswith(opened):
                raise UserError(f"{rewrites(opened, ended)}; {_ADDS}")
            said += [_USER, {"role": "assistant", "content": _REPLIES[0]}]
            self.ids(prompt, said[:1], [_USER])
            self.ids(prompt, said, [_USER])
            first, later = (self._beginning(prompt, more) for more in ([], said[:2]))
            if first != later:
                raise UserError(
                    f"the chat template begins the assistant's first turn with {first!r} and a "
                    f"later one with {later!r}; expected the same; set template.file to another "
                    "template"
                )

    def _beginning(self, prompt: Prompt, more: Sequence[Turn]) -> str:
        """What the template writes before a turn of the assistant."""
        parts = (self._renderer.continued(prompt, more, opened=each) for each in (False, True))
        before, opened = parts
        return opened.removeprefix(before)

    def ids(self, prompt: Prompt, said: Sequence[Turn], new: Sequence[Turn]) -> Ids:
        """The ids of turns behind others, with the beginning of the next one [N].

        Args:
            prompt: what the student answered first.
            said: turns behind it; the last one is the student's.
            new: the turns of others that follow.

        Raises:
            UserError: the template does not take them, or writes earlier turns anew; or one spells
                a control token.
        """
        name = prompt.prompt_id
        ended = self._renderer.continued(prompt, said, opened=False)
        turns = [*said, *self._renderer.guarded(new, f"prompt {name!r}")]
        text = self._renderer.continued(prompt, turns, opened=True)
        if not text.startswith(ended):
            raise UserError(f"prompt {name!r}: {rewrites(ended, text)}; {_ADDS}")
        stop = next((stop for stop in self._stops if _is_last(stop, ended)), None)
        if stop is None:
            raise UserError(
                f"the chat template ends the assistant's turn with {ended[-20:]!r}, and the "
                f"student's turns end with {' or '.join(map(repr, self._stops))}; expected one of "
                "these there; name the template's token in rollouts.stop_tokens"
            )
        between = text[ended.rindex(stop) :]
        ids: list[int] = self._tokenizer(between, add_special_tokens=False)["input_ids"]
        return np.array(ids[ids.index(self._stops[stop]) + 1 :], np.int64)


def _is_last(stop: str, text: str) -> bool:
    """Whether a text ends with a terminator, but for white space behind it."""
    before, found, behind = text.rpartition(stop)
    return bool(found) and not behind.strip() and bool(before)


_ADDS = (
    "an environment needs one that only adds to what it wrote, since what the student wrote stays; "
    "set template.file to another template"
)
