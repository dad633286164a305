"""Equality of two expressions by math-verify, in a process of its own.

Reading or comparing an expression may take for ever, take all memory, or end the interpreter, and a
signal can interrupt only what runs in a main thread. So a child process does it: it may use so much
processor time and memory, is killed when it uses more, and is started again for the next
expression. What is never decided is not equal. Verdicts do not depend on how busy the machine is.
"""

import atexit
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from select import select
from threading import Lock
from typing import Any

from opd_stream.errors import UserError

CPU_SECONDS = 5  # of a processor, to read two expressions and to compare them
WALL_SECONDS = 120  # the same on a machine where much else runs
MEMORY_BYTES = 4 * 2**30  # address space of the child
_DIGITS = 60  # to which two values are worked out, and
_EQUAL_DIGITS = 40  # to which equal ones agree
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from opd_stream.tasks.algebra import serve; serve(int(sys.argv[2]))"
)


class Algebra:
    """The child process, started when it is first asked; safe to share between threads."""

    def __init__(self, cpu_seconds: int = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # process that started the child; a fork of it starts its own
        atexit.register(self.close)

    def is_equal(self, found: str, expected: str) -> bool:
        """Whether two pieces of LaTeX are equal; False too where that takes too long."""
        return self._ask([expected, found])

    def can_read(self, expected: str) -> bool:
        """Whether a piece of LaTeX is an expression."""
        return self._ask([expected])

    def close(self) -> None:
        """End the child."""
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()  # nothing happens to one that has ended
            self._child.communicate()
        self._child = None

    def _ask(self, question: list[str]) -> bool:
        with self._lock:
            for _ in range(2):  # a child that something else has ended decides nothing
                answer = self._answer(question)
                if answer is not None:
                    return answer
        return False

    def _answer(self, question: list[str]) -> bool | None:
        """None: something else than its limits has ended the child."""
        child = self._running()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
            line = _line(child, WALL_SECONDS)
        except BrokenPipeError:
            line = b""
        if line in (b"0", b"1"):
            return line == b"1"
        self.close()
        return False if line is None or child.returncode == -signal.SIGXCPU else None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._owner != os.getpid():
            self._owner = os.getpid()
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path), str(self._cpu_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            if _line(self._child, WALL_SECONDS) != b"ready":
                self.close()
                raise UserError(
                    "judge math cannot start its process; expected the library math-verify to be "
                    "imported within two minutes; try python -c 'import math_verify'"
                )
        return self._child


def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line of a child, which writes it at once; empty: it has ended; None: it is late."""
    assert child.stdout is not None
    ready, _, _ = select([child.stdout], [], [], seconds)
    return os.read(child.stdout.fileno(), 100).strip() if ready else None


def serve(cpu_seconds: int) -> None:
    """Answer questions from standard input, a line each, until it ends: the child process."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints is no answer
    importlib.import_module("logging").disable()
    importlib.import_module("math_verify")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers.write(b"ready\n")
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + cpu_seconds + 2
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        signal.signal(signal.SIGPROF, _too_long)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds, 0.1)  # again, if it is swallowed
        try:
            found = _decide(*json.loads(line))
        except (Exception, _TooLongError, RecursionError, MemoryError):
            found = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(b"1\n" if found else b"0\n")


class _TooLongError(BaseException):
    """Not an Exception: libraries catch these."""


def _too_long(*_: Any) -> None:
    raise _TooLongError


def _decide(expected: str, found: str | None = None) -> bool:
    left = _parsed(expected)
    if found is None or left is None:
        return left is not None
    right = _parsed(found)
    return right is not None and _is_equal(left, right)


def _parsed(latex: str) -> Any:
    """An expression without floating point numbers; None: it is none."""
    library, sympy = importlib.import_module("math_verify"), importlib.import_module("sympy")
    normal = replace(library.LatexExtractionConfig().normalization_config, units=False)
    config = [library.LatexExtractionConfig(normalization_config=normal, boxed_match_priority=0)]
    read: list[Any] = library.parse(
        f"\\boxed{{{latex}}}", config, fallback_mode="no_fallback", parsing_timeout=None
    )
    if not read:
        return None
    if isinstance(read[0], sympy.MatrixBase):
        return read[0].applyfunc(_exact)
    return _exact(read[0])


def _exact(expression: Any) -> Any:
    """Decimals as the fractions that they are."""
    sympy = importlib.import_module("sympy")
    floats = expression.atoms(sympy.Float)
    return expression.xreplace({each: sympy.Rational(str(each)) for each in floats})


def _is_equal(left: Any, right: Any) -> bool:
    """math-verify's verdict, which a comparison of values without rounding has to confirm."""
    library = importlib.import_module("math_verify")
    values = _values(left, right)
    if values is not None:
        return _is_same_value(*values)
    if not library.verify(left, right, timeout_seconds=None):
        return False
    return _confirmed(left, right)


def _values(left: Any, right: Any) -> tuple[Any, Any] | None:
    """Both as numbers, `x = 5` as 5 where only one of them names it; None: they are no numbers."""
    sympy = importlib.import_module("sympy")
    sides = [left, right]
    for one, other in ((0, 1), (1, 0)):
        is_named = isinstance(sides[one], sympy.Eq) and sides[one].lhs.is_Symbol
        if is_named and not isinstance(sides[other], sympy.Eq):
            sides[one] = sides[one].rhs
    if all(isinstance(side, sympy.Expr) and side.is_number for side in sides):
        return sides[0], sides[1]
    return None


def _confirmed(left: Any, right: Any) -> bool:
    """Whether parts and values of two expressions agree, as far as they can be worked out."""
    sympy = importlib.import_module("sympy")
    lists = [_parts(side) for side in (left, right)]
    if lists[0] is not None and lists[1] is not None:
        unused = list(lists[1])
        for part in lists[0]:
            same = next((other for other in unused if _is_part_equal(part, other)), None)
            if same is None:
                return False
            unused.remove(same)
        return not unused
    if not all(isinstance(side, sympy.Expr) for side in (left, right)):
        return True
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    place = {each: sympy.Rational(2 * n + 7, n + 3) for n, each in enumerate(symbols)}
    values = [side.subs(place) for side in (left, right)]
    return not all(value.is_number for value in values) or _is_same_value(*values)


def _is_part_equal(left: Any, right: Any) -> bool:
    return left == right or _is_equal(left, right)


def _parts(value: Any) -> list[Any] | None:
    sympy = importlib.import_module("sympy")
    if isinstance(value, sympy.MatrixBase):
        return list(value)
    if isinstance(value, sympy.FiniteSet | sympy.Tuple):
        return list(value.args)
    if isinstance(value, sympy.Interval):
        return [value.start, value.end]
    return None


def _is_same_value(left: Any, right: Any) -> bool:
    """Whether two numbers are the same: fractions exactly, others in 40 digits or by algebra."""
    left, right = left.doit(), right.doit()
    if left == right:
        return True
    if left.is_Rational and right.is_Rational:
        return False
    values = [side.evalf(_DIGITS) for side in (left, right)]
    if all(value.is_Number or value.is_comparable or value.is_number for value in values):
        largest = max(abs(value) for value in values)
        if abs(values[0] - values[1]) < largest * 10**-_EQUAL_DIGITS:
            return True
    return importlib.import_module("sympy").simplify(left - right) == 0
