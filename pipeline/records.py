"""What a run's folder says: plan and report of each round, the summary; for writers and readers.

`config.json` and `metrics.jsonl` stand beside them; `pipeline/run_folder.py` knows
where everything lies.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from opd_stream.drift import DriftSums
from opd_stream.outcome import Coverage, EpochRecord, ExtrapolationRecord, StartDrift, WindowAudit
from opd_stream.section import Record, later
from opd_stream.store.sealed import Sealed
from opd_stream.tasks.distance import TextDistance

Origin = Literal["fresh", "ahead", "extended", "kept", "replayed", "given"]


class CacheRecord(Record):
    """Units of one scores artifact that a round trains on."""

    rollouts: str  # fingerprint
    scores: str  # fingerprint
    origin: Origin
    policy_version: int  # of the oldest tokens in it
    window_tokens: int | None  # of its rollouts; None of imported rows
    units: tuple[int, ...] | None  # None: all
    teacher: str | None = later(default=None)  # its name, of several
    weight: float = later(default=1.0)  # of its terms in the loss


class MadeBy(Sealed):
    """Who made a run, and with what: `run.json`."""

    id: str
    python: str | None = None
    versions: dict[str, str] = Field(default={})
    started: str | None = None  # date and time, UTC
    host: str | None = None
    commit: str | None = None  # of the checkout of opd-stream; with -dirty where it was changed


class UnitDecisionRecord(Record):
    """What was decided about a unit of the round before, with all it was decided by."""

    first: int  # prompts of the round whose place the unit has
    last: int  # exclusive
    floor: float
    distance: float = 0.0  # KL(behavior || teacher) of the round before, nats per token
    drift: DriftSums
    student_top_mass: float
    policies: int
    window_tokens: int
    unfinished: int
    action: Literal["train", "gated", "extend", "regenerate", "retire"]
    reason: str
    is_gated: bool = later(default=False)  # kept on condition that drift weighs its tokens


class RoundPlanRecord(Sealed):
    """A round before it runs: `plan.json`."""

    NAMED_BY: ClassVar[int] = 3  # rounds/NUMBER/FILE

    format_version: Literal[1] = 1
    round_index: int
    first_step: int
    planned_steps: int
    window_tokens: int
    caches: tuple[CacheRecord, ...]
    unit_decisions: tuple[UnitDecisionRecord, ...] = ()
    policy: str  # fingerprint


class PolicyRecord(Record):
    """A policy of a run; version 0 is the initial student, R + 1 the policy after round R."""

    version: int
    fingerprint: str
    weights_sha256: str


class RoundPolicy(PolicyRecord):
    """The policy that a round made."""

    folder: str


class Passes(Record):
    """pass@k and avg@n by name, with intervals; in JSON each is a field of its own."""

    passes: dict[str, float] = Field(default={})
    intervals: dict[str, tuple[float, float]] = Field(default={})
    standard_error: float | None = None
    problems: int | None = None
    samples: int | None = None  # of a problem; None: several benchmarks

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "passes" in value:
            return value
        return {**value, "passes": {k: v for k, v in value.items() if "@" in k}}

    @model_serializer(mode="wrap")
    def _spread(self, dump: Any) -> dict[str, Any]:
        value = dump(self)
        return {**value.pop("passes"), **value}

    @property
    def pass_at_1(self) -> float | None:
        """Mean share of right samples; None: nothing was judged."""
        return self.passes.get("pass@1")


class BenchmarkRecord(Passes):
    """One set of problems of an evaluation."""

    mean_tokens: float | None = None  # of an answer
    cut: int | None = None  # answers that the length limit ended; None: an older report
    artifact: str | None = None  # name in the store
    left_out: int = 0  # problems without a reference that the judge can read


class DistanceRecord(Record):
    """How far a policy is from the teacher on one set of held-out prompts."""

    texts: dict[str, TextDistance]
    prompts: int
    samples: int  # of a prompt
    artifact: str  # name in the store


class Answers(Passes):
    """Sampled answers of one policy on every benchmark."""

    benchmarks: dict[str, BenchmarkRecord] = Field(default={})
    distances: dict[str, DistanceRecord] = later(default={})


class EvaluationRecord(Answers):
    """The same, with what it cost."""

    seconds: float = 0.0  # of what this run sampled


class SummaryEvaluation(Answers):
    """The same in a summary."""

    round: int  # the policy's version
    policy_version: int | None = None


class EvaluationFile(Answers, Sealed):
    """A policy's evaluation as `evaluate --out` writes it and `compare` reads it."""

    NAMED_BY: ClassVar[int] = 0

    policy: str  # folder
    fingerprint: str
    store: str


class StageNumbers(Record):
    """A number of each stage, such as seconds."""

    generate: float = 0.0
    score: float = 0.0
    train: float = 0.0


class RunSeconds(StageNumbers):
    """Seconds of a run by stage, and of its calls."""

    evaluate: float = 0.0
    wall: float | None = None  # of all calls of `run`
    other: float | None = None  # of these, when no stage was at work

    @model_serializer(mode="wrap")
    def _without_calls(self, dump: Any) -> dict[str, Any]:
        """Where there was no call of `run`, nothing is said of calls."""
        return {name: value for name, value in dump(self).items() if value is not None}


class TokenNumbers(Record):
    """Completion tokens."""

    generated: int = 0
    teacher_scored: int = 0
    trained: int = 0


class RoundTokens(TokenNumbers):
    """Completion tokens of a round."""

    probed: int = 0  # of those that were scored, for audits


class ReusedUnits(Record):
    """Units that were made by other runs."""

    rollout_units: int = 0
    score_units: int = 0


class RoundReuse(ReusedUnits):
    """What of a round was made by other runs."""

    policy: bool = False


class AlignmentShares(Record):
    """Of a teacher with another tokenizer: shares of the student's tokens."""

    aligned_share: float  # one token on both sides
    chunk_share: float  # in a chunk that trains


class TeacherFigures(Record):
    """What one of several teachers did in a round."""

    teacher_scored: int = 0  # completion tokens, by this run
    rows: int = 0  # that train on its scores
    tokens: int = 0  # completion tokens that it scored, by any run
    reverse_kl: float | None = None  # of the student's rollouts, nats a token, by drawn tokens


class TeacherSummary(Record):
    """The same of all rounds."""

    teacher_scored: int = 0
    rows: int = 0
    reverse_kl: tuple[float | None, ...] = ()  # of each round


class RoundReport(Sealed):
    """What a round did: `report.json`."""

    NAMED_BY: ClassVar[int] = 3

    format_version: Literal[1] = 1
    round: int
    window_tokens: int
    first_step: int
    steps: int
    rows: int
    tokens: RoundTokens
    refused_rows: int = 0
    dropped_rows: dict[str, int] = later(default={})  # by rollouts.keep: reason -> rows
    length_share: float
    terminator_rate: float
    repeat_ratio: float
    alignment: AlignmentShares | None = None
    cache_bytes: int
    flops: StageNumbers
    unknown_costs: tuple[str, ...] = ()  # a line for each model whose operations are left out
    seconds: StageNumbers
    cpu_seconds: StageNumbers
    audit_cpu_seconds: float = 0.0
    reused: RoundReuse
    processes: int = 1
    extrapolations: tuple[ExtrapolationRecord, ...] = ()
    held_out_rows: int = later(default=0)  # of the rows, those that scored them and did not train
    window_decision: WindowAudit | None = None  # the last of its audits, for the next round
    window_audits: tuple[WindowAudit, ...] = later(default=())  # within the round
    decision_age: int | None = later(default=None)  # of a step's window, in steps, at most
    trained_share: float | None = None  # of the cached completion tokens
    cut_share: float = 0.0  # of them, behind the training window
    sampler_gap: float | None = None
    drift_floor: float | None = None
    start_drift: float
    start: StartDrift | None = None  # all that was measured before training
    coverage: Coverage | None = None  # what the cached candidates hold and see
    teachers: dict[str, TeacherFigures] = later(default={})  # of several, by name
    unit_decisions: tuple[UnitDecisionRecord, ...] = ()
    policy_drift: float
    effective_sample_fraction: float
    epochs: tuple[EpochRecord, ...]
    decision: str
    policy: RoundPolicy
    caches: tuple[CacheRecord, ...]
    evaluation: EvaluationRecord | None = None


class RunSummary(Sealed):
    """The whole run so far: `summary.json`."""

    format_version: Literal[1] = 1
    finished: bool
    rounds: int
    rounds_planned: int
    evaluations: tuple[SummaryEvaluation, ...] = ()
    tokens: TokenNumbers = TokenNumbers()
    flops: StageNumbers = StageNumbers()
    unknown_costs: tuple[str, ...] = ()
    seconds: RunSeconds = RunSeconds()
    cpu_seconds: StageNumbers = StageNumbers()
    reused: ReusedUnits = ReusedUnits()
    policies: tuple[PolicyRecord, ...]
    final_policy: str | None = None
    caches: tuple[tuple[CacheRecord, ...], ...] = ()
    steps: int = 0
    refused_rows: int = 0
    dropped_rows: dict[str, int] = later(default={})
    teachers: dict[str, TeacherSummary] = later(default={})
    cache_bytes: int = 0
    decisions: tuple[str, ...] = ()
