"""Files that are either there, whole and durable, or not there at all.

On a disk, a file is written beside its destination under a temporary name, synced, and then linked
or renamed into place. In an object store it is one put, which is whole or nothing. `publish_new`
never replaces: when two writers race, the first one wins and the other is told, so everything that
was derived from the winner's bytes stays true.

A place is a `Path`, or for `s3://...` and other fsspec addresses a `UPath`, which has the same
methods.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Generator, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, cast

from opd_stream.errors import Unreachable, UserError, unreachable
from opd_stream.section import is_object

RETRY_TIMEOUT = 5.0  # seconds, with a store that has not answered yet
READS = 3  # of an object that arrives torn, before it is called damaged


def place(location: str, retry_timeout: float = RETRY_TIMEOUT) -> Path:
    """A folder on this machine or in an object store.

    Args:
        location: a folder, or s3://BUCKET/PATH.
        retry_timeout: seconds for which S3 is asked again while it does not answer.

    Raises:
        UserError: the package for this kind of address is not installed.
    """
    if "://" not in location:
        return Path(location)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://.", location):
        raise UserError(
            f"store {location} is no address; expected a folder or s3://BUCKET/PATH; mend it"
        )
    try:
        if location.startswith("s3://"):
            from opd_stream.store.s3 import StorePath, options

            return cast(Path, StorePath(location, **options(retry_timeout)))
        from upath import UPath

        return cast(Path, UPath(location, use_listings_cache=False))  # other machines write too
    except (ImportError, ValueError) as error:
        raise UserError(
            f"store {location} cannot be opened ({error}); expected a folder or s3://BUCKET/PATH; "
            "pip install s3fs universal-pathlib"
        ) from error


def is_remote(path: Path) -> bool:
    """Whether a place is in an object store."""
    return not isinstance(path, Path)  # pyright: ignore[reportUnnecessaryIsInstance]


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a local file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of a checkpoint with several files of weights


def checkpoint_json(path: Path) -> dict[str, Any]:
    """A settings file of a checkpoint.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        found: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} cannot be read ({reason}); expected a JSON object; copy the checkpoint again"
        ) from error
    if not is_object(found):
        raise UserError(
            f"{path} holds a {type(found).__name__}; expected a JSON object; copy the checkpoint "
            "again"
        )
    return found


def indexed_files(folder: Path) -> set[str]:
    """Names of the files of weights that transformers reads; none where nothing names them.

    A whole `model.safetensors` comes before an index, and neither brings what lies beside it.

    Raises:
        UserError: the index is none, or leads out of the folder.
    """
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS}
    path = folder / INDEX
    if not path.exists():
        return set()
    listed = checkpoint_json(path).get("weight_map")
    if not is_object(listed):
        raise UserError(f"{path} has no weight_map; copy the checkpoint again")
    names = set(listed.values())
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{path} lists {name!r:.80}; expected safetensors files of the folder itself; "
                "copy the checkpoint again"
            )
    return names


def json_files(folder: Path) -> list[Path]:
    """The JSON files in a folder that may not be there."""
    return sorted(folder.glob("*.json"), key=str) if folder.exists() else []


def is_there(path: Path) -> bool:
    """Whether a name is taken, be it by a link that leads nowhere."""
    return path.exists() or (not is_remote(path) and path.is_symlink())


def remove_file(path: Path) -> None:
    """Remove a file that may be gone.

    Raises:
        UserError: a folder is in its place, or the system does not let it be removed.
    """
    if not is_remote(path) and path.is_dir() and not path.is_symlink():
        raise UserError(
            f"{path} is a folder; expected a file that opd-stream wrote; move the folder away, and "
            "run the same command again"
        )
    with explained(path):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder that may be there.

    Raises:
        UserError: it cannot be made.
    """
    with explained(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # of a file system without folders of one's own
            raise UserError(
                f"cannot make the folder {path}; expected a place on a disk; choose another one "
                "(--set store=DIR, --run-dir DIR)"
            ) from error


def verified_bytes(
    path: Path, expected_sha256: str, stretch: tuple[int, int] | None = None
) -> bytes:
    """The bytes of a file, or of the stretch (offset, length) of it, whose digest is known.

    Raises:
        ValueError: they are missing, torn or altered (says which).
    """
    data = b""
    for _ in range(READS if is_remote(path) else 1):
        try:
            data = _read(path, stretch)
        except FileNotFoundError:
            raise ValueError("its shard is missing") from None
        except IsADirectoryError:
            raise ValueError("a folder stands in the place of its shard") from None
        if sha256(data) == expected_sha256:
            return data
    raise ValueError(
        f"its {len(data)} bytes have SHA-256 {sha256(data)[:12]}…, "
        f"the commit record says {expected_sha256[:12]}…"
    )


def _read(path: Path, stretch: tuple[int, int] | None) -> bytes:
    if is_remote(path):
        start, end = (None, None) if stretch is None else (stretch[0], sum(stretch))
        with explained(path):
            return cast(Any, path).fs.cat_file(cast(Any, path).path, start=start, end=end)
    check_regular(path)
    with path.open("rb") as file:
        file.seek(0 if stretch is None else stretch[0])
        return file.read(-1 if stretch is None else stretch[1])


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device in place of a file, which would be waited for.

    Raises:
        OSError: it is one.
    """
    if not path.is_file() and path.exists() and not path.is_dir():
        raise OSError(errno.EINVAL, "no regular file", str(path))


def publish(path: Path, data: bytes, *, is_last: bool = True) -> None:
    """Write `path` atomically and durably, replacing what was there.

    `is_last`: False where another file is published in the same folder at once, which makes the
    names of both durable.
    """
    if is_remote(path):
        with explained(path):
            _put(path, data)
        return
    with _temporary(path, data) as temporary:
        temporary.replace(path)
    if is_last:
        sync_folder(path.parent)


def publish_new(path: Path, data: bytes) -> bool:
    """Write `path` atomically unless it exists; returns whether these bytes are the ones there."""
    if is_remote(path):
        with explained(path):
            try:
                _put(path, data, mode="create")
            except FileExistsError:
                return (
                    path.read_bytes() == data
                )  # ours, if an answer was lost and the put sent again
        return True
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
    """Make every file below a folder durable, before something points at the folder.

    Files that libraries made for their writer alone get the permissions of any new file.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            file.chmod(mode)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(inner)


def _put(path: Path, data: bytes, **options: Any) -> None:
    remote = cast(Any, path)
    remote.fs.pipe_file(remote.path, data, **options)


def upload(source: Path, target: Path) -> None:
    """Put every file below a local folder under a place in an object store."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        remote = cast(Any, target / file.relative_to(source).as_posix())
        with explained(remote):
            remote.fs.put_file(str(file), remote.path)


def remove_tree(folder: Path) -> None:
    """Remove a folder and everything below it."""
    if is_remote(folder):
        remote = cast(Any, folder)
        if remote.exists():
            with explained(folder):
                remote.fs.rm(remote.path, recursive=True)
    else:
        shutil.rmtree(folder)


def real(path: Path) -> Path:
    """Where a path leads, also where links lead in a circle."""
    return Path(os.path.realpath(path))


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, where `name` comes from a manifest.

    Raises:
        UserError: the name is absolute or leads out of the folder.
    """
    pure, path = PurePosixPath(name), folder / name
    leads_out = pure.is_absolute() or ".." in pure.parts or "://" in name or "\\" in name
    if not leads_out and not is_remote(folder):
        leads_out = not real(path).is_relative_to(real(folder))
    if leads_out:
        raise UserError(
            f"a manifest in {folder} names the file {name!r}; expected a name inside that folder; "
            "do not use this store: it was altered"
        )
    return path


def stale_temporaries(root: Path, names: Iterable[str], *, before: float) -> list[Path]:
    """What killed writers left in a folder and in those of its folders that have these names.

    A writer that is still at work is younger. Links are not followed.
    """
    if is_remote(root):
        return []  # a put leaves nothing behind
    folders = [root / name for name in names if not (root / name).is_symlink()]
    found = [*root.glob(".*.tmp"), *(path for each in folders for path in each.rglob(".*.tmp"))]
    return [path for path in found if path.is_file() and path.lstat().st_mtime < before]


@contextlib.contextmanager
def explained(path: Path) -> Generator[None]:
    """Turn the operating system's refusals of a write into one line each."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        refuse_full(path, error)
        if error.errno == errno.EISDIR:
            raise UserError(
                f"{path} is a folder; expected the name of a file; name another one"
            ) from error
        refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
        is_odd = error.errno == errno.ENOENT and not is_remote(path) and is_folder(path.parent)
        is_refused = error.errno in refusals or is_odd  # some file systems hold no new files
        if is_refused and not (is_remote(path) and isinstance(error, FileExistsError)):
            raise UserError(
                f"cannot write {path} ({error.strerror}); expected a writable folder; "
                "choose another one (--set store=DIR, --run-dir DIR)"
            ) from error
        if is_remote(path) and not isinstance(error, FileNotFoundError | FileExistsError):
            raise Unreachable(unreachable(path, error)) from error
        raise
    except Exception as error:
        refuse_full(path, error)
        if is_remote(path) and is_of_client(error):
            raise Unreachable(unreachable(path, error)) from error
        raise


@contextlib.contextmanager
def whole_or_gone(folder: Path) -> Generator[None]:
    """Remove a folder if what writes it fails; refusals as in `explained`."""
    try:
        with explained(folder):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_full(path: Path, error: BaseException) -> None:
    """Raise the one line of a disk that is full, if that is what an exception says.

    safetensors tells the system's error in words.
    """
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise UserError(
            f"no space left while writing {path}; nothing half-written was kept; "
            "free space and run the same command again"
        ) from error


def is_of_client(error: BaseException) -> bool:
    """Whether an exception comes from a client of an object store; they have their own kinds."""
    return any(
        type(each).__module__.startswith(("botocore", "aiobotocore", "aiohttp"))
        for each in (error, error.__cause__)
    )


def check_there(root: Path) -> None:
    """Refuse to go on in a folder that went away; what is written there would be lost.

    Raises:
        UserError: says so.
    """
    if not is_remote(root) and not is_folder(root):
        raise UserError(
            f"the store {root} is not there: no such folder, or its file system is gone; nothing "
            "half-written was kept; bring it back, or set store to where it is, and run the same "
            "command again"
        )


def is_folder(path: Path) -> bool:
    """Whether a folder on this machine can be reached."""
    try:
        return path.is_dir()
    except OSError:  # a file system that answers with an error
        return False


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Generator[Path]:
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with explained(path):
        make_folder(path.parent)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
