"""Prompt lengths before a run: from the store, or tokenised here, without transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.config.prompts import DatasetPrompts, EmbeddedPrompts, JsonlPrompts, Prompts
from opd_stream.errors import UserError
from opd_stream.prompts import prompts_table, read_prompts
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.files import lines_of, read_json
from pipeline.forecast.lengths import PromptLengths
from stages.prompts import selected_rows

MOST_PROMPTS = 2_000  # tokenised to measure them


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """Tokens of the prompts of a source."""

    lengths: NDArray[np.integer[Any]]
    is_whole: bool  # of all of them, in their order
    rows: int | None  # prompts in the source, as far as that is known

    def chosen(self, selection: dict[str, Any]) -> PromptLengths:
        """Of the prompts of a recipe; where not all are known, of those that are.

        Raises:
            UserError: a round wants more prompts than there are.
        """
        lengths = self.lengths
        if self.is_whole:
            lengths = lengths[selected_rows(selection, len(lengths))]
        return PromptLengths(
            mean=float(lengths.mean()),
            mean_square=float(np.square(lengths).mean()),
            longest=int(lengths.max()),
        )


class FastTokenizer:
    """`tokenizer.json` alone: what raw prompts need of a tokenizer, without transformers."""

    chat_template = None

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = folder / "tokenizer_config.json"
        token = read_json(settings).get("bos_token") if settings.exists() else None
        text = token["content"] if isinstance(token, dict) else token
        self.bos_token_id = None if text is None else self.token_id(text)

    @staticmethod
    def of(folder: Path) -> "FastTokenizer | None":
        """That of a checkpoint; None where it has none in this form.

        Raises:
            UserError: the file cannot be read.
        """
        if not (folder / "tokenizer.json").is_file():
            return None
        try:
            return FastTokenizer(folder)
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder} has no readable tokenizer ({reason}); check the folder"
            ) from error

    def token_id(self, token: str) -> int | None:
        """The id of a token as it stands in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def measure_prompts(
    artifact: Artifact, source: Prompts, tokenizer: FastTokenizer | None, notes: list[str]
) -> PromptSource:
    """The lengths of a source's prompts; what is assumed is added to `notes`.

    Raises:
        UserError: as the run would: the source cannot be read, or a prompt does not fit.
    """
    if artifact.is_complete():
        try:
            return _source(artifact.read_unit(0)["prompt_ids"])
        except DamagedUnit:
            notes.append(f"{artifact.name} is damaged; the run makes it again")
    if tokenizer is None or source.template.kind == "chat" or isinstance(source, DatasetPrompts):
        most = source.max_prompt_tokens
        notes.append(
            f"prompts ({source.kind}, template {source.template.kind}) are not in the store yet: "
            f"each is taken to have max_prompt_tokens, {most}"
        )
        return PromptSource(lengths=np.array([most]), is_whole=False, rows=_rows(source))
    field = "count" if isinstance(source, EmbeddedPrompts) else "limit"
    most = min(getattr(source, field) or MOST_PROMPTS + 1, MOST_PROMPTS + 1)
    prompts = read_prompts(source.model_copy(update={field: most}))
    table = prompts_table(source.model_copy(update={field: most}), tokenizer)
    found = _source(table["prompt_ids"])
    if len(prompts) <= MOST_PROMPTS:
        return found
    notes.append(f"prompts ({source.kind}) are measured on the first {MOST_PROMPTS:,} of them")
    return PromptSource(lengths=found.lengths, is_whole=False, rows=_rows(source))


def _source(prompt_ids: pa.ChunkedArray) -> PromptSource:
    lengths = np.concatenate([np.diff(_offsets(chunk)) for chunk in prompt_ids.chunks])
    return PromptSource(lengths=lengths, is_whole=True, rows=len(lengths))


def _offsets(lists: Any) -> NDArray[np.int32]:
    """Of a column of lists; `to_numpy` would load pandas, which takes longer than all the rest."""
    offsets = lists.offsets
    whole = np.frombuffer(offsets.buffers()[1], np.int32)
    return whole[offsets.offset : offsets.offset + len(offsets)]


def _rows(source: Prompts) -> int | None:
    """How many prompts a source holds, without reading them."""
    if isinstance(source, EmbeddedPrompts):
        return source.count
    if isinstance(source, JsonlPrompts) and source.limit is None:
        return sum(1 for line in lines_of(source.path) if line.strip())
    return source.limit
