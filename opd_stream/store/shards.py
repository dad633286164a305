"""One shard: an Arrow IPC file, zstd inside, with digests outside.

Arrow's own compression verifies nothing (most single-bit flips decode to wrong numbers), so bytes
are trusted only when their SHA-256 is the one in the unit's commit record: that of the whole file,
and one for each record batch, so that a part can be read and verified alone.
"""

from dataclasses import dataclass

import pyarrow as pa

from opd_stream.store.files import sha256

ROWS_PER_PART = 64
MAGIC = b"ARROW1\x00\x00"


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
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))
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
    """The table of a verified shard."""
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def schema_of(data: bytes) -> pa.Schema:
    """The schema of a verified schema part."""
    return pa.ipc.read_schema(pa.py_buffer(data))


def batch_of(data: bytes, schema: pa.Schema) -> pa.RecordBatch:
    """The record batch of a verified part."""
    return pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(data)), schema)
