"""Two ways to run the same workers: Ray Data actor pools, or a plain loop in this process."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

from opd_stream.config import Config
from opd_stream.memory import give_back
from stages.distance import StudentWorker
from stages.score import ScoreWorker
from stages.workers import Role, Task, TaskResult, Worker, WorkerSettings, checked, worker_specs

BOTH: tuple[Role, ...] = ("student", "teacher")
_WORKERS: dict[Role, type[Worker]] = {"student": StudentWorker, "teacher": ScoreWorker}


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

    def release(self) -> None:
        """Give up the engines that this process holds, for training to have the memory."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_executor(config: Config, roles: tuple[Role, ...] = BOTH) -> Executor:
    """The executor a config asks for, with workers of some roles only."""
    if config.executor == "local":
        return LocalExecutor(config, roles)
    from stages.ray_stream import RayExecutor

    return RayExecutor(config, roles)


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
            specs = worker_specs(self._config, self._roles)
            self._workers = [_WORKERS[spec.role](spec.settings) for spec in specs]

    def results(self, tasks: Sequence[Task]) -> Iterator[TaskResult]:
        asked = {task.teacher_name for task in tasks if task.scores is not None}
        for worker in self._workers if tasks else ():
            if asked and worker.settings.teacher_name not in (None, *asked):
                worker.release()  # one of several teachers is in memory at a time
            worker.prepare(tasks[0])
        for task in tasks:
            result = TaskResult(task=task)
            for worker in self._workers:
                result = worker.run(result)
            yield checked(result)

    def release(self) -> None:
        for worker in self._workers:
            worker.release()
        give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
