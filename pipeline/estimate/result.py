"""What a run costs, as values for programs (`as_json`) and as a table for people."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, computed_field, model_serializer
from rich.console import Console
from rich.filesize import decimal

from opd_stream.section import Record
from pipeline.console import print_lines
from pipeline.estimate.memory import TrainingMemory
from pipeline.tables import result_table
from stages.step import PROBE, PROBE_SCORE, StepKind

# Where the numbers of what is left come from: nothing is left; the completions measured so far;
# or there are none, and every row is taken to fill its window.
Basis = Literal["measured", "estimated", "full window"]
Whole = Annotated[float, PlainSerializer(round, return_type=int)]
STAGES = {
    "generate": "generated",
    "score": "teacher_scored",
    "train": "trained",
    "evaluate": "evaluated",
}
COLUMNS = (
    *("round", "stage", "window", "prompts", "rows", "tokens", "cache", "FLOPs", "in the store"),
    *("left\ntokens", "\nFLOPs", "basis"),
)


DROPS = ("basis", "rows", "\nFLOPs", "window", "left\ntokens", "cache", "prompts", "in the store")


class Amount(Record):
    """Sums that add over units and steps.

    Example:
        >>> Amount(rows=128, tokens=8_192, bytes=40_412, flops=1.1e10)
    """

    rows: Whole = 0.0
    tokens: Whole = 0.0  # completion tokens: generated, scored or trained
    bytes: Whole = 0.0  # of shards
    flops: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            rows=self.rows + other.rows,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            flops=self.flops + other.flops,
        )


class StepCost(Record):
    """One step of one round."""

    kind: StepKind
    teacher: str | None = None  # who scores, of several
    window_tokens: int
    prompts: int
    done: Amount = Amount()
    left: Amount = Amount()
    units: int = 1  # shards, or 1 policy
    units_left: int
    basis: Basis

    @property
    def total(self) -> Amount:
        """Done and left."""
        return self.done + self.left

    @property
    def store(self) -> str:
        """What of it is in the store."""
        what = "policy" if self.kind.stage == "train" else "units"
        return f"{self.units - self.units_left} of {self.units} {what}"

    @model_serializer
    def _json(self) -> dict[str, Any]:
        return {
            "stage": self.kind.name,
            **({} if self.teacher is None else {"teacher": self.teacher}),
            "window_tokens": self.window_tokens,
            "prompts": self.prompts,
            **self.total.as_json(),
            "left": self.left.as_json(),
            "store": self.store,
            "basis": self.basis,
        }


class RoundCost(Record):
    """The steps of a round; number -1 is what comes before the first."""

    index: int = Field(serialization_alias="round")
    window_tokens: int
    first_step: int = 0
    optimizer_steps: int = Field(default=0, serialization_alias="steps")
    steps: tuple[StepCost, ...] = Field(serialization_alias="stages")


class Disk(Record):
    """A disk, with what the run still writes to it."""

    path: str
    parts: dict[str, int]  # bytes of shards, policies, checkpoints
    free: int | None  # bytes; None: an object store, which does not say

    @computed_field
    @property
    def needed(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @computed_field
    @property
    def fits(self) -> bool:
        """Whether it has the room."""
        return self.free is None or self.needed <= self.free


class LogitMemory(Record):
    """The logits that exist at one time while the teacher scores."""

    rows: int
    vocabulary: int
    bytes: int
    bound: int
    what: str  # sets the bound

    @computed_field
    @property
    def fits(self) -> bool:
        """Whether the bound is kept; a vocabulary beyond it still gets its fewest rows."""
        return self.bytes <= self.bound


class BreakEven(Record):
    """What the cache costs beside a live teacher that scores fresh rollouts at every step."""

    cache_flops: float  # generating and scoring, once
    live_flops: float  # generating and scoring what a run trains on, in every run
    train_flops: float  # of a run, and all of a replay

    @computed_field
    @property
    def runs(self) -> float | None:
        """Runs on the cache that pay for it."""
        return self.cache_flops / self.live_flops if self.live_flops else None

    @computed_field
    @property
    def replays(self) -> int | None:
        """Runs after the first that pay for it; 0: the first does."""
        return None if self.runs is None else max(0, -int(-self.runs // 1) - 1)

    @computed_field
    @property
    def cache_share_after_replays(self) -> dict[str, float]:
        """Of all operations, those for the cache."""
        cache, train = self.cache_flops, self.train_flops
        return {str(replays): cache / (cache + (replays + 1) * train) for replays in (0, 1, 3, 10)}


class Estimate(Record):
    """What a run would do."""

    rounds: tuple[RoundCost, ...]
    disk: tuple[Disk, ...]
    logits: LogitMemory | None  # None: no teacher scores here
    training: TrainingMemory | None  # None: the student's files do not say enough
    break_even: BreakEven | None  # None: nothing is known of a teacher
    notes: tuple[str, ...]  # what was assumed
    warnings: tuple[str, ...]

    def sum(self, *stages: str, left: bool = False, probes: bool = True) -> Amount:
        """Of the steps that some stages make, or of all; with or without the probes of audits."""
        total = Amount()
        for step in (step for each in self.rounds for step in each.steps):
            is_probe = step.kind in (PROBE, PROBE_SCORE)
            if (not stages or step.kind.stage in stages) and (probes or not is_probe):
                total += step.left if left else step.total
        return total

    @computed_field
    @property
    def total(self) -> dict[str, Any]:
        """Done and left, under the names of a run's summary."""
        return self._sums(left=False)

    @computed_field
    @property
    def left(self) -> dict[str, Any]:
        """The same of what is left."""
        return self._sums(left=True)

    @computed_field
    @property
    def fits(self) -> bool:
        """Whether every disk has the room."""
        return all(disk.fits for disk in self.disk)

    def _sums(self, *, left: bool) -> dict[str, Any]:
        """Probes count as generated and scored, as they do in a summary."""
        amounts = {stage: self.sum(stage, left=left) for stage in STAGES}
        cached = self.sum("generate", "score", left=left, probes=False)
        return {
            "tokens": {name: round(amounts[stage].tokens) for stage, name in STAGES.items()},
            "flops": {stage: amount.flops for stage, amount in amounts.items()},
            "cache_bytes": round(cached.bytes),
        }


ROUNDS_SHOWN = 100  # the latest ones, of a run that has more


def print_plan(found: Estimate, *, console: Console) -> None:
    """Print rounds, totals, disks, memory, break-even, assumptions and warnings."""
    table = result_table(COLUMNS, left=("stage", "in the store", "basis"), drops=DROPS)
    hidden = len(found.rounds) - ROUNDS_SHOWN
    for each in found.rounds[max(0, hidden) :]:
        label = "start" if each.index < 0 else str(each.index)
        for step in each.steps:
            size = round(step.total.bytes)
            table.add_row(
                label,
                step.kind.name if step.teacher is None else f"{step.kind.name} {step.teacher}",
                str(step.window_tokens),
                f"{step.prompts:,}",
                f"{round(step.total.rows):,}",
                f"{round(step.total.tokens):,}",
                decimal(size) if size else "",
                flops_text(step.total.flops),
                step.store,
                f"{round(step.left.tokens):,}",
                flops_text(step.left.flops),
                step.basis,
            )
            label = ""
    table.add_section()
    total, left = found.sum(), found.sum(left=True)
    sums = [decimal(round(total.bytes)), flops_text(total.flops), "", "", flops_text(left.flops)]
    table.add_row("all", *[""] * 5, *sums, "")
    console.print(table)
    if hidden > 0:
        console.print(f"the {hidden} earliest rounds are in the sums and not shown; --json has all")
    print_lines(console, _lines(found))


def _lines(found: Estimate) -> Iterator[str]:
    """What stands below the table."""
    yield f"teacher-scored tokens: {round(found.sum('score', left=True).tokens):,} to come"
    for disk in found.disk:
        parts = ", ".join(f"{name} {decimal(size)}" for name, size in disk.parts.items() if size)
        what = f"{decimal(disk.needed)} more" + (f" ({parts})" if parts else "")
        free = "its free space is not known here"
        if disk.free is not None:
            free = f"{decimal(disk.free)} free"
        yield f"disk: {what} in {disk.path}, {free}"
    if (logits := found.logits) is not None:
        yield (
            f"logits while scoring: {logits.rows:,} rows of {logits.vocabulary:,} at a time, "
            f"{decimal(logits.bytes)} (bound {decimal(logits.bound)}, {logits.what})"
        )
    if (training := found.training) is not None:
        parts = ", ".join(
            f"{name} {decimal(size)}" for name, size in training.parts.items() if size
        )
        yield (
            f"memory of training on a CPU: {decimal(training.bytes)} at the peak, micro-batches of "
            f"{training.tokens:,} tokens ({parts}; of gradients and activations the larger)"
        )
    cost = found.break_even
    if cost is not None and cost.runs is not None:
        when = "the first run pays for it"
        if cost.replays:
            when = f"it is paid for after {cost.replays} replays"
        yield (
            f"break-even: the cache costs {flops_text(cost.cache_flops)} FLOPs to generate and "
            f"score; a live teacher beside every step would cost {flops_text(cost.live_flops)} a "
            f"run, so {when} ({cost.runs:.2f} runs)"
        )
        shares = cost.cache_share_after_replays.items()
        after = ", ".join(f"{share:.0%} after {replays}" for replays, share in shares)
        yield f"of all FLOPs the cache is {after} replays"
    yield from (f"note: {note}" for note in found.notes)
    yield from (f"warning: {warning}" for warning in found.warnings)


def flops_text(flops: float) -> str:
    """Operations with three figures, such as 1.53e+12."""
    return f"{flops:.2e}" if flops else "0"
