"""opd-stream: on-policy distillation of language models from a cache of teacher scores.

`import opd_stream as opd` gives `opd.run`, `opd.open_run`, `opd.open_scores`, `opd.load_config` and
`opd.UserError`; `__init__.pyi` has their types. They are imported when they are first used, so the
package itself is there at once.
"""

from typing import Any

__version__ = "0.1.0"
# __init__.pyi has the types of those that __getattr__ imports.
__all__ = [
    "Run",  # pyright: ignore[reportUnsupportedDunderAll]
    "UserError",  # pyright: ignore[reportUnsupportedDunderAll]
    "__version__",
    "load_config",  # pyright: ignore[reportUnsupportedDunderAll]
    "open_run",  # pyright: ignore[reportUnsupportedDunderAll]
    "open_scores",  # pyright: ignore[reportUnsupportedDunderAll]
    "run",  # pyright: ignore[reportUnsupportedDunderAll]
]

_PLACES = {
    "UserError": "opd_stream.errors",
    "load_config": "opd_stream.config_file",
    "open_scores": "opd_stream.store",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name in __all__:
        from opd_stream.launcher import from_python

        return from_python(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
