"""From a prompt to token ids: as raw text, or as turns that a chat template writes."""

import contextlib
import datetime
import random
import re
import resource
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from opd_stream.errors import UserError
from opd_stream.messages import ControlTokens, Turn, said_by_others, turns_text, with_objects
from opd_stream.section import Section, is_object, later
from opd_stream.store.files import sha256_file
from opd_stream.store.lines import opened

TEMPLATE_SECONDS = 5.0  # of processor time, for one prompt
TEMPLATE_BYTES = 2**30  # of memory beside what the process has, for one prompt
MOST_CHARACTERS = 2**24  # that a template writes
_MARKS = re.compile(r"\{%-?\s*generation\b")
_HALF = re.compile(r"[\ud800-\udfff]")
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]{8,}>")  # as Python writes what has no text
_OURS = {  # arguments of templates that other settings decide
    "messages": "the prompts",
    "tools": "the prompts' tools_field",
    "chat_template": "template.file or template.name",
    "add_generation_prompt": "template.add_generation_prompt",
    "continue_final_message": "template.final_answer",
    "strftime_now": "template.date",
    "tokenize": "opd-stream",
    "return_dict": "opd-stream",
}


def _around_prompt(text: str) -> str:
    if "{prompt}" not in text:
        raise PydanticCustomError(
            "no_prompt", "expected text with {{prompt}} in it, where the prompt goes"
        )
    return text


def _as_date(value: Any) -> Any:
    """A number, or the text of one, would be seconds since 1970."""
    is_text = isinstance(value, str) and not re.match(r"\d{4}-\d\d-\d\d", value)
    if is_text or isinstance(value, int | float):
        raise PydanticCustomError("no_date", "expected a date such as 2026-01-31")
    return value


AroundPrompt = Annotated[str, AfterValidator(_around_prompt)]


class RawTemplate(Section):
    """The prompt text as it is, with the ids of `tokenizer(text)`; BOS never twice, no EOS behind.

    There are never two beginning-of-text tokens, where the text itself begins with one; an
    end-of-text token that the tokenizer appends is left off, since the text is to be continued.
    """

    kind: Literal["raw"] = "raw"
    text: AroundPrompt = Field(
        default="{prompt}", description="text around the prompt; {prompt} is replaced"
    )
    bos: Literal["tokenizer", "always"] = Field(
        default="tokenizer",
        description="who puts a beginning-of-text token in front: tokenizer: the tokenizer, where "
        "it does so itself; always: we do, where it has one (default of the embedded tasks)",
    )


class ChatTemplate(Section):
    """A chat template, with the prompt as the user's turn, or with the row's own messages."""

    kind: Literal["chat"] = "chat"
    text: AroundPrompt = Field(
        default="{prompt}", description="text of the (last) user's turn; {prompt} is replaced"
    )
    system: str | None = Field(
        default=None, description="text of a system turn before it, in place of a row's own"
    )
    arguments: dict[str, JsonValue] = later(
        default={}, description="what the template is told, such as {enable_thinking: false}"
    )
    date: Annotated[datetime.date, BeforeValidator(_as_date)] | None = later(
        default=None,
        description="today, to a template that writes the date; needed for such a template",
    )
    file: Path | None = later(
        default=None, description="Jinja file of a template; null: the tokenizer's own"
    )
    name: str | None = later(
        default=None, description="which one, where the tokenizer has several by name"
    )
    add_generation_prompt: bool = later(
        default=True, description="write the beginning of the assistant's turn"
    )
    prefill: str | None = later(
        default=None, description="beginning of the answer, which the student continues"
    )
    final_answer: Literal["refuse", "drop", "continue", "given"] = later(
        default="refuse",
        description="of messages that end with the assistant's turn: drop: it is answered anew; "
        "continue: the student goes on from its words; given: as drop, and it is the row's "
        "completion, for rollouts.given_share",
    )
    control_tokens: Literal["refuse", "escape", "skip", "allow"] = later(
        default="refuse",
        description="of prompts whose text spells special tokens, such as one that ends a turn: "
        "escape: put a space into them; skip: leave the prompt out; allow: let them count",
    )

    @model_validator(mode="after")
    def _arguments(self) -> Self:
        for name in self.arguments:
            if name in _OURS:
                raise ValueError(
                    f"template.arguments names {name}, which {_OURS[name]} decides; leave it out"
                )
        if self.file is not None and self.name is not None:
            raise ValueError(
                f"template has file {self.file} and name {self.name!r}; expected one of the two; "
                "name is of the tokenizer's own templates"
            )
        return self


Template = Annotated[RawTemplate | ChatTemplate, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How a teacher reads prompts, where it does not read what the student reads, or not all.

    Example:
        >>> Rendering(template=RawTemplate(), view="{prompt}\\nThe answer is {answer}.")
    """

    template: RawTemplate | ChatTemplate | None  # None: the student's ids
    view: str | None = None  # text in place of the prompt, with {field} of its row; None: none
    when: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    is_of_several: bool = False  # teachers, whose name stands before what is said

    @property
    def field(self) -> str:
        """The setting that asks for it."""
        return self.setting("template" if self.view is None else "view")

    def setting(self, name: str) -> str:
        """A setting of the teacher, as messages name it."""
        return name if self.is_of_several else f"teacher.{name}"

    def settings(self) -> dict[str, Any]:
        """What of it goes into the recipe."""
        template = {} if self.template is None else {"template": template_settings(self.template)}
        shown = {} if self.view is None else {"view": self.view}
        chosen = {name: list(values) for name, values in self.when.items()}
        routed = {"when": chosen, "others": "empty"} if chosen else {}
        return {**template, **shown, **routed}


def template_settings(template: RawTemplate | ChatTemplate) -> dict[str, Any]:
    """What of a template goes into the recipe: the digest of a file instead of its path.

    Raises:
        UserError: the file cannot be read.
    """
    settings = template.model_dump(mode="json")
    if isinstance(template, ChatTemplate) and template.file is not None:
        opened(template.file).close()
        settings["file"] = sha256_file(template.file)
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt before tokenisation.

    Example:
        >>> Prompt(prompt_id="row-0", text="How much is 2 + 3?", answer="5")
    """

    prompt_id: str
    text: str  # of messages their JSON
    answer: str | None
    turns: tuple[Turn, ...] | None = None  # of a row that holds messages
    tools: tuple[dict[str, Any], ...] | None = None  # schemas
    completions: tuple[str, ...] = ()  # given answers
    level: str | None = None  # that rollouts.select goes by


class Renderer:
    """Writes prompts as ids, under one template and one tokenizer.

    Raises:
        UserError: there is no such chat template, or its file cannot be read.
    """

    def __init__(
        self, template: RawTemplate | ChatTemplate, tokenizer: Any, *, jinja: str | None = None
    ) -> None:
        """Open it; `jinja` is the text of `template.file`, where that is not at hand."""
        self._template, self._tokenizer = template, tokenizer
        self._jinja = jinja  # None: the tokenizer chooses
        if isinstance(template, ChatTemplate):
            self._jinja = jinja or _jinja(template, tokenizer)
            self._control = ControlTokens(tokenizer)

    def ids(self, prompt: Prompt) -> NDArray[np.int32]:
        """The ids of a prompt [P]; raises as `ids_of`."""
        return self.ids_of([prompt])[0]

    def ids_of(self, prompts: Sequence[Prompt]) -> list[NDArray[np.int32]]:
        """The ids of each prompt [P].

        Raises:
            UserError: the template does not take one, or leaves a part of it out.
        """
        texts = [self.text(prompt) for prompt in prompts]
        if not texts:
            return []
        if isinstance(self._template, ChatTemplate):
            found = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        else:
            found = raw_ids_of(self._tokenizer, texts, bos=self._template.bos)
        return [np.asarray(ids, np.int32) for ids in found]

    def text(self, prompt: Prompt) -> str:
        """A prompt as it is written, before it becomes ids; raises as `ids` does."""
        template = self._template
        if isinstance(template, ChatTemplate):
            turns, goes_on = self._conversation(template, prompt)
            is_opened = template.add_generation_prompt and not goes_on
            text = self._written(prompt, turns, opened=is_opened, goes_on=goes_on)
            return text + (template.prefill or "")
        if prompt.turns is not None:
            raise UserError(
                f"prompt {prompt.prompt_id!r} is a list of messages and template.kind is raw, "
                "which writes text alone; set template={kind: chat}"
            )
        return template.text.replace("{prompt}", prompt.text)

    def answered(self, prompt: Prompt, answer: str) -> str:
        """A prompt with an answer, as a chat template ends it; raises as `ids` does."""
        return self.continued(prompt, [{"role": "assistant", "content": answer}], opened=False)

    def continued(self, prompt: Prompt, more: Sequence[Turn], *, opened: bool) -> str:
        """A prompt with further turns, as a chat template writes them; raises as `ids` does.

        `opened` says whether the assistant's next turn begins behind them.
        """
        template = self._template
        assert isinstance(template, ChatTemplate)
        is_opened = opened and template.add_generation_prompt
        turns = [*self.turns(prompt), *more]
        return self._written(prompt, turns, opened=is_opened, goes_on=False)

    def completion_ids(self, prompt: Prompt, answer: str) -> NDArray[np.int32]:
        """The ids behind a prompt's own that the template gives for an answer [T].

        Of a chat template with what ends the turn, of raw text without a terminator.

        Raises:
            UserError: as `ids`; the prompt's ids are not the first ones, so that no rollout could
                be this answer; or the answer spells a control token.
        """
        template, before = self._template, self.text(prompt)
        if isinstance(template, ChatTemplate):
            if spelled := self._control.found(answer):
                raise UserError(
                    f"the completion of prompt {prompt.prompt_id!r} spells {spelled[0]!r}, which "
                    "would end or begin turns; expected text alone; mend the row"
                )
            text = self.answered(prompt, answer)
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = raw_ids(self._tokenizer, before + answer, bos=template.bos)
        first = self.ids(prompt)
        if len(ids) <= len(first) or ids[: len(first)] != first.tolist():
            raise UserError(
                f"the ids of prompt {prompt.prompt_id!r} are not the first ones of prompt and "
                "completion together: the template does not mark where the assistant's turn "
                "begins; expected a template that writes the same beginning with and without an "
                "answer; set template.file, template.arguments or template.text"
            )
        return np.asarray(ids[len(first) :], np.int32)

    def control_tokens(self, prompt: Prompt) -> list[str]:
        """Special tokens that the text of a prompt spells, but for the assistant's turns."""
        said = map(said_by_others, _turns(prompt))
        return sorted({token for text in said for token in self._control.found(text)})

    def turns(self, prompt: Prompt) -> list[Turn]:
        """The turns of a prompt as a chat template is given them."""
        assert isinstance(self._template, ChatTemplate)
        return self._conversation(self._template, prompt)[0]

    def guarded(self, turns: Sequence[Turn], name: str) -> list[Turn]:
        """Turns whose text spells no control token, as `template.control_tokens` says.

        Raises:
            UserError: one does, and they are not escaped or allowed (begins with the name).
        """
        template = self._template
        assert isinstance(template, ChatTemplate)
        if template.control_tokens == "allow":
            return list(turns)
        if template.control_tokens == "escape":
            turns = [self._control.escaped(turn, name) for turn in turns]
        for turn in turns:
            content = turn.get("content")
            if isinstance(content, str) and (spelled := self._control.found(content)):
                raise UserError(
                    f"{name}: the {turn['role']} turn {content[:40]!r} spells {spelled[0]!r}, "
                    "which would end or begin turns; expected text alone; mend it, or set "
                    "template.control_tokens=escape (turns of others) or allow"
                )
        return list(turns)

    def turn_length(self, text: str) -> int:
        """Characters of an assistant's turn without the white space behind what ends it."""
        whole = text.rstrip()
        is_ended = any(word and whole.endswith(word) for word in self._control.words)
        return len(whole) if is_ended else len(text)

    def marked(self, prompt: Prompt, more: Sequence[Turn]) -> NDArray[np.bool_] | None:
        """Tokens that a template's generation marks name, of what `continued` writes [N].

        None: the template has no such marks.
        """
        template, tools = self._template, None if prompt.tools is None else list(prompt.tools)
        assert isinstance(template, ChatTemplate)
        if not _MARKS.search(self._tokenizer.get_chat_template(self._jinja, tools)):
            return None
        found: dict[str, list[int]] = self._applied(
            prompt,
            [*self.turns(prompt), *more],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return np.array(found["assistant_masks"], np.bool_)

    def _written(self, prompt: Prompt, turns: list[Turn], *, opened: bool, goes_on: bool) -> str:
        """Turns as the template writes them, the next one opened or the last one not ended."""
        drawn = random.getstate()
        text: str = self._applied(
            prompt,
            turns,
            add_generation_prompt=opened,
            continue_final_message=goes_on,
            tokenize=False,
        )
        _check_settled(prompt, turns, text, is_random=random.getstate() != drawn)
        _check_whole(prompt, turns, text)
        return text

    def _applied(self, prompt: Prompt, turns: list[Turn], **how: Any) -> Any:
        """What the library makes of turns, within limits of time and memory."""
        template = self._template
        assert isinstance(template, ChatTemplate)
        try:
            apply = partial(
                self._tokenizer.apply_chat_template,
                tools=None if prompt.tools is None else list(prompt.tools),
                chat_template=self._jinja,
                **how,
                **{**template.arguments, "strftime_now": _clock(template.date)},
            )
            with _LIMITS, _little_memory(TEMPLATE_BYTES), _limited(TEMPLATE_SECONDS):
                try:
                    return apply(with_objects(turns))
                except TypeError:  # a template that writes arguments as the text that they are
                    return apply(turns)
        except UserError:
            raise
        except MemoryError as error:
            raise UserError(
                f"the chat template needs more than {TEMPLATE_BYTES:,} bytes of memory on prompt "
                f"{prompt.prompt_id!r}; expected a few lines; set template.file to another template"
            ) from error
        except _EndlessError as error:
            raise UserError(
                f"the chat template ran for {TEMPLATE_SECONDS:g} s of processor time on prompt "
                f"{prompt.prompt_id!r}; expected an end; set template.file to another template"
            ) from error
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            cause = "" if template.system is None else "leave out template.system, or "
            raise UserError(
                f"the chat template does not take prompt {prompt.prompt_id!r}: {reason}; {cause}"
                "set template.file to a template that does"
            ) from error

    def _conversation(self, template: ChatTemplate, prompt: Prompt) -> tuple[list[Turn], bool]:
        """What the template is given, and whether its last turn is to be continued."""
        turns = _turns(prompt)
        if template.control_tokens == "escape":
            turns = [self._control.escaped(turn, prompt.prompt_id) for turn in turns]
        if template.system is not None:
            rest = turns[1:] if turns[0]["role"] == "system" else turns
            turns = [{"role": "system", "content": template.system}, *rest]
        goes_on = turns[-1]["role"] == "assistant"
        if goes_on and template.final_answer == "refuse":
            raise UserError(
                f"prompt {prompt.prompt_id!r} ends with the assistant's turn; expected a turn to "
                "answer; set template.final_answer=drop to have it answered anew, or continue to "
                "go on from its words"
            )
        if goes_on and template.final_answer in ("drop", "given"):
            goes_on = False
            while turns and turns[-1]["role"] == "assistant":
                turns.pop()
            if not turns:
                raise UserError(
                    f"prompt {prompt.prompt_id!r} has no turn but the assistant's; expected a turn "
                    "to answer; mend or remove the row"
                )
        users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
        if users:
            text = template.text.replace("{prompt}", turns[users[-1]]["content"])
            turns[users[-1]] = {**turns[users[-1]], "content": text}
        return turns, goes_on


_LIMITS = threading.Lock()  # of the process, which one template at a time may lower


class _EndlessError(BaseException):
    """Not an Exception: templates' own handlers catch these."""


@contextlib.contextmanager
def _limited(cpu_seconds: float) -> Generator[None]:
    """End what a template does for so long; a signal can interrupt the main thread alone.

    No command renders in another one: prompts are made before workers start, and workers write the
    turns of an environment in their main thread.
    """

    def stop(*_: Any) -> None:
        raise _EndlessError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, 0.1)  # again, if it is swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _little_memory(most: int) -> Generator[None]:
    """Let the process have so many bytes more, where the system says how many it has."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = pages * resource.getpagesize() + most
    bound = bound if soft == resource.RLIM_INFINITY else min(bound, soft)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _turns(prompt: Prompt) -> list[Turn]:
    return list(prompt.turns or ({"role": "user", "content": prompt.text},))


def _jinja(template: ChatTemplate, tokenizer: Any) -> str | None:
    """The template's text or name; None: the tokenizer's own."""
    if template.file is not None:
        with opened(template.file) as file:
            try:
                return file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{template.file} is not UTF-8 text ({error}); convert it"
                ) from error
    own: object = tokenizer.chat_template
    if own is None:
        raise UserError(
            "template.kind is chat but the tokenizer has no chat template; "
            "set template.kind=raw, set template.file, or use a tokenizer with one"
        )
    names = sorted(own) if is_object(own) else []
    if template.name is None and (not names or "default" in names):
        return None
    if template.name in names:
        return template.name
    has = f"has {', '.join(names)}" if names else "has one, without a name"
    raise UserError(
        f"template.name is {template.name or 'not set'}; the tokenizer {has}; "
        f"{'set template.name to one of them' if names else 'leave template.name out'}"
    )


def _clock(today: datetime.date | None) -> Callable[[str], str]:
    """What a template reads the date from."""

    def strftime(form: str) -> str:
        if today is None:
            raise UserError(
                "the chat template writes today's date, so that prompts would differ from day to "
                f"day; fix it: set template.date, such as {datetime.date.today()}"
            )
        return datetime.datetime.combine(today, datetime.time()).strftime(form)

    return strftime


def _check_settled(prompt: Prompt, turns: Sequence[Turn], text: str, *, is_random: bool) -> None:
    """Refuse what would be another text tomorrow, or is none to speak of."""
    found = _ADDRESS.search(text)
    flaw = None
    if is_random:
        flaw = "draws at random (filter random, or lipsum)"
    elif found and found[0] not in turns_text((*turns, *(prompt.tools or ()))):
        flaw = f"writes {found[0][:80]!r}, which is another text in each process"
    elif not text.isascii() and (half := _HALF.search(text)):
        flaw = f"writes {half[0]!r}, half a surrogate pair,"
    elif len(text) > MOST_CHARACTERS:
        flaw = f"writes {len(text):,} characters, more than {MOST_CHARACTERS:,},"
    if flaw is not None:
        raise UserError(
            f"the chat template {flaw} on prompt {prompt.prompt_id!r}; expected the same few lines "
            "each time; set template.file to another template"
        )


def _check_whole(prompt: Prompt, turns: Sequence[Turn], text: str) -> None:
    """Refuse a template that leaves out what somebody said."""
    wanted = [(f"the {turn['role']} turn", said_by_others(turn).strip()) for turn in turns]
    for tool in prompt.tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if is_object(function) else None
        wanted.append(("the tool", str(name or "")))
    for what, words in wanted:
        if words not in text:
            raise UserError(
                f"the chat template leaves out {what} {words[:40]!r} of prompt "
                f"{prompt.prompt_id!r}; expected all of the text; set template.file to a template "
                "that writes it, or leave it out of the prompts"
            )


def raw_ids(tokenizer: Any, text: str, *, bos: Literal["tokenizer", "always"]) -> list[int]:
    """The ids of a text that a model is to continue: see `RawTemplate`.

    Example:
        >>> raw_ids(llama, "<s>Anna", bos="tokenizer")  # tokenizer("<s>Anna") begins with two
        [1, 7740]
    """
    return raw_ids_of(tokenizer, [text], bos=bos)[0]


def raw_ids_of(
    tokenizer: Any, texts: list[str], *, bos: Literal["tokenizer", "always"]
) -> list[list[int]]:
    """`raw_ids` of each text, which a tokenizer reads faster together."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    found: list[list[int]] = []
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        if last is not None and ids[-1:] == [last] and len(ids) > 1:
            written: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids[len(ids) - 1 - len(written) : -1] == written:  # the text has no end of its own
                ids = ids[:-1]
        if bos == "always" and first is not None and ids[:1] != [first]:
            ids = [first, *ids]
        while first is not None and ids[:2] == [first, first]:
            ids = ids[1:]
        found.append(ids)
    return found
