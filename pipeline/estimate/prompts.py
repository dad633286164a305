"""How long the prompts of a run are, and whether it would refuse them, from their first rows.

Nothing is written and torch is not loaded: raw prompts need `tokenizer.json` alone, chat templates
the tokenizer of transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.errors import UserError, named
from opd_stream.prompts import lost_rows, rendered_prompts, tokenised_prompts
from opd_stream.rendering import ChatTemplate, RawTemplate
from opd_stream.sources import (
    EmbeddedPrompts,
    FilePrompts,
    Prompts,
    UnreadableDataset,
    read_prompts,
    row_count,
)
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.tokenizer_folder import open_vocabulary, read_settings
from pipeline.estimate.sizes import PromptLengths
from pipeline.setup import Setup, teacher_rendering
from stages.prompts import (
    check_chosen,
    is_sound,
    own_prompts,
    rows_left_out,
    selected_rows,
    table_lengths,
)

MOST_PROMPTS = 2_000  # written and tokenised to measure them
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLengths:
    """Tokens of the prompts of a source."""

    tokens: NDArray[np.integer[Any]]
    is_whole: bool  # of all of them, in their order
    rows: int | None  # prompts in the source, as far as that is known

    def selected(self, selection: dict[str, Any]) -> PromptLengths:
        """Of the prompts of a recipe; where not all are measured, of those that are."""
        tokens = self.tokens
        if self.is_whole:
            tokens = tokens[selected_rows(selection, len(tokens))]
        return PromptLengths(mean=float(tokens.mean()), mean_square=float((tokens**2.0).mean()))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPrompts:
    """The prompts that were looked at, of a source or of its first rows."""

    table: pa.Table
    lengths: SourceLengths


class FastTokenizer:
    """`tokenizer.json` alone: what raw prompts need of a tokenizer, without transformers."""

    chat_template = None

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        named = read_settings(folder)
        self.bos_token_id = self._special(named.get("bos_token"))
        self.eos_token_id = self._special(named.get("eos_token"))

    @staticmethod
    def of(folder: Path) -> "FastTokenizer | None":
        """That of a checkpoint; None where it has none in this form."""
        if not (folder / "tokenizer.json").is_file():
            return None
        try:
            return FastTokenizer(folder)
        except UserError:
            raise
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder} has no readable tokenizer ({reason}); check the folder"
            ) from error

    def token_id(self, token: str) -> int | None:
        """The id of a token as it stands in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def text_id(self, text: str) -> int | None:
        """The id of a text that is one token, as it stands in the vocabulary or as it is read."""
        if (known := self.token_id(text)) is not None:
            return known
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids[0] if len(ids) == 1 and self._tokenizer.decode(ids) == text else None

    def _special(self, token: Any) -> int | None:
        text = token["content"] if isinstance(token, dict) else token
        return None if text is None else self.token_id(text)

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True) -> dict[str, Any]:
        """The ids of a text, or of each of a list, as a tokenizer of transformers gives them."""
        texts = [text] if isinstance(text, str) else text
        found = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids = [encoding.ids for encoding in found]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def tokenizer_for(folder: Path, template: RawTemplate | ChatTemplate) -> Any:
    """What a template needs of a checkpoint's tokenizer."""
    fast = FastTokenizer.of(folder) if isinstance(template, RawTemplate) else None
    return fast or open_vocabulary(folder)


def measure_prompts(
    field: str, artifact: Artifact, source: Prompts, folder: Path, notes: list[str]
) -> MeasuredPrompts:
    """The prompts of a source, or its first ones where it is not in the store yet.

    Args:
        field: of the config that names the source.
        artifact: that has or will have them.
        source: where they come from.
        folder: of the checkpoint that reads them.
        notes: gets what is assumed and what is left out.

    Raises:
        UserError: the run would refuse them.
    """
    if artifact.is_complete():
        try:
            table = artifact.read_all()
            notes += rows_left_out(artifact, field)
            return MeasuredPrompts(table=table, lengths=_whole(table))
        except DamagedUnit:
            notes.append(f"{artifact.name} is damaged; the run makes it again")
    with named(field):
        tokenizer = tokenizer_for(folder, source.template)
        found = _of_first_rows(source, lambda first: tokenised_prompts(first, tokenizer))
    notes += lost_rows(field, found.table.num_rows, found.lost)
    lengths = _whole(found.table)
    if found.table.num_rows + sum(found.lost.values()) > MOST_PROMPTS:
        notes.append(f"{field}: measured and checked on the first {MOST_PROMPTS:,} rows")
        lengths = SourceLengths(tokens=lengths.tokens, is_whole=False, rows=row_count(source))
    return MeasuredPrompts(table=found.table, lengths=lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPrompts:
    """What a teacher reads, where it reads something else than the student, or not all of it."""

    table: pa.Table
    lengths: SourceLengths
    share: float  # of the student's prompts

    def selected(self, selection: dict[str, Any]) -> PromptLengths:
        """Of the prompts of a recipe; where it reads some of them, of all that it reads."""
        is_whole = self.lengths.is_whole and self.share == 1
        return replace(self.lengths, is_whole=is_whole).selected(selection)


def measure_teacher_prompts(setup: Setup, students: MeasuredPrompts) -> TeacherPrompts | None:
    """The same prompts as a teacher reads them; None: as the student does, all of them.

    Raises:
        UserError: the teacher's template, view or rule does not take them.
    """
    artifact, rendering = setup.teacher_prompts, teacher_rendering(setup.config)
    if artifact is None or rendering is None:
        return None
    assert setup.teacher is not None  # else there is no such artifact
    if is_sound(artifact):
        table, rows = own_prompts(artifact), setup.prompts.layout().rows
        return TeacherPrompts(table=table, lengths=_whole(table), share=table.num_rows / rows)
    folder, names = setup.teacher.folder, students.table["prompt_id"].to_pylist()
    tokenizer = None if rendering.template is None else tokenizer_for(folder, rendering.template)

    def rendered(first: Prompts) -> tuple[pa.Table, int]:
        there = {prompt.prompt_id for prompt in read_prompts(first)}
        read = students.table.take([n for n, name in enumerate(names) if name in there])
        return rendered_prompts(first, rendering, tokenizer, read), read.num_rows

    table, read = _of_first_rows(setup.config.prompts, rendered)
    is_whole = students.lengths.is_whole and read == len(names)
    if is_whole:
        check_chosen(rendering, table.num_rows)
    found = table if table.num_rows else students.table  # none of the first rows is its own
    lengths = replace(_whole(found), is_whole=is_whole, rows=students.lengths.rows)
    return TeacherPrompts(table=table, lengths=lengths, share=table.num_rows / read)


def _of_first_rows(source: Prompts, read: Callable[[Prompts], T]) -> T:
    """What is read of a source that is cut to one row more than are measured.

    A data set is read as it arrives, which keeps no copy; where that fails, as the run reads it,
    which may have a copy.
    """
    limit = "count" if isinstance(source, EmbeddedPrompts) else "limit"
    most = min(getattr(source, limit) or MOST_PROMPTS + 1, MOST_PROMPTS + 1)
    first = source.model_copy(update={limit: most})
    if isinstance(source, EmbeddedPrompts | FilePrompts) or source.streaming:
        return read(first)
    try:
        return read(first.model_copy(update={"streaming": True}))
    except UnreadableDataset:
        return read(first)


def _whole(prompts: pa.Table) -> SourceLengths:
    """Of a whole source."""
    lengths = table_lengths(prompts)
    return SourceLengths(tokens=np.array(lengths), is_whole=True, rows=len(lengths))
