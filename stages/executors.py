"""Two ways to run the same workers: Ray Data actor pools, or a plain loop in this process.

Starting an actor pool costs seconds (a new process and its imports for every worker), so one
streaming Ray Data dataset lives for the whole run: its source is a queue, and each round only adds
its tasks to it. Workers keep their engines from round to round, and scoring of a unit starts while
the next one is being sampled, because both pools are stages of that one dataset.
"""

import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import pyarrow as pa

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.store import Store
from stages.generate import GenerateWorker
from stages.ray_stream import (
    Role,
    WorkerSpec,
    close_queue,
    open_queue,
    put,
    start_cluster,
    stop_cluster,
    stream,
)
from stages.score import ScoreWorker
from stages.workers import Task, TaskResult, Worker, WorkerSettings, results_of

BOTH: tuple[Role, ...] = ("student", "teacher")
_WORKERS: dict[Role, type[Worker]] = {"student": GenerateWorker, "teacher": ScoreWorker}


class Executor(Protocol):
    """Runs tasks; results come as tasks are done, in any order."""

    def submit(self, tasks: Iterable[Task]) -> None:
        """Queue tasks."""
        ...

    def results(self, tasks: Sequence[Task]) -> Iterator[TaskResult]:
        """The results of submitted tasks; results of others are kept until they are asked for.

        Raises:
            UserError: a worker met a user's mistake.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_executor(config: Config, roles: tuple[Role, ...] = BOTH) -> Executor:
    """The executor a config asks for, with workers of some roles only."""
    return (RayExecutor if config.executor == "ray" else LocalExecutor)(config, roles)


def open_worker(role: Role, **settings: Any) -> Worker:
    """A worker of a role; `settings` are the fields of `WorkerSettings`."""
    return _WORKERS[role](WorkerSettings(**settings))


class LocalExecutor:
    """The workers in this process, one task after another; needs no Ray."""

    def __init__(self, config: Config, roles: tuple[Role, ...] = BOTH) -> None:
        self._config, self._roles = config, roles
        self._workers: list[Worker] = []

    def submit(self, tasks: Iterable[Task]) -> None:
        if not self._workers:
            specs = _worker_specs(self._config, self._roles)
            self._workers = [_WORKERS[spec.role](spec.settings) for spec in specs]

    def results(self, tasks: Sequence[Task]) -> Iterator[TaskResult]:
        for task in tasks:
            result = TaskResult(task=task)
            for worker in self._workers:
                result = worker.run(result)
            yield _checked(result)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class RayExecutor:
    """One dataset for the whole run: queue -> student pool -> teacher pool -> results.

    Ray starts with the first task, so a run that has nothing to do does not wait for it. A thread
    takes the results, so workers go on while this process trains.
    """

    def __init__(self, config: Config, roles: tuple[Role, ...] = BOTH) -> None:
        self._config, self._roles = config, roles
        self._tasks: Any = None  # Ray's queue
        self._results: queue.SimpleQueue[pa.Table | BaseException] = queue.SimpleQueue()
        self._early: dict[Task, TaskResult] = {}  # done before they were asked for
        self._receiver: threading.Thread | None = None
        self._owns_cluster = False

    def submit(self, tasks: Iterable[Task]) -> None:
        if self._tasks is None:
            self._owns_cluster = start_cluster(self._config.pools)
            self._tasks = open_queue()
            self._receiver = threading.Thread(target=self._receive, daemon=True)
            self._receiver.start()
        put(self._tasks, [TaskResult(task=task).as_table() for task in tasks])

    def results(self, tasks: Sequence[Task]) -> Iterator[TaskResult]:
        wanted = set(tasks)
        while wanted:
            for task in wanted & self._early.keys():
                yield self._early.pop(task)
                wanted.remove(task)
            if wanted:
                received = self._results.get()
                if isinstance(received, BaseException):
                    raise received
                self._early |= {result.task: _checked(result) for result in results_of(received)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tasks is None or self._receiver is None:
            return
        if exception[0] is None:
            close_queue(self._tasks)
            self._receiver.join()
        if self._owns_cluster:
            stop_cluster()

    def _receive(self) -> None:
        try:
            for table in stream(self._tasks, _worker_specs(self._config, self._roles)):
                self._results.put(table)
        except BaseException as error:  # raised in the thread that waits for results
            self._results.put(error)


def _worker_specs(config: Config, roles: tuple[Role, ...]) -> list[WorkerSpec]:
    """The workers of some roles, as far as the config has a model for them."""
    specs: list[WorkerSpec] = []
    students = ("student", config.student, config.pools.student)
    for role, model, pool in (students, ("teacher", config.teacher, config.pools.teacher)):
        if role in roles and model is not None:
            settings = WorkerSettings(
                store=Store(config.store).address,
                batch_rows=model.batch_rows,
                threads=pool.threads,
                vllm=model.vllm,
                unit_seconds=pool.unit_seconds if config.executor == "ray" else None,
                store_seconds=config.store_seconds,
            )
            specs.append(WorkerSpec(role=role, settings=settings, pool=pool))
    return specs


def _checked(result: TaskResult) -> TaskResult:
    """A result without a problem.

    Raises:
        UserError: with the problem; a traceback goes to the log.
    """
    if result.traceback is not None:
        logging.getLogger("opd_stream").error("%s", result.traceback.rstrip())
    if result.problem is not None:
        raise UserError(result.problem)
    return result
