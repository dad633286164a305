"""Integers as byte planes: all lowest bytes, then all second bytes, ...

A general compressor finds in a plane of high bytes what it cannot see between the noise of low
ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.store.codecs.columns import flat_values, list_column


def plane_columns(
    name: str, values: NDArray[np.integer[Any]], offsets: NDArray[np.int64]
) -> dict[str, pa.Array]:
    """Non-negative integers below 2^32 [E] as list<uint8> columns NAME_0, NAME_1, ..."""
    largest = int(values.max()) if len(values) else 0
    planes = max(1, -(-largest.bit_length() // 8))
    bytes_E4 = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return {
        f"{name}_{plane}": list_column(np.ascontiguousarray(bytes_E4[:, plane]), offsets)
        for plane in range(planes)
    }


def plane_values(name: str, batch: pa.RecordBatch) -> NDArray[np.uint32]:
    """The integers of the planes [E]."""
    return joined(_planes(name, batch))


def joined(planes: list[NDArray[np.uint8]]) -> NDArray[np.uint32]:
    """Planes, lowest first, as integers."""
    if len(planes) == 1:
        return planes[0].astype(np.uint32)
    whole = np.zeros((len(planes[0]), 2 if len(planes) == 2 else 4), np.uint8)
    for number, plane in enumerate(planes):
        whole[:, number] = plane
    return (
        whole.view("<u2" if len(planes) == 2 else "<u4").reshape(-1).astype(np.uint32, copy=False)
    )


def _planes(name: str, batch: pa.RecordBatch) -> list[NDArray[np.uint8]]:
    columns: Mapping[str, int] = {field: place for place, field in enumerate(batch.schema.names)}
    found: list[NDArray[np.uint8]] = []
    while (field := f"{name}_{len(found)}") in columns:
        found.append(flat_values(batch.column(columns[field])))
    return found
