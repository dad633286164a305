"""What the student writes and what is cached of the teacher."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from opd_stream.engines.vllm_engine import VllmOptions
from opd_stream.section import Section
from opd_stream.store.codecs import Codec, ExactCodec


class Model(Section):
    """A checkpoint in a role, and the engine that runs it."""

    path: Path = Field(description="Hugging Face folder: config.json, safetensors, tokenizer")
    engine: Literal["transformers", "vllm", "fake"] = Field(
        default="transformers", description="what runs it"
    )
    vllm: VllmOptions = Field(default=VllmOptions(), description="settings of engine vllm")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the engine"
    )
    batch_rows: int = Field(
        default=64, ge=1, description="rows the engine runs at once; placement only"
    )


class Student(Model):
    """The checkpoint that is trained."""

    taught_by: Path | None = Field(
        default=None,
        description="checkpoint that wrote the student's fine-tuning data; offline distillation "
        "from another teacher is biased, so a run of one round asks",
    )


class FixedWindowConfig(Section):
    """The same window in every round (ESR, 2605.27028)."""

    kind: Literal["fixed"]
    tokens: int = Field(ge=1, description="new tokens per rollout")


class RatioWindowConfig(Section):
    """A share of the longest rollout (TOPD, 2605.31490)."""

    kind: Literal["ratio"]
    ratio: float = Field(gt=0, le=1, description="share of max_window_tokens")
    max_window_tokens: int = Field(ge=1, description="new tokens of a full rollout")


class LinearWindowConfig(Section):
    """A window that grows with optimizer steps (POPD, 2605.31490)."""

    kind: Literal["linear"]
    h0: int = Field(ge=1, description="new tokens at step 0")
    delta: int = Field(ge=0, description="new tokens added every `every` steps")
    every: int = Field(default=1, ge=1, description="optimizer steps between two additions")
    max_window_tokens: int = Field(ge=1, description="new tokens of a full rollout")


class AdaptiveWindowConfig(Section):
    """Decided each round by an audit on full-length probes (ADWIN)."""

    kind: Literal["adaptive"]
    candidates: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(64, 128, 256, 512, 1024, 2048), min_length=1, description="windows, ascending"
    )
    max_window_tokens: int = Field(ge=2, description="new tokens of a full rollout, and of a probe")
    start: int | None = Field(
        default=None, ge=1, description="window of the first round; null: the last candidate"
    )
    threshold: float = Field(
        default=2**-0.5, gt=0, le=1, description="cosine from which a prefix stands for the whole"
    )
    probe_rows: int = Field(default=64, ge=1, description="unfinished rollouts continued, at most")
    probe_share: float = Field(
        default=0.05, gt=0, le=1, description="of a round's rollouts, at most (never below 2 rows)"
    )
    every_rounds: int = Field(default=1, ge=1, description="rounds from one audit to the next")
    objective: Literal["sampled", "trained"] = Field(
        default="sampled",
        description="whose gradients are compared: that of the drawn tokens, or train.objective",
    )
    metric: Literal["identity", "adam"] = Field(
        default="identity", description="of the cosine; adam: divided by root second moments"
    )
    layers: int = Field(default=2, ge=1, description="last layers whose gradients are compared")
    hysteresis: bool = Field(default=False, description="move one candidate a round at most")
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of the cosines of the audit before"
    )


Window = Annotated[
    FixedWindowConfig | RatioWindowConfig | LinearWindowConfig | AdaptiveWindowConfig,
    Field(discriminator="kind"),
]


class Rollouts(Section):
    """How the student writes."""

    prompts_per_round: int = Field(
        ge=1,
        description="prompts of a round; rounds take consecutive slices of a permutation of all "
        "prompts, a new one for each pass, and the remainder of a pass is left out",
    )
    samples_per_prompt: int = Field(default=1, ge=1, description="rollouts of one prompt")
    temperature: float = Field(
        default=1.0, ge=0, description="1 keeps the objectives' gradients exact"
    )
    extra_draws: int = Field(
        default=0,
        ge=0,
        le=63,
        description="further ids drawn at each position, for objective mc",
    )
    window: Window
    ahead: bool = Field(
        default=False,
        description="sample and score the next round's rollouts while a round trains, by the "
        "policy it starts from, where the round before stayed within staleness.policy_drift",
    )


class Alignment(Section):
    """A teacher with another tokenizer: scores of stretches of bytes (docs/alignment.md)."""

    kind: Literal["bytes"] = Field(description="chunks end where both tokenizations end")
    max_chunk_tokens: int = Field(
        default=6, ge=1, description="tokens of the student; longer chunks do not train"
    )


class Scores(Section):
    """What of the teacher is cached, per completion token."""

    top_k: int = Field(
        default=32, ge=1, le=1024, description="teacher candidates, most probable first"
    )
    codec: Codec = Field(default=ExactCodec(), description="how it is stored")
    forced_tokens: tuple[str, ...] = Field(
        default=(),
        description="tokens whose log-probability is always cached, beside the terminators",
    )
    alignment: Alignment | None = Field(
        default=None,
        description="for a teacher with another tokenizer; null: such a teacher is refused",
    )
