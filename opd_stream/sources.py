"""Where prompts come from: sections of the config, and the prompts that a source holds."""

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from decimal import Decimal
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from opd_stream.errors import UserError, shortened
from opd_stream.messages import Turn, check_unicode, is_turns, tools_of, turns_of, turns_text
from opd_stream.rendering import ChatTemplate, Prompt, RawTemplate, Template, template_settings
from opd_stream.rows import (
    Format,
    PlacedRow,
    count_rows,
    format_of,
    rows_of_file,
    source_files,
    value_of,
)
from opd_stream.section import SEEDS, PathText, Section, is_list, is_object, later
from opd_stream.store.files import canonical_json, sha256, sha256_file
from opd_stream.store.lines import opened
from opd_stream.tasks.ledger import make_problems
from opd_stream.tasks.references import Match, reference_text

HUB_SECONDS = 10  # for the hub's first answer
FIELD = re.compile(r"\{([\w.]+)\}")
_VIEW = re.compile(rf"\{{\{{|\}}\}}|{FIELD.pattern}")  # of a text in which {{ stands for a brace


class UnreadableDataset(UserError):
    """A data set that its library cannot find or read; rows that it read are no reason."""


class EmbeddedPrompts(Section):
    """The embedded tasks: generated problems with answers a program can check."""

    kind: Literal["ledger", "routine", "programs"] = Field(
        description="ledger: a few days, solutions of 170 tokens; routine: some weeks, of 600; "
        "programs: small functions, of 40, for judge code"
    )
    count: int = Field(ge=1, le=10_000_000, description="number of problems")
    seed: int = Field(
        ge=0, lt=SEEDS, description="seed of the problems; keep training and evaluation apart"
    )
    solutions: bool = later(
        default=False, description="the worked solutions are given completions of the prompts"
    )
    template: Template = RawTemplate(text="{prompt}\n", bos="always")
    max_prompt_tokens: int = Field(default=512, ge=1, description="a longer prompt is refused")

    @property
    def gives_answers(self) -> bool:
        """Whether rows have completions."""
        return self.solutions


class RowPrompts(Section):
    """Prompts from rows with named fields; `a.b` is field b of the object in field a."""

    prompt_field: str = Field(
        default="prompt",
        description="field that holds the prompt: text, or a list of messages; or a text with "
        "{field} in it, for which the row's fields are put in",
    )
    messages_field: str | None = later(
        default=None,
        description="or field that holds a list of messages; null: messages or conversations, "
        "where a row has no prompt_field",
    )
    tools_field: str = later(
        default="tools", description="field that holds tool schemas, where a row has one"
    )
    answer_field: str | None = Field(
        default=None, description="field that holds the reference answer, or a list of answers"
    )
    answer_fields: tuple[str, ...] = later(
        default=(),
        description="or fields that make up the reference together, as judge code reads it; a row "
        "may lack one whose name ends in ?",
    )
    answers: Match = later(
        default="any",
        description="of a reference that is a list: any of its answers is right, or all have to be",
    )
    completion_field: str | None = later(
        default=None,
        description="field that holds a given answer, or a list of them, that rollouts.given_share "
        "trains on (docs/rollouts.md); a row may have none",
    )
    level_field: str | None = later(
        default=None,
        description="field that holds the level of a prompt, for rollouts.select",
    )
    id_field: str | None = Field(
        default=None, description="field that identifies a prompt; default: the row's number"
    )
    limit: int | None = Field(default=None, ge=1, description="read only the first rows")
    template: Template = RawTemplate()
    max_prompt_tokens: int = Field(default=1024, ge=1, description="tokens a prompt may have")
    long_prompts: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="what to do with a longer prompt; how many were skipped is a warning",
    )

    @property
    def gives_answers(self) -> bool:
        """Whether rows may have completions."""
        template = self.template
        is_given = isinstance(template, ChatTemplate) and template.final_answer == "given"
        return is_given or self.completion_field is not None


class FilePrompts(RowPrompts):
    """Files of rows: JSON lines, JSON arrays, CSV, Parquet (docs/prompts.md)."""

    kind: Literal["files", "jsonl"] = Field(
        description="files: formats by the files' names; jsonl: one file of JSON, whatever its name"
    )
    path: Path = Field(
        description="file; with kind files also a folder, or a pattern such as data/*.parquet"
    )


class DatasetPrompts(RowPrompts):
    """A Hugging Face dataset: a hub name, a saved folder, or a builder with local files."""

    kind: Literal["datasets"]
    path: PathText = Field(
        description="hub name, save_to_disk folder, or builder (json, parquet, ...)"
    )
    name: str | None = Field(default=None, description="configuration of the dataset")
    revision: str | None = later(
        default=None, description="of a hub name: branch, tag or commit; name a commit to fix it"
    )
    data_files: Path | None = Field(default=None, description="local file for a builder")
    split: str = Field(default="train", description="split to read")
    streaming: bool = later(
        default=False, description="read rows as they arrive, up to `limit`, and keep no copy"
    )

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.streaming and self.limit is None:
            raise ValueError(
                f"streaming is set for dataset {self.path!r} without limit; expected the number of "
                "rows to read; set limit"
            )
        return self


Prompts = Annotated[EmbeddedPrompts | FilePrompts | DatasetPrompts, Field(discriminator="kind")]


def source_settings(source: Prompts) -> dict[str, Any]:
    """What of a source goes into the recipe: content digests instead of paths.

    Raises:
        UserError: a file does not exist, or is of no known format.
    """
    settings = source.model_dump(mode="json")
    settings["template"] = template_settings(source.template)
    if isinstance(source, FilePrompts):
        digests = [[kind, _digest(path)] for path, kind in _files(source)]
        one_file = digests[0][1] if source.kind == "jsonl" else None
        settings["path"] = one_file or sha256(canonical_json(digests))
    elif isinstance(source, DatasetPrompts):
        if source.data_files is not None and not source.data_files.is_file():
            raise UserError(f"data file {source.data_files} does not exist; check data_files")
        if source.data_files is not None:
            settings["data_files"] = _digest(source.data_files)
        elif Path(source.path).is_dir():
            files = sorted(path for path in Path(source.path).rglob("*") if path.is_file())
            settings["path"] = sha256(canonical_json([[p.name, _digest(p)] for p in files]))
    return settings


def read_prompts(source: Prompts) -> list[Prompt]:
    """Read a source.

    Raises:
        UserError: no prompts, a malformed line, a missing field or a duplicate id.
    """
    return [prompt for prompt, _ in read_rows(source)]


def read_rows(source: Prompts) -> Iterator[tuple[Prompt, PlacedRow]]:
    """The prompts of a source with their rows; raises as `read_prompts` does."""
    if isinstance(source, EmbeddedPrompts):
        for found in make_problems(count=source.count, seed=source.seed, task=source.kind):
            prompt = Prompt(prompt_id=found.problem_id, text=found.question, answer=found.answer)
            if source.solutions:
                prompt = replace(prompt, completions=(found.solution,))
            yield prompt, (f"problem {found.problem_id}", asdict(found))
        return
    place_of: dict[str, str] = {}
    for number, (place, row) in enumerate(islice(_rows(source), source.limit)):
        prompt = _prompt(source, number, place, row)
        if prompt.prompt_id in place_of:
            raise UserError(
                f"{place}: id {prompt.prompt_id!r} stands at {place_of[prompt.prompt_id]} already; "
                "expected unique ids; mend the file or choose another id_field"
            )
        place_of[prompt.prompt_id] = place
        yield prompt, (place, row)
    if not place_of:
        name = source.data_files if isinstance(source, DatasetPrompts) else source.path
        raise UserError(f"{name or source.path} holds no prompts; expected at least one; check it")


def belongs(when: Mapping[str, Sequence[str]], placed: PlacedRow) -> bool:
    """Whether a row has one of the wanted values in each field; of a list, any item counts.

    Raises:
        UserError: it has no such field, or nothing in it.
    """
    place, row = placed
    found = (
        set(_texts(value_of(row, name, place, "when"), f"{place}: field {name!r}", "mend it"))
        for name in when
    )
    return all(not texts.isdisjoint(when[name]) for name, texts in zip(when, found, strict=True))


def view_flaw(view: str) -> str | None:
    """Why a text cannot be a view, in words; None: it can.

    Example:
        >>> view_flaw("{prompt} {solution")
        "expected braces around the name of a field, found '{solution' (write {{ for a brace)"
    """
    if not any(found.group(1) for found in _VIEW.finditer(view)):
        return "expected text with a field in it, {prompt} or another of the row"
    left = _VIEW.sub(lambda found: " " * len(found[0]), view)
    if (stray := re.search(r"[{}]", left)) is None:
        return None
    found = shortened(view[stray.start() :].split("\n")[0], 24)
    return f"expected braces around the name of a field, found {found} (write {{{{ for a brace)"


def shown(view: str, source: Prompts, prompt: Prompt, placed: PlacedRow) -> Prompt:
    """A prompt with the text of a view in place of its own; of messages, of the last user's turn.

    Args:
        view: text in which {prompt} is the prompt's text, {answer} its reference answer, where
            `answer_field` names one, and {field} any field of its row; {{ and }} are braces.
        source: of the prompt.
        prompt: as the student reads it.
        placed: its row, and where that stands.

    Raises:
        UserError: the row has no such field, or its messages have no user's turn.
    """
    place, row = placed
    users = [n for n, turn in enumerate(prompt.turns or ()) if turn["role"] == "user"]
    if prompt.turns is not None and not users:
        raise UserError(
            f"{place}: the messages have no user's turn, in which a view could stand; leave "
            "teacher.view out, or mend the row"
        )
    own = prompt.text if prompt.turns is None else prompt.turns[users[-1]]["content"]
    answer = None if isinstance(source, EmbeddedPrompts) else source.answer_field

    def written(name: str) -> str:
        if name == "prompt":
            return own
        name = answer or name if name == "answer" else name
        return _written(row, name, place, "teacher.view")

    text = _VIEW.sub(lambda found: written(found.group(1)) if found.group(1) else found[0][0], view)
    check_unicode(place, text)
    if prompt.turns is None:
        return replace(prompt, text=text)
    turns = list(prompt.turns)
    turns[users[-1]] = {**turns[users[-1]], "content": text}
    return replace(prompt, turns=tuple(turns))


def row_count(source: Prompts) -> int | None:
    """Rows of a source, or its limit; None where only reading it all would tell."""
    if isinstance(source, EmbeddedPrompts):
        return source.count
    if source.limit is not None:
        return source.limit
    if isinstance(source, FilePrompts):
        return sum(count_rows(path, kind) for path, kind in _files(source))
    return len(_saved(source)) if _is_saved(source) else None


def _files(source: FilePrompts) -> list[tuple[Path, Format]]:
    """The files of a source with their formats, in order."""
    if source.kind == "jsonl":
        if source.path.is_dir():
            raise UserError(
                f"path {source.path} is a folder; expected a file of JSON lines; set "
                "kind=files to read all files of a folder"
            )
        if not source.path.is_file():
            raise UserError(
                f"prompt file {source.path} does not exist; expected JSON lines, plain, .gz or "
                ".zst; correct path"
            )
        return [(source.path, "json")]
    return [(path, kind) for path in source_files(source.path) if (kind := format_of(path))]


def _digest(path: Path) -> str:
    opened(path).close()  # it can be read
    return sha256_file(path)


def _rows(source: FilePrompts | DatasetPrompts) -> Iterator[PlacedRow]:
    if isinstance(source, FilePrompts):
        for path, kind in _files(source):
            yield from rows_of_file(path, kind)
        return
    try:
        for number, row in enumerate(_dataset(source)):
            yield f"{source.path} row {number}", dict(row)
    except Exception as error:  # the library and its file systems raise kinds of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UnreadableDataset(
            f"dataset {source.path!r} cannot be read: {reason}; expected a hub name, a saved "
            "folder or a builder; check path, name and split; without a network, copy it to a "
            f"folder before (hf download {source.path} --repo-type dataset --local-dir DIR) and "
            "set path to DIR"
        ) from error


def _dataset(source: DatasetPrompts) -> Iterable[Any]:
    if _is_saved(source):
        return _saved(source)
    datasets: Any = importlib.import_module("datasets")  # not typed
    if source.data_files is None and not Path(source.path).exists():
        _leave_out_hub(datasets)
    return datasets.load_dataset(
        source.path,
        name=source.name,
        revision=source.revision,
        data_files=None if source.data_files is None else str(source.data_files),
        split=source.split,
        streaming=source.streaming,
    )


@lru_cache(maxsize=1)
def _leave_out_hub(datasets: Any) -> None:
    """Without a network, read what was fetched before; else the library asks for half a minute."""
    import huggingface_hub

    hub: Any = huggingface_hub
    try:
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # of the library that it uses
        datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = True


def _is_saved(source: DatasetPrompts) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    names = ("dataset_info.json", "dataset_dict.json")
    return source.data_files is None and any((Path(source.path) / n).is_file() for n in names)


def _saved(source: DatasetPrompts) -> Any:
    datasets: Any = importlib.import_module("datasets")  # not typed
    loaded = datasets.load_from_disk(source.path)
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if source.split not in loaded:
        raise ValueError(f"it has no split {source.split!r}, it has {', '.join(loaded)}")
    return loaded[source.split]


def _prompt(
    source: FilePrompts | DatasetPrompts, number: int, place: str, row: dict[str, Any]
) -> Prompt:
    text, turns = _text_or_turns(source, place, row)
    identity = f"row-{number}"
    if source.id_field is not None:
        found = _scalar(value_of(row, source.id_field, place, "id_field"))
        if found is None:
            raise UserError(
                f"{place}: field {source.id_field!r} {_found(row.get(source.id_field))}; expected "
                "an id; add it"
            )
        identity = found
    prompt = Prompt(
        prompt_id=identity,
        text=text,
        answer=_answer(source, place, row),
        turns=turns,
        tools=None if turns is None else tools_of(row.get(source.tools_field), place),
        completions=_completions(source, place, row, turns or ()),
        level=_level(source, place, row),
    )
    for said in (prompt.prompt_id, prompt.text, prompt.answer or "", *prompt.completions):
        check_unicode(place, said)
    return prompt


def _text_or_turns(
    source: FilePrompts | DatasetPrompts, place: str, row: dict[str, Any]
) -> tuple[str, tuple[Turn, ...] | None]:
    """The prompt of a row as text, and its messages if it is a list of them."""
    name, setting = source.messages_field or source.prompt_field, "prompt_field"
    if source.messages_field is not None:
        setting = "messages_field"
    elif name == "prompt" and name not in row:
        name = next((known for known in ("messages", "conversations") if known in row), name)
    if "{" in name:
        written = partial(_written, row, place=place, setting="prompt_field")
        return FIELD.sub(lambda field: written(field.group(1)), name), None
    found = value_of(row, name, place, setting)
    if isinstance(found, str) and source.messages_field is None:
        return found, None
    if source.messages_field is None and not is_turns(found):
        raise UserError(
            f"{place}: field {name!r} {_found(found)}; expected text or messages; mend the row, "
            "or set prompt_field"
        )
    turns = turns_of(found, f"{place}: field {name!r}")
    return turns_text(turns), turns


def _written(row: dict[str, Any], name: str, place: str, setting: str) -> str:
    """A field as text: of a list, a line for each item."""
    found = value_of(row, name, place, setting)
    return "\n".join(_texts(found, f"{place}: field {name!r}", f"mend it, or set {setting}"))


def _answer(source: FilePrompts | DatasetPrompts, place: str, row: dict[str, Any]) -> str | None:
    """The reference answer of a row: of a list as `reference_text` writes it, of fields as JSON."""
    if source.answer_fields:
        fields = {
            name: value_of(row, name, place, "answer_fields")
            for asked in source.answer_fields
            if (name := asked.removesuffix("?")) in row or name == asked
        }
        return json.dumps(fields, ensure_ascii=False, default=str)
    if source.answer_field is None:
        return None
    value = value_of(row, source.answer_field, place, "answer_field")
    if value is None:
        return None
    remedy = f"set answer_field, such as {source.answer_field}.FIELD for a field of an object"
    answers = _texts(value, f"{place}: field {source.answer_field!r}", remedy)
    return reference_text(answers, source.answers)


def _completions(
    source: FilePrompts | DatasetPrompts, place: str, row: dict[str, Any], turns: Sequence[Turn]
) -> tuple[str, ...]:
    """The given answers of a row: of its field, or the text of an only turn that ends it."""
    name, last = source.completion_field, turns[-1:]
    if name is None and source.gives_answers and last and last[0]["role"] == "assistant":
        is_one = turns[-2:-1] and turns[-2]["role"] != "assistant"
        words = last[0].get("content") or ""
        return (words,) if is_one and words.strip() and "tool_calls" not in last[0] else ()
    setting = "completion_field, or write null into rows without a completion"
    if name is None or (value := value_of(row, name, place, setting)) is None:
        return ()
    said = f"{place}: field {name!r}"
    remedy = f"set completion_field, such as {name}.FIELD for a field of an object"
    texts = _texts(value, said, remedy)
    if not all(text.strip() for text in texts):
        raise UserError(
            f"{said} holds an empty completion; expected text; mend the row, or set it to null"
        )
    return tuple(texts)


def _level(source: FilePrompts | DatasetPrompts, place: str, row: dict[str, Any]) -> str | None:
    """The level of a row; None: the source names none."""
    if source.level_field is None:
        return None
    value = value_of(row, source.level_field, place, "level_field")
    if (level := _scalar(value)) is None:
        raise UserError(
            f"{place}: field {source.level_field!r} {_found(value)}; expected text or a number; "
            "mend the row, or set level_field"
        )
    return level


def _texts(value: Any, said: str, remedy: str) -> list[str]:
    """A value, or the items of a list, as text."""
    texts = list(map(_scalar, value)) if is_list(value) else [_scalar(value)]
    known = [text for text in texts if text is not None]
    if len(known) < len(texts):
        raise UserError(
            f"{said} {_found(value)}; expected text, a number or a list of them; {remedy}"
        )
    return known


def _scalar(value: Any) -> str | None:
    """Text, a number or a truth value as text; None: it is none of these."""
    is_one = isinstance(value, str | int | float | Decimal | date)  # a date may be an id
    return str(value) if is_one else None


def _found(value: Any) -> str:
    if value is None:
        return "is null"
    fields = f" with {', '.join(map(str, value))}" if is_object(value) else ""
    return f"holds a {type(value).__name__}{fields}"
