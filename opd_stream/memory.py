"""Memory of this process."""

import contextlib
import ctypes
import sys


def give_back() -> None:
    """Return what was freed to the system, where the C library (glibc) would keep it for later."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
