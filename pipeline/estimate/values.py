"""What a run costs, as values: steps, rounds, disks, memory, and when the cache pays for itself."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from stages.step import PROBE, PROBE_SCORE, StepKind

# Where the numbers of what is left come from: nothing is left; the completions measured so far;
# or there are none, and every row is taken to fill its window.
Basis = Literal["measured", "estimated", "full window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Sums that add over units and steps.

    Example:
        >>> Amount(rows=128, tokens=8_192, bytes=40_412, flops=1.1e10)
    """

    rows: float = 0.0
    tokens: float = 0.0  # completion tokens: generated, scored or trained
    bytes: float = 0.0  # of shards
    flops: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            rows=self.rows + other.rows,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            flops=self.flops + other.flops,
        )

    def as_json(self) -> dict[str, float]:
        """Whole rows, tokens and bytes, as they are counted."""
        whole = {name: round(getattr(self, name)) for name in ("rows", "tokens", "bytes")}
        return {**whole, "flops": self.flops}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """One step of one round."""

    kind: StepKind
    window_tokens: int
    prompts: int
    done: Amount
    left: Amount
    units: int  # shards, or 1 policy
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

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "stage": self.kind.name,
            "window_tokens": self.window_tokens,
            "prompts": self.prompts,
            **self.total.as_json(),
            "left": self.left.as_json(),
            "store": self.store,
            "basis": self.basis,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCost:
    """The steps of a round; number -1 is what comes before the first."""

    index: int
    window_tokens: int
    first_step: int
    optimizer_steps: int
    steps: tuple[StepCost, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "round": self.index,
            "window_tokens": self.window_tokens,
            "first_step": self.first_step,
            "steps": self.optimizer_steps,
            "stages": [step.as_json() for step in self.steps],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk, with what the run still writes to it."""

    path: str
    parts: dict[str, int]  # bytes of shards, policies, checkpoints
    free: int | None  # bytes; None: an object store, which does not say

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it has the room."""
        return self.free is None or self.needed <= self.free

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "needed": self.needed, "fits": self.fits}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitMemory:
    """The logits that exist at one time while the teacher scores."""

    rows: int
    vocabulary: int
    bytes: int
    bound: int
    what: str  # sets the bound

    @property
    def fits(self) -> bool:
        """Whether the bound is kept; a vocabulary beyond it still gets its fewest rows."""
        return self.bytes <= self.bound

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "fits": self.fits}


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """What the cache costs beside a live teacher that scores fresh rollouts at every step."""

    cache_flops: float  # generating and scoring, once
    live_flops: float  # generating and scoring what a run trains on, in every run
    train_flops: float  # of a run, and all of a replay

    @property
    def runs(self) -> float | None:
        """Runs on the cache that pay for it."""
        return self.cache_flops / self.live_flops if self.live_flops else None

    @property
    def replays(self) -> int | None:
        """Runs after the first that pay for it; 0: the first does."""
        return None if self.runs is None else max(0, -int(-self.runs // 1) - 1)

    def cache_share(self, replays: int) -> float:
        """Of all operations, those for the cache, after some replays."""
        return self.cache_flops / (self.cache_flops + (replays + 1) * self.train_flops)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        shares = {str(replays): self.cache_share(replays) for replays in (0, 1, 3, 10)}
        computed = {"runs": self.runs, "replays": self.replays, "cache_share_after_replays": shares}
        return {**asdict(self), **computed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run would do."""

    rounds: tuple[RoundCost, ...]
    disks: tuple[Disk, ...]
    logits: LogitMemory | None  # None: no teacher scores here
    break_even: BreakEven | None  # None: nothing is known of a teacher
    notes: tuple[str, ...]  # what was assumed
    warnings: tuple[str, ...]

    def total(self, *stages: str, left: bool = False, probes: bool = True) -> Amount:
        """Of the steps that some stages make, or of all; with or without the probes of audits."""
        total = Amount()
        for step in (step for each in self.rounds for step in each.steps):
            is_probe = step.kind in (PROBE, PROBE_SCORE)
            if (not stages or step.kind.stage in stages) and (probes or not is_probe):
                total += step.left if left else step.total
        return total

    @property
    def fits(self) -> bool:
        """Whether every disk has the room."""
        return all(disk.fits for disk in self.disks)

    def as_json(self) -> dict[str, Any]:
        """For programs; tokens and operations as in a run's summary."""
        return {
            "rounds": [each.as_json() for each in self.rounds],
            "total": self._sums(left=False),
            "left": self._sums(left=True),
            "disk": [disk.as_json() for disk in self.disks],
            "fits": self.fits,
            "logits": None if self.logits is None else self.logits.as_json(),
            "break_even": None if self.break_even is None else self.break_even.as_json(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def _sums(self, *, left: bool) -> dict[str, Any]:
        """Under the names of a summary; probes count as generated and scored, as they do there."""
        stages = ("generate", "score", "train", "evaluate")
        names = ("generated", "teacher_scored", "trained", "evaluated")
        amounts = {stage: self.total(stage, left=left) for stage in stages}
        cached = self.total("generate", "score", left=left, probes=False)
        return {
            "tokens": {n: round(amounts[s].tokens) for n, s in zip(names, stages, strict=True)},
            "flops": {stage: amounts[stage].flops for stage in stages},
            "cache_bytes": round(cached.bytes),
        }
