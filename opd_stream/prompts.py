"""From a prompt source to the prompts artifact: ids, text and reference answer, once.

No later stage sees a template or a tokenizer's opinion of the prompt: ids travel from here on.
"""

import hashlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from opd_stream.errors import UserError
from opd_stream.rows import (
    Format,
    PlacedRow,
    count_rows,
    format_of,
    rows_of_file,
    source_files,
    value_of,
)
from opd_stream.section import Section, is_list, is_object, later
from opd_stream.store.files import canonical_json, sha256, sha256_file
from opd_stream.store.lines import opened
from opd_stream.store.shards import PROMPTS, id_lists
from opd_stream.tasks.ledger import make_problems
from opd_stream.tasks.references import Match, reference_text


class RawTemplate(Section):
    """The prompt text as it is, with the ids of `tokenizer(text)`; BOS never twice, no EOS behind.

    There are never two beginning-of-text tokens, where the text itself begins with one; an
    end-of-text token that the tokenizer appends is left off, since the text is to be continued.
    """

    kind: Literal["raw"] = "raw"
    text: str = Field(
        default="{prompt}", description="text around the prompt; {prompt} is replaced"
    )
    bos: Literal["tokenizer", "always"] = Field(
        default="tokenizer",
        description="who puts a beginning-of-text token in front: tokenizer: the tokenizer, where "
        "it does so itself; always: we do, where it has one (default of the embedded tasks)",
    )


class ChatTemplate(Section):
    """The tokenizer's own chat template, with the prompt as the user's turn."""

    kind: Literal["chat"] = "chat"
    text: str = Field(
        default="{prompt}", description="text of the user's turn; {prompt} is replaced"
    )
    system: str | None = Field(default=None, description="text of a system turn before it")


Template = Annotated[RawTemplate | ChatTemplate, Field(discriminator="kind")]


class EmbeddedPrompts(Section):
    """The embedded tasks: generated problems with answers a program can check."""

    kind: Literal["ledger", "routine"] = Field(
        description="ledger: a few days, solutions of 170 tokens; routine: some weeks, of 600"
    )
    count: int = Field(ge=1, description="number of problems")
    seed: int = Field(description="seed of the problems; keep training and evaluation apart")
    template: Template = RawTemplate(text="{prompt}\n", bos="always")
    max_prompt_tokens: int = Field(default=512, ge=1, description="a longer prompt is refused")


class RowPrompts(Section):
    """Prompts from rows with named fields; `a.b` is field b of the object in field a."""

    prompt_field: str = Field(default="prompt", description="field that holds the prompt text")
    answer_field: str | None = Field(
        default=None, description="field that holds the reference answer, or a list of answers"
    )
    answers: Match = later(
        default="any",
        description="of a reference that is a list: any of its answers is right, or all have to be",
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
    path: str = Field(description="hub name, save_to_disk folder, or builder (json, parquet, ...)")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt before tokenisation."""

    prompt_id: str
    text: str
    answer: str | None


def source_settings(source: Prompts) -> dict[str, Any]:
    """What of a source goes into the recipe: content digests instead of paths.

    Raises:
        UserError: a file does not exist, or is of no known format.
    """
    settings = source.model_dump(mode="json")
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
    if isinstance(source, EmbeddedPrompts):
        problems = make_problems(count=source.count, seed=source.seed, task=source.kind)
        return [Prompt(prompt_id=p.problem_id, text=p.question, answer=p.answer) for p in problems]
    prompts: list[Prompt] = []
    place_of: dict[str, str] = {}
    for number, (place, row) in enumerate(islice(_rows(source), source.limit)):
        prompt = _prompt(source, number, place, row)
        if prompt.prompt_id in place_of:
            raise UserError(
                f"{place}: id {prompt.prompt_id!r} stands at {place_of[prompt.prompt_id]} already; "
                "expected unique ids; mend the file or choose another id_field"
            )
        place_of[prompt.prompt_id] = place
        prompts.append(prompt)
    if not prompts:
        name = source.data_files if isinstance(source, DatasetPrompts) else source.path
        raise UserError(f"{name or source.path} holds no prompts; expected at least one; check it")
    return prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedPrompts:
    """A source in the prompts schema, and how many of its rows are not in it."""

    table: pa.Table
    lost: dict[str, int]  # why -> rows, a key of `LOSSES`; only what lost some


# Why rows of a source are left out, as counts of an artifact name it, and in words.
LOSSES = {"skipped_long": "longer than max_prompt_tokens (long_prompts=skip)"}


def lost_rows(field: str, kept: int, counts: Mapping[str, float]) -> Iterator[str]:
    """A line for every reason why rows of a source are left out.

    Args:
        field: of the config that names the source.
        kept: rows that are not left out.
        counts: of the artifact, or `TokenisedPrompts.lost`.
    """
    found = {name: int(counts[name]) for name in LOSSES if counts.get(name)}
    of = kept + sum(found.values())
    for name, rows in found.items():
        yield f"{field}: {rows:,} of {of:,} rows are left out: {LOSSES[name]}"


def prompts_table(source: Prompts, tokenizer: Any) -> pa.Table:
    """`tokenised_prompts`, without what was lost."""
    return tokenised_prompts(source, tokenizer).table


def tokenised_prompts(source: Prompts, tokenizer: Any) -> TokenisedPrompts:
    """Read, template and tokenise a source into the prompts schema.

    Raises:
        UserError: see `read_prompts`; or a prompt is longer than the limit, or empty.
    """
    prompts = read_prompts(source)
    ids = [_tokenise(source, tokenizer, prompt) for prompt in prompts]
    limit = source.max_prompt_tokens
    skip = not isinstance(source, EmbeddedPrompts) and source.long_prompts == "skip"
    kept: list[int] = []
    for row, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True)):
        if not len(tokens):
            raise UserError(f"prompt {prompt.prompt_id!r} is empty; expected text; mend the source")
        if len(tokens) <= limit:
            kept.append(row)
        elif not skip:
            raise UserError(
                f"prompt {prompt.prompt_id!r} has {len(tokens)} tokens; the limit is {limit}; "
                "raise max_prompt_tokens, or set long_prompts=skip to leave such prompts out"
            )
    if not kept:
        raise UserError(
            f"all {len(prompts)} prompts are longer than {limit} tokens; raise the limit"
        )
    columns = [
        pa.array([prompts[row].prompt_id for row in kept], pa.string()),
        id_lists([ids[row] for row in kept]),
        pa.array([prompts[row].text for row in kept], pa.string()),
        pa.array([prompts[row].answer for row in kept], pa.string()),
    ]
    lost = {"skipped_long": len(prompts) - len(kept)}
    return TokenisedPrompts(
        table=pa.Table.from_arrays(columns, schema=PROMPTS),
        lost={name: rows for name, rows in lost.items() if rows},
    )


def shuffled_rows(*, rows: int, seed: int, round_index: int, per_round: int) -> list[int]:
    """The prompts of a round: consecutive slices of a permutation, a new one for each pass.

    Raises:
        UserError: a round wants more prompts than there are.
    """
    if per_round > rows:
        raise UserError(
            f"rollouts.prompts_per_round is {per_round} but there are {rows} prompts; "
            "lower it or add prompts"
        )
    rounds_per_pass = rows // per_round
    pass_index, place = divmod(round_index, rounds_per_pass)
    digest = hashlib.sha256(f"prompts/{seed}/{pass_index}".encode()).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big"))).permutation(
        rows
    )
    return order[place * per_round : (place + 1) * per_round].tolist()


def row_count(source: FilePrompts) -> int:
    """Rows of a source, its limit aside."""
    return sum(count_rows(path, kind) for path, kind in _files(source))


def _files(source: FilePrompts) -> list[tuple[Path, Format]]:
    """The files of a source with their formats, in order."""
    if source.kind == "jsonl":
        if source.path.is_dir():
            raise UserError(
                f"prompts.path {source.path} is a folder; expected a file of JSON lines; set "
                "kind=files to read all files of a folder"
            )
        if not source.path.is_file():
            raise UserError(
                f"prompt file {source.path} does not exist; expected JSON lines, plain, .gz or "
                ".zst; give it with --set prompts.path=FILE"
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
        raise UserError(
            f"dataset {source.path!r} cannot be read: {reason}; expected a hub name, a saved "
            "folder or a builder; check path, name and split; without a network, fetch a hub name "
            f"before: hf download {source.path} --repo-type dataset"
        ) from error


def _dataset(source: DatasetPrompts) -> Iterable[Any]:
    datasets: Any = importlib.import_module("datasets")  # not typed

    saved = ("dataset_info.json", "dataset_dict.json")
    if source.data_files is None and any((Path(source.path) / name).is_file() for name in saved):
        loaded = datasets.load_from_disk(source.path)
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if source.split not in loaded:
            raise ValueError(f"it has no split {source.split!r}, it has {', '.join(loaded)}")
        return loaded[source.split]
    return datasets.load_dataset(
        source.path,
        name=source.name,
        revision=source.revision,
        data_files=None if source.data_files is None else str(source.data_files),
        split=source.split,
        streaming=source.streaming,
    )


def _prompt(
    source: FilePrompts | DatasetPrompts, number: int, place: str, row: dict[str, Any]
) -> Prompt:
    text = value_of(row, source.prompt_field, place, "prompt_field")
    if not isinstance(text, str):
        raise UserError(
            f"{place}: field {source.prompt_field!r} {_found(text)}; expected text; mend the row, "
            "or set prompt_field"
        )
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
    )
    for said in (prompt.prompt_id, prompt.text, prompt.answer or ""):
        _check_unicode(place, said)
    return prompt


def _check_unicode(place: str, text: str) -> None:
    """Refuse what JSON can escape and UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{place} holds {half} alone, half a surrogate pair; expected text that UTF-8 can "
            "write; mend or remove the line"
        ) from error


def _answer(source: FilePrompts | DatasetPrompts, place: str, row: dict[str, Any]) -> str | None:
    """The reference answer of a row, of a list of them as `reference_text` writes it."""
    if source.answer_field is None:
        return None
    value = value_of(row, source.answer_field, place, "answer_field")
    if value is None:
        return None
    texts = list(map(_scalar, value)) if is_list(value) else [_scalar(value)]
    answers = [text for text in texts if text is not None]
    if len(answers) < len(texts):
        raise UserError(
            f"{place}: field {source.answer_field!r} {_found(value)}; expected text, a number or a "
            f"list of them; set answer_field, such as {source.answer_field}.FIELD for a field of "
            "an object"
        )
    return reference_text(answers, source.answers)


def _scalar(value: Any) -> str | None:
    """Text, a number or a truth value as text; None: it is none of these."""
    is_one = isinstance(value, str | int | float | Decimal | date)  # a date may be an id
    return str(value) if is_one else None


def _found(value: Any) -> str:
    if value is None:
        return "is null"
    fields = f" with {', '.join(map(str, value))}" if is_object(value) else ""
    return f"holds a {type(value).__name__}{fields}"


def _tokenise(source: Prompts, tokenizer: Any, prompt: Prompt) -> np.ndarray:
    text = source.template.text.replace("{prompt}", prompt.text)
    if source.template.kind == "raw":
        ids = raw_ids(tokenizer, text, bos=source.template.bos)
    else:
        if tokenizer.chat_template is None:
            raise UserError(
                "template.kind is chat but the student's tokenizer has no chat template; "
                "set template.kind=raw or use a tokenizer with one"
            )
        turns = [{"role": "user", "content": text}]
        if source.template.system is not None:
            turns.insert(0, {"role": "system", "content": source.template.system})
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return np.asarray(ids, np.int32)


def raw_ids(tokenizer: Any, text: str, *, bos: Literal["tokenizer", "always"]) -> list[int]:
    """The ids of a text that a model is to continue: see `RawTemplate`.

    Example:
        >>> raw_ids(llama, "<s>Anna", bos="tokenizer")  # tokenizer("<s>Anna") begins with two
        [1, 7740]
    """
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids: list[int] = tokenizer(text)["input_ids"]
    if last is not None and ids[-1:] == [last] and len(ids) > 1:
        written: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids[len(ids) - 1 - len(written) : -1] == written:  # the text does not end here itself
            ids = ids[:-1]
    if bos == "always" and first is not None and ids[:1] != [first]:
        ids = [first, *ids]
    while first is not None and ids[:2] == [first, first]:
        ids = ids[1:]
    return ids
