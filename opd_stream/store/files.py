"""Files that are either there, whole and durable, or not there at all.

A file is written beside its destination under a temporary name, synced, and then linked or renamed
into place. `publish_new` never replaces: when two writers race, the first one wins and the other is
told, so everything that was derived from the winner's bytes stays true.
"""

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_stream.errors import UserError


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is not JSON (names it).
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); expected a file written by opd-stream; "
            "delete it and run the same command again"
        ) from error


def publish(path: Path, data: bytes) -> None:
    """Write `path` atomically and durably, replacing what was there."""
    with _temporary(path, data) as temporary:
        temporary.replace(path)
    sync_folder(path.parent)


def publish_new(path: Path, data: bytes) -> bool:
    """Write `path` atomically unless it exists; returns whether these bytes are the ones there."""
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and links inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below a folder durable, before something points at the folder."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(inner)


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, where `name` comes from a manifest.

    Raises:
        UserError: the name is absolute or leads out of the folder.
    """
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"a manifest in {folder} names the file {name!r}; expected a name inside that folder; "
            "do not use this store: it was altered"
        )
    return path


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals of a write into one line each."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space left while writing {path}; nothing half-written was kept; "
                "free space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"cannot write {path} ({error.strerror}); expected a writable folder; "
                "choose another one (--set store=DIR, --run-dir DIR)"
            ) from error
        raise


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
