"""Two ways to run the same workers: Ray Data actor pools, or a plain loop in this process.

Starting an actor pool costs seconds (a new process and its imports for every worker), so one
streaming Ray Data dataset lives for the whole run: its source is a queue, and each round only adds
its orders to it. Workers keep their engines from round to round, and scoring of a unit starts while
the next one is being sampled, because both pools are stages of that one dataset.
"""

import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, Self

import pyarrow as pa

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.store import Store
from stages.orders import Order, Worked, worked_of
from stages.ray_stream import WorkerSpec
from stages.units import GenerateUnits, ScoreUnits, UnitWorker


class Executor(Protocol):
    """Runs orders; results come back as they are done, in any order."""

    def submit(self, orders: Iterable[Order]) -> None:
        """Queue orders."""
        ...

    def results(self, orders: Sequence[Order]) -> Iterator[Worked]:
        """What became of submitted orders; those of others wait for whoever asks for them.

        Raises:
            UserError: a worker met a user's mistake.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


Role = Literal["student", "teacher"]
BOTH: tuple[Role, ...] = ("student", "teacher")


def open_executor(config: Config, roles: tuple[Role, ...] = BOTH) -> Executor:
    """The executor a config asks for, with workers of some roles only."""
    if config.executor == "ray":
        return RayExecutor(config, roles)
    return LocalExecutor(config, roles)


class LocalExecutor:
    """The workers in this process, one order after another."""

    def __init__(self, config: Config, roles: tuple[Role, ...] = BOTH) -> None:
        self._config, self._roles = config, roles
        self._workers: list[UnitWorker] = []

    def submit(self, orders: Iterable[Order]) -> None:
        if not self._workers:
            specs = _worker_specs(self._config, self._roles)
            self._workers = [worker(*arguments) for worker, arguments, _ in specs]

    def results(self, orders: Sequence[Order]) -> Iterator[Worked]:
        for order in orders:
            table = Worked(order=order).as_table()
            for worker in self._workers:
                table = worker(table)
            yield from _checked(table)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class RayExecutor:
    """One dataset for the whole run: queue -> student pool -> teacher pool -> results.

    Ray starts with the first order, so a run that has nothing to do does not wait for it. A thread
    takes the results, so workers go on while this process trains.
    """

    def __init__(self, config: Config, roles: tuple[Role, ...] = BOTH) -> None:
        self._config, self._roles = config, roles
        self._orders: Any = None
        self._done: queue.SimpleQueue[pa.Table | BaseException] = queue.SimpleQueue()
        self._early: dict[Order, Worked] = {}  # done before anybody asked
        self._taker: threading.Thread | None = None
        self._owns_cluster = False

    def submit(self, orders: Iterable[Order]) -> None:
        from stages.ray_stream import open_queue, put, start_cluster

        if self._orders is None:
            self._owns_cluster = start_cluster(self._config.pools)
            self._orders = open_queue()
            self._taker = threading.Thread(target=self._take, daemon=True)
            self._taker.start()
        put(self._orders, [Worked(order=order).as_table() for order in orders])

    def results(self, orders: Sequence[Order]) -> Iterator[Worked]:
        wanted = set(orders)
        while wanted:
            for order in wanted & self._early.keys():
                yield self._early.pop(order)
                wanted.remove(order)
            if wanted:
                done = self._done.get()
                if isinstance(done, BaseException):
                    raise done
                self._early |= {worked.order: worked for worked in _checked(done)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        from stages.ray_stream import close_queue, stop_cluster

        if self._orders is None or self._taker is None:
            return
        if exception[0] is None:
            close_queue(self._orders)
            self._taker.join()
        if self._owns_cluster:
            stop_cluster()

    def _take(self) -> None:
        from stages.ray_stream import stream

        try:
            specs = _worker_specs(self._config, self._roles)
            for table in stream(self._orders, specs):
                self._done.put(table)
        except BaseException as error:  # handed to the thread that waits for results
            self._done.put(error)


def _worker_specs(config: Config, roles: tuple[Role, ...]) -> list[WorkerSpec]:
    """The pools: worker class, constructor arguments, placement."""
    store = Store(config.store).address
    pools, specs = config.pools, list[WorkerSpec]()
    for role, worker, model, pool in (
        ("student", GenerateUnits, config.student, pools.student),
        ("teacher", ScoreUnits, config.teacher, pools.teacher),
    ):
        if role in roles and model is not None:
            patience = pool.unit_seconds if config.executor == "ray" else None
            arguments = [
                store,
                model.batch_rows,
                pool.threads,
                model.vllm,
                patience,
                config.store_seconds,
            ]
            specs.append((worker, arguments, pool))
    return specs


def _checked(table: pa.Table) -> list[Worked]:
    done = worked_of(table)
    for worked in done:
        if worked.traceback is not None:
            logging.getLogger("opd_stream").error("%s", worked.traceback.rstrip())
        if worked.problem is not None:
            raise UserError(worked.problem)
    return done
