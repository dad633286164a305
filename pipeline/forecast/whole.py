"""A run as a whole: its rounds, the disks it writes to, the teacher's memory, the break-even."""

import shutil
from pathlib import Path

from opd_stream.config import Config
from opd_stream.costs import TokenCounts, forward_flops, train_flops
from opd_stream.engines.base import MAX_LOGITS_PER_CHUNK, rows_per_chunk
from opd_stream.store.files import is_remote
from opd_stream.windows import AdaptiveWindow
from pipeline.forecast.amounts import (
    BreakEven,
    Forecast,
    LogitMemory,
    Place,
    RoundForecast,
    Stage,
)
from pipeline.forecast.known import Known, known_of
from pipeline.forecast.opened import existing, open_read_only
from pipeline.forecast.rounds import forecast_rounds
from pipeline.forecast.sizes import FLOAT32, RECORD_BYTES, policy_sizes
from pipeline.run_folder import RunFolder


def forecast(config: Config, directory: RunFolder) -> Forecast:
    """What the run would do, from what the store has of it on.

    Raises:
        UserError: the run would be refused, told in the same line.
    """
    known = known_of(open_read_only(config))
    directory.check(config)
    found = list(forecast_rounds(known))
    rounds = tuple(here for here, _ in found)
    trained = [counts for _, counts in found]
    whole = Forecast(
        rounds=rounds,
        places=_places(known, rounds, directory.path),
        logits=_logits(known),
        break_even=None,
        notes=(),
    )
    return Forecast(
        rounds=rounds,
        places=whole.places,
        logits=whole.logits,
        break_even=_break_even(known, whole, trained),
        notes=(*known.opened.notes, *_assumptions(known, whole)),
        warnings=(*known.setup.warnings, *_warnings(whole)),
    )


def disk_places(config: Config, directory: Path) -> tuple[Place, ...]:
    """The disks that a run writes to, with what it still needs of each.

    Raises:
        UserError: the run would be refused, told in the same line.
    """
    known = known_of(open_read_only(config))
    return _places(known, tuple(here for here, _ in forecast_rounds(known)), directory)


def _places(known: Known, rounds: tuple[RoundForecast, ...], directory: Path) -> tuple[Place, ...]:
    """The store's disk and the run folder's, which may be one."""
    config, store = known.config, known.setup.store
    sizes = policy_sizes(known.setup.student.folder, config.train.lora)
    stages = [stage for here in rounds for stage in here.stages]
    shards = sum(stage.left.bytes + RECORD_BYTES * stage.units_left for stage in stages)
    untrained = [here for here in rounds for s in here.stages if s.name == "train" and s.left.rows]
    policies = sizes.policy * len(untrained)
    steps = max((here.steps for here in untrained), default=0)
    # The one before stays until the next is whole.
    checkpoints = sizes.checkpoint * min(2, steps // config.train.checkpoint_steps)
    written = {"shards": round(shards), "policies": policies}
    if is_remote(store.root):
        local, remote = {"policies": policies}, (store.location, written)
        places = [(directory, {"checkpoints": checkpoints}), (store.local, local)]
    else:
        places, remote = [(directory, {"checkpoints": checkpoints}), (store.root, written)], None
    by_device: dict[int, Place] = {}
    for path, parts in places:
        there = existing(path)
        device = there.stat().st_dev
        before = by_device[device].parts if device in by_device else {}
        by_device[device] = Place(
            path=str(path), parts={**parts, **before}, free=shutil.disk_usage(there).free
        )
    found = tuple(by_device.values())
    return found if remote is None else (*found, Place(path=remote[0], parts=remote[1], free=None))


def _logits(known: Known) -> LogitMemory | None:
    """float32 logits of one chunk; engine vllm holds those of a forward pass."""
    teacher, shape = known.config.teacher, known.teacher
    if shape is None or teacher is None or teacher.engine == "fake":
        return None
    if teacher.engine == "vllm":
        rows = teacher.vllm.batched_tokens
        size = rows * shape.vocabulary * FLOAT32
        return LogitMemory(
            rows=rows,
            vocabulary=shape.vocabulary,
            bytes=size,
            bound=size,
            what="teacher.vllm.batched_tokens",
        )
    device = "cuda" if known.config.pools.teacher.gpus else "cpu"
    rows = rows_per_chunk(shape.vocabulary, device)
    return LogitMemory(
        rows=rows,
        vocabulary=shape.vocabulary,
        bytes=rows * shape.vocabulary * FLOAT32,
        bound=MAX_LOGITS_PER_CHUNK[device] * FLOAT32,
        what="a GPU's chunk" if device == "cuda" else "a CPU's chunk",
    )


def _break_even(known: Known, whole: Forecast, trained: list[TokenCounts]) -> BreakEven | None:
    if known.teacher is None:
        return None
    read = [counts for counts in trained if counts.tokens]
    live = sum(
        forward_flops(shape, counts) for shape in (known.student, known.teacher) for counts in read
    )
    return BreakEven(
        cache_flops=whole.total("generate", "score", "probe", "probe score").flops,
        live_flops=live,
        train_flops=sum(
            train_flops(known.student, counts, recomputed=known.config.train.gradient_checkpointing)
            for counts in read
        ),
    )


def _assumptions(known: Known, whole: Forecast) -> list[str]:
    """One line for everything that could turn out otherwise."""
    stages, config = [stage for here in whole.rounds for stage in here.stages], known.config
    lines: list[str] = []
    if guessed := _named(stages, "full window"):
        lines.append(
            f"{guessed}: no completions are measured yet, so every row is taken to fill its window"
        )
    if estimated := _named(stages, "estimated"):
        lines.append(
            f"{estimated}: what is left is estimated from the completions of the latest measured "
            "round; a longer window is taken to be filled by the rows that were cut"
        )
    if any(stage.name == "train" and stage.left.rows for stage in stages):
        lines.append(
            "training is taken to use all epochs (staleness.max_epochs "
            f"{config.staleness.max_epochs}); drift may stop it earlier"
        )
        if isinstance(config.rollouts.window, AdaptiveWindow):
            lines.append("audits decide later windows; until then the latest one is taken")
        if config.staleness.max_policies:
            lines.append("rounds that have no name yet are taken to sample all of their rollouts")
        if config.train.extrapolation is not None:
            lines.append("what extrapolation reads or samples to judge its points is not counted")
    if any(problems.source.rows is None for problems in known.opened.evaluation):
        lines.append("evaluations are not counted: the number of held-out prompts is unknown")
    return lines


def _named(stages: list[Stage], basis: str) -> str:
    """The stages whose figures rest on a basis."""
    return ", ".join(dict.fromkeys(stage.name for stage in stages if stage.basis == basis))


def _warnings(whole: Forecast) -> list[str]:
    lines = [
        f"{place.path} does not have the room: {_bytes(place.needed)} needed, "
        f"{_bytes(place.free or 0)} free; free space, set store and --run-dir to a larger disk, or "
        f"lower what makes the {max(place.parts, key=lambda name: place.parts[name])} large "
        "(docs/plan.md)"
        for place in whole.places
        if not place.fits
    ]
    if whole.logits is not None and not whole.logits.fits:
        lines.append(
            f"scoring holds {_bytes(whole.logits.bytes)} of logits, above its bound of "
            f"{_bytes(whole.logits.bound)}: the vocabulary is large for a chunk"
        )
    return lines


def _bytes(number: float) -> str:
    from rich.filesize import decimal

    return decimal(round(number))
