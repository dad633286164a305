"""Engines: `sample` and `extend` as a student, `score` as a teacher, `load` other weights.

Torch is loaded when an engine is opened, not before.
"""

import os
from pathlib import Path

from opd_stream.engines.base import Engine
from opd_stream.engines.vllm_engine import VllmOptions

__all__ = ["Engine", "open_engine"]


def open_engine(
    *,
    engine: str,
    folder: Path,
    dtype: str,
    batch_rows: int,
    vllm: VllmOptions | None = None,
) -> Engine:
    """The engine of a name, with the weights of a folder; heavy imports happen here.

    Args:
        engine: transformers, vllm or fake.
        folder: Hugging Face checkpoint.
        dtype: of weights and arithmetic.
        batch_rows: rows that transformers runs at once.
        vllm: how vLLM uses its device.

    Raises:
        UserError: the folder is no checkpoint, or the engine's library is not installed.
    """
    if engine == "vllm":
        from opd_stream.engines.vllm_engine import VllmEngine

        return VllmEngine(folder, dtype=dtype, options=vllm)
    if engine == "fake":
        from opd_stream.engines.fake_engine import FakeEngine

        pace = os.environ.get("OPD_STREAM_FAKE_SECONDS_PER_TOKEN", "0")
        return FakeEngine(folder, seconds_per_token=float(pace))
    import torch

    from opd_stream.engines.transformers_engine import TransformersEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersEngine(folder, dtype=dtype, batch_rows=batch_rows, device=device)
