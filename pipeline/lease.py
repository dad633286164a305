"""One process writes in a run's folder: `lease.json` says which, and is touched while it works.

A process of this machine is looked up. Of another machine, or another container, whose processes
cannot be seen, the age of the file decides, by the clock of the file system that both share.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import ClassVar, Literal

from opd_stream.errors import UserError
from opd_stream.store.files import explained, make_folder
from opd_stream.store.sealed import Sealed, load_record, record_bytes
from pipeline.interrupts import end_process

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


class LeaseRecord(Sealed):
    """`lease.json`: who writes in this folder."""

    NAMED_BY: ClassVar[int] = 0
    format_version: Literal[1] = 1
    host: str
    process: int
    place: str  # where the number of the process means something
    started: str  # when the process began, as the place counts it: numbers are used again
    token: str


@contextlib.contextmanager
def lease(folder: Path) -> Generator[None]:
    """Be the one process that writes in a run's folder.

    Args:
        folder: of the run.

    Raises:
        UserError: another process is at work there (says which).
    """
    path, token = folder / "lease.json", uuid.uuid4().hex
    own = LeaseRecord(
        host=platform.node(),
        process=os.getpid(),
        place=_place(),
        started=_start_of(os.getpid()) or "",
        token=token,
    )
    make_folder(folder)
    with explained(path):
        _take(path, own)
    done = threading.Event()
    beat = threading.Thread(target=_keep, args=(path, token, done), name="lease", daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        if (found := _record(path)) is not None and found.token == token:
            path.unlink(missing_ok=True)


def holder(folder: Path) -> str | None:
    """The process that works in a run's folder, as far as can be seen from here; None: none."""
    path = folder / "lease.json"
    try:
        age = time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return None
    found = _record(path)
    if not is_held(found, age, _place()):
        return None
    return "a process" if found is None else f"process {found.process} on {found.host}"


def _take(path: Path, own: LeaseRecord) -> None:
    temporary = path.with_name(f".lease.{own.token}.tmp")
    temporary.write_bytes(record_bytes(own, temporary))
    try:
        while True:
            try:
                os.link(temporary, path)
                return
            except FileExistsError:
                _remove_stale(path, own, now=temporary.stat().st_mtime)
    finally:
        temporary.unlink()


def _remove_stale(path: Path, own: LeaseRecord, *, now: float) -> None:
    """Take away the lease of a process that is gone, or refuse."""
    try:
        age = now - path.lstat().st_mtime
    except FileNotFoundError:
        return
    other = _record(path)
    if is_held(other, age, own.place):
        who = f"process {other.process} on {other.host}" if other else "a process without a name"
        is_far = other is None or other.place != own.place
        seen = f", which was seen there {max(age, 0):.0f} s ago" if is_far else ""
        raise UserError(
            f"{path.parent} is in use by {who}{seen}; expected one process in a run's folder; wait "
            "until it ends, or stop it, or use another --run-dir: what both share is found in the "
            "store"
        )
    aside = path.with_name(f".lease.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _record(aside) != other:  # somebody was faster: this lease is theirs
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def is_held(other: LeaseRecord | None, age: float, place: str) -> bool:
    """Whether the holder of a lease is at work.

    Args:
        other: the lease; None: it cannot be read.
        age: seconds since it was touched.
        place: of this process.
    """
    if other is not None and other.place == place:
        return _start_of(other.process) == other.started
    return abs(age) < STALE_SECONDS


def _keep(path: Path, token: str, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        found = _record(path)
        if found is not None and found.token != token and not done.is_set():
            end_process(
                f"another process took {path.parent} over, because this one was not seen for "
                f"{STALE_SECONDS:.0f} s; wait until that one ends, then run the same command",
                code=2,
            )
        with contextlib.suppress(OSError):  # the folder is away: what writes there will say so
            os.utime(path)


def _record(path: Path) -> LeaseRecord | None:
    """The lease, if it can be read; a link is none."""
    try:
        return None if path.is_symlink() else load_record(LeaseRecord, path)
    except (OSError, UserError):
        return None


def _place() -> str:
    """This host since it was started, and its process namespace: a container has its own."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _start_of(process: int) -> str | None:
    """When a process of this place began; None: there is none. Empty where no one tells."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state == "Z" else rest[18]
