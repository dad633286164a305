"""What a training stage did, as its policy's manifest says it.

Everything that a later round, a report or an estimate asks about a finished round's training is in
`TrainOutcome`; it needs no torch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from opd_stream.drift import DriftSums
from opd_stream.errors import UserError
from opd_stream.section import Record, later, read_record
from opd_stream.windows import WindowDecision

EpochAction = Literal["train", "gated", "stop", "regenerate"]


class TrainedCounts(Record):
    """What training read, each token as often as it was read; operations follow from it."""

    tokens: float  # of completions, as far as they train
    row_tokens: float  # of prompts and completions
    row_pairs: float  # attended pairs of tokens


class PositionMeans(Record):
    """Means over the tokens between one place of a completion and the next bin's first."""

    first: int
    tokens: int
    reverse_kl: float | None = None
    policy_drift: float | None = None
    teacher_entropy: float | None = None  # nats


class EpochRecord(Record):
    """An epoch over a round's cache: means over its tokens, and what was decided after it."""

    epoch: int
    action: EpochAction
    reason: str
    loss: float
    policy_drift: float  # k3, nats per token
    effective_sample_fraction: float
    reverse_kl: float | None = None
    student_top_mass: float | None = None
    teacher_top_mass: float | None = None
    student_entropy: float | None = None
    teacher_entropy: float | None = None
    capped_importance: float | None = None
    block_drift: float | None = None
    seen_kl: float | None = None  # reverse KL over the candidates and one outcome for the rest
    unseen_kl: float | None = None  # estimate of what is missing to the full one
    absolute_reverse_kl_p50: float | None = None
    absolute_reverse_kl_p90: float | None = None
    absolute_reverse_kl_p99: float | None = None
    overlap: float | None = None
    mean_drift_weight: float | None = None
    drift_weight_spread: float | None = None
    least_drift_weight: float | None = None
    greatest_drift_weight: float | None = None
    mean_d: float | None = None
    mean_absolute_d: float | None = None
    rms_d: float | None = None
    given_loss: float | None = later(default=None)  # of rows that are not the student's
    by_position: tuple[PositionMeans, ...] = ()


class Coverage(Record):
    """What the cached candidates hold and see, on some rows before anything trained on them."""

    tokens: int
    student_mass: float  # on the candidates
    teacher_mass: float
    reverse_kl: float | None = None  # estimate of the full one, nats a token
    share: float | None = None  # of it, seen by the candidates; None: cannot be estimated
    error: float | None = None  # standard error of the share over rows


class StartDrift(Record):
    """Drift of a sample of the rows before anything trained on them."""

    tokens: int
    policy_drift: float
    sampler_gap: float | None  # mean |d| of fresh rows; None: none was fresh
    floor: float | None  # policy_drift of the latest rows that were fresh; None: none ever was
    floor_error: float | None = None  # its standard error over rows
    mean_d: float = 0.0
    distance: float = 0.0  # KL(behavior || teacher) of the rows, nats per token
    distance_error: float = 0.0
    coverage: Coverage | None = None  # None: not of ranked candidates


class UnitRecord(Record):
    """A unit that was trained on, as the next round decides about it."""

    rollouts: str  # fingerprint
    scores: str  # fingerprint
    policy_version: int  # of its oldest tokens
    made_in: int  # the round that made the artifact
    unit: int
    first: int  # prompts of the round whose place it takes
    last: int  # exclusive
    drift: DriftSums  # of a sample of its rows, under the trained weights
    student_top_mass: float
    unfinished: int | None = None  # rows that the window cut; None: its commit record says it


class PointScore(Record):
    """The score of a point of an extrapolation; None: not asked for, or not finite."""

    reward: float | None = None
    kl: float | None = None
    policy_drift: float | None = later(default=None)


class ExtrapolationRecord(Record):
    """A search along the way the weights came."""

    step: int
    scores: tuple[PointScore, ...] = ()  # of k = 0, 1, ...
    kept: int  # k of the point that was kept; 0: none
    policy_drift: float | None = None
    length_shares: tuple[float, float] | None = later(default=None)  # cut answers, before and after
    undone: int = later(default=0)  # k of the point that made answers longer


class WindowAudit(WindowDecision):
    """The same, decided on probes, with what the audit cost."""

    probe_rows: int
    steps: int = 0  # of the round, before it
    layers: int | None = None  # the last ones; None: all parameters
    layer_gap: float | None = None  # of cosines to all parameters', at the run's first audit
    seconds: float
    cpu_seconds: float


class LevelRate(Record):
    """How often the student answered prompts of a level right (rollouts.select)."""

    level: str
    right: int
    judged: int

    @property
    def rate(self) -> float:
        """Share of right rollouts among those that were judged."""
        return self.right / self.judged


class TrainOutcome(Record):
    """What a training stage did."""

    steps: int
    rows: int
    trained: TrainedCounts
    cached_tokens: int | None = None  # completion tokens of all rows, each once
    cut_tokens: int = 0  # of these, behind the training window
    epochs: tuple[EpochRecord, ...]
    start: StartDrift
    units: tuple[UnitRecord, ...] = ()  # where units may outlive their policy
    extrapolations: tuple[ExtrapolationRecord, ...] = ()
    held_out_rows: int = later(default=0)  # of the rows, those that scored them and did not train
    window_decision: WindowAudit | None = None  # the round's last, for the next one
    window_audits: tuple[WindowAudit, ...] = later(default=())  # all of them, within the round
    decision_age: int | None = later(default=None)  # of a step's window, in steps, at most
    levels: tuple[LevelRate, ...] = later(default=())  # that decide the next round's prompts
    processes: int
    gradient_checkpointing: bool = False  # each forward pass was done twice
    made_by: str  # id of the run
    seconds: float
    cpu_seconds: float

    @property
    def trained_share(self) -> float | None:
        """Share of the cached completion tokens that trained at all; None: not recorded."""
        if not self.cached_tokens:
            return None
        return sum(place.tokens for place in self.epochs[0].by_position) / self.cached_tokens

    @property
    def floor(self) -> float:
        """Drift below this is the difference between engine and trainer."""
        return self.start.floor or 0.0


class StepMetrics(Record):
    """An optimizer step as a line of metrics.jsonl has it; all its other numbers are kept."""

    model_config = ConfigDict(extra="allow")

    round: int
    epoch: int = 0
    step: int
    policy_drift: float | None = None
    effective_sample_fraction: float | None = None
    mean_drift_weight: float | None = None


def read_metrics(path: Path, *, backwards: bool = False) -> Iterator[tuple[str, StepMetrics]]:
    """The whole lines of a metrics.jsonl, and what they say; one still being written is left out.

    Raises:
        UserError: a line is damaged (says which).
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    numbered = list(enumerate(lines, start=1))
    for number, line in reversed(numbered) if backwards else numbered:
        if line.endswith(b"\n"):
            where = f"line {number} of {path}"
            try:
                value: Any = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{where} is not valid JSON ({error}); expected what opd-stream writes; delete "
                    "the file: the run writes the lines of its finished rounds again"
                ) from error
            yield line.decode(), read_record(StepMetrics, value, where)
