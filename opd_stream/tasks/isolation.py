"""Run a program and its tests where they can do no harm: a child process with limits.

This module starts and ends the child; `isolated.py`, a script of the standard library alone, is the
child. How a program is told apart from its tests, and what its success looks like, stands there.
"""

import json
import os
import secrets
import signal
import site
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from opd_stream.errors import UserError

Isolation = Literal["namespaces", "limits"]

_SCRIPT = Path(__file__).with_name("isolated.py")
_SLACK = 10  # seconds that a child may take to start and to end, beside its wall time
_NEEDED = {
    "namespaces": "expected Linux 5.12 or later, and root with the right to mount or user "
    "namespaces; run in such a place, or set isolation=limits of the judge, which leaves "
    "readable files open",
    "limits": "expected a Python that other users can read too, and the right to become one where "
    "you are root; run as another user than root, or move Python",
}
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",  # threads take address space
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use.

    Example:
        >>> Limits(cpu_seconds=2).memory_mib
        1024
    """

    cpu_seconds: int = 10  # of each process
    wall_seconds: int = 60  # of all together
    memory_mib: int = 1024  # address space of each process
    files_mib: int = 64  # of all files together; with isolation `limits`, of each
    processes: int = 16  # and threads
    isolation: Isolation = "namespaces"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program, and what has to hold after it.

    Example:
        >>> passes(Program(code="x = 1", tests="assert x == 1"), Limits())
        True
    """

    code: str
    tests: str  # statements, which see the names of the program
    check: str | None = None  # a function of the tests, called with the program's `candidate`
    candidate: str | None = None


def passes(program: Program, limits: Limits) -> bool:
    """Whether the tests of a program ran to their end.

    Raises:
        UserError: the child cannot be isolated as asked on this machine.
    """
    marker = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="opd-code-", ignore_cleanup_errors=True) as folder:
        job = {
            **asdict(program),
            **asdict(limits),
            "marker": marker,
            "folder": folder,
            "paths": _libraries(),
            "prefix": os.path.realpath(sys.base_prefix),
        }
        status, verdict = _run(json.dumps(job).encode(), limits)
    if status != b"ready":
        reason = status.decode(errors="replace").strip() or "the child process ended at once"
        raise UserError(
            f"judge code cannot isolate a program here ({reason}); {_NEEDED[limits.isolation]}"
        )
    return verdict == marker.encode()


@cache
def check_isolation(limits: Limits) -> None:
    """Refuse to go on where a program cannot be isolated, or the simplest one does not pass.

    Raises:
        UserError: as `passes`, or the limits are too low for Python itself.
    """
    if not sys.platform.startswith("linux"):
        raise UserError("judge code needs Linux; expected its limits; evaluate there")
    if not passes(Program(code="import decimal", tests="assert decimal"), limits):
        raise UserError(
            f"judge code cannot run a program of one line within {limits}; expected at least some "
            "seconds and 64 MiB; raise the limits of the judge"
        )


def _run(job: bytes, limits: Limits) -> tuple[bytes, bytes]:
    """What the child said of itself, and what its tests said at their end."""
    readers, writers = zip(*(os.pipe() for _ in range(2)), strict=True)
    command = [sys.executable, "-s", "-S", "-P", "-B", str(_SCRIPT), *map(str, writers)]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=writers,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        for writer in writers:
            os.close(writer)
        try:
            child.communicate(job, timeout=limits.wall_seconds + _SLACK)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(child)
        for reader in readers:
            os.set_blocking(reader, False)
        said, verdict = (_read(reader) for reader in readers)
        return said, verdict
    finally:
        for reader in readers:
            os.close(reader)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _read(reader: int) -> bytes:
    """What was written; a process that outlived the child could add nothing to it."""
    try:
        return os.read(reader, 1000)
    except BlockingIOError:
        return b""


def _libraries() -> list[str]:
    """The folders of the import path that hold the standard library or installed packages."""
    known = (os.path.realpath(sys.base_prefix), *map(os.path.realpath, site.getsitepackages()))
    paths = map(os.path.realpath, sys.path)
    return [path for path in paths if Path(path).is_dir() and path.startswith(known)]
