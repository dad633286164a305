"""From a prompt source to the prompts artifact: ids, text and reference answer, once.

No later stage sees a template or a tokenizer's opinion of the prompt: ids travel from here on.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from opd_stream.errors import UserError
from opd_stream.section import Section
from opd_stream.store.files import canonical_json, lines_of, sha256, sha256_file
from opd_stream.store.shards import PROMPTS, id_lists
from opd_stream.tasks.ledger import make_problems


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
    """Prompts from rows with named fields."""

    prompt_field: str = Field(default="prompt", description="field that holds the prompt text")
    answer_field: str | None = Field(
        default=None, description="field that holds the reference answer"
    )
    id_field: str | None = Field(
        default=None, description="field that identifies a prompt; default: the row's number"
    )
    limit: int | None = Field(default=None, ge=1, description="read only the first rows")
    template: Template = RawTemplate()
    max_prompt_tokens: int = Field(default=1024, ge=1, description="tokens a prompt may have")
    long_prompts: Literal["refuse", "skip"] = Field(
        default="refuse", description="what to do with a longer prompt"
    )


class JsonlPrompts(RowPrompts):
    """One JSON object a line, plain or .zst."""

    kind: Literal["jsonl"]
    path: Path = Field(description="file to read")


class DatasetPrompts(RowPrompts):
    """A Hugging Face dataset: a hub name, a saved folder, or a builder with local files."""

    kind: Literal["datasets"]
    path: str = Field(description="hub name, save_to_disk folder, or builder (json, parquet, ...)")
    name: str | None = Field(default=None, description="configuration of the dataset")
    data_files: Path | None = Field(default=None, description="local file for a builder")
    split: str = Field(default="train", description="split to read")


Prompts = Annotated[EmbeddedPrompts | JsonlPrompts | DatasetPrompts, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt before tokenisation."""

    prompt_id: str
    text: str
    answer: str | None


def source_settings(source: Prompts) -> dict[str, Any]:
    """What of a source goes into the recipe: content digests instead of paths."""
    settings = source.model_dump(mode="json")
    if isinstance(source, JsonlPrompts):
        if not source.path.is_file():
            raise UserError(
                f"prompt file {source.path} does not exist; expected JSON lines, plain or .zst; "
                "give it with --set prompts.path=FILE"
            )
        settings["path"] = sha256_file(source.path)
    elif isinstance(source, DatasetPrompts):
        if source.data_files is not None and not source.data_files.is_file():
            raise UserError(f"data file {source.data_files} does not exist; check data_files")
        if source.data_files is not None:
            settings["data_files"] = sha256_file(source.data_files)
        elif Path(source.path).is_dir():
            files = sorted(path for path in Path(source.path).rglob("*") if path.is_file())
            settings["path"] = sha256(canonical_json([[p.name, sha256_file(p)] for p in files]))
    return settings


def read_prompts(source: Prompts) -> list[Prompt]:
    """Read a source.

    Raises:
        UserError: no prompts, a malformed line, a missing field or a duplicate id.
    """
    if isinstance(source, EmbeddedPrompts):
        problems = make_problems(count=source.count, seed=source.seed, task=source.kind)
        return [Prompt(prompt_id=p.problem_id, text=p.question, answer=p.answer) for p in problems]
    rows = _jsonl_rows(source) if isinstance(source, JsonlPrompts) else _dataset_rows(source)
    prompts: list[Prompt] = []
    place_of: dict[str, str] = {}
    for number, (place, row) in enumerate(rows):
        if source.limit is not None and number >= source.limit:
            break
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


def prompts_table(source: Prompts, tokenizer: Any) -> pa.Table:
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
    return pa.Table.from_arrays(columns, schema=PROMPTS)


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


def _jsonl_rows(source: JsonlPrompts) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines_of(source.path), start=1):
        if not line.strip():
            continue
        place = f"{source.path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{place} is not valid JSON ({error}); mend or remove the line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{place} holds a {type(row).__name__}; expected one JSON object a line"
            )
        yield place, row


def _dataset_rows(source: DatasetPrompts) -> Iterator[tuple[str, dict[str, Any]]]:
    datasets: Any = importlib.import_module("datasets")  # not typed

    try:
        if source.data_files is None and Path(source.path).is_dir():
            loaded = datasets.load_from_disk(source.path)
            data = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            files = str(source.data_files) if source.data_files is not None else None
            data = datasets.load_dataset(
                source.path, name=source.name, data_files=files, split=source.split
            )
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"dataset {source.path!r} cannot be read: {reason}; check it") from error
    for number, row in enumerate(data):
        yield f"{source.path} row {number}", dict(row)


def _prompt(
    source: JsonlPrompts | DatasetPrompts, number: int, place: str, row: dict[str, Any]
) -> Prompt:
    def field(name: str) -> Any:
        if name not in row:
            raise UserError(
                f"{place} has no field {name!r}; it has {', '.join(row)}; set the field"
            )
        return row[name]

    text = field(source.prompt_field)
    if not isinstance(text, str):
        raise UserError(
            f"{place}: field {source.prompt_field!r} holds a {type(text).__name__}; expected text"
        )
    answer = None if source.answer_field is None else field(source.answer_field)
    identity = f"row-{number}" if source.id_field is None else field(source.id_field)
    if identity is None:
        raise UserError(f"{place}: field {source.id_field!r} is null; expected an id; add it")
    prompt = Prompt(
        prompt_id=str(identity), text=text, answer=None if answer is None else str(answer)
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
