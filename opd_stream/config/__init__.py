"""One YAML file is one run: every field, its unit and its effect.

A path written in a config file is relative to that file; a path given on the command line, and the
default store and run folder, are relative to where the command is called. Unknown keys are refused.
Nothing here needs torch.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from opd_stream.config.collection import Model, Rollouts, Scores, Student
from opd_stream.config.evaluation import Evaluation
from opd_stream.config.prompts import Prompts
from opd_stream.config.training import Staleness, Train, unserved_by_chunks
from opd_stream.section import Section

__all__ = [
    "PLACEMENT",
    "Config",
    "Evaluation",
    "Model",
    "Pool",
    "Pools",
    "Prompts",
    "Replay",
    "Rollouts",
    "Scores",
    "Staleness",
    "Student",
    "Train",
    "TrainerPool",
]


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
    accelerator: str | None = Field(
        default=None, description="kind of GPU as Ray names it, such as H100"
    )
    resources: dict[str, float] = Field(
        default={}, description="custom Ray resources of one worker"
    )
    labels: dict[str, str] = Field(
        default={}, description="labels of the nodes that may run the workers"
    )
    env: dict[str, str] = Field(default={}, description="environment of the workers")
    start_seconds: int = Field(
        default=60, ge=1, description="a pool without a worker by then ends the run"
    )
    unit_seconds: int | None = Field(
        default=None,
        ge=1,
        description="a worker that takes longer over a unit, with loading its engine, counts as "
        "hung and is started again; null: never",
    )


class TrainerPool(Section):
    """Where training runs (placement only)."""

    devices: int = Field(default=1, ge=1, description="processes, each with one GPU or the CPU")
    strategy: Literal["ddp", "fsdp2"] = Field(
        default="ddp", description="of several devices: whole copies, or shards of the weights"
    )


class Pools(Section):
    """Placement of the two roles, and of training."""

    student: Pool = Pool()
    teacher: Pool = Pool()
    trainer: TrainerPool = TrainerPool()


_EITHER = {"sampled_pg", "mc"}  # objectives that read no candidates of the teacher


class Config(Section):
    """A run."""

    seed: int = Field(default=0, description="of prompts, sampling and batch order")
    rounds: int = Field(
        ge=1,
        description="rounds of generate, score, train; docs/store.md: adding some later",
    )
    student: Student
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
    store_seconds: float = Field(
        default=120,
        ge=0,
        description="a store in S3 that stops answering is asked for so long, then the run stops",
    )

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        if self.teacher is None and self.replay is None:
            raise ValueError(
                "'teacher' is missing; expected a checkpoint that scores the rollouts; "
                "add teacher, or set replay.run to train from the scores of an earlier run"
            )
        kinds = {part.kind for part in self.train.objective}
        if not kinds:
            raise ValueError("train.objective is an empty list; name at least one objective")
        if self.rollouts.temperature == 0 and kinds & {"sampled_pg", "mc", "hybrid"}:
            raise ValueError(
                f"rollouts.temperature is 0 with objective {sorted(kinds)[0]}, which needs samples "
                "from the student; set rollouts.temperature=1 or another objective"
            )
        signed = sorted(kinds & {"sampled_pg", "mc", "hybrid"})
        if signed and self.train.guards.soft_clamp is not None:
            raise ValueError(
                f"train.guards.soft_clamp is set with objective {signed[0]}, whose losses may be "
                "negative, and so may be the mean that bounds them; leave it out"
            )
        drawn = self.scores.codec.kind == "sampled"
        needs_drawn, needs_ranked = "drawn_forward" in kinds, kinds - _EITHER - {"drawn_forward"}
        if (drawn and needs_ranked) or (not drawn and needs_drawn):
            raise ValueError(
                f"scores.codec is {self.scores.codec.kind} with train.objective "
                f"{', '.join(sorted(kinds))}; ids drawn from the teacher serve drawn_forward, "
                "ranked ones every other objective (sampled_pg and mc take both); change one of "
                "the two"
            )
        for role, model in (("student", self.student), ("teacher", self.teacher)):
            if model is not None and model.engine == "vllm" and self.executor == "local":
                raise ValueError(
                    f"{role}.engine is vllm with executor local, which shares a process with "
                    "training; vLLM changes its process; set executor=ray"
                )
        if "mc" in kinds and self.replay is None and not self.rollouts.extra_draws:
            raise ValueError(
                "rollouts.extra_draws is 0 with objective mc, which averages over several draws; "
                "set rollouts.extra_draws (3 already helps), or use sampled_pg"
            )
        top_k = self.train.top_k
        if top_k is not None and drawn:
            raise ValueError(
                f"train.top_k is {top_k} with scores.codec sampled, whose ids have no ranks; "
                "leave train.top_k out, or score again with fewer draws"
            )
        if top_k is not None and self.replay is None and top_k > self.scores.top_k:
            raise ValueError(
                f"train.top_k is {top_k} but scores.top_k is {self.scores.top_k}; lower the one or "
                "raise the other"
            )
        jump = self.train.extrapolation
        if jump is not None and jump.signal != "kl":
            if self.evaluation is None:
                raise ValueError(
                    f"train.extrapolation.signal is {jump.signal}, which judges answers as "
                    "evaluation does, but there is no evaluation section; add one, or use kl"
                )
            if self.pools.trainer.devices > 1 and self.pools.trainer.strategy == "fsdp2":
                raise ValueError(
                    f"train.extrapolation.signal is {jump.signal}, which samples from the model in "
                    "training, with sharded weights; use strategy ddp, or signal kl"
                )
        _check_staleness(self)
        _check_ahead(self)
        _check_adaptive(self)
        _check_alignment(self)
        window = self.rollouts.window
        if window.kind == "linear" and window.h0 > window.max_window_tokens:
            raise ValueError(
                f"rollouts.window.h0 {window.h0} is larger than max_window_tokens "
                f"{window.max_window_tokens}; lower h0 or raise max_window_tokens"
            )
        return self


def _check_adaptive(config: Config) -> None:
    window = config.rollouts.window
    if window.kind != "adaptive":
        return
    rising = list(window.candidates)
    if rising != sorted(set(rising)):
        raise ValueError(
            f"rollouts.window.candidates are {rising}; expected ascending windows; sort them"
        )
    if rising[-1] >= window.max_window_tokens:
        raise ValueError(
            f"rollouts.window.candidates end at {rising[-1]}, which is not below "
            f"max_window_tokens {window.max_window_tokens}; raise max_window_tokens"
        )
    if window.objective == "trained" and any(part.kind == "mc" for part in config.train.objective):
        raise ValueError(
            "rollouts.window.objective is trained with train.objective mc, whose further draws "
            "probes do not have; set rollouts.window.objective=sampled"
        )


def _check_ahead(config: Config) -> None:
    """Rollouts made ahead must follow from what is known before the round trains."""
    if not config.rollouts.ahead:
        return
    against = {
        "rollouts.window.kind=adaptive": config.rollouts.window.kind == "adaptive",
        "staleness.max_policies": bool(config.staleness.max_policies),
        "replay": config.replay is not None,
    }
    found = [name for name, is_set in against.items() if is_set]
    if found:
        raise ValueError(
            f"rollouts.ahead is set with {', '.join(found)}, where a round's rollouts depend on "
            "the training before it or are there already; leave one of them out"
        )


def _check_staleness(config: Config) -> None:
    """Bounds that contradict each other, or that nothing can act on."""
    staleness, train = config.staleness, config.train
    if staleness.gated_from > staleness.policy_drift:
        raise ValueError(
            f"staleness.gated_from {staleness.gated_from:g} is above staleness.policy_drift "
            f"{staleness.policy_drift:g}, where training stops; lower gated_from"
        )
    if staleness.gated_from and train.gate is None and train.freshness is None:
        raise ValueError(
            f"staleness.gated_from is {staleness.gated_from:g} but nothing weighs tokens; add "
            "train.gate or train.freshness, or leave gated_from out"
        )
    if not staleness.max_policies:
        return
    if config.replay is not None:
        raise ValueError(
            f"staleness.max_policies is {staleness.max_policies} in a replay, which samples "
            "nothing; leave it out"
        )
    if config.rollouts.extra_draws:
        raise ValueError(
            f"staleness.max_policies is {staleness.max_policies} with rollouts.extra_draws, whose "
            "candidates are lost when a rollout is continued; set one of the two to 0"
        )


def _check_alignment(config: Config) -> None:
    """What a teacher with another tokenizer cannot give."""
    if config.scores.alignment is None or config.replay is not None:
        return
    if (problem := unserved_by_chunks(config.train)) is not None:
        raise ValueError(f"scores.alignment is set: {problem}")
    if config.rollouts.extra_draws:
        raise ValueError(
            "scores.alignment is set with rollouts.extra_draws, ids that no text holds; a teacher "
            "with another tokenizer cannot score them; set rollouts.extra_draws=0"
        )
    if config.scores.codec.kind == "sampled":
        raise ValueError(
            "scores.alignment is set with codec sampled, whose draws may be no token of the "
            "student's; use codec exact or compact"
        )
    kinds = {part.kind for part in config.train.objective}
    if config.staleness.student_top_mass and "sampled_pg" in kinds:
        raise ValueError(
            f"scores.alignment is set with staleness.student_top_mass "
            f"{config.staleness.student_top_mass:g} and sampled_pg, whose tokens have no "
            "candidates where the tokenizers differ; set staleness.student_top_mass=0"
        )


def counts_rounds(config: Config) -> bool:
    """Whether a round would be another one in a run of more rounds, as under a falling rate."""
    return (
        config.train.schedule != "constant"
        or config.train.warmup > 0
        or config.staleness.max_policies > 0
        or config.rollouts.window.kind == "adaptive"
    )


# Fields that decide where and how fast a run happens, never what it produces.
PLACEMENT = (
    "executor",
    "pools",
    "prompts_per_unit",
    "store",
    "store_seconds",
    "student.batch_rows",
    "teacher.batch_rows",
    "student.vllm",
    "teacher.vllm",
    "train.tokens_per_microbatch",
    "train.gradient_checkpointing",
    "train.loggers",
    "student.taught_by",
    "train.threads",
    "train.checkpoint_steps",
)
