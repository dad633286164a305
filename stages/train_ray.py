"""Training on several devices or nodes: Ray Train starts the workers, and each of them is a process
of the loop in `stages/train.py`.

Ray places the workers as the config's `pools.trainer` says and makes the process group that Fabric
joins. What the first worker has to say (progress, warnings, a mistake of the user) travels to this
process through a queue. All workers see the run's folder and the store under the same paths.
"""

import logging
import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd_stream.config import TrainerPool
from opd_stream.errors import UserError
from opd_stream.launcher import call_with
from opd_stream.store.artifact import DamagedUnit
from stages.ray_stream import lacking, open_queue, put, start_cluster, stop_cluster
from stages.step import Progress
from stages.train_job import TrainJob

POLL_SECONDS = "0.5"  # between two looks of Ray Train at its workers


# A call of `Progress`, or an error: its name, arguments and named arguments. Plain values, so that
# the queue's process imports nothing of ours.
Message = tuple[str, tuple[Any, ...], dict[str, float]]


def train_on_ray(job: TrainJob, progress: Progress) -> None:
    """Train and publish the policy on the workers of `pools.trainer`.

    Raises:
        UserError: the cluster has no room for the workers, a worker found a mistake of the user, or
            it died.
        DamagedUnit: a worker found one.
    """
    _set_environment(job.config.pools.trainer)
    is_ours = start_cluster(job.config.pools)
    try:
        _fit(_absolute(job), progress)
    finally:
        if is_ours:
            stop_cluster()


def _fit(job: TrainJob, progress: Progress) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # errors are raised
    scratch = Path(job.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    pool, queue = _with_gpus(job.config.pools.trainer), open_queue()
    resources = {"CPU": pool.cpus, **pool.resources}
    if pool.gpus:
        resources["GPU"] = pool.gpus
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            call_with,
            # References in it are followed by the worker, once it has found our packages.
            train_loop_config={
                "function": "stages.train_ray:train_in_worker",
                "job": ray.put(job),
                "queue": queue,
            },
            scaling_config=ScalingConfig(
                num_workers=pool.devices,
                use_gpu=bool(pool.gpus),
                resources_per_worker=resources,
                accelerator_type=pool.accelerator,
                label_selector=pool.labels or None,
            ),
            run_config=RunConfig(
                name="train",
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                worker_runtime_env={"env_vars": pool.env} if pool.env else None,
            ),
        )
        failures: list[BaseException] = []

        def fit() -> None:  # not in the main thread, where it would take over Ctrl-C
            try:
                trainer.fit()
            except BaseException as error:  # raised below
                failures.append(error)
            finally:
                put(queue, [None])

        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        problem: Exception | None = None
        for message in iter(lambda: _next(queue), None):
            problem = problem or _heed(message, job, progress)
        thread.join()
    ray.kill(queue)
    if problem is not None:
        raise problem
    if failures and isinstance(failures[0], TrainingFailedError):
        raise _explained(failures[0], pool) from failures[0]
    if failures:
        raise failures[0]


def _next(queue: Any) -> Message | None:
    import ray

    message: Any = ray.get(queue.get.remote())
    return message


def _heed(message: Message, job: TrainJob, progress: Progress) -> Exception | None:
    """Show progress; an error is returned, to be raised when the workers have ended."""
    verb, values, facts = message
    match verb:
        case "error":
            return UserError(*values)
        case "damaged":
            kind, fingerprint, unit, reason = values
            return DamagedUnit(job.store().by_fingerprint(kind, fingerprint), unit, reason)
        case _:
            getattr(progress, verb)(*values, **facts)
            return None


def _explained(error: Exception, pool: TrainerPool) -> UserError:
    """A failure of Ray Train in a line; a traceback goes to the log."""
    import ray

    text = " ".join(str(error).split())
    if "WorkerGroupStartupTimeout" in text or "WorkerGroupStartupTimeout" in repr(
        getattr(error, "controller_failure", "")
    ):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        lacks = lacking(pool, nodes) or [
            f"nodes that could have no room left; the cluster has {ray.cluster_resources()}"
        ]
        return UserError(
            f"training has not all of its {pool.devices} workers after {pool.start_seconds} s; "
            f"{'; '.join(lacks)}; lower what pools.trainer asks for, add such a node, or raise "
            "pools.trainer.start_seconds"
        )
    logging.getLogger("opd_stream").error("%s", str(error).rstrip())
    return UserError(
        f"a training worker died, or its node is gone: {text[-300:]}; the policy of the round "
        "before is intact; look at the worker's memory, then run again: training resumes from its "
        "latest checkpoint"
    )


def train_in_worker(config: dict[str, Any]) -> None:
    """One worker: the loop of `stages/train.py`, with the process group that Ray Train made."""
    import ray
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    from stages.learner import open_fabric
    from stages.train import train_here

    job: Any = ray.get(config["job"])
    queue = config["queue"]
    environment = TorchElasticEnvironment()  # reads RANK, LOCAL_RANK and WORLD_SIZE
    problem: Message | None = None
    try:
        if not Path(job.scratch).is_dir():
            raise UserError(
                f"training on {ray.util.get_node_ip_address()} does not see {job.scratch}; "
                "put the run's folder and the store on a file system that all nodes share, or "
                "place training on the node of the run with pools.trainer.labels"
            )
        train_here(job, _Sender(queue, environment.global_rank()), open_fabric(job, environment))
    except UserError as error:
        problem = ("error", (str(error),), {})
    except DamagedUnit as damaged:
        artifact = damaged.artifact
        found = (artifact.recipe.kind, artifact.fingerprint, damaged.unit, damaged.reason)
        problem = ("damaged", found, {})
    if problem is not None:
        put(queue, [problem])
        raise RuntimeError("a mistake of the user, told through the queue")  # ends all workers


class _Sender:
    """A `Progress` that sends what it is told to the process that started the workers."""

    def __init__(self, queue: Any, rank: int) -> None:
        self._queue, self._is_first = queue, rank == 0

    def start(self, stage: str, total: int, done: int = 0) -> None:
        self._send("start", stage, total, done)

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        self._send("advance", stage, count, tokens, **facts)

    def say(self, line: str) -> None:
        self._send("say", line)

    def warn(self, line: str) -> None:
        self._send("warn", line)

    def _send(self, verb: str, *values: Any, **facts: float) -> None:
        if self._is_first:
            put(self._queue, [(verb, values, facts)])


def _absolute(job: TrainJob) -> TrainJob:
    """The same job for processes with another working directory."""
    store, replay = job.store(), job.config.replay
    if replay is not None and store.replayed is not None:
        replay = replay.model_copy(update={"store": store.replayed.address})
    return replace(
        job,
        config=job.config.model_copy(update={"store": store.address, "replay": replay}),
        base=str(Path(job.base).absolute()),
        initial=str(Path(job.initial).absolute()),
        scratch=str(Path(job.scratch).absolute()),
        metrics=str(Path(job.metrics).absolute()),
    )


def _with_gpus(pool: TrainerPool) -> TrainerPool:
    """The pool with a number of GPUs: where none is asked for, one where the nodes have them."""
    import ray

    if pool.gpus is not None:
        return pool
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with_gpu = pool.model_copy(update={"gpus": 1.0})
    return pool.model_copy(update={"gpus": 0.0}) if lacking(with_gpu, nodes) else with_gpu


def _set_environment(pool: TrainerPool) -> None:
    """What Ray Train reads from the environment of the process that starts it."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(pool.start_seconds)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
