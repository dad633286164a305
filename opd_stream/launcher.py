"""Where `opd-stream` and Ray's workers start: `stages` and `pipeline` are ours there, not a user's.

A folder or package of a user may have one of these names too. Python takes the first of a name on
its path, and Ray puts the folder of a run first. Nobody else's package is called `opd_stream`, so
what starts in this module can put that right before anything else of the project is imported.
"""

import pkgutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("stages", "pipeline")


def main() -> None:
    """The command line."""
    call("pipeline.cli:start")


def find_own_packages() -> None:
    """Put our packages first on the path of this process, and of those it spawns, if they are not.

    Where no name clashes the path stays as it is.
    """
    found = [PathFinder.find_spec(name) for name in _PACKAGES]
    origins = [spec.origin or "" for spec in found if spec is not None]
    if [Path(origin).resolve().parent for origin in origins] != [_ROOT / n for n in _PACKAGES]:
        sys.path.insert(0, str(_ROOT))


def from_python(name: str) -> Any:
    """What `opd_stream.NAME` is, of those names that the floors above make."""
    find_own_packages()
    return pkgutil.resolve_name(f"pipeline.api:{name}")


def call(function: str, *arguments: Any, **named: Any) -> Any:
    """Call one of our functions, `module:name`, in a process that Ray may have started.

    A reference to `stages` or `pipeline` would be followed before this module could help.
    """
    find_own_packages()
    return pkgutil.resolve_name(function)(*arguments, **named)


def call_with(config: dict[str, Any]) -> None:
    """Call the function that `config` names with all of it, in a process that Ray starts."""
    call(config["function"], config)


class RemoteWorker:
    """A worker that one of our functions opens, in a process that Ray starts."""

    def __init__(self, opener: str, *arguments: Any, **named: Any) -> None:
        self._worker = call(opener, *arguments, **named)

    def __call__(self, table: Any) -> Any:
        """Pass a table to the worker."""
        return self._worker(table)
