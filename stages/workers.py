"""What a worker is told, what it returns, and what all workers share: a store and one engine.

The same workers run in Ray Data actor pools and in the plain local loop. A task names one unit;
everything that decides its content is read from the recipe in the store, so a worker needs nothing
but the store and a checkpoint folder.
"""

import contextlib
import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
from pydantic import TypeAdapter

from opd_stream.config import Config, Model, Pool, Teacher
from opd_stream.engines import open_engine
from opd_stream.engines.base import Engine, VllmOptions
from opd_stream.engines.server_client import ServerOptions
from opd_stream.environments import Environment
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.files import RETRY_TIMEOUT, canonical_json
from opd_stream.store.policy import Part, identify
from opd_stream.store.recipe import Kind, Recipe
from opd_stream.store.store import Store

if TYPE_CHECKING:
    from opd_stream.store.served import ServedTeacher
    from stages.trajectories import Trajectories

Role = Literal["student", "teacher"]
HUNG = 75  # exit status of a worker that gave up its unit
ARTIFACTS_AT_ONCE = 16  # that a worker remembers: those of a round, and what they continue


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit to make.

    Example:
        >>> Task(unit=3, rollouts="3f0c…", scores="77c0…", student="models/s", teacher="models/t",
        ...      made_by="5b0c…")
    """

    unit: int
    rollouts: str  # fingerprint of the rollouts artifact
    scores: str | None  # fingerprint of the teacher's side; None: only sample
    student: str  # checkpoint folder; a policy's may not exist on another node
    teacher: str | None  # checkpoint folder
    made_by: str  # id of the run
    policy: str | None = None  # fingerprint of the student, where it is a policy of the store
    teacher_policy: str | None = None  # the same of the teacher
    teacher_name: str | None = None  # of several
    siblings: tuple[str, ...] = ()  # fingerprints of the other teachers' scores of the rollouts
    author: Role = "student"  # samples the rollouts
    teacher_side: Literal["scores", "hidden"] = "scores"  # the kind of `scores`
    distances: str | None = None  # fingerprint; the student is only compared with the teacher
    only_opens: bool = False  # open what the unit needs and make nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What workers did for a task so far; a span is (start, end) in seconds since the epoch."""

    task: Task
    generate_span: tuple[float, float] | None = None  # None: the unit was committed before
    score_span: tuple[float, float] | None = None
    generated_tokens: int = 0  # of completions, as far as this task made them
    scored_tokens: int = 0
    problem: str | None = None  # what went wrong, in one line
    traceback: str | None = None  # of anything that is not the user's mistake

    def as_table(self) -> pa.Table:
        """One row that travels between workers."""
        return pa.table({"result": [_RESULT.dump_json(self).decode()]})


_RESULT = TypeAdapter(TaskResult)


def results_of(table: pa.Table) -> list[TaskResult]:
    """The results that a table holds."""
    return [_RESULT.validate_json(text) for text in table["result"].to_pylist()]


def checked(result: TaskResult) -> TaskResult:
    """A result without a problem.

    Raises:
        UserError: with the problem; a traceback goes to the log.
    """
    if result.traceback is not None:
        logging.getLogger("opd_stream").error("%s", result.traceback.rstrip())
    if result.problem is not None:
        raise UserError(result.problem)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How a worker uses its device and its store; nothing here changes what it makes."""

    store: str  # address
    batch_rows: int = 8
    threads: int = 1
    vllm: VllmOptions = field(default_factory=VllmOptions)
    server: ServerOptions | None = None  # of a served teacher
    teacher_name: str | None = None  # of several: the one whose tasks it does
    unit_seconds: int | None = None  # a unit that takes longer ends the process
    store_seconds: float = RETRY_TIMEOUT  # how long a remote store is asked again
    environment: Environment | None = None  # how it is called; the recipe says what it is


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """The workers of a pool."""

    role: Role
    settings: WorkerSettings
    pool: Pool  # how many, and where they may run


def worker_specs(config: Config, roles: tuple[Role, ...]) -> list[WorkerSpec]:
    """The workers of some roles, as far as the config has a model for them; of each teacher."""
    teachers: dict[str | None, Teacher] = {**config.teachers}
    if config.teacher is not None:
        teachers[None] = config.teacher
    models: list[tuple[Role, str | None, Model]] = [("student", None, config.student)]
    models.extend(("teacher", name, teacher) for name, teacher in teachers.items())
    specs: list[WorkerSpec] = []
    for role, name, model in models:
        pool = config.pools.student if role == "student" else config.pools.teacher
        if role in roles:
            settings = WorkerSettings(
                store=Store(config.store).address,
                batch_rows=model.batch_rows,
                threads=pool.threads,
                vllm=model.vllm,
                server=model.server if isinstance(model, Teacher) else None,
                teacher_name=name,
                unit_seconds=pool.unit_seconds if config.executor == "ray" else None,
                store_seconds=config.store_seconds,
                environment=config.rollouts.environment,
            )
            specs.append(WorkerSpec(role=role, settings=settings, pool=pool))
    return specs


class Worker:
    """A worker with one engine, which is kept between units, rounds and policies."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.store = Store(settings.store, retry_timeout=settings.store_seconds)
        self._engine: Engine | None = None
        self._loaded: str | None = None  # fingerprint of the engine's weights
        self._trajectories: tuple[bytes, Trajectories] | None = None  # and what names them
        self._artifacts: dict[str, Artifact] = {}  # by name: what a recipe says does not change

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run every row of a table (Ray Data passes one row at a time)."""
        return pa.concat_tables([self.run(result).as_table() for result in results_of(table)])

    def run(self, result: TaskResult) -> TaskResult:
        """Do this worker's part of a task; an error becomes a result, not a dead worker."""
        import torch

        if result.problem is not None:
            return result
        torch.set_num_threads(self.settings.threads)  # the local loop also trains in this process
        try:
            with _ending_hung_process(self.settings.unit_seconds), self.store.watched():
                if result.task.only_opens:
                    self.prepare(result.task)
                    return result
                return self.work(result)
        except (UserError, DamagedUnit) as error:
            return replace(result, problem=str(error))
        except Exception as error:  # a prompt that breaks the engine must not look like a dead node
            task = result.task
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return replace(
                result,
                problem=f"unit {task.unit} of rollouts/{task.rollouts[:16]} failed ({text}); "
                "committed units stay; mend the cause and run again",
                traceback=traceback.format_exc(),
            )

    def prepare(self, task: Task) -> None:
        """Open what a task needs before others do paid work for it; by default nothing.

        Raises:
            UserError: the engine cannot be opened.
        """

    def work(self, result: TaskResult) -> TaskResult:
        """Make the task's unit, or pass the result on if the unit is committed."""
        raise NotImplementedError

    def artifact(self, kind: Kind, fingerprint: str) -> Artifact:
        """An artifact of the store, looked for once for all of its units.

        Raises:
            UserError: as `Store.by_fingerprint`.
        """
        name = f"{kind}/{fingerprint}"
        if name not in self._artifacts:
            if len(self._artifacts) >= ARTIFACTS_AT_ONCE:
                self._artifacts.pop(next(iter(self._artifacts)))  # the oldest
            self._artifacts[name] = self.store.by_fingerprint(kind, fingerprint)
        return self._artifacts[name]

    def student_folder(self, task: Task, part: Part = "model") -> Path:
        """The student's checkpoint on this node; that part of a remote policy is fetched."""
        return self._folder(task.policy, task.student, part)

    def teacher_folder(self, task: Task) -> Path:
        """The teacher's checkpoint on this node, likewise."""
        return self._folder(task.teacher_policy, task.teacher or "", "model")

    def _folder(self, policy: str | None, folder: str, part: Part) -> Path:
        if policy is None:
            return Path(folder)
        return self.store.policy_by_fingerprint(policy).folder(part)

    def trajectories(self, task: Task, rollouts: Recipe) -> "Trajectories":
        """The environment of a recipe of rollouts, opened once for all that name the same.

        Raises:
            UserError: its function cannot be imported, or is another one here.
        """
        from stages.trajectories import Trajectories

        key = canonical_json([rollouts.settings["environment"], rollouts.settings["stop_ids"]])
        if self._trajectories is None or self._trajectories[0] != key:
            folder = self.student_folder(task, "texts")
            found = Trajectories.of(rollouts, folder, self.settings.environment)
            self._trajectories = (key, found)
        return self._trajectories[1]

    def release(self) -> None:
        """Give up the engine; the next unit opens it again."""
        self._engine, self._loaded = None, None

    def engine(self, find_folder: Callable[[], Path], fingerprint: str, recipe: Recipe) -> Engine:
        """The engine of a recipe with the weights of that fingerprint.

        Raises:
            UserError: the folder holds other weights.
        """
        if self._loaded == fingerprint and self._engine is not None:
            return self._engine
        folder = find_folder()
        served = self._served(folder, recipe)
        digest = None if served is None else served.weights_sha256
        found = identify(folder, weights_sha256=digest).fingerprint
        if found != fingerprint:
            raise UserError(
                f"checkpoint {folder} is {found[:12]}; the recipe asks for {fingerprint[:12]}; its "
                "files changed since they were first read: restore them, or, if the change is "
                "meant, touch them and run again"
            )
        if self._engine is None:
            self._engine = open_engine(
                engine=recipe.settings["engine"],
                folder=folder,
                dtype=recipe.settings["dtype"],
                batch_rows=self.settings.batch_rows,
                vllm=self.settings.vllm,
                server=self.settings.server,
                expected=None if served is None else served.expected,
            )
        else:
            self._loaded = None  # if reading fails, the engine has no weights
            self._engine.load(folder)
        self._loaded = fingerprint
        return self._engine

    def _served(self, folder: Path, recipe: Recipe) -> "ServedTeacher | None":
        """What the store knows of a served teacher; None: the recipe's model is a folder's."""
        if recipe.settings["engine"] != "server" or self.settings.server is None:
            return None
        from opd_stream.store.served import served_teacher

        return served_teacher(self.store, folder, self.settings.server)


@contextlib.contextmanager
def _ending_hung_process(seconds: int | None) -> Iterator[None]:
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
