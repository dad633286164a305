"""How cached scores are read into weights, and for how long."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from opd_stream.section import Section


class BucketObjective(Section):
    """A divergence over the K teacher candidates and one bucket for everything else."""

    kind: Literal["bucket"]
    direction: Literal["reverse", "forward", "js"] = "reverse"
    beta: float = Field(
        default=0.5, ge=0, le=1, description="of direction js: 0 is forward, 1 is reverse"
    )
    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")


class SkewObjective(Section):
    """KL to a mixture with alpha of its own left side (DistiLLM, 2402.03898)."""

    kind: Literal["skew"]
    direction: Literal["reverse", "forward"] = "reverse"
    alpha: float = Field(default=0.1, ge=0, lt=1, description="0 is the plain KL")
    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")


class LsmObjective(Section):
    """Reverse KL with both sides renormalised over the K candidates (2603.25562)."""

    kind: Literal["lsm"]
    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")


class HybridObjective(Section):
    """The full reverse KL: the bucket, and the sampled token where the bucket is blind."""

    kind: Literal["hybrid"]
    importance_cap: float = Field(default=5.0, gt=0, description="largest p / b of that token")
    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")


class SampledPgObjective(Section):
    """Policy gradient on the sampled token, with importance weights."""

    kind: Literal["sampled_pg"]
    baseline: Literal["none", "bucket"] = Field(
        default="none", description="subtracted from the advantage; bucket: a little less variance"
    )
    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")


class MonteCarloObjective(Section):
    """Policy gradient on several draws from the student; needs rollouts.extra_draws."""

    kind: Literal["mc"]
    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")


class DrawnForwardObjective(Section):
    """Cross-entropy to ids drawn from the teacher (RS-KD); needs codec sampled."""

    kind: Literal["drawn_forward"]
    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")


class EntropyAwareObjective(Section):
    """Forward KL where the teacher is unsure: a term to add to another objective."""

    kind: Literal["entropy_aware"]
    threshold: float = Field(default=0.67, ge=0, description="teacher entropy above it, nats")
    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")


Objective = Annotated[
    BucketObjective
    | SkewObjective
    | LsmObjective
    | HybridObjective
    | SampledPgObjective
    | MonteCarloObjective
    | DrawnForwardObjective
    | EntropyAwareObjective,
    Field(discriminator="kind"),
]


class Guards(Section):
    """Protections against known failures; docs/objectives.md says which."""

    merge_terminators: bool = Field(
        default=True, description="all terminators of student and teacher are one outcome"
    )
    mask_first: tuple[str, ...] = Field(
        default=("<", "think", "<think>"),
        description="tokens whose first occurrence in a rollout does not train",
    )
    soft_clamp: float | None = Field(
        default=None,
        gt=1,
        description="largest loss of a token, in mean losses of the step before (3 is published)",
    )


class DriftGate(Section):
    """Tokens of blocks that have drifted count less (PDG)."""

    blocks: Annotated[int, Field(ge=1)] | Literal["spans"] = Field(
        default=64, description="tokens of a block, or spans: lines of the text"
    )
    tau: float = Field(default=1.0, gt=0, description="weight exp(-tau |drift|), then normalised")
    statistic: Literal["signed", "abs", "rms"] = Field(
        default="signed", description="of the drift in a block; in signed, opposite shifts cancel"
    )


class Freshness(Section):
    """Rows that are old or have drifted count less (f-OPD)."""

    alpha: float = Field(default=1.0, ge=0, description="exp(-alpha sqrt(policy_drift)) of the row")
    floor: float = Field(
        default=0.05, ge=0, lt=1, description="subtracted; rows below it have no weight"
    )


class Extrapolation(Section):
    """After steps 1, 2, 4, 8, ... jump further along the way the weights came (EffOPD)."""

    signal: Literal["kl", "reward", "both"] = Field(
        default="kl",
        description="kl: cached objective on `rows` rows; reward: judged answers to `prompts` "
        "training prompts (published); both: neither may fall",
    )
    base: Literal["accepted", "previous"] = Field(
        default="accepted",
        description="start of the direction: last accepted point, or ordinary point (paper)",
    )
    acceptance: Literal["strict", "equal"] = Field(
        default="strict", description="equal: an equal score is accepted too (paper)"
    )
    candidates: int = Field(default=5, ge=1, description="points W + 2 k (W - base), k = 1, 2, ...")
    rows: int = Field(default=64, ge=1, description="cached rows that score a point")
    prompts: int = Field(default=50, ge=1, description="training prompts that score a point")
    reset_moments: bool = Field(
        default=False, description="forget the optimizer's moments of what jumped"
    )


class Lora(Section):
    """Low-rank adapters instead of all weights (needs the extra `lora`)."""

    rank: int = Field(default=32, ge=1, description="of each adapter")
    alpha: float = Field(default=64, gt=0, description="the adapters' scale is alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the adapters' input")
    targets: str | tuple[str, ...] = Field(
        default="all-linear", description="module names, or all-linear: all but the head"
    )


def unserved_by_chunks(train: "Train") -> str | None:
    """What of a training section scores with alignment cannot serve, with the way out; or None."""
    kinds = {part.kind for part in train.objective}
    if lost := sorted(kinds & {"mc", "drawn_forward"}):
        return (
            f"objective {lost[0]} reads the teacher at ids that no text holds, which a teacher "
            "with another tokenizer cannot score; use sampled_pg, or an objective over candidates"
        )
    if any(getattr(part, "baseline", "none") != "none" for part in train.objective):
        return (
            "objective sampled_pg with baseline bucket reads candidates at every token, which a "
            "teacher with another tokenizer has at some; set baseline=none"
        )
    if "sampled_pg" in kinds and len(kinds) > 1:
        return (
            f"objectives {', '.join(sorted(kinds))} train at different tokens where the teacher "
            "has another tokenizer; use sampled_pg alone, or leave it out"
        )
    if not train.guards.merge_terminators:
        return (
            "train.guards.merge_terminators is no, but the terminators of a teacher with another "
            "tokenizer can only be one outcome; set it to yes"
        )
    return None


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


class Train(Section):
    """How the scores are read into weights."""

    objective: Annotated[
        tuple[Objective, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=Objective | tuple[Objective, ...]),
    ] = Field(description="one, or a list whose weighted sum is the loss")
    top_k: int | None = Field(
        default=None, ge=1, description="use only so many of the cached candidates; null: all"
    )
    guards: Guards = Guards()
    gate: DriftGate | None = Field(default=None, description="left out: every block counts")
    freshness: Freshness | None = Field(default=None, description="left out: every row counts")
    extrapolation: Extrapolation | None = Field(default=None, description="left out: none")
    learning_rate: float = Field(gt=0, description="peak")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="over the whole run; linear and cosine: down to 0"
    )
    warmup: float = Field(
        default=0.0, ge=0, lt=1, description="share of the run with a rising rate"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW")
    clip_norm: float = Field(default=1.0, gt=0, description="largest gradient norm")
    rows_per_step: int = Field(default=16, ge=1, description="rollouts of an optimizer step")
    precision: Literal["float32", "bf16-mixed"] = Field(
        default="float32", description="bf16-mixed: float32 weights, bfloat16 products"
    )
    lora: Lora | None = Field(default=None, description="left out: all weights are trained")
    tokens_per_microbatch: int = Field(
        default=16384, ge=1, description="tokens in memory at once, padding included"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="less memory, a second forward pass"
    )
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="beside metrics.jsonl and metrics.csv"
    )
    threads: int = Field(default=1, ge=1, description="CPU threads; more help on idle cores only")
    checkpoint_steps: int = Field(
        default=50, ge=1, description="optimizer steps between two checkpoints"
    )


class Staleness(Section):
    """When a cache has been used enough."""

    max_epochs: int = Field(default=1, ge=1, description="passes over a round's scores, at most")
    policy_drift: float = Field(default=0.1, gt=0, description="stop above; k3, nats per token")
    effective_sample_fraction: float = Field(default=0.5, gt=0, le=1, description="stop below")
    gated_from: float = Field(
        default=0.0, ge=0, description="policy_drift from which train.gate and freshness weigh"
    )
    max_policies: int = Field(
        default=0,
        ge=0,
        description="policies that a unit of rollouts may outlive its own; 0: every round samples "
        "all of its rollouts",
    )
    keep_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="keep a unit while its drift is below this share of policy_drift: with more, "
        "the next round would stop for it",
    )
    student_top_mass: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="make a kept unit again when the student puts less on the teacher's candidates",
    )
    sample_share: float = Field(
        default=0.02,
        gt=0,
        le=1,
        description="rows of a unit that measure its drift between rounds (never below 2)",
    )
