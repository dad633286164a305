"""What a stage costs: rows, tokens, bytes and operations, done and left to do."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

StageName = Literal["generate", "score", "probe", "probe score", "train", "evaluate"]
Basis = Literal["measured", "estimated", "full window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """Sums that add over units and stages.

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

    def rounded(self) -> "Amount":
        """Whole rows, tokens and bytes, as they are counted."""
        return Amount(
            rows=round(self.rows),
            tokens=round(self.tokens),
            bytes=round(self.bytes),
            flops=self.flops,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of one round.

    `basis` says where the numbers of what is left come from: `measured` where nothing is left,
    `estimated` from the completions measured so far, `full window` where there are none and every
    row is taken to fill its window.
    """

    name: StageName
    window_tokens: int
    prompts: int
    done: Amount
    left: Amount
    store: str  # what of it is there: "2 of 2 units", "1 of 1 policy"
    basis: Basis
    units_left: int = 0  # shards

    @property
    def total(self) -> Amount:
        """Done and left."""
        return self.done + self.left

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "stage": self.name,
            "window_tokens": self.window_tokens,
            "prompts": self.prompts,
            **asdict(self.total.rounded()),
            "left": asdict(self.left.rounded()),
            "store": self.store,
            "basis": self.basis,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundForecast:
    """The stages of a round; number -1 is what comes before the first."""

    index: int
    window_tokens: int
    first_step: int
    steps: int
    stages: tuple[Stage, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "round": self.index,
            "window_tokens": self.window_tokens,
            "first_step": self.first_step,
            "steps": self.steps,
            "stages": [stage.as_json() for stage in self.stages],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
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
        return {
            **asdict(self),
            "runs": self.runs,
            "replays": self.replays,
            "cache_share_after_replays": shares,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run would do."""

    rounds: tuple[RoundForecast, ...]
    places: tuple[Place, ...]
    logits: LogitMemory | None  # None: no teacher scores here
    break_even: BreakEven | None  # None: nothing is known of a teacher
    notes: tuple[str, ...]  # what was assumed
    warnings: tuple[str, ...] = field(default=())

    def total(self, *names: str, left: bool = False) -> Amount:
        """Of the stages with these names, or of all."""
        total = Amount()
        for stage in (stage for here in self.rounds for stage in here.stages):
            if not names or stage.name in names:
                total += stage.left if left else stage.total
        return total

    @property
    def fits(self) -> bool:
        """Whether every disk has the room."""
        return all(place.fits for place in self.places)

    def as_json(self) -> dict[str, Any]:
        """For programs; tokens and operations as in a run's summary."""
        return {
            "rounds": [here.as_json() for here in self.rounds],
            "total": self._sums(left=False),
            "left": self._sums(left=True),
            "disk": [place.as_json() for place in self.places],
            "fits": self.fits,
            "logits": None if self.logits is None else self.logits.as_json(),
            "break_even": None if self.break_even is None else self.break_even.as_json(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def _sums(self, *, left: bool) -> dict[str, Any]:
        """Under the names of a summary; probes count as generated and scored, as they do there."""
        generated = self.total("generate", "probe", left=left)
        scored = self.total("score", "probe score", left=left)
        trained = self.total("train", left=left)
        evaluated = self.total("evaluate", left=left)
        cached = self.total("generate", "score", left=left)
        return {
            "tokens": {
                "generated": round(generated.tokens),
                "teacher_scored": round(scored.tokens),
                "trained": round(trained.tokens),
                "evaluated": round(evaluated.tokens),
            },
            "flops": {
                "generate": generated.flops,
                "score": scored.flops,
                "train": trained.flops,
                "evaluate": evaluated.flops,
            },
            "cache_bytes": round(cached.bytes),
        }
