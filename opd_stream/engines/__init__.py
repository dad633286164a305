"""Engines: `sample` and `extend` as a student, `score` as a teacher, `load` other weights.

Torch is loaded when an engine is opened, not before.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from opd_stream.engines.base import Engine, HiddenEngine, VllmOptions
from opd_stream.engines.server_client import ServerOptions
from opd_stream.errors import UserError
from opd_stream.section import import_path, own_path, source_sha256

if TYPE_CHECKING:
    from opd_stream.engines.server_engine import Probe

__all__ = [
    "Engine",
    "EngineName",
    "engine_recipe",
    "gives_hidden",
    "hidden_engine",
    "open_engine",
]

BUILT_IN = ("transformers", "vllm", "server", "fake")
VERBS = ("load", "sample", "extend", "score")
HIDDEN_VERBS = ("hidden", "head")  # that some engines have besides


def _named(name: str) -> str:
    if name not in BUILT_IN and (path := own_path(name, "opd_stream.engines")) is not None:
        return path
    if name not in BUILT_IN:
        expected = f"expected {', '.join(BUILT_IN)}, or the import path package.module:Class"
        raise PydanticCustomError("unknown_engine", expected)
    return name


EngineName = Annotated[str, AfterValidator(_named)]
"""A built-in engine, or the import path of a class (or an entry point that stands for one)."""


def engine_recipe(engine: str) -> dict[str, str]:
    """What a recipe says of an engine: its name; of the user's own, also the digest of its file.

    Raises:
        UserError: the class cannot be imported, or is no engine.
    """
    if engine in BUILT_IN:
        return {"engine": engine}
    _own_class(engine)
    return {"engine": engine} | {f"engine_{k}": v for k, v in source_sha256(engine).items()}


def _own_class(path: str) -> Callable[..., Engine]:
    return import_path(
        path,
        "engine class",
        lambda found: isinstance(found, type) and all(hasattr(found, verb) for verb in VERBS),
        f"a class with {', '.join(VERBS)} (opd_stream.engines.base.Engine)",
    )


def gives_hidden(engine: str) -> bool:
    """Whether the engine of a name is a `HiddenEngine`.

    Raises:
        UserError: as `engine_recipe`.
    """
    if engine in BUILT_IN:
        return engine == "transformers"
    return all(hasattr(_own_class(engine), verb) for verb in HIDDEN_VERBS)


def hidden_engine(engine: Engine) -> HiddenEngine:
    """The engine as one that gives hidden states.

    Raises:
        UserError: it does not; `gives_hidden` says so before any work.
    """
    missing = [verb for verb in HIDDEN_VERBS if not hasattr(engine, verb)]
    if missing:
        raise UserError(
            f"engine {type(engine).__name__} has no {' and no '.join(missing)}; expected an engine "
            "that gives hidden states; use engine transformers"
        )
    return cast(HiddenEngine, engine)


def open_engine(
    *,
    engine: str,
    folder: Path,
    dtype: str,
    batch_rows: int,
    vllm: VllmOptions | None = None,
    server: ServerOptions | None = None,
    expected: "Probe | None" = None,
) -> Engine:
    """The engine of a name, with the weights of a folder; heavy imports happen here.

    Args:
        engine: transformers, vllm, server, fake, or the import path of a class whose instances are
            an `Engine` and which takes (folder, *, dtype, batch_rows).
        folder: Hugging Face checkpoint.
        dtype: of weights and arithmetic.
        batch_rows: rows that transformers runs at once.
        vllm: how vLLM uses its device.
        server: that scores, of engine server.
        expected: what it says of the probe; None: it is not compared.

    Raises:
        UserError: the folder is no checkpoint, or the engine's library or class is not found.
    """
    if engine == "vllm":
        from opd_stream.engines.vllm_engine import VllmEngine

        return VllmEngine(folder, dtype=dtype, options=vllm)
    if engine == "server":
        from opd_stream.engines.server_engine import ServerEngine

        if server is None:
            raise UserError(
                "engine server without the section server; expected its url and model; add "
                "teacher.server"
            )
        return ServerEngine(folder, server, expected=expected)
    if engine == "fake":
        from opd_stream.engines.fake_engine import FakeEngine

        pace = os.environ.get("OPD_STREAM_FAKE_SECONDS_PER_TOKEN", "0")
        return FakeEngine(folder, seconds_per_token=float(pace))
    if engine != "transformers":
        return _own_class(engine)(folder, dtype=dtype, batch_rows=batch_rows)
    import torch

    from opd_stream.engines.transformers_engine import TransformersEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TransformersEngine(folder, dtype=dtype, batch_rows=batch_rows, device=device)
