"""Engines: `sample` and `extend` as a student, `score` as a teacher, `load` other weights.

Torch is loaded when an engine is opened, not before.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_stream.engines.base import Engine

__all__ = ["Engine", "open_engine"]


def open_engine(
    *,
    engine: str,
    folder: Path,
    dtype: str,
    batch_rows: int,
    vllm: Mapping[str, Any] | None = None,
) -> Engine:
    """The engine of a name, with the weights of a folder; heavy imports happen here.

    Args:
        engine: transformers, vllm or fake.
        folder: Hugging Face checkpoint.
        dtype: of weights and arithmetic.
        batch_rows: rows that transformers runs at once.
        vllm: fields of `VllmOptions`.

    Raises:
        UserError: the folder is no checkpoint, or the engine's library is not installed.
    """
    if engine == "vllm":
        from opd_stream.engines.vllm_engine import VllmEngine
        from opd_stream.engines.vllm_options import VllmOptions

        return VllmEngine(folder, dtype=dtype, options=VllmOptions(**(vllm or {})))
    if engine == "fake":
        from opd_stream.engines.fake_engine import FakeEngine

        pace = os.environ.get("OPD_STREAM_FAKE_SECONDS_PER_TOKEN", "0")
        return FakeEngine(folder, seconds_per_token=float(pace))
    import torch

    from opd_stream.engines.transformers_engine import TransformersEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersEngine(folder, dtype=dtype, batch_rows=batch_rows, device=device)
