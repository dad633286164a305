"""The setup of a run as `pipeline.setup` opens it, but read only, and without torch.

Nothing is written: prompts are named, not made, and no digest is remembered.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opd_stream.config import Config, Evaluation
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.files import is_remote
from opd_stream.store.policy import UNREAD, known_identity
from opd_stream.store.store import Store
from pipeline.contexts import check_context
from pipeline.forecast.prompts import FastTokenizer, PromptSource, measure_prompts
from pipeline.setup import Setup, check_extras, setup_of
from stages.checkpoints import Checkpoint
from stages.prompts import prompts_artifact

MOST_BYTES = 2**30  # of weights, read for their digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """A set of problems that policies are evaluated on."""

    settings: Evaluation
    artifact: Artifact
    source: PromptSource


@dataclass(slots=True, kw_only=True)
class Opened:
    """A setup, and the lengths of its prompts."""

    setup: Setup
    prompts: PromptSource
    evaluation: tuple["Problems", ...]
    notes: list[str]  # what was assumed


def open_read_only(config: Config) -> Opened:
    """Open what a run needs, without changing anything.

    Raises:
        UserError: as `open_setup`, and where the run would be refused.
    """
    check_extras(config)
    store = Store(config.store)
    _check_store(store)
    notes: list[str] = []
    tokenizer = FastTokenizer.of(config.student.path)

    def token_id(model: Checkpoint, token: str) -> int | None:
        return None if tokenizer is None else tokenizer.token_id(token)

    setup = setup_of(config, store, partial(_opened, store, notes), token_id, make=False)
    evaluation: list[Problems] = []
    for part in () if config.evaluation is None else config.evaluation.parts().values():
        assert part.prompts is not None  # validated
        held_out = prompts_artifact(store, part.prompts, setup.student)
        source = measure_prompts(held_out, part.prompts, tokenizer, notes)
        evaluation.append(Problems(settings=part, artifact=held_out, source=source))
    lengths = measure_prompts(setup.prompts, config.prompts, tokenizer, notes)
    check_context(config, setup.student, setup.teacher, int(lengths.lengths.max()))
    return Opened(setup=setup, prompts=lengths, evaluation=tuple(evaluation), notes=notes)


def _opened(store: Store, notes: list[str], folder: Path) -> Checkpoint:
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
    there = existing(store.root)
    if not there.is_dir():
        raise UserError(f"store {store.root} is a file; expected a folder; set store=DIR")
    if not os.access(there, os.W_OK):
        raise UserError(
            f"cannot write {store.root}; expected a writable folder; choose another one "
            "(--set store=DIR)"
        )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
