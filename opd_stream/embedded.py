"""What comes with the package: the embedded models, and the configs that name them.

A wheel holds them below `opd_stream/_embedded`; an editable install reads the repository's
`configs`.
"""

from importlib.resources import files
from pathlib import Path

ORGANISATION = "opd-stream"  # of the embedded models' names, which have the form of hub ids


def embedded(name: str) -> Path:
    """A file or folder of `configs`, wherever this installation has it.

    Example:
        >>> embedded("quickstart.yaml")
    """
    package = Path(str(files("opd_stream")))
    inside = package / "_embedded"
    return (inside if inside.is_dir() else package.parent / "configs") / name


def embedded_model(path: Path | str) -> Path | None:
    """The folder of an embedded model by its name, opd-stream/NAME; None: it names none."""
    organisation, _, name = str(path).partition("/")
    if organisation != ORGANISATION or not name or "/" in name or name.startswith("."):
        return None
    folder = embedded(f"models/{name}")
    return folder if folder.is_dir() else None


def embedded_name(folder: Path) -> str | None:
    """The name of an embedded model by its folder, as `embedded_model` reads it; None: it is none.

    Example:
        >>> embedded_name(embedded("models/ledger-student"))
        'opd-stream/ledger-student'
    """
    is_own = folder.resolve().parent == embedded("models").resolve()
    return f"{ORGANISATION}/{folder.name}" if is_own else None
