"""One YAML file is one run: every field, its unit and its effect.

A path written in a config file is relative to that file; a path given on the command line, and the
default store and run folder, are relative to where the command is called. Unknown keys are refused.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the config: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RawTemplate(Section):
    """The prompt text as it is, with a beginning-of-text token where the tokenizer has one."""

    kind: Literal["raw"] = "raw"
    text: str = Field(
        default="{prompt}", description="text around the prompt; {prompt} is replaced"
    )


class ChatTemplate(Section):
    """The tokenizer's own chat template, with the prompt as the user's turn."""

    kind: Literal["chat"] = "chat"
    text: str = Field(
        default="{prompt}", description="text of the user's turn; {prompt} is replaced"
    )
    system: str | None = Field(default=None, description="text of a system turn before it")


Template = Annotated[RawTemplate | ChatTemplate, Field(discriminator="kind")]


class LedgerPrompts(Section):
    """The embedded task: generated problems with answers a program can check."""

    kind: Literal["ledger"]
    count: int = Field(ge=1, description="number of problems")
    seed: int = Field(description="seed of the problems; keep training and evaluation apart")
    template: Template = RawTemplate(text="{prompt}\n")
    max_prompt_tokens: int = Field(default=512, ge=1, description="a longer prompt is refused")


class JsonlPrompts(Section):
    """One JSON object a line, plain or .zst."""

    kind: Literal["jsonl"]
    path: Path = Field(description="file to read")
    prompt_field: str = Field(default="prompt", description="field that holds the prompt text")
    answer_field: str | None = Field(
        default=None, description="field that holds the reference answer"
    )
    id_field: str | None = Field(
        default=None, description="field that identifies a prompt; default: line"
    )
    limit: int | None = Field(default=None, ge=1, description="read only the first lines")
    template: Template = RawTemplate()
    max_prompt_tokens: int = Field(default=1024, ge=1, description="tokens a prompt may have")
    long_prompts: Literal["refuse", "skip"] = Field(
        default="refuse", description="what to do with more"
    )


class DatasetPrompts(Section):
    """A Hugging Face dataset: a hub name, a saved folder, or a builder with local files."""

    kind: Literal["datasets"]
    path: str = Field(description="hub name, save_to_disk folder, or builder (json, parquet, ...)")
    name: str | None = Field(default=None, description="configuration of the dataset")
    data_files: Path | None = Field(default=None, description="local file for a builder")
    split: str = Field(default="train", description="split to read")
    prompt_field: str = Field(default="prompt", description="column that holds the prompt text")
    answer_field: str | None = Field(
        default=None, description="column that holds the reference answer"
    )
    id_field: str | None = Field(
        default=None, description="column that identifies a prompt; default: row"
    )
    limit: int | None = Field(default=None, ge=1, description="read only the first rows")
    template: Template = RawTemplate()
    max_prompt_tokens: int = Field(default=1024, ge=1, description="tokens a prompt may have")
    long_prompts: Literal["refuse", "skip"] = Field(
        default="refuse", description="what to do with more"
    )


Prompts = Annotated[LedgerPrompts | JsonlPrompts | DatasetPrompts, Field(discriminator="kind")]


class Model(Section):
    """A checkpoint in a role, and the engine that runs it."""

    path: Path = Field(description="Hugging Face folder: config.json, safetensors, tokenizer")
    engine: Literal["transformers", "fake"] = Field(
        default="transformers", description="what runs it"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the engine"
    )
    batch_rows: int = Field(
        default=64, ge=1, description="rows the engine runs at once; placement only"
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


Window = Annotated[
    FixedWindowConfig | RatioWindowConfig | LinearWindowConfig, Field(discriminator="kind")
]


class Rollouts(Section):
    """How the student writes."""

    prompts_per_round: int = Field(ge=1, description="prompts drawn for a round")
    samples_per_prompt: int = Field(default=1, ge=1, description="rollouts of one prompt")
    temperature: float = Field(
        default=1.0, ge=0, description="1 keeps the objectives' gradients exact"
    )
    window: Window


class ExactCodecConfig(Section):
    """Ids as they are, log-probabilities rounded to a floating-point type."""

    kind: Literal["exact"] = "exact"
    dtype: Literal["float16", "float32"] = Field(default="float16", description="as stored")


class CompactCodecConfig(Section):
    """Quantised log-probabilities, packed ids, as many candidates as hold the mass."""

    kind: Literal["compact"]
    max_error: float = Field(
        default=1 / 32, gt=0, le=1, description="of a stored log-probability, nats"
    )
    mass: float | None = Field(
        default=None, gt=0, le=1, description="stop at this retained mass; null: always top_k"
    )
    min_k: int = Field(default=1, ge=1, description="candidates kept whatever the mass")


class SampledCodecConfig(Section):
    """Ids drawn from the teacher with replacement, and their counts (RS-KD)."""

    kind: Literal["sampled"]
    draws: int = Field(default=50, ge=1, le=1024, description="draws per completion token")


Codec = Annotated[
    ExactCodecConfig | CompactCodecConfig | SampledCodecConfig, Field(discriminator="kind")
]


class Scores(Section):
    """What of the teacher is cached, per completion token."""

    top_k: int = Field(
        default=32, ge=1, le=1024, description="teacher candidates, most probable first"
    )
    codec: Codec = Field(default=ExactCodecConfig(), description="how it is stored")
    forced_tokens: tuple[str, ...] = Field(
        default=(),
        description="tokens whose log-probability is always cached, beside the terminators",
    )


class BucketObjective(Section):
    """KL over the K teacher candidates and one bucket for everything else."""

    kind: Literal["bucket"]
    direction: Literal["reverse", "forward"] = "reverse"


class LsmObjective(Section):
    """Reverse KL with both sides renormalised over the K candidates (2603.25562)."""

    kind: Literal["lsm"]


class DrawnForwardObjective(Section):
    """Cross-entropy to ids drawn from the teacher (RS-KD); needs codec sampled."""

    kind: Literal["drawn_forward"]


class SampledPgObjective(Section):
    """Policy gradient on the sampled token, with importance weights."""

    kind: Literal["sampled_pg"]


Objective = Annotated[
    BucketObjective | LsmObjective | SampledPgObjective | DrawnForwardObjective,
    Field(discriminator="kind"),
]


class Train(Section):
    """How the scores are read into weights."""

    objective: Objective
    learning_rate: float = Field(gt=0, description="peak")
    schedule: Literal["constant", "linear"] = Field(
        default="constant", description="linear: down to 0"
    )
    warmup: float = Field(
        default=0.0, ge=0, lt=1, description="share of the run with a rising rate"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW")
    clip_norm: float = Field(default=1.0, gt=0, description="largest gradient norm")
    rows_per_step: int = Field(default=16, ge=1, description="rollouts of an optimizer step")
    rows_per_microbatch: int = Field(default=16, ge=1, description="rollouts in memory at once")
    threads: int = Field(default=1, ge=1, description="CPU threads; more help on idle cores only")
    checkpoint_steps: int = Field(
        default=50, ge=1, description="optimizer steps between two checkpoints"
    )


class Staleness(Section):
    """When a cache has been used enough."""

    max_epochs: int = Field(default=1, ge=1, description="passes over a round's scores, at most")
    policy_drift: float = Field(default=0.1, gt=0, description="stop above; k3, nats per token")
    effective_sample_fraction: float = Field(default=0.5, gt=0, le=1, description="stop below")


class Judge(Section):
    """How an answer is checked."""

    kind: Literal["ledger", "final_number"] = Field(
        description="ledger: the embedded task; final_number: last number of the text, GSM8K's ####"
    )


class Evaluation(Section):
    """Sampling on held-out prompts, judged by program."""

    prompts: Prompts
    judge: Judge
    samples_per_prompt: int = Field(default=8, ge=1, description="for pass@k up to this k")
    max_new_tokens: int = Field(ge=1, description="never shortened by the training window")
    temperature: float = Field(default=1.0, ge=0, description="0 is greedy")
    seed: int = Field(default=0, description="of the sampling")
    every_rounds: int | None = Field(
        default=None,
        ge=1,
        description="also between rounds; default: before the first and after the last",
    )


class Replay(Section):
    """Train from what is in the store: nothing is sampled or scored."""

    run: Path | None = Field(default=None, description="folder of the earlier run")
    scores: tuple[str, ...] = Field(
        default=(), description="or scores/FINGERPRINT in the store, one for each round"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "Replay":
        if (self.run is None) == (not self.scores):
            raise ValueError("replay has run and scores, or neither; expected one of the two")
        return self


class Pool(Section):
    """Where the workers of a role run (placement only)."""

    workers: int = Field(default=1, ge=1, description="processes")
    cpus: float = Field(default=1, gt=0, description="logical CPUs of one worker")
    gpus: float = Field(default=0, ge=0, description="GPUs of one worker")
    threads: int = Field(default=1, ge=1, description="CPU threads of one worker")


class Pools(Section):
    """Placement of the two roles."""

    student: Pool = Pool()
    teacher: Pool = Pool()


class Config(Section):
    """A run."""

    seed: int = Field(default=0, description="of prompts, sampling and batch order")
    rounds: int = Field(ge=1, description="rounds of generate, score, train")
    student: Model
    teacher: Model | None = Field(default=None, description="left out only where `replay` is set")
    prompts: Prompts
    rollouts: Rollouts
    scores: Scores = Scores()
    train: Train
    staleness: Staleness = Staleness()
    evaluation: Evaluation | None = Field(default=None, description="left out: no evaluation")
    replay: Replay | None = Field(default=None, description="scores that are there already")
    executor: Literal["ray", "local"] = Field(
        default="ray", description="Ray Data pools or a plain loop"
    )
    pools: Pools = Pools()
    prompts_per_unit: int = Field(
        default=64, ge=1, description="prompts of a shard; placement only"
    )
    store: str = Field(
        default="store", description="folder of artifacts, or s3://BUCKET/PATH; shared by runs"
    )

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        if self.teacher is None and self.replay is None:
            raise ValueError(
                "'teacher' is missing; expected a checkpoint that scores the rollouts; "
                "add teacher, or set replay.run to train from the scores of an earlier run"
            )
        if self.rollouts.temperature == 0 and self.train.objective.kind == "sampled_pg":
            raise ValueError(
                "rollouts.temperature is 0 with objective sampled_pg, which needs samples from "
                "the student; set rollouts.temperature=1 or another objective"
            )
        drawn, objective = self.scores.codec.kind == "sampled", self.train.objective.kind
        if drawn != (objective == "drawn_forward") and objective != "sampled_pg":
            raise ValueError(
                f"scores.codec is {self.scores.codec.kind} with train.objective {objective}; ids "
                "drawn from the teacher serve drawn_forward, ranked ones every other objective "
                "(sampled_pg takes both); change one of the two"
            )
        if self.train.rows_per_step % min(self.train.rows_per_microbatch, self.train.rows_per_step):
            raise ValueError(
                f"train.rows_per_step {self.train.rows_per_step} is not a multiple of "
                f"train.rows_per_microbatch {self.train.rows_per_microbatch}; make it one"
            )
        window = self.rollouts.window
        if window.kind == "linear" and window.h0 > window.max_window_tokens:
            raise ValueError(
                f"rollouts.window.h0 {window.h0} is larger than max_window_tokens "
                f"{window.max_window_tokens}; lower h0 or raise max_window_tokens"
            )
        return self


# Fields that decide where and how fast a run happens, never what it produces.
PLACEMENT = (
    "executor",
    "pools",
    "prompts_per_unit",
    "store",
    "student.batch_rows",
    "teacher.batch_rows",
    "train.rows_per_microbatch",
    "train.threads",
    "train.checkpoint_steps",
)
