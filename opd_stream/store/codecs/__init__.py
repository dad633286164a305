"""Codecs: how a teacher's scores become Arrow columns, and come back as arrays.

    table, fidelity = encode_scores(CompactCodec(max_error=1 / 32), scores, rollouts)
    block = decode_scores(table.to_batches()[0])

Every codec keeps the same row: docs/cache-format.md is the specification. A shard says in its
schema metadata which codec wrote it, so a reader needs no config. Nothing here needs torch.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from opd_stream.errors import UserError
from opd_stream.store.codecs.block import ScoreBlock
from opd_stream.store.codecs.columns import (
    flat,
    flat_values,
    lengths_of,
    list_column,
    matrix_column,
    matrix_of,
    offsets_of,
)
from opd_stream.store.codecs.compact import decode_compact, encode_compact
from opd_stream.store.codecs.exact import decode_exact, encode_exact
from opd_stream.store.codecs.fidelity import Fidelity
from opd_stream.store.codecs.sampled import decode_sampled, encode_sampled
from opd_stream.store.files import canonical_json
from opd_stream.types import RolloutBatch, ScoreBatch

__all__ = [
    "Codec",
    "CompactCodec",
    "ExactCodec",
    "Fidelity",
    "SampledCodec",
    "ScoreBlock",
    "build_codec",
    "codec_settings",
    "decode_scores",
    "encode_scores",
]

METADATA_KEY = b"opd_stream"
ALIGNED = ("chunk_ids", "same_tokens")  # columns of scores with alignment, whatever the codec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactCodec:
    """Ids and log-probabilities as they are."""

    dtype: Literal["float16", "float32"] = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactCodec:
    """Quantised log-probabilities, packed ids, as many candidates as hold the mass."""

    max_error: float = 1 / 32  # nats, of every stored log-probability
    mass: float | None = None  # stop at this share of the distribution; None: always K
    min_k: int = 1  # but never below so many candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledCodec:
    """Ids drawn from the teacher with replacement, and how often each was drawn (RS-KD)."""

    draws: int = 50


Codec = ExactCodec | CompactCodec | SampledCodec
KINDS: dict[str, type[Codec]] = {
    "exact": ExactCodec,
    "compact": CompactCodec,
    "sampled": SampledCodec,
}


def build_codec(*, kind: str, **settings: Any) -> Codec:
    """The codec of a config section."""
    return KINDS[kind](**settings)


def codec_settings(codec: Codec) -> dict[str, Any]:
    """The JSON value of a codec, as it stands in recipes and shards."""
    (kind,) = (name for name, cls in KINDS.items() if isinstance(codec, cls))
    return {"kind": kind, **asdict(codec)}


def encode_scores(
    codec: Codec, scores: ScoreBatch, rollouts: RolloutBatch
) -> tuple[pa.Table, Fidelity]:
    """The columns of a unit's scores, and what was lost in them.

    Raises:
        ValueError: a stored value would be further from the true one than the codec promises.
    """
    extra: dict[bytes, bytes] = {}
    match codec:
        case ExactCodec(dtype=dtype):
            columns, fidelity = encode_exact(scores, dtype=dtype)
        case CompactCodec(max_error=max_error, mass=mass, min_k=min_k):
            columns, extra, fidelity = encode_compact(
                scores, max_error=max_error, mass=mass, min_k=min_k
            )
        case SampledCodec(draws=draws):
            columns, fidelity = encode_sampled(scores, draws=draws)
    keys = {
        "prompt_id": pa.array(rollouts.prompt_id, pa.string()),
        "sample_index": pa.array(rollouts.sample_index, pa.int32()),
        "refused": pa.array([scores.refused.get(row) for row in range(len(scores))], pa.string()),
    }
    if scores.candidate_teacher_logprobs is not None:
        values = flat(scores.candidate_teacher_logprobs, np.float32)
        offsets = offsets_of(lengths_of(scores.candidate_teacher_logprobs))
        columns["candidate_teacher_logprobs"] = matrix_column(values, offsets)
    for name in ALIGNED:
        if (rows := getattr(scores, name)) is not None:
            dtype = np.bool_ if name == "same_tokens" else np.int32
            columns[name] = list_column(flat(rows, dtype), offsets_of(lengths_of(rows)))
    table = pa.table({**keys, **columns})
    metadata = {METADATA_KEY: canonical_json({"codec": codec_settings(codec)}), **extra}
    return table.replace_schema_metadata(metadata), fidelity


def decode_scores(batch: pa.RecordBatch) -> ScoreBlock:
    """The arrays of a record batch, whatever codec wrote it.

    Raises:
        UserError: the codec is not known here.
    """
    metadata = batch.schema.metadata or {}
    settings = json.loads(metadata.get(METADATA_KEY, b"{}")).get("codec", {})
    match settings.get("kind"):
        case "exact":
            block = decode_exact(batch)
        case "compact":
            block = decode_compact(batch, max_error=settings["max_error"])
        case "sampled":
            block = decode_sampled(batch, draws=settings["draws"])
        case other:
            raise UserError(
                f"a shard was written by codec {other!r}; this opd-stream knows {sorted(KINDS)}; "
                "update opd-stream"
            )
    if ALIGNED[0] in batch.schema.names:
        aligned = {name: flat_values(batch.column(name)) for name in ALIGNED}
        block = replace(block, **aligned)
    if "candidate_teacher_logprobs" not in batch.schema.names:
        return block
    candidates = matrix_of(batch.column("candidate_teacher_logprobs").flatten())
    return replace(block, candidate_teacher_logprobs=candidates)
