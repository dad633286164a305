"""Engines: one class with two verbs, `sample` (as a student) and `score` (as a teacher)."""

from pathlib import Path

from opd_stream.engines.base import Engine


def open_engine(*, engine: str, folder: Path, dtype: str, batch_rows: int) -> Engine:
    """The engine of a name, with the weights of a folder; heavy imports happen here.

    Raises:
        UserError: the folder is no checkpoint.
    """
    if engine == "fake":
        from opd_stream.engines.fake_engine import FakeEngine

        return FakeEngine(folder)
    import torch

    from opd_stream.engines.transformers_engine import TransformersEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersEngine(folder, dtype=dtype, batch_rows=batch_rows, device=device)
