"""What travels between workers: an order and what became of it, also when it failed or hung."""

import contextlib
import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit

HUNG = 75  # exit status of a worker that gave its unit up


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One unit to make.

    Example:
        >>> Order(unit=3, rollouts="3f0c…", scores="77c0…", student="models/s", teacher="models/t",
        ...       made_by="5b0c…")
    """

    unit: int
    rollouts: str  # fingerprint of the rollouts artifact
    scores: str | None  # fingerprint of the scores artifact; None: only sample
    student: str  # checkpoint folder; on another node that of a policy may not be there
    teacher: str | None  # checkpoint folder
    made_by: str  # id of the run that orders it
    policy: str | None = None  # fingerprint of the student, where it is a policy of the store


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """What a worker reports of one unit; a span is (start, end) in seconds since the epoch."""

    order: Order
    generate_span: tuple[float, float] | None = None  # None: it was committed already
    score_span: tuple[float, float] | None = None
    generated_tokens: int = 0  # of completions, as far as this order made them
    scored_tokens: int = 0
    problem: str | None = None  # what went wrong, in a line
    traceback: str | None = None  # of what is not a user's mistake

    def as_table(self) -> pa.Table:
        """One row that travels between workers."""
        return pa.table({"worked": [json.dumps(asdict(self))]})


def worked_of(table: pa.Table) -> list[Worked]:
    """The reports of a table."""
    rows = [json.loads(text) for text in table["worked"].to_pylist()]
    return [Worked(**{**row, "order": Order(**row["order"])}) for row in rows]


@contextlib.contextmanager
def ending_if_hung(seconds: int | None) -> Iterator[None]:
    """End the process if the work inside takes longer: nothing in it can be trusted to stop."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, os._exit, (HUNG,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def each(table: pa.Table, work: Callable[[Worked], Worked]) -> pa.Table:
    """Work on every row; a user's mistake becomes a row with its line, not a dead worker."""
    done: list[pa.Table] = []
    for worked in worked_of(table):
        if worked.problem is None:
            try:
                worked = work(worked)
            except (UserError, DamagedUnit) as error:
                worked = replace(worked, problem=str(error))
            except Exception as error:  # a poisoned prompt must not look like a dead machine
                text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                worked = replace(
                    worked,
                    problem=f"unit {worked.order.unit} of rollouts/{worked.order.rollouts[:16]} "
                    f"failed ({text}); committed units stay; mend the cause and run again",
                    traceback=traceback.format_exc(),
                )
        done.append(worked.as_table())
    return pa.concat_tables(done)
