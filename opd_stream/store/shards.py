"""One shard: an Arrow IPC file, zstd inside, with a digest outside.

Arrow's own compression verifies nothing (most single-bit flips decode to wrong numbers), so a shard
is trusted only when its SHA-256 is the one in its commit record.
"""

from pathlib import Path

import pyarrow as pa

from opd_stream.store.files import sha256

ROWS_PER_RECORD_BATCH = 64


def shard_bytes(table: pa.Table) -> bytes:
    """The bytes of a shard that holds `table`."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=ROWS_PER_RECORD_BATCH)
    return sink.getvalue().to_pybytes()


def read_shard(path: Path, *, expected_sha256: str) -> pa.Table:
    """Read and verify a shard.

    Raises:
        ValueError: the file is missing, torn or altered (says which).
    """
    data = verified_bytes(path, expected_sha256=expected_sha256)
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def verified_bytes(path: Path, *, expected_sha256: str) -> bytes:
    """The bytes of a file whose digest is known.

    Raises:
        ValueError: the file is missing, torn or altered (says which).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError("its shard is missing") from None
    found = sha256(data)
    if found != expected_sha256:
        raise ValueError(
            f"its {len(data)} bytes have SHA-256 {found[:12]}…, "
            f"the commit record says {expected_sha256[:12]}…"
        )
    return data
