"""What an estimate reads: the setup of a run and the lengths of its prompts, without torch.

Nothing is written: prompts are named, not made, and no digest is remembered.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.config import Config, Evaluation
from opd_stream.errors import UserError
from opd_stream.prompts import lost_rows, tokenised_prompts
from opd_stream.sources import (
    DatasetPrompts,
    EmbeddedPrompts,
    FilePrompts,
    Prompts,
    read_prompts,
    row_count,
)
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.files import is_remote
from opd_stream.store.policy import UNREAD, known_identity
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_settings import read_settings
from pipeline.estimate.sizes import PromptLengths
from pipeline.setup import Setup, check_context, check_extras, setup_of
from stages.checkpoints import Checkpoint
from stages.prompts import prompts_artifact, rows_left_out, selected_rows

MOST_BYTES = 2**30  # of weights, read for their digest
MOST_PROMPTS = 2_000  # tokenised to measure them


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


class Problems(NamedTuple):
    """A set of problems that policies are evaluated on."""

    settings: Evaluation
    artifact: Artifact
    lengths: SourceLengths


@dataclass(slots=True, kw_only=True)
class RunInputs:
    """The setup of a run, and the lengths of its prompts."""

    setup: Setup
    prompts: SourceLengths
    problems: tuple[Problems, ...]
    notes: list[str]  # what was assumed


def read_inputs(config: Config) -> RunInputs:
    """Open what a run needs, without changing anything."""
    check_extras(config)
    store = Store(config.store)
    _check_store(store)
    notes: list[str] = []
    tokenizer = FastTokenizer.of(config.student.folder)

    def token_id(model: Checkpoint, token: str) -> int | None:
        return None if tokenizer is None else tokenizer.token_id(token)

    setup = setup_of(config, store, partial(_checkpoint, store, notes), token_id, make=False)
    problems: list[Problems] = []
    parts = {} if config.evaluation is None else config.evaluation.parts()
    for name, part in parts.items():
        assert part.prompts is not None  # validated
        held_out = prompts_artifact(store, part.prompts, setup.student)
        lengths = measure_prompts(f"evaluation ({name})", held_out, part.prompts, tokenizer, notes)
        problems.append(Problems(part, held_out, lengths))
    prompts = measure_prompts("prompts", setup.prompts, config.prompts, tokenizer, notes)
    check_context(config, setup.student, setup.teacher, int(prompts.tokens.max()))
    return RunInputs(setup=setup, prompts=prompts, problems=tuple(problems), notes=notes)


def _checkpoint(store: Store, notes: list[str], folder: Path) -> Checkpoint:
    identity = known_identity(folder, cache=store.digests, most_bytes=MOST_BYTES)
    if identity.weights_sha256 == UNREAD:
        notes.append(
            f"the weights of {folder} have not been read by a run on this machine, and are too "
            "large to read now: what the store has for them is not counted"
        )
    return Checkpoint(folder=folder.resolve(), identity=identity)


def _check_store(store: Store) -> None:
    """Refuse what the run would refuse, by looking alone."""
    if is_remote(store.root):
        return
    if not (folder := existing_folder(store.root)).is_dir():
        raise UserError(f"store {store.root} is a file; expected a folder; set store=DIR")
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"cannot write {store.root}; expected a writable folder; choose another one "
            "(--set store=DIR)"
        )


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


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

    def _special(self, token: Any) -> int | None:
        text = token["content"] if isinstance(token, dict) else token
        return None if text is None else self.token_id(text)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The ids of a text, as a tokenizer of transformers gives them."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoding.ids}


def measure_prompts(
    field: str,
    artifact: Artifact,
    source: Prompts,
    tokenizer: FastTokenizer | None,
    notes: list[str],
) -> SourceLengths:
    """The lengths of a source's prompts; refuses as a run would, and notes what it assumes."""
    if artifact.is_complete():
        try:
            found = _all_lengths(artifact.read_unit(0))
            notes += rows_left_out(artifact, field)
            return found
        except DamagedUnit:
            notes.append(f"{artifact.name} is damaged; the run makes it again")
    if tokenizer is None or source.template.kind == "chat" or isinstance(source, DatasetPrompts):
        most = source.max_prompt_tokens
        notes.append(
            f"prompts ({source.kind}, template {source.template.kind}) are not in the store yet: "
            f"each is taken to have max_prompt_tokens, {most}"
        )
        return SourceLengths(tokens=np.array([most]), is_whole=False, rows=_rows(source))
    field = "count" if isinstance(source, EmbeddedPrompts) else "limit"
    most = min(getattr(source, field) or MOST_PROMPTS + 1, MOST_PROMPTS + 1)
    first = source.model_copy(update={field: most})
    tokenised = tokenised_prompts(first, tokenizer)
    found = _all_lengths(tokenised.table)
    notes += lost_rows(field, len(found.tokens), tokenised.lost)
    if len(read_prompts(first)) <= MOST_PROMPTS:
        return found
    notes.append(f"prompts ({source.kind}) are measured on the first {MOST_PROMPTS:,} of them")
    return SourceLengths(tokens=found.tokens, is_whole=False, rows=_rows(source))


def _all_lengths(prompts: pa.Table) -> SourceLengths:
    """Of a whole source; `to_numpy` would load pandas, which takes longer than all the rest."""
    lengths = prompts["prompt_ids"].combine_chunks().value_lengths().to_pylist()
    return SourceLengths(tokens=np.array(lengths), is_whole=True, rows=len(lengths))


def _rows(source: Prompts) -> int | None:
    """How many prompts a source holds, without reading them."""
    if isinstance(source, EmbeddedPrompts):
        return source.count
    if isinstance(source, FilePrompts) and source.limit is None:
        return row_count(source)
    return source.limit
