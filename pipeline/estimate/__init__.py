"""What a run would do, before it costs anything: tokens, bytes, operations, disk, memory.

    estimate(config, RunFolder(Path("runs/mine"))).as_json()

Nothing is written and no model is loaded. What the store has is measured; what is left follows from
the completions that were measured so far, or, where there are none, from full windows.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal

from opd_stream.config import Config
from opd_stream.costs import forward_flops
from opd_stream.engines.base import MAX_LOGITS_PER_CHUNK, rows_per_chunk
from opd_stream.store.files import is_remote
from pipeline.estimate.memory import training_memory
from pipeline.estimate.reading import existing_folder, read_inputs
from pipeline.estimate.result import BreakEven, Disk, Estimate, LogitMemory, RoundCost, StepCost
from pipeline.estimate.rounds import RunCosts
from pipeline.estimate.sizes import FLOAT32, RECORD_BYTES, policy_sizes
from pipeline.run_folder import RunFolder
from pipeline.setup import Setup, largest_window
from stages.prompts import every_prompt
from stages.step import TRAIN


def estimate(config: Config, folder: RunFolder) -> Estimate:
    """What the run would do, from what the store has of it on.

    Raises:
        UserError: the run would be refused, told in the same line.
    """
    costs = RunCosts(read_inputs(config))
    folder.check(config)
    rounds = tuple(costs.rounds())
    steps = [step for each in rounds for step in each.steps]
    disks, logits = _disks(costs, rounds, folder.path), _logits(costs)
    reads = costs.inputs.prompts.selected(every_prompt()).mean + largest_window(config)
    return Estimate(
        rounds=rounds,
        disk=disks,
        logits=logits,
        training=training_memory(config, costs.setup.student.folder, row_tokens=reads),
        break_even=_break_even(costs, steps),
        notes=(*costs.inputs.notes, *_assumptions(costs, steps)),
        warnings=(*costs.setup.warnings, *_warnings(disks, logits)),
    )


def _disks(costs: RunCosts, rounds: tuple[RoundCost, ...], folder: Path) -> tuple[Disk, ...]:
    """The store's disk and the run folder's, which may be one."""
    config, store = costs.config, costs.setup.store
    sizes = policy_sizes(costs.setup.student.folder, config.train)
    steps = [step for each in rounds for step in each.steps]
    shards = sum(s.left.bytes + RECORD_BYTES * s.units_left for s in steps if s.kind != TRAIN)
    untrained = [each for each in rounds for s in each.steps if s.kind == TRAIN and s.left.rows]
    # States go when the round after is complete, so that there is one more for a moment.
    kept, trained = config.keep_optimizers or len(rounds), len(rounds) - len(untrained)
    states = min(trained + len(untrained), kept + 1) - min(trained, kept) if untrained else 0
    policies = sizes.policy * len(untrained) + sizes.state * states
    longest = max((each.optimizer_steps for each in untrained), default=0)
    # The one before stays until the next is whole.
    checkpoints = sizes.checkpoint * min(2, longest // config.train.checkpoint_steps)
    written = {"shards": round(shards), "policies": policies}
    local, remote = (store.root, written), tuple[Disk, ...]()
    if is_remote(store.root):
        local = (store.local, {"policies": policies})
        remote = (Disk(path=store.location, parts=written, free=None),)
    by_device: dict[int, Disk] = {}
    for path, parts in ((folder, {"checkpoints": checkpoints}), local):
        place = existing_folder(path)
        device = place.stat().st_dev
        before = by_device[device].parts if device in by_device else {}
        free = shutil.disk_usage(place).free
        by_device[device] = Disk(path=str(path), parts={**parts, **before}, free=free)
    return (*by_device.values(), *remote)


def _logits(costs: RunCosts) -> LogitMemory | None:
    """float32 logits of one chunk; engine vllm holds those of a forward pass."""
    found = [one for each in costs.setup.by_teacher if (one := _logits_of(each)) is not None]
    return max(found, key=lambda one: one.bytes, default=None)


def _logits_of(setup: Setup) -> LogitMemory | None:
    teacher, checkpoint = setup.config.teacher, setup.teacher
    if checkpoint is None or teacher is None or teacher.engine in ("fake", "server"):
        return None
    vocabulary = checkpoint.config.vocabulary
    if teacher.engine == "vllm":
        rows, what, bound = teacher.vllm.batched_tokens, "teacher.vllm.batched_tokens", None
    else:
        device = "cuda" if setup.config.pools.teacher.gpus else "cpu"
        rows, bound = rows_per_chunk(vocabulary, device), MAX_LOGITS_PER_CHUNK[device]
        what = "a GPU's chunk" if device == "cuda" else "a CPU's chunk"
    logits = rows * vocabulary
    return LogitMemory(
        rows=rows,
        vocabulary=vocabulary,
        bytes=logits * FLOAT32,
        bound=(bound or logits) * FLOAT32,
        what=what,
    )


def _break_even(costs: RunCosts, steps: list[StepCost]) -> BreakEven | None:
    teachers = [*costs.teachers.values()]
    if len(teachers) != 1 or costs.unknown:  # how much of training each of several reads varies
        return None
    models = (costs.student, *teachers)
    cached = [step.total.flops for step in steps if step.kind.stage in ("generate", "score")]
    return BreakEven(
        cache_flops=sum(cached),
        live_flops=sum(forward_flops(model, counts) for model in models for counts in costs.reads),
        train_flops=sum(map(costs.train_flops, costs.reads)),
    )


def _assumptions(costs: RunCosts, steps: list[StepCost]) -> Iterator[str]:
    """One line for everything that could turn out otherwise."""
    config = costs.config
    yield from costs.unknown
    bases = {
        "full window": "no completions are measured yet, so every row is taken to fill its window",
        "estimated": "what is left is estimated from the completions of the latest measured round; "
        "a longer window is taken to be filled by the rows that were cut",
    }
    for basis, said in bases.items():
        names = dict.fromkeys(step.kind.name for step in steps if step.basis == basis)
        if names:
            yield f"{', '.join(names)}: {said}"
    if any(step.kind == TRAIN and step.left.rows for step in steps):
        if config.rollouts.keep is not None and config.replay is None:
            yield (
                "rollouts.keep leaves rollouts out, how many is not known before they are there: "
                "what is left of scoring and training is the most that there can be"
            )
        yield (
            "training is taken to use all epochs (staleness.max_epochs "
            f"{config.staleness.max_epochs}); drift may stop it earlier"
        )
        if config.rollouts.window.is_decided:
            yield "training decides later windows; until then the latest one is taken"
        if config.staleness.max_policies:
            yield "rounds that have no name yet are taken to sample all of their rollouts"
        if config.train.extrapolation is not None:
            yield (
                "what extrapolation reads or samples to judge its points is not counted (with "
                "signal kl, rows that do not train)"
            )
    if any(problems.lengths.rows is None for problems in costs.inputs.problems):
        yield "evaluations are not counted: the number of held-out prompts is unknown"


def _warnings(disks: tuple[Disk, ...], logits: LogitMemory | None) -> Iterator[str]:
    for disk in disks:
        if not disk.fits:
            largest = max(disk.parts, key=lambda name: disk.parts[name])
            yield (
                f"{disk.path} does not have the room: {decimal(disk.needed)} needed, "
                f"{decimal(disk.free or 0)} free; free space, set store and --run-dir to a larger "
                f"disk, or lower what makes the {largest} large (docs/plan.md)"
            )
    if logits is not None and not logits.fits:
        yield (
            f"scoring holds {decimal(logits.bytes)} of logits, above its bound of "
            f"{decimal(logits.bound)}: the vocabulary is large for a chunk"
        )
