"""Whether the devices that a config asks for are here, can do its arithmetic, and have room."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_stream.config import Config, Pool
from opd_stream.config.collection import Model
from pipeline.doctor.findings import Check, Finding

DEVICES = Check(
    name="devices",
    why="a pool that no node can run ends the run; a worker without its GPU is many times slower",
)
PRECISION = Check(
    name="precision",
    why="arithmetic that a device has to emulate is slow, and some engines refuse it",
)
MEMORY = Check(
    name="memory",
    why="weights that do not fit end the stage that loads them",
)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINING_BYTES = 16  # a parameter: float32 weights, gradients and two moments of AdamW
BFLOAT16_FROM = (8, 0)  # compute capability
LARGE = 300_000_000  # parameters from which a CPU is no place to run a model
CGROUP = Path("/sys/fs/cgroup/memory.max")
Sizes = dict[str, int]  # role -> parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device of this machine.

    Example:
        >>> Gpu(name="NVIDIA H100 80GB HBM3", bytes=85_000_000_000, capability=(9, 0))
    """

    name: str
    bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine has.

    Example:
        >>> Machine(gpus=(), cpus=2, bytes=16_000_000_000, cpu_bfloat16=True)
    """

    gpus: tuple[Gpu, ...]
    cpus: int
    bytes: int  # of memory
    cpu_bfloat16: bool | None  # whether the CPU has instructions for it; None: not known

    def as_node(self) -> dict[str, Any]:
        """This machine as Ray would describe it, were it started here."""
        kinds = {f"accelerator_type:{word}": 1.0 for gpu in self.gpus for word in gpu.name.split()}
        resources = {"CPU": float(self.cpus), "GPU": float(len(self.gpus)), **kinds}
        return {"Resources": resources, "Labels": {}, "Alive": True}


def this_machine() -> Machine:
    """Look at this machine."""
    import torch

    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.9 has none
    instructions = None if ask is None else ask()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return Machine(
        gpus=tuple(
            Gpu(name=gpu.name, bytes=gpu.total_memory, capability=(gpu.major, gpu.minor))
            for gpu in gpus
        ),
        cpus=os.cpu_count() or 1,
        bytes=memory if limit == "max" else min(memory, int(limit)),
        cpu_bfloat16=(
            None
            if instructions is None
            else any(instructions.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        ),
    )


def cluster_nodes(config: Config) -> list[dict[str, Any]]:
    """The nodes of the cluster at RAY_ADDRESS, as Ray describes them.

    Raises:
        ConnectionError: nothing answers there.
    """
    import ray

    from stages.ray_stream import start_cluster, stop_cluster

    owned = start_cluster(config.pools)
    try:
        return [node for node in ray.nodes() if node["Alive"]]
    finally:
        if owned:
            stop_cluster()


def pools(config: Config, nodes: list[dict[str, Any]], where: str) -> list[Finding]:
    """What the workers ask for against what nodes have, one by one and all together."""
    from stages.ray_stream import lacking

    roles = _pools_of(config)
    findings = [
        DEVICES.error(
            f"pools.{role}: {lack} ({where})",
            f"lower what pools.{role} asks for, or run where such a node is",
        )
        for role, pool in roles.items()
        for lack in lacking(pool, nodes)
    ]
    if findings:
        return findings
    for name in ("CPU", "GPU"):
        there = sum(node["Resources"].get(name, 0.0) for node in nodes)
        asked = sum(pool.workers * _asked(pool, name) for pool in roles.values())
        if asked > there:
            findings.append(
                DEVICES.error(
                    f"the pools ask for {asked:g} {name} together, {where} has {there:g}; both run "
                    "at the same time",
                    "lower workers or what each takes",
                )
            )
    told = ", ".join(
        f"{role} {pool.workers} x ({pool.cpus:g} CPU, {pool.gpus:g} GPU)"
        for role, pool in roles.items()
    )
    return findings or [DEVICES.ok(f"{where} can run the pools: {told}")]


def local_nodes(config: Config, machine: Machine) -> list[dict[str, Any]]:
    """This machine as the one node; Ray is told of as many CPUs as the pools ask for."""
    node = machine.as_node()
    wanted = sum(pool.workers * pool.cpus for pool in _pools_of(config).values())
    node["Resources"]["CPU"] = max(node["Resources"]["CPU"], wanted)
    return [node]


def trainer(config: Config, machine: Machine) -> list[Finding]:
    """Devices and strategy of training, which runs on the machine that is asked."""
    pool, gpus, findings = config.pools.trainer, len(machine.gpus), list[Finding]()
    if gpus and pool.devices > gpus:
        findings.append(
            DEVICES.error(
                f"pools.trainer.devices is {pool.devices}; this machine has {gpus} GPU",
                "lower pools.trainer.devices, or train on a larger machine",
            )
        )
    elif not gpus and pool.devices > machine.cpus:
        findings.append(
            DEVICES.warning(
                f"pools.trainer.devices is {pool.devices} on {machine.cpus} CPU cores and no GPU",
                "lower pools.trainer.devices",
            )
        )
    if pool.devices == 1 and pool.strategy == "fsdp2":
        findings.append(
            DEVICES.warning(
                "pools.trainer.strategy is fsdp2 with one device, where it does nothing",
                "set pools.trainer.devices, or leave the strategy out",
            )
        )
    taken = sum(each.workers * each.gpus for each in _pools_of(config).values())
    if gpus and "RAY_ADDRESS" not in os.environ and taken + pool.devices > gpus:
        findings.append(
            DEVICES.warning(
                f"workers hold {taken:g} GPU and training takes {pool.devices}; this machine has "
                f"{gpus}, so some are shared and both have to fit into the memory of one",
                "leave room with vllm.memory_share and train.tokens_per_microbatch",
            )
        )
    for role, model in _models_of(config).items():
        asked = model.vllm.tensor_parallel
        have = _pools_of(config)[role].gpus
        if model.engine == "vllm" and gpus and asked > max(1.0, have):
            findings.append(
                DEVICES.error(
                    f"{role}.vllm.tensor_parallel is {asked}, pools.{role}.gpus is {have:g}",
                    f"set pools.{role}.gpus={asked}",
                )
            )
    kind = f"{gpus} GPU ({machine.gpus[0].name})" if gpus else f"{machine.cpus} CPU cores, no GPU"
    return findings or [DEVICES.ok(f"training on {pool.devices} of {kind}")]


def precision(config: Config, machine: Machine) -> list[Finding]:
    """16-bit arithmetic against what the devices of this machine have."""
    wanted = {f"{role}.dtype": model.dtype for role, model in _models_of(config).items()}
    if config.train.precision == "bf16-mixed":
        wanted["train.precision"] = "bfloat16"
    engines = {f"{role}.dtype": model.engine for role, model in _models_of(config).items()}
    findings: list[Finding] = []
    for name, dtype in wanted.items():
        if dtype == "float32":
            continue
        todo = f"set {name} to float32, or run on a device that has {dtype}"
        old = [gpu.name for gpu in machine.gpus if gpu.capability < BFLOAT16_FROM]
        if old and dtype == "bfloat16":
            told = f"{name} is bfloat16, which {old[0]} only emulates"
            is_refused = engines.get(name) == "vllm"
            findings.append((PRECISION.error if is_refused else PRECISION.warning)(told, todo))
        elif not machine.gpus and not (dtype == "bfloat16" and machine.cpu_bfloat16 is not False):
            findings.append(
                PRECISION.warning(f"{name} is {dtype}, which this CPU only emulates", todo)
            )
    told = ", ".join(f"{name} {dtype}" for name, dtype in wanted.items())
    return findings or [PRECISION.ok(f"{told}: the device has it")]


def memory(config: Config, machine: Machine, sizes: Sizes) -> list[Finding]:
    """Weights of each role, and the state of training, against the memory of a device."""
    findings = [_engine_room(config, machine, role, sizes[role]) for role in sizes]
    per_parameter = TRAINING_BYTES if config.train.lora is None else BYTES["float32"]
    state = sizes["student"] * per_parameter
    pool = config.pools.trainer
    if pool.strategy == "fsdp2":
        state //= pool.devices
    findings.append(_fits("training, without activations", state, _device(machine)))
    if "RAY_ADDRESS" not in os.environ:
        findings += _together(config, machine, sizes, state)
    if not machine.gpus and max(sizes.values()) > LARGE and "RAY_ADDRESS" not in os.environ:
        findings.append(
            DEVICES.warning(
                f"{max(sizes.values()):,} parameters, and no GPU that torch can use",
                "look at nvidia-smi and at the build of torch; on this CPU the run would be slow",
            )
        )
    return findings


def _together(config: Config, machine: Machine, sizes: Sizes, state: int) -> list[Finding]:
    """What `run` keeps on the first device at once: engines stay loaded while a round trains."""
    pools = _pools_of(config)
    is_one = config.executor == "local" or len(machine.gpus) < 2
    here = [role for role in sizes if is_one or pools[role].gpus == 0]  # 0 reserves no GPU
    if not here:
        return []
    need = state
    for role in here:
        model = _models_of(config)[role]
        workers = 1 if config.executor == "local" else pools[role].workers
        taken = sizes[role] * BYTES[model.dtype]
        if model.engine == "vllm" and machine.gpus:
            taken = int(_device(machine) * model.vllm.memory_share)
        need += workers * taken
    return [_fits(f"{', '.join(here)} and training at once", need, _device(machine))]


def _engine_room(config: Config, machine: Machine, role: str, count: int) -> Finding:
    model = _models_of(config)[role]
    have = _device(machine)
    need = count * BYTES[model.dtype]
    if model.engine == "vllm" and machine.gpus:
        have = int(have * model.vllm.memory_share)
        need //= model.vllm.tensor_parallel
    return _fits(f"{role} in {model.dtype}, weights alone", need, have)


def _fits(what: str, need: int, have: int) -> Finding:
    found = f"{what}: {need / 1e9:.2f} GB of {have / 1e9:.1f} GB"
    if need > have:
        return MEMORY.error(
            found, "use a larger device, a smaller dtype, train.lora, or more devices with fsdp2"
        )
    if need > 0.8 * have:
        return MEMORY.warning(found, "leave more room: activations and caches come on top")
    return MEMORY.ok(found)


def fits_in_float32(machine: Machine, count: int) -> bool:
    """Whether a model can be loaded as training loads it, with room for a short forward pass."""
    return count * BYTES["float32"] < 0.8 * _device(machine)


def _device(machine: Machine) -> int:
    return min((gpu.bytes for gpu in machine.gpus), default=machine.bytes)


def _models_of(config: Config) -> dict[str, Model]:
    found: dict[str, Model] = {"student": config.student}
    return found if config.teacher is None else {**found, "teacher": config.teacher}


def _pools_of(config: Config) -> dict[str, Pool]:
    """The pools of the roles that have a model."""
    return {role: getattr(config.pools, role) for role in _models_of(config)}


def _asked(pool: Pool, name: str) -> float:
    return pool.cpus if name == "CPU" else pool.gpus
