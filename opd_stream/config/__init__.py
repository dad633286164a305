"""One YAML file is one run: every field, its unit and its effect.

A path written in a config file is relative to that file; a path given on the command line, and the
default store and run folder, are relative to where the command is called. Unknown keys are refused.
Nothing here needs torch.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from opd_stream.config.conflicts import conflicts
from opd_stream.config.sections import (
    Evaluation,
    Model,
    OneTeacher,
    Rollouts,
    Scores,
    Student,
    Teacher,
    Train,
)
from opd_stream.engines.server_client import PLACEMENT as SERVER_PLACEMENT
from opd_stream.section import SEEDS, PathText, Section, later
from opd_stream.sources import Prompts
from opd_stream.staleness import Staleness

__all__ = [
    "PLACEMENT",
    "Config",
    "Evaluation",
    "Model",
    "OneTeacher",
    "Pool",
    "Pools",
    "Prompts",
    "Replay",
    "Rollouts",
    "Scores",
    "Staleness",
    "Student",
    "Teacher",
    "Train",
    "TrainerPool",
]


def _scores_name(name: str) -> str:
    if not re.fullmatch(r"(scores/)?[0-9a-f]{4,64}", name):
        raise PydanticCustomError("flaw", "expected scores/FINGERPRINT, as cache ls shows it")
    return name


class Replay(Section):
    """Train from what is in the store: nothing is sampled or scored."""

    run: Path | None = Field(default=None, description="folder of the earlier run")
    scores: tuple[Annotated[str, AfterValidator(_scores_name)], ...] = Field(
        default=(),
        description="or scores/FINGERPRINT in the store, one for each round, with weight 1",
    )
    store: PathText | None = later(
        default=None,
        description="store that has them, where it is not `store`; it is only read, and may be "
        "one that cannot be written",
    )


LONGEST_WAIT = 30 * 86_400  # seconds


def _divided(amount: float) -> float:
    """Ray divides one CPU or GPU, and not several."""
    if amount > 1 and amount % 1:
        raise PydanticCustomError("flaw", "expected a share of one, or a whole number")
    return amount


def _resource(name: str) -> str:
    """Ray has other ways to ask for what it knows itself."""
    if name in ("CPU", "GPU", "memory", "object_store_memory"):
        raise PydanticCustomError("flaw", "expected a custom resource, or cpus and gpus instead")
    return name


Amount = Annotated[float, Field(ge=0, le=1_000_000), AfterValidator(_divided)]


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("flaw", "expected text without the character NUL")
    return text


def _variable(name: str) -> str:
    if not name or "=" in name:
        raise PydanticCustomError("flaw", "expected the name of a variable, without =")
    return name


Text = Annotated[str, AfterValidator(_without_nul)]
Variable = Annotated[Text, AfterValidator(_variable)]
Resource = Annotated[str, Field(min_length=1), AfterValidator(_resource)]


class Placement(Section):
    """What a process asks of the node that runs it."""

    cpus: Amount = Field(default=1, gt=0, description="logical CPUs of one process")
    accelerator: str | None = Field(
        default=None, description="kind of GPU as Ray names it, such as H100"
    )
    resources: dict[Resource, Amount] = Field(
        default={}, description="custom Ray resources of one process"
    )
    labels: dict[Text, Text] = Field(
        default={}, description="labels of the nodes that may run the processes"
    )
    env: dict[Variable, Text] = Field(default={}, description="environment of the processes")
    start_seconds: int = Field(
        default=60,
        ge=1,
        le=LONGEST_WAIT,
        description="the run ends if the pool has no worker, or training not all of its "
        "processes, by then",
    )


class Pool(Placement):
    """Where the workers of a role run (placement only)."""

    workers: int = Field(default=1, ge=1, le=100_000, description="processes")
    gpus: Amount = Field(default=0, description="GPUs of one process")
    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads of one process")
    unit_seconds: int | None = Field(
        default=None,
        ge=1,
        le=LONGEST_WAIT,
        description="a worker that takes longer over a unit, with loading its engine, counts as "
        "hung and is started again; null: never",
    )


class TrainerPool(Placement):
    """Where training runs (placement only): in the run's process, or on workers of Ray Train."""

    devices: int = Field(
        default=1, ge=1, le=100_000, description="processes, each with one GPU or the CPU"
    )
    strategy: Literal["ddp", "fsdp2"] = Field(
        default="ddp", description="of several devices: whole copies, or shards of the weights"
    )
    gpus: Amount | None = Field(
        default=None, description="GPUs of one process; null: one where there are any"
    )

    @property
    def is_on_ray(self) -> bool:
        """Whether Ray places it: several devices, or a place is asked for."""
        placed = (self.gpus, self.accelerator, self.resources, self.labels, self.env)
        return self.devices > 1 or any(placed)


class Pools(Section):
    """Placement of the two roles, and of training."""

    student: Pool = Pool()
    teacher: Pool = Pool()
    trainer: TrainerPool = TrainerPool()


class Config(Section):
    """A run."""

    seed: int = Field(default=0, ge=0, lt=SEEDS, description="of prompts, sampling and batch order")
    rounds: int = Field(
        ge=1,
        le=100_000,
        description="rounds of generate, score, train; docs/store.md: adding some later",
    )
    student: Student
    teacher: Teacher | None = Field(default=None, description="left out only where `replay` is set")
    teachers: dict[str, OneTeacher] = later(
        default={}, description="or several, each under its name (docs/teachers.md)"
    )
    prompts: Prompts
    rollouts: Rollouts
    scores: Scores = Scores()
    train: Train
    staleness: Staleness = Staleness()
    evaluation: Evaluation | None = Field(
        default=None, description="left out: the distance to the teacher, see held_out_prompts"
    )
    held_out_prompts: int = later(
        default=32,
        ge=0,
        description="without evaluation: so many of the training prompts that no round reads; the "
        "distance to the teacher is measured on them, where there are as many; 0: it is not",
    )
    replay: Replay | None = Field(default=None, description="train on the scores of an earlier run")
    executor: Literal["ray", "local"] = Field(
        default="ray", description="Ray Data pools or a plain loop"
    )
    pools: Pools = Pools()
    prompts_per_unit: int = Field(
        default=64, ge=1, description="prompts of a shard; placement only"
    )
    store: PathText = Field(
        default="store", description="folder of artifacts, or s3://BUCKET/PATH; shared by runs"
    )
    store_seconds: float = Field(
        default=120,
        ge=0,
        le=LONGEST_WAIT,
        description="retry timeout of a store in S3; without an answer by then the run stops",
    )
    keep_optimizers: int | None = later(
        default=1,
        ge=1,
        description="policies of the run, the latest included, that keep the state of training "
        "(optimizer, exact weights); null: all",
    )

    @property
    def replayed_store(self) -> str | None:
        """The store of what is replayed, where it is another one."""
        return None if self.replay is None else self.replay.store

    @property
    def all_teachers(self) -> dict[str, Teacher]:
        """Field of the config -> a checkpoint that scores."""
        alone = {} if self.teacher is None else {"teacher": self.teacher}
        return alone | {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of a round that no drift stops; all routed teachers are one pass."""
        teachers = self.teachers.values()  # a row trains once for each of those that score it
        of_all = sum(not teacher.when for teacher in teachers)
        return self.steps_of(of_all + any(teacher.when for teacher in teachers))

    def steps_of(self, passes: int) -> int:
        """Optimizer steps of a round whose rows train `passes` times in an epoch, at least once."""
        rows = self.rollouts.own_prompts * self.rollouts.samples_per_prompt
        rows += self.rollouts.given_prompts * self.rollouts.given_samples
        steps_per_epoch = -(-rows * max(1, passes) // self.train.rows_per_step)
        return steps_per_epoch * self.staleness.max_epochs

    def with_teacher(self, name: str) -> "Config":
        """The config as if one of its several teachers were the only one."""
        return self.model_copy(update={"teacher": self.teachers[name], "teachers": {}})

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        """Tell every conflict between fields at once."""
        found = [
            InitErrorDetails(
                type=PydanticCustomError("conflict", "{text}", {"text": text}), input=""
            )
            for text in conflicts(self)
        ]
        if found:
            raise ValidationError.from_exception_data("Config", found)
        return self


def counts_rounds(config: Config) -> bool:
    """Whether a round would be another one in a run of more rounds, as under a falling rate."""
    return (
        config.train.schedule != "constant"
        or config.train.warmup > 0
        or config.staleness.max_policies > 0
        or config.rollouts.window.is_decided
    )


# Fields that decide where and how fast a run happens, never what it produces.
PLACEMENT = (
    "executor",
    "pools",
    "prompts_per_unit",
    "store",
    "store_seconds",
    "replay.store",
    "keep_optimizers",
    "rollouts.environment.seconds",
    "rollouts.environment.at_once",
    "student.batch_rows",
    "teacher.batch_rows",
    "teachers.*.batch_rows",
    "student.vllm",
    "teacher.vllm",
    *(f"teacher.server.{name}" for name in SERVER_PLACEMENT),
    "teachers.*.vllm",
    *(f"teachers.*.server.{name}" for name in SERVER_PLACEMENT),
    "train.tokens_per_microbatch",
    "train.gradient_checkpointing",
    "train.loggers",
    "student.taught_by",
    "train.threads",
    "train.checkpoint_steps",
)
