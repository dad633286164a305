"""Shards: Arrow IPC files with zstd inside and digests outside, and the tables in them.

Arrow's own compression verifies nothing (most single-bit flips decode to wrong numbers), so bytes
are trusted only when their SHA-256 is the one in the unit's commit record: that of the whole file,
and one for each record batch, so that a part can be read and verified alone.

One row is one prompt or one rollout; per-token fields are lists. The scores shard of a unit has the
same rows in the same order as its rollouts shard; its columns are the codecs' affair.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.store.codecs.columns import (
    flat,
    lengths_of,
    list_rows,
    matrix_of,
    matrix_rows,
    offsets_of,
    plane_columns,
    plane_values,
)
from opd_stream.store.codecs.laws import (
    BrokenLaw,
    Column,
    check_columns,
    check_expansion,
    check_rollouts,
    row_lengths,
)
from opd_stream.store.files import sha256
from opd_stream.types import PromptBatch, RolloutBatch

ROWS_PER_PART = 64
THREADED_BYTES = 2**20  # from which columns are compressed in threads; a small shard waits for them
MAGIC = b"ARROW1\x00\x00"
TOP_IDS = "student_top_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a shard's bytes: the schema message (0 rows), or one record batch.

    Example:
        >>> Part(offset=712, length=91_144, rows=64, sha256="9a41…")
    """

    offset: int
    length: int
    rows: int
    sha256: str


def shard_bytes(table: pa.Table) -> tuple[bytes, list[Part]]:
    """The bytes of a shard that holds `table`, and its parts: the schema, then the batches."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(
        compression=pa.Codec("zstd", 1), use_threads=table.nbytes > THREADED_BYTES
    )
    start = len(MAGIC) + table.schema.serialize().size
    places = [(len(MAGIC), start - len(MAGIC), 0)]
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        for batch in table.combine_chunks().to_batches(max_chunksize=ROWS_PER_PART):
            writer.write_batch(batch)
            places.append((start, sink.tell() - start, batch.num_rows))
            start = sink.tell()
    data = sink.getvalue().to_pybytes()
    return data, [
        Part(offset=offset, length=length, rows=rows, sha256=sha256(data[offset : offset + length]))
        for offset, length, rows in places
    ]


def table_of(data: bytes) -> pa.Table:
    """The table of a verified shard.

    Raises:
        BrokenLaw: it claims to be far larger than its bytes.
    """
    ipc: Any = pa.ipc  # not typed as a whole
    messages = ipc.MessageReader.open_stream(pa.py_buffer(memoryview(data)[len(MAGIC) :]))
    schema = ipc.read_schema(messages.read_next_message())
    batches = [_expanded(message, schema) for message in messages]
    return pa.Table.from_batches(batches, schema)


def schema_of(data: bytes) -> pa.Schema:
    """The schema of a verified schema part."""
    return pa.ipc.read_schema(pa.py_buffer(data))


def batch_of(data: bytes, schema: pa.Schema) -> pa.RecordBatch:
    """The record batch of a verified part; raises as `table_of`."""
    return _expanded(pa.ipc.read_message(pa.py_buffer(data)), schema)


def _expanded(message: Any, schema: pa.Schema) -> pa.RecordBatch:
    """The record batch of a message; each compressed buffer begins with its size in whole."""
    if message.type != "record batch":
        raise BrokenLaw(None, f"a message is a {message.type}; expected record batches alone")
    body = memoryview(message.body)
    claimed = sum(
        int.from_bytes(bytes(body[start : start + 8]), "little", signed=True)
        for start, length in _buffers(bytes(message.metadata))
        if length >= 8
    )
    check_expansion(body.nbytes, claimed, "a record batch")
    return pa.ipc.read_record_batch(message, schema)


def _buffers(metadata: bytes) -> list[tuple[int, int]]:
    """(offset, length) of each buffer in the body of a record batch, from its flatbuffer."""

    def field(table: int, number: int) -> int:
        at = table - struct.unpack_from("<i", metadata, table)[0] + 4 + 2 * number
        return table + struct.unpack_from("<H", metadata, at)[0]

    def followed(at: int) -> int:
        return at + struct.unpack_from("<I", metadata, at)[0]

    header = followed(field(followed(0), 2))
    vector = followed(field(header, 2))
    (number,) = struct.unpack_from("<I", metadata, vector)
    return [struct.unpack_from("<qq", metadata, vector + 4 + 16 * each) for each in range(number)]


PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_ids", pa.list_(pa.uint32())),
        ("text", pa.string()),
        ("answer", pa.string()),
    ]
)


COMPLETIONS = "completions"  # of prompts with given answers: their ids, list<list<uint32>>
LEVEL = "level"  # of prompts that a curriculum chooses from: text

COLUMNS = {  # of rollouts
    "prompt_id": Column(types=("string",), entries="value"),
    "sample_index": Column(types=("int32",), entries="value"),
    "prompt_ids": Column(types=("uint32",), entries="any"),
    "completion_ids": Column(types=("uint32",)),
    "behavior_logprobs": Column(types=("float",)),
    "finish_reason": Column(types=("string",), entries="value"),
    "loss_mask": Column(types=("bool",), is_optional=True),
    "candidate_ids": Column(types=("uint32",), is_matrix=True, is_optional=True),
    "candidate_behavior_logprobs": Column(types=("float",), is_matrix=True, is_optional=True),
    TOP_IDS: Column(types=("uint8",), entries="multiple", is_planes=True, is_optional=True),
}


def checked_rollouts(table: pa.Table, *, vocabulary: int | None = None) -> RolloutBatch:
    """The rollout batch of a table that anybody may have written.

    Raises:
        BrokenLaw: names row, column and value.
    """
    for batch in table.to_batches():
        if "completion_ids" not in batch.schema.names:
            raise BrokenLaw(None, "there is no column completion_ids")
        column = batch.column("completion_ids")
        is_list = pa.types.is_list(column.type)
        lengths = row_lengths(column) if is_list else np.zeros(batch.num_rows, np.int64)
        check_columns(batch, COLUMNS, lengths)
    found = rollouts_batch(table)
    check_rollouts(found, vocabulary=vocabulary)
    return found


def rollouts_table(batch: RolloutBatch) -> pa.Table:
    """A rollout batch as one table."""
    columns = {
        "prompt_id": pa.array(batch.prompt_id, pa.string()),
        "sample_index": pa.array(batch.sample_index, pa.int32()),
        "prompt_ids": id_lists(batch.prompt_ids),
        "completion_ids": id_lists(batch.completion_ids),
        "behavior_logprobs": list_rows(batch.behavior_logprobs, np.float32),
        "finish_reason": pa.array(batch.finish_reason, pa.string()),
    }
    if batch.loss_mask is not None:
        columns["loss_mask"] = list_rows(batch.loss_mask, np.bool_)
    if batch.candidate_ids is not None and batch.candidate_behavior_logprobs is not None:
        columns["candidate_ids"] = matrix_rows(batch.candidate_ids, np.uint32)
        columns["candidate_behavior_logprobs"] = matrix_rows(
            batch.candidate_behavior_logprobs, np.float32
        )
    if batch.student_top_ids is not None:
        columns |= _top_columns(batch.student_top_ids)
    return pa.table(columns)


def _top_columns(rows: Sequence[NDArray[Any]]) -> dict[str, pa.Array]:
    """The student's most probable ids as byte planes.

    Rising, each as the difference to the one before: three quarters of the bytes by rank, which
    nothing reads.
    """
    ids_NS = np.sort(flat(rows, np.int64), axis=1)
    offsets = offsets_of(lengths_of(rows)) * ids_NS.shape[1]
    return plane_columns(TOP_IDS, np.diff(ids_NS, axis=1, prepend=0).reshape(-1), offsets)


def _top_rows(table: pa.Table, lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """The same ids, one matrix a row."""
    planes = [name for name in table.column_names if name.startswith(TOP_IDS)]
    batches = table.select(planes).combine_chunks().to_batches()
    steps = [plane_values(TOP_IDS, batch) for batch in batches]
    values = np.concatenate([np.zeros(0, np.uint32), *steps])
    tokens = int(lengths.sum())
    ids_NS = values.reshape(tokens, len(values) // max(1, tokens)).cumsum(1, np.int64)
    return tuple(np.split(ids_NS, np.cumsum(lengths)[:-1])) if len(lengths) else ()


def rollouts_batch(table: pa.Table) -> RolloutBatch:
    """The rollout batch of a table."""
    names = set(table.column_names)
    has_candidates = "candidate_ids" in names
    completion_ids = rows_of(table["completion_ids"], np.int64)
    has_top = f"{TOP_IDS}_0" in names
    return RolloutBatch(
        prompt_id=tuple(table["prompt_id"].to_pylist()),
        sample_index=table["sample_index"].to_numpy(),
        prompt_ids=rows_of(table["prompt_ids"], np.int64),
        completion_ids=completion_ids,
        behavior_logprobs=rows_of(table["behavior_logprobs"], np.float32),
        finish_reason=tuple(table["finish_reason"].to_pylist()),
        loss_mask=rows_of(table["loss_mask"], np.bool_) if "loss_mask" in names else None,
        candidate_ids=rows_of(table["candidate_ids"], np.int64) if has_candidates else None,
        candidate_behavior_logprobs=(
            rows_of(table["candidate_behavior_logprobs"], np.float32) if has_candidates else None
        ),
        student_top_ids=_top_rows(table, lengths_of(completion_ids)) if has_top else None,
    )


def prompts_batch(table: pa.Table) -> PromptBatch:
    """The engine's view of a prompts table."""
    return PromptBatch(
        prompt_id=tuple(table["prompt_id"].to_pylist()),
        prompt_ids=rows_of(table["prompt_ids"], np.int64),
    )


def id_lists(rows: Sequence[NDArray[Any]]) -> pa.Array:
    """Token ids of each row as a list<uint32> column.

    Raises:
        ValueError: an id is negative or above 2^32 - 1.
    """
    ids = flat(rows, np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**32):
        raise ValueError(f"a token id is outside 0 to 2^32 - 1: {ids.min()} to {ids.max()}")
    return list_rows(rows, np.uint32)


def rows_of(column: pa.ChunkedArray, dtype: Any) -> tuple[NDArray[Any], ...]:
    """The rows of a list column as arrays of shape [T], or [T, M] for lists of lists."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    values = array.values
    if pa.types.is_fixed_size_list(values.type):
        values = matrix_of(values)
    else:
        values = values.to_numpy(zero_copy_only=False)
    values = values.astype(dtype, copy=False)
    return tuple(values[start:end] for start, end in pairwise(array.offsets.to_numpy()))
