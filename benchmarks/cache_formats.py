"""The formats that the cache is measured against: the same columns, written and read by others.

Each takes scores and returns the bytes written and a function that reads them into tensors.
"""

import importlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from opd_stream.types import ScoreBatch


def _flat_table(scores: ScoreBatch) -> pa.Table:
    top_k = scores.teacher_top_ids[0].shape[1]
    ids = np.concatenate(scores.teacher_top_ids).astype(np.int32)
    logprobs = np.concatenate(scores.teacher_top_logprobs).astype(np.float16)
    return pa.table(
        {
            "ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), top_k),
            "logprobs": pa.FixedSizeListArray.from_arrays(pa.array(logprobs.reshape(-1)), top_k),
            "sampled": pa.array(np.concatenate(scores.teacher_logprobs)),
            "tail": pa.array(np.concatenate(scores.teacher_tail_logprobs)),
        }
    )


def _to_tensors(table: pa.Table) -> None:
    for batch in table.combine_chunks().to_batches():
        for name, dtype in (("ids", np.int64), ("logprobs", np.float32)):
            values = batch.column(name).flatten().to_numpy(zero_copy_only=False)
            torch.from_numpy(values.astype(dtype))


def raw_ipc(scores: ScoreBatch) -> tuple[bytes, Callable[[], None]]:
    sink = pa.BufferOutputStream()
    table = _flat_table(scores)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    return data, lambda: _to_tensors(pa.ipc.open_file(data).read_all())


def parquet(scores: ScoreBatch, **options: Any) -> tuple[bytes, Callable[[], None]]:
    sink = pa.BufferOutputStream()
    split = ["ids.list.element", "logprobs.list.element", "sampled", "tail"]
    options = options or {"use_dictionary": False, "use_byte_stream_split": split}
    pq.write_table(_flat_table(scores), sink, compression="zstd", **options)
    data = sink.getvalue()
    return data.to_pybytes(), lambda: _to_tensors(
        pq.read_table(pa.BufferReader(data), use_threads=False)
    )


def lance(scores: ScoreBatch) -> tuple[bytes, Callable[[], None]]:
    library = importlib.import_module("lance")
    folder = Path(tempfile.mkdtemp(prefix="lance-"))
    library.write_dataset(_flat_table(scores), folder / "rows.lance")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def read() -> None:
        _to_tensors(library.dataset(folder / "rows.lance").to_table())
        shutil.rmtree(folder)

    return bytes(size), read


def parquet_default(scores: ScoreBatch) -> tuple[bytes, Callable[[], None]]:
    return parquet(scores, use_dictionary=True)
