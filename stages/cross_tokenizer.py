"""Scoring by a teacher with another tokenizer: its part of a recipe, and the scores of a unit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_stream.config import Config
from opd_stream.cross_tokenizer.aligner import Aligner
from opd_stream.cross_tokenizer.byte_tokenizer import ByteTokenizer
from opd_stream.engines.base import Engine, ScoringSettings, score_batch
from opd_stream.errors import UserError
from opd_stream.model_config import read_model_config
from opd_stream.store.artifact import Artifact
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import open_tokenizer, tokenizer_digest
from opd_stream.types import RolloutBatch, ScoreBatch
from stages.checkpoints import Checkpoint, compare_pair
from stages.prompts import Ids, make_prompts, prompts_artifact

_BYTE_TOKENIZERS: dict[str, ByteTokenizer] = {}  # by the digest of the tokenizer's files


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentRecipe:
    """What a recipe of scores has in addition where the tokenizers differ.

    Example:
        >>> AlignmentRecipe(settings={"kind": "bytes", ...}, inputs={"prompts": "3f0c…", ...})
    """

    settings: dict[str, Any]
    inputs: dict[str, str]


def open_alignment(
    store: Store,
    config: Config,
    student: Checkpoint,
    teacher: Checkpoint,
    *,
    rendered: Artifact | None = None,
    make: bool = True,
) -> AlignmentRecipe | None:
    """The alignment of a run; None where ids mean the same to both, or none is asked for.

    `rendered` are the prompts under the teacher's own template, if it has one. Without `make` its
    prompts are only named, and tokenizers are compared but not read as bytes.

    Raises:
        UserError: a tokenizer cannot be read as bytes, or the teacher has no terminator.
    """
    alignment = config.scores.alignment
    tokenizers = student.identity.tokenizer_sha256, teacher.identity.tokenizer_sha256
    if alignment is None or compare_pair(student, teacher).difference is None:
        return None
    if not teacher.terminators():
        raise UserError(
            f"teacher {teacher.folder} names no eos_token_id; expected one in "
            "generation_config.json or config.json, since it ends texts in its own way; add it"
        )
    for model in (student, teacher) if make else ():
        _byte_tokenizer(model.folder, model.identity.tokenizer_sha256)
    prompts = rendered or (make_prompts if make else prompts_artifact)(
        store, config.prompts, teacher
    )
    return AlignmentRecipe(
        settings={
            **alignment.model_dump(mode="json"),
            "teacher_stop_ids": list(teacher.terminators()),
        },
        inputs={
            "prompts": prompts.fingerprint,
            "student_tokenizer": tokenizers[0],
            "teacher_tokenizer": tokenizers[1],
        },
    )


def open_aligner(
    store: Store, scores: Recipe, rollouts: Recipe, *, student: Path, teacher: Path
) -> Aligner:
    """The aligner that a recipe of scores asks for.

    Raises:
        UserError: a checkpoint has another tokenizer than the recipe says.
    """
    tokenizers: list[ByteTokenizer] = []
    for folder, role in ((student, "student_tokenizer"), (teacher, "teacher_tokenizer")):
        digest = tokenizer_digest(folder)
        if digest != scores.inputs[role]:
            raise UserError(
                f"the tokenizer of {folder} is not the one that the scores' recipe names; the "
                "folder changed during the run: restore it or start the run again"
            )
        tokenizers.append(_byte_tokenizer(folder, digest))
    settings = scores.settings["alignment"]
    return Aligner(
        *tokenizers,
        vocab_size=read_model_config(teacher).vocabulary,
        student_vocabulary=rollouts.settings.get(
            "vocabulary", read_model_config(student).vocabulary
        ),
        student_stops=rollouts.settings["stop_ids"],
        teacher_stops=settings["teacher_stop_ids"],
        max_chunk_tokens=settings["max_chunk_tokens"],
    )


def _byte_tokenizer(folder: Path, digest: str) -> ByteTokenizer:
    """The tokenizer of a folder; every policy of a run has the same, read once."""
    if digest not in _BYTE_TOKENIZERS:
        _BYTE_TOKENIZERS[digest] = ByteTokenizer(open_tokenizer(folder), str(folder))
    return _BYTE_TOKENIZERS[digest]


def score_aligned(
    engine: Engine,
    aligner: Aligner,
    batch: RolloutBatch,
    asked: ScoringSettings,
    prompts: Mapping[str, Ids],
) -> tuple[ScoreBatch, RolloutBatch]:
    """The teacher's scores of rollouts, and the rows that it read; `prompts` are in its tokens."""
    reading = aligner.read(batch, prompts)
    if reading.rows:
        teachers = replace(asked, forced_ids=aligner.asked_ids(asked.forced_ids))
        scored = engine.score(reading.batch, teachers)
    else:
        scored = score_batch((), reading.batch)
    return aligner.scores(batch, reading, scored, asked.forced_ids), reading.batch


def aligned_counts(batch: RolloutBatch, scored: ScoreBatch) -> dict[str, float]:
    """Tokens of the student in scored rows, of them those in chunks that train and those alike."""
    assert scored.chunk_ids is not None
    assert scored.same_tokens is not None
    return {
        "student_tokens": batch.completion_tokens,
        "chunk_tokens": sum(int((chunks >= 0).sum()) for chunks in scored.chunk_ids),
        "aligned_tokens": sum(int(same.sum()) for same in scored.same_tokens),
    }


def refuse_aligned(scores: Artifact, what: str) -> None:
    """Refuse a use of scores that reads every token by itself.

    Raises:
        UserError: the scores are of a teacher with another tokenizer.
    """
    if "alignment" in scores.recipe.settings:
        raise UserError(
            f"{scores.name} is of a teacher with another tokenizer, and {what} reads every token "
            "by itself; give it scores without scores.alignment"
        )
