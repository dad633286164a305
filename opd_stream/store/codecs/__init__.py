"""Codecs: how a teacher's scores become Arrow columns, and come back as arrays.

    table, fidelity = encode_scores(CompactCodec(max_error=1 / 32), scores, rollouts)
    block = decode_scores(table.to_batches()[0])

Every codec keeps the same row: docs/cache-format.md is the specification. A shard says in its
schema metadata which codec wrote it, so a reader needs no config. Nothing here needs torch.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from opd_stream.errors import UserError, shortened
from opd_stream.section import Section
from opd_stream.store.codecs.columns import (
    ScoreBlock,
    flat_values,
    list_rows,
    matrix_rows,
    matrix_values,
)
from opd_stream.store.codecs.compact import COLUMNS as COMPACT_COLUMNS
from opd_stream.store.codecs.compact import decode_compact, encode_compact
from opd_stream.store.codecs.exact import COLUMNS as EXACT_COLUMNS
from opd_stream.store.codecs.exact import decode_exact, encode_exact
from opd_stream.store.codecs.fidelity import Fidelity
from opd_stream.store.codecs.hidden import COLUMNS as HIDDEN_COLUMNS
from opd_stream.store.codecs.hidden import (
    PLAIN_COLUMNS,
    StateBasis,
    StoredStates,
    encode_states,
    integers_of,
    stored_states,
)
from opd_stream.store.codecs.laws import BrokenLaw, Column, check_columns, check_scores
from opd_stream.store.codecs.sampled import COLUMNS as SAMPLED_COLUMNS
from opd_stream.store.codecs.sampled import decode_sampled, encode_sampled
from opd_stream.store.files import canonical_json
from opd_stream.types import RolloutBatch, ScoreBatch

__all__ = [
    "Codec",
    "CompactCodec",
    "ExactCodec",
    "Fidelity",
    "HiddenCodec",
    "SampledCodec",
    "ScoreBlock",
    "StateBasis",
    "StoredStates",
    "codec_of",
    "decode_scores",
    "encode_scores",
    "scores_batch",
]

METADATA_KEY = b"opd_stream"
LEAST_ERROR = 1 / 512  # with 65,534 steps down to -255 nats, below what teachers give
_COLUMNS = {
    "exact": EXACT_COLUMNS,
    "compact": COMPACT_COLUMNS,
    "sampled": SAMPLED_COLUMNS,
    "hidden": COMPACT_COLUMNS,
}
HIDDEN_MAX_ERROR = 1 / 32  # of the few log-probabilities beside hidden states, nats
ALIGNED = ("chunk_ids", "same_tokens")  # columns of scores with alignment, whatever the codec


class ExactCodec(Section):
    """Ids as they are, log-probabilities rounded to a floating-point type."""

    kind: Literal["exact"] = "exact"
    dtype: Literal["float16", "float32"] = Field(default="float16", description="as stored")


class CompactCodec(Section):
    """Quantised log-probabilities, packed ids, as many candidates as hold the mass.

    The student's own ids (`rollouts.student_top_k`) are kept whatever the mass.
    """

    kind: Literal["compact"] = "compact"
    max_error: float = Field(
        default=1 / 32, ge=LEAST_ERROR, le=1, description="of a stored log-probability, nats"
    )
    mass: float | None = Field(
        default=None, gt=0, le=1, description="stop at this retained mass; null: always top_k"
    )
    min_k: int = Field(default=1, ge=1, description="candidates kept whatever the mass")


class SampledCodec(Section):
    """Ids drawn from the teacher with replacement, and their counts (RS-KD)."""

    kind: Literal["sampled"] = "sampled"
    draws: int = Field(default=50, ge=1, le=1024, description="draws per completion token")


class HiddenCodec(Section):
    """The teacher's hidden states, of which training makes its whole distributions again."""

    kind: Literal["hidden"] = "hidden"
    max_kl: float | None = Field(
        default=0.0005,
        gt=0,
        description="KL of the true to the rebuilt distributions, nats: the mean over the tokens "
        "of a unit, at most; null: states are kept unrounded",
    )
    max_kl_p99: float = Field(default=0.004, gt=0, description="the 99th percentile of it, at most")
    candidates: int = Field(
        default=4,
        ge=1,
        description="that are stored as well, for what reads a cache without a head",
    )


Codec = Annotated[
    ExactCodec | CompactCodec | SampledCodec | HiddenCodec, Field(discriminator="kind")
]
_CODEC: TypeAdapter[Codec] = TypeAdapter(Codec)


def codec_of(settings: Mapping[str, Any]) -> Codec:
    """The codec of a recipe's settings, `{"kind": "compact", ...}`.

    Raises:
        ValidationError: they describe none.
    """
    return _CODEC.validate_python(settings)


def encode_scores(
    codec: Codec, scores: ScoreBatch, rollouts: RolloutBatch, *, basis: StateBasis | None = None
) -> tuple[pa.Table, Fidelity]:
    """The columns of a unit's scores, and what was lost in them; `basis` is that of hidden states.

    Raises:
        ValueError: a stored value would be further from the true one than the codec promises.
    """
    extra: dict[bytes, bytes] = {}
    match codec:
        case ExactCodec(dtype=dtype):
            columns, fidelity = encode_exact(scores, dtype=dtype)
        case CompactCodec(max_error=max_error, mass=mass, min_k=min_k):
            columns, extra, fidelity = encode_compact(
                scores,
                max_error=max_error,
                mass=mass,
                min_k=min_k,
                student_top_ids=rollouts.student_top_ids,
            )
        case SampledCodec(draws=draws):
            columns, fidelity = encode_sampled(scores, draws=draws)
        case HiddenCodec(candidates=candidates):
            assert scores.teacher_states is not None  # whoever scores for this codec gives them
            columns, extra, fidelity = encode_compact(
                scores, max_error=HIDDEN_MAX_ERROR, mass=None, min_k=candidates
            )
            states, more = encode_states(scores.teacher_states, basis)
            columns, extra = columns | states, extra | more
    keys = {
        "prompt_id": pa.array(rollouts.prompt_id, pa.string()),
        "sample_index": pa.array(rollouts.sample_index, pa.int32()),
        "refused": pa.array([scores.refused.get(row) for row in range(len(scores))], pa.string()),
    }
    if scores.candidate_teacher_logprobs is not None:
        candidates = matrix_rows(scores.candidate_teacher_logprobs, np.float32)
        columns["candidate_teacher_logprobs"] = candidates
    for name in ALIGNED:
        if (rows := getattr(scores, name)) is not None:
            dtype = np.bool_ if name == "same_tokens" else np.int32
            columns[name] = list_rows(rows, dtype)
    table = pa.table({**keys, **columns})
    metadata = {METADATA_KEY: canonical_json({"codec": codec.model_dump()}), **extra}
    return table.replace_schema_metadata(metadata), fidelity


def decode_scores(batch: pa.RecordBatch, basis: StateBasis | None = None) -> ScoreBlock:
    """The arrays of a record batch, whatever codec wrote it; hidden states stay packed.

    Args:
        batch: of a shard of scores.
        basis: that the recipe of the scores names; None: hidden states are not unpacked.

    Raises:
        UserError: the codec is not known here.
        ValueError: hidden states are not those of the batch's tokens.
    """
    metadata: dict[bytes, bytes] = batch.schema.metadata or {}
    settings = json.loads(metadata.get(METADATA_KEY, b"{}")).get("codec", {})
    match settings.get("kind"):
        case "exact":
            block = decode_exact(batch)
        case "compact":
            block = decode_compact(batch, max_error=settings["max_error"])
        case "sampled":
            block = decode_sampled(batch, draws=settings["draws"])
        case "hidden":
            block = decode_compact(batch, max_error=HIDDEN_MAX_ERROR)
            states = stored_states(batch, np.diff(block.offsets), basis)
            block = replace(block, teacher_states=states)
        case other:
            raise UserError(
                f"a shard was written by codec {other!r}; this opd-stream reads exact, "
                "compact, sampled and hidden; update opd-stream"
            )
    if ALIGNED[0] in batch.schema.names:
        aligned = {name: flat_values(batch.column(name)) for name in ALIGNED}
        block = replace(block, **aligned)
    if "candidate_teacher_logprobs" not in batch.schema.names:
        return block
    candidates = matrix_values(batch, "candidate_teacher_logprobs")
    return replace(block, candidate_teacher_logprobs=candidates)


_KEYS = {
    "prompt_id": Column(types=("string",), entries="value"),
    "sample_index": Column(types=("int32",), entries="value"),
    "refused": Column(types=("string",), entries="value", is_nullable=True),
    "candidate_teacher_logprobs": Column(types=("float",), is_matrix=True, is_optional=True),
    "chunk_ids": Column(types=("int32",), is_optional=True),
    "same_tokens": Column(types=("bool",), is_optional=True),
}


def checked_scores(
    batch: pa.RecordBatch,
    tokens_R: NDArray[np.int64],
    basis: StateBasis | None = None,
    *,
    vocabulary: int | None = None,
) -> ScoreBlock:
    """As `decode_scores`, of a record batch that anybody may have written.

    Args:
        batch: of a shard of scores.
        tokens_R: completion tokens of each row.
        basis: as of `decode_scores`.
        vocabulary: ids are below it; None: it is not known.

    Raises:
        BrokenLaw: names row, column and value.
        UserError: the codec is not known here.
    """
    metadata: dict[bytes, bytes] = batch.schema.metadata or {}
    try:
        settings = json.loads(metadata.get(METADATA_KEY, b"{}")).get("codec", {})
        codec = codec_of(settings) if settings.get("kind") in _COLUMNS else None
    except (ValueError, AttributeError) as error:
        raise BrokenLaw(None, f"its codec cannot be read ({shortened(str(error))})") from error
    columns = _KEYS | (_COLUMNS[codec.kind] if codec is not None else {})
    if isinstance(codec, HiddenCodec):
        columns = columns | (PLAIN_COLUMNS if "hidden" in batch.schema.names else HIDDEN_COLUMNS)
    if "refused" in batch.schema.names and len(tokens_R) == batch.num_rows:
        tokens_R = np.where(batch.column("refused").is_valid(), 0, tokens_R)
    check_columns(batch, columns, tokens_R)
    try:
        block = decode_scores(batch, basis)
    except (KeyError, IndexError, pa.ArrowInvalid) as error:  # metadata that is not there
        raise BrokenLaw(None, f"it cannot be decoded ({shortened(error)})") from error
    check_scores(
        block,
        error=HIDDEN_MAX_ERROR
        if isinstance(codec, HiddenCodec)
        else getattr(codec, "max_error", 0),
        is_ranked=not isinstance(codec, SampledCodec),
        vocabulary=vocabulary,
    )
    return block


def scores_batch(table: pa.Table, basis: StateBasis | None = None) -> ScoreBatch:
    """The rows of a unit's scores, as they were stored.

    Raises:
        ValueError: hidden states were rounded in another basis than this one.
    """
    blocks = [decode_scores(batch, basis) for batch in table.to_batches()]

    def rows(name: str) -> Any:
        if any(getattr(block, name) is None for block in blocks):
            return None
        return tuple(
            getattr(block, name)[first:last]
            for block in blocks
            for first, last in pairwise(block.offsets.tolist())
        )

    def states() -> tuple[NDArray[Any], ...] | None:
        packed = [row for block in blocks for row in block.teacher_states or ()]
        return tuple(integers_of(packed)) if packed else None

    refused = enumerate(reason for block in blocks for reason in block.refused)
    apart = ("refused", "teacher_states")
    names = [field.name for field in fields(ScoreBatch) if field.name not in apart]
    return ScoreBatch(
        teacher_states=states(),
        **{name: rows(name) for name in names},
        refused={row: reason for row, reason in refused if reason is not None},
    )
