"""Ctrl-C and SIGTERM: one line, exit code 130 or 143, and no process of ours left at work.

The main thread is told by an exception, so that bars and connections close. It may be inside a
product of matrices, where no exception is raised, or a library may have taken the signal over: a
thread of its own hears of it, too, and ends the process when its time is up, with all that it
started (Ray's agents outlive their node for a minute). Whatever was at work is then as after a
kill, which the same command resumes.
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline.console import print_error

GRACE_SECONDS = 3.0  # for closing what is open
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_heard: list[int] = []
_started: list[int] = []  # processes
_ending = threading.Lock()
_answered = threading.Event()
_pipe = os.pipe()
_STDERR = os.dup(2)
_QUESTION = 0  # no signal has this number


class Interrupted(BaseException):
    """Raised in the main thread, wherever it is."""


def listen() -> None:
    """From here on, end this process in one line when it is interrupted."""
    read_end, write_end = _pipe
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    threading.Thread(target=_wait, args=(read_end,), name="interrupts", daemon=True).start()


def is_interrupted() -> bool:
    """Whether a signal came, whatever exception then ended the command."""
    os.write(_pipe[1], bytes([_QUESTION]))  # behind a signal that was not read yet
    _answered.wait()
    return bool(_heard)


def leave() -> NoReturn:
    """End this process and what it started, in one line, by the signal that came."""
    end_process("interrupted; the same command resumes", code=128 + _heard[0])


def end_process(line: str, *, code: int) -> NoReturn:
    """End this process at once, from any thread."""
    _ending.acquire()  # never given back: who comes second waits for the end
    for process in {*_started, *_descendants()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    os.dup2(_STDERR, 2)  # a library may have put another file there
    print_error(line)
    sys.stdout.flush()
    os._exit(code)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _heard.append(number)
    _started.extend(_descendants())  # what is unwound may end a parent, and leave its children
    raise Interrupted


def _wait(read_end: int) -> None:
    is_first = True
    while True:
        number = os.read(read_end, 1)[0]
        if number == _QUESTION:
            _answered.set()
        elif number in SIGNALS and is_first:
            is_first = False
            _heard.append(number)
            _started.extend(_descendants())
            threading.Timer(GRACE_SECONDS, leave).start()
        elif number in SIGNALS:
            leave()  # asked twice


def _descendants() -> list[int]:
    """Processes that this one started, and theirs; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return found[1:]
