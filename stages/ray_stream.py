"""A Ray Data dataset that stays open: blocks are put into a queue and stream through actor pools.

Starting an actor pool costs seconds (a new process and its imports for every worker), so one
dataset lives for the whole run: its source is a queue, and each round only adds its tasks to it.
Workers keep their engines from round to round, and scoring of a unit starts while the next one is
being sampled, because both pools are stages of that one dataset.

Ray Data buffers rows until a block is large (128 MiB by default). Here a block is one task, so
`target_max_block_size` is 1 byte, and a task moves on as soon as its worker is done. Workers
publish their own shards and pass on a few hundred bytes. Ray itself is imported inside functions.
"""

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from queue import SimpleQueue
from typing import Any, Self

import pyarrow as pa

from opd_stream.config import Config, Pool, Pools, TrainerPool
from opd_stream.errors import UserError
from opd_stream.launcher import RemoteWorker
from stages.workers import Role, Task, TaskResult, WorkerSpec, checked, results_of, worker_specs

log = logging.getLogger("opd_stream")

RESTARTS = 3  # of a worker; a unit that kills it four times ends the run


class RayExecutor:
    """One dataset for the whole run: queue -> student pool -> teacher pool -> results.

    The first task that is to be scored goes through alone before, and only opens the teacher, so
    that one which is refused is refused before the student samples.

    Ray starts with the first task, so a run that has nothing to do does not wait for it. A thread
    takes the results, so workers go on while this process trains.
    """

    def __init__(self, config: Config, roles: tuple[Role, ...]) -> None:
        self._config, self._roles = config, roles
        self._tasks: Any = None  # Ray's queue
        self._results: SimpleQueue[pa.Table | BaseException] = SimpleQueue()
        self._early: dict[Task, TaskResult] = {}  # done before they were asked for
        self._receiver: threading.Thread | None = None
        self._owns_cluster = False
        self._opened: set[str | None] = set()  # names of teachers

    def submit(self, tasks: Iterable[Task]) -> None:
        tasks = list(tasks)
        if self._tasks is None:
            self._owns_cluster = start_cluster(
                self._config.pools, teachers=max(1, len(self._config.teachers))
            )
            self._tasks = open_queue()
            self._receiver = threading.Thread(target=self._receive, daemon=True)
            self._receiver.start()
        first = next((task for task in tasks[:1] if task.scores is not None), None)
        if first is not None and first.teacher_name not in self._opened:
            self._opened.add(first.teacher_name)
            opens = replace(first, only_opens=True)
            put(self._tasks, [TaskResult(task=opens).as_table()])
            list(self.results([opens]))
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
                self._early |= {result.task: checked(result) for result in results_of(received)}

    def release(self) -> None:
        """Nothing: the workers have processes of their own."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tasks is None or self._receiver is None:
            return
        if exception[0] is None:
            put(self._tasks, [None])
            self._receiver.join()
        if self._owns_cluster:
            stop_cluster()

    def _receive(self) -> None:
        try:
            for table in stream(self._tasks, worker_specs(self._config, self._roles)):
                self._results.put(table)
        except BaseException as error:  # raised in the thread that waits for results
            self._results.put(error)


def start_cluster(pools: Pools, *, teachers: int = 1) -> bool:
    """Connect to RAY_ADDRESS, or start Ray on this machine; returns whether this call did.

    `teachers` is the number of pools of teachers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors reach us as exceptions
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a stream left running starts no Ray
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        log.info("connecting to Ray at %s", address)
        ray.init(address=address, **quiet)
        return True
    asked = (pools.student, *[pools.teacher] * teachers)
    wanted = sum(pool.workers * pool.cpus for pool in asked)
    if pools.trainer.is_on_ray:
        wanted += pools.trainer.devices * pools.trainer.cpus
    log.info("starting Ray on this machine, which takes some seconds")
    with _without_native_stderr():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, -int(-wanted // 1)),
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            **quiet,
        )
    return True


def stop_cluster() -> None:
    """Disconnect from the cluster, and end it if `start_cluster` started it."""
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # threads of a stream left running
    ray.shutdown()


def open_queue() -> Any:
    """An actor that hands out blocks in the order they were put."""
    import asyncio

    import ray

    class Queue:
        def __init__(self) -> None:
            self.blocks: asyncio.Queue[pa.Table | None] = asyncio.Queue()

        async def put(self, blocks: list[pa.Table | None]) -> None:
            for block in blocks:
                await self.blocks.put(block)

        async def get(self) -> pa.Table | None:
            return await self.blocks.get()

    return ray.remote(num_cpus=0, scheduling_strategy=_this_node())(Queue).remote()


def _this_node() -> Any:
    """On the node of the run itself: losing another node must not end the stream."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def put(queue: Any, blocks: list[Any]) -> None:
    """Add blocks to the stream."""
    import ray

    ray.get(queue.put.remote(blocks))


def stream(queue: Any, specs: list[WorkerSpec]) -> Iterator[pa.Table]:
    """Send the queue's blocks through one actor pool after another.

    Raises:
        UserError: a pool could not be started (says what it asks for and what the nodes have), or
            a worker died too often.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    start_seconds = _start_seconds([spec.pool for spec in specs])
    try:
        yield from _blocks(queue, specs, start_seconds)
    except GetTimeoutError as error:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        lacks = [
            f"pools.{spec.role}: {lack}" for spec in specs for lack in lacking(spec.pool, nodes)
        ] or [f"every node could, but has no room left; the cluster has {ray.cluster_resources()}"]
        raise UserError(
            f"a pool has no worker after {start_seconds} s; {'; '.join(lacks)}; lower what it asks "
            "for, add such a node, or raise start_seconds of the pool"
        ) from error
    except RayError as error:
        raise UserError(
            f"a worker died {RESTARTS + 1} times, or its node is gone: {_cause(error)}; committed "
            "units stay: look at the worker's memory and, if it was only slow, at unit_seconds of "
            "its pool, then run again"
        ) from error


def _blocks(queue: Any, specs: list[WorkerSpec], start_seconds: int) -> Any:
    """An iterator over what comes out of the last pool."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for name in ("exceptions", "_internal.execution.streaming_executor_state"):
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)  # one line says it
    # Bounded restarts have no named parameter in Ray 2.60 to 2.63.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.* is deprecated.*")
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1
    context.execution_no_progress_timeout_s = -1  # the stream rests while the student trains
    context.wait_for_min_actors_s = start_seconds
    with ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(
            _source(queue),
            override_num_blocks=1,
            num_cpus=0,
            ray_remote_args={"scheduling_strategy": _this_node()},
        )
        for spec in specs:
            dataset = dataset.map_batches(
                # the class's name is that of Ray's processes
                type(_class_name(spec), (RemoteWorker,), {}),
                fn_constructor_args=["stages.executors:open_worker", spec.role],
                fn_constructor_kwargs=asdict(spec.settings),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=spec.pool.workers),
                **_placement(spec.pool),
                max_restarts=RESTARTS,
                max_task_retries=-1,  # tries while a worker is being restarted must not count
            )
        return dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _class_name(spec: WorkerSpec) -> str:
    name = spec.settings.teacher_name
    return f"{spec.role.title()}Worker" + ("" if name is None else f"-{name}")


def _cause(error: BaseException) -> str:
    """Why a worker died, in Ray's words, in one line."""
    whole = " ".join(str(error).split())
    if "creation task" in whole:  # a worker that cannot start: the error that it raised
        whole = str(error).strip().splitlines()[-1]
    text = whole[max(0, whole.find("The actor is dead because")) :]
    return text if len(text) <= 240 else f"{text[:240]}…"


def _start_seconds(pools: list[Pool]) -> int:
    """Seconds until a stream without workers gives up: a pool that no node can run decides."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    lost = [pool.start_seconds for pool in pools if lacking(pool, nodes)]
    return min(lost) if lost else max(pool.start_seconds for pool in pools)


def _placement(pool: Pool) -> dict[str, Any]:
    """Arguments of Ray for the workers of a pool."""
    asked: dict[str, Any] = {"num_cpus": pool.cpus, "num_gpus": pool.gpus or None}
    if pool.accelerator is not None:
        asked["accelerator_type"] = pool.accelerator
    if pool.resources:
        asked["resources"] = pool.resources
    if pool.labels:
        asked["label_selector"] = pool.labels
    if pool.env:
        asked["runtime_env"] = {"env_vars": pool.env}
    return asked


def lacking(pool: Pool | TrainerPool, nodes: list[dict[str, Any]]) -> list[str]:
    """What a worker of the pool asks for that no node has, a phrase each.

    Args:
        pool: of a role.
        nodes: of the cluster, as `ray.nodes()` describes them.
    """
    wanted = {"CPU": pool.cpus, "GPU": pool.gpus or 0.0, **pool.resources}
    if pool.accelerator is not None:
        wanted[f"accelerator_type:{pool.accelerator}"] = 0.001
    found: list[str] = []
    for name, amount in wanted.items():
        most = max((node["Resources"].get(name, 0.0) for node in nodes), default=0.0)
        if amount > most:
            found.append(f"a worker asks for {amount:g} {name}, the largest node has {most:g}")
    for key, value in pool.labels.items():
        if not any(node.get("Labels", {}).get(key) == value for node in nodes):
            found.append(f"no node has the label {key}={value}")
    return found


def _source(queue: Any) -> Any:
    import ray
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def blocks() -> Iterator[pa.Table]:
        block: Any
        while (block := ray.get(queue.get.remote())) is not None:
            yield block

    class QueueSource(Datasource):
        def get_name(self) -> str:
            return "Tasks"

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *unused: Any, **named: Any) -> list[ReadTask]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [ReadTask(blocks, unknown)]

    return QueueSource()


@contextlib.contextmanager
def _without_native_stderr() -> Iterator[None]:
    """Keep the native library's notes on its own log level off the terminal; errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
