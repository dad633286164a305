"""One YAML file is one run: every field, its unit and its effect.

A path written in a config file is relative to that file; a path given on the command line, and the
default store and run folder, are relative to where the command is called. Unknown keys are refused.
Nothing here needs torch.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from opd_stream.config.sections import (
    Evaluation,
    Model,
    OneTeacher,
    Rollouts,
    Scores,
    Student,
    Teacher,
    Train,
    unserved_by_chunks,
    unserved_by_given,
    unserved_by_own,
)
from opd_stream.engines.server_client import PLACEMENT as SERVER_PLACEMENT
from opd_stream.section import SEEDS, PathText, Section, later
from opd_stream.sources import EmbeddedPrompts, Prompts
from opd_stream.staleness import Staleness
from opd_stream.store.codecs import CompactCodec, HiddenCodec, SampledCodec
from opd_stream.windows import AdaptiveWindow, LinearWindow

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
    if not re.fullmatch(r"(scores/)?[0-9a-f]{16,64}", name):
        raise PydanticCustomError("flaw", "expected scores/FINGERPRINT, as cache ls shows it")
    return name


class Replay(Section):
    """Train from what is in the store: nothing is sampled or scored."""

    run: Path | None = Field(default=None, description="folder of the earlier run")
    scores: tuple[Annotated[str, AfterValidator(_scores_name)], ...] = Field(
        default=(), description="or scores/FINGERPRINT in the store, one for each round"
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
            for text in _conflicts(self)
        ]
        if found:
            raise ValidationError.from_exception_data("Config", found)
        return self


def _conflicts(config: Config) -> Iterator[str]:
    """What fields say against each other, one line each."""
    if not config.all_teachers and config.replay is None:
        yield (
            "'teacher' is missing; expected a checkpoint that scores the rollouts; "
            "add teacher, or set replay.run to train from the scores of an earlier run"
        )
    if (replay := config.replay) is not None and (replay.run is None) == (not replay.scores):
        yield "replay.run and replay.scores are both set, or neither; expected one of the two"
    for role, model in {"student": config.student, **config.all_teachers}.items():
        if model.engine == "vllm" and config.executor == "local":
            yield (
                f"{role}.engine is vllm with executor local, which shares a process with "
                "training; vLLM changes its process; set executor=ray"
            )
    yield from _server_conflicts(config)
    trainer = config.pools.trainer
    if trainer.is_on_ray and config.executor == "local":
        yield (
            f"pools.trainer asks for {trainer.devices} devices or a place of its own with executor "
            "local, which trains in the run's process; set executor=ray, or leave all but strategy "
            "out of pools.trainer"
        )
    yield from _objective_conflicts(config)
    yield from _given_conflicts(config)
    yield from _extrapolation_conflicts(config)
    yield from _precision_conflicts(config)
    yield from _window_conflicts(config)
    yield from _staleness_conflicts(config)
    yield from _alignment_conflicts(config)
    yield from _following_conflicts(config)
    yield from _teachers_conflicts(config)
    if config.evaluation is not None:
        yield from config.evaluation.conflicts()


def _server_conflicts(config: Config) -> Iterator[str]:
    """A server that scores: where it stands, and what only the server decides."""
    if config.student.engine == "server":
        yield (
            "student.engine is server, which only scores; the student samples and is trained; set "
            "student.engine=transformers"
        )
    is_author = config.rollouts.given_share > 0 and config.rollouts.given_by == "teacher"
    for field, teacher in config.all_teachers.items():
        server, is_served = teacher.server, teacher.engine == "server"
        if is_served != (server is not None):
            found = "server without" if server is None else f"{teacher.engine} beside"
            yield (
                f"{field}.engine is {found} the section {field}.server; expected both or neither; "
                "add url and model of the server, or leave both out"
            )
        if is_served and teacher.follows_student:
            yield (
                f"{field}.follows_student is set with engine server, which does not run the policy "
                f"of a round; set {field}.engine=transformers"
            )
        if server is not None and server.forced == "tail" and config.scores.alignment:
            yield (
                f"{field}.server.forced is tail with scores.alignment, which reads the terminators "
                "of every position; set forced=exact, with api sglang or vllm"
            )
        if is_served and is_author:
            yield (
                f"rollouts.given_by is teacher with {field}.engine server, which only scores; set "
                f"{field}.engine=transformers, or given_by=rows"
            )
        if is_served and teacher.dtype != "float32":
            yield (
                f"{field}.dtype is {teacher.dtype} with engine server, whose precision the server "
                f"decides; leave it out ({field}.server.revision may name it)"
            )


def _objective_conflicts(config: Config) -> Iterator[str]:
    """Objectives, against what rollouts and scores hold."""
    objectives, train, codec = config.train.objective, config.train, config.scores.codec
    kinds = ", ".join(sorted({part.kind for part in objectives}))
    if not objectives:
        yield "train.objective is an empty list; name at least one objective"
    sampled = sorted(part.kind for part in objectives if part.is_sampled)
    if sampled and config.rollouts.temperature == 0:
        yield (
            f"rollouts.temperature is 0 with objective {sampled[0]}, which needs samples "
            "from the student; set rollouts.temperature=1 or another objective"
        )
    if sampled and train.guards.soft_clamp is not None:
        yield (
            f"train.guards.soft_clamp is set with objective {sampled[0]}, whose losses may be "
            "negative, and so may be the mean that bounds them; leave it out"
        )
    is_drawn = isinstance(codec, SampledCodec)
    every = (*objectives, *(train.given_objective or ()))
    if any(part.reads == ("candidates" if is_drawn else "drawn") for part in every):
        yield (
            f"scores.codec is {codec.kind} with train.objective {kinds}; ids drawn from the "
            "teacher serve drawn_forward, ranked ones every other objective (sampled_pg and mc "
            "take both); change one of the two"
        )
    own = config.rollouts.student_top_k
    if own and is_drawn and config.replay is None:
        yield (
            f"rollouts.student_top_k is {own} with scores.codec sampled, which stores ids that are "
            "drawn from the teacher and no others; use codec compact or exact, or leave "
            "student_top_k out"
        )
    if own and isinstance(codec, HiddenCodec) and config.replay is None:
        yield (
            f"rollouts.student_top_k is {own} with scores.codec hidden, which gives the teacher's "
            "log-probability of every id; leave student_top_k out"
        )
    reads_draws = any(part.reads == "draws" for part in objectives)
    if reads_draws and config.replay is None and not config.rollouts.extra_draws:
        yield (
            "rollouts.extra_draws is 0 with objective mc, which averages over several draws; "
            "set rollouts.extra_draws (3 already helps), or use sampled_pg"
        )
    if train.top_k is not None and is_drawn:
        yield (
            f"train.top_k is {train.top_k} with scores.codec sampled, whose ids have no ranks; "
            "leave train.top_k out, or score again with fewer draws"
        )
    elif isinstance(codec, CompactCodec) and codec.min_k > config.scores.top_k:
        yield (
            f"scores.codec.min_k is {codec.min_k} but scores.top_k is {config.scores.top_k}, and "
            "no more candidates are scored; lower min_k or raise top_k"
        )
    elif isinstance(codec, HiddenCodec):
        return  # any number of candidates can be rebuilt
    elif train.top_k is not None and config.replay is None and train.top_k > config.scores.top_k:
        yield (
            f"train.top_k is {train.top_k} but scores.top_k is {config.scores.top_k}; lower the "
            "one or raise the other"
        )


def _given_conflicts(config: Config) -> Iterator[str]:
    """Rollouts that the student does not write, and what cannot be made of them."""
    rollouts, train = config.rollouts, config.train
    share, given = rollouts.given_share, rollouts.given_prompts
    if config.replay is not None:
        return
    if rollouts.own_prompts and (problem := unserved_by_own(train)) is not None:
        yield f"rollouts.given_share is {share:g}: {problem}, or set given_share=1"
    if not share:
        if train.given_objective is not None:
            yield (
                "train.given_objective is set and rollouts.given_share is 0, so that no rollout is "
                "given; set given_share, or leave given_objective out"
            )
        return
    if not given or (share < 1 and not rollouts.own_prompts):
        yield (
            f"rollouts.given_share is {share:g} of {rollouts.prompts_per_round} prompts a round, "
            f"which is {given} of them; expected some of both kinds; raise prompts_per_round, or "
            "change given_share"
        )
    if (problem := unserved_by_given(train)) is not None:
        yield f"rollouts.given_share is {share:g}: {problem}"
    yield from _given_sources(config)


def _given_sources(config: Config) -> Iterator[str]:
    """Where given rollouts come from, against what else a round may do."""
    rollouts, share = config.rollouts, config.rollouts.given_share
    source = config.prompts
    is_named = not isinstance(source, EmbeddedPrompts) and source.gives_answers
    if rollouts.given_by == "rows" and not is_named:
        yield (
            f"rollouts.given_share is {share:g} and the prompts name no completion; expected the "
            "field that holds them; set prompts.completion_field, template.final_answer=given for "
            "messages, or rollouts.given_by=teacher"
        )
    if rollouts.given_by == "teacher":
        teacher = config.teacher
        against = {
            "scores.alignment": config.scores.alignment is not None,
            "a rendering of its own": teacher is not None and teacher.is_rendering,
        }
        if found := ", ".join(name for name, is_set in against.items() if is_set):
            yield (
                f"rollouts.given_by is teacher with {found}: what it writes behind its own "
                "prompts is no answer to the student's; use a teacher that reads the same prompts, "
                "or given_by=rows"
            )
    if isinstance(rollouts.window, AdaptiveWindow) and share == 1:
        yield (
            "rollouts.given_share is 1 with window adaptive, whose audits continue the student's "
            "rollouts; lower given_share, or use another window"
        )


def _extrapolation_conflicts(config: Config) -> Iterator[str]:
    """A reward needs a judge, and weights that are whole."""
    jump, trainer = config.train.extrapolation, config.pools.trainer
    if jump is None or jump.signal == "kl":
        return
    if config.evaluation is None or config.evaluation.judged() is None:
        found = "there is no evaluation section" if config.evaluation is None else "it has no judge"
        yield (
            f"train.extrapolation.signal is {jump.signal}, which judges answers as "
            f"evaluation does, but {found}; add one, or use kl"
        )
    if trainer.devices > 1 and trainer.strategy == "fsdp2":
        yield (
            f"train.extrapolation.signal is {jump.signal}, which samples from the model in "
            "training, with sharded weights; use strategy ddp, or signal kl"
        )


def _precision_conflicts(config: Config) -> Iterator[str]:
    """Where other numbers than float32 and AdamW's two moments cannot be."""
    train, trainer, window = config.train, config.pools.trainer, config.rollouts.window
    is_sharded = trainer.strategy == "fsdp2" and trainer.devices > 1
    if train.precision == "bf16-true":
        if train.lora is not None:
            yield (
                "train.precision is bf16-true with train.lora, whose adapters are float32 on a "
                "base in the checkpoint's own dtype; set train.precision=bf16-mixed"
            )
        if train.extrapolation is not None:
            yield (
                "train.precision is bf16-true with train.extrapolation, which moves the weights "
                "themselves; set train.precision=bf16-mixed"
            )
        if is_sharded:
            yield (
                "train.precision is bf16-true with strategy fsdp2, whose shards have one dtype; "
                "set train.precision=bf16-mixed, or strategy ddp"
            )
    if is_sharded and train.lora is not None and train.lora.base != "stored":
        yield (
            f"train.lora.base is {train.lora.base} with strategy fsdp2, whose shards have one "
            "dtype; leave base out, or set strategy ddp"
        )
    reads_moments = isinstance(window, AdaptiveWindow) and window.metric == "adam"
    resets = train.extrapolation is not None and train.extrapolation.reset_moments
    if train.optimizer != "adamw" and (reads_moments or resets or is_sharded):
        field = "rollouts.window.metric=adam" if reads_moments else "strategy fsdp2"
        field = "train.extrapolation.reset_moments" if resets else field
        yield (
            f"train.optimizer is {train.optimizer} with {field}, which reads the moments of "
            "adamw; set train.optimizer=adamw"
        )


def _window_conflicts(config: Config) -> Iterator[str]:
    """Bounds of a window, and rollouts made ahead of a window that is not decided yet."""
    window = config.rollouts.window
    if isinstance(window, LinearWindow) and window.h0 > window.max_window_tokens:
        yield (
            f"rollouts.window.h0 {window.h0} is larger than max_window_tokens "
            f"{window.max_window_tokens}; lower h0 or raise max_window_tokens"
        )
    if isinstance(window, AdaptiveWindow):
        if (window.start or 1) > window.max_window_tokens:
            yield (
                f"rollouts.window.start {window.start} is larger than max_window_tokens "
                f"{window.max_window_tokens}; lower start or raise max_window_tokens"
            )
        rising = list(window.candidates)
        if rising != sorted(set(rising)):
            yield (
                f"rollouts.window.candidates are {rising}; expected ascending windows; sort them"
            )
        elif rising[-1] >= window.max_window_tokens:
            yield (
                f"rollouts.window.candidates end at {rising[-1]}, which is not below "
                f"max_window_tokens {window.max_window_tokens}; raise max_window_tokens"
            )
        reads_draws = any(part.reads == "draws" for part in config.train.objective)
        if window.objective == "trained" and reads_draws:
            yield (
                "rollouts.window.objective is trained with train.objective mc, whose further draws "
                "probes do not have; set rollouts.window.objective=sampled"
            )
    against = {
        "rollouts.window.kind=adaptive": isinstance(window, AdaptiveWindow),
        "staleness.max_policies": bool(config.staleness.max_policies),
        "replay": config.replay is not None,
    }
    found = [name for name, is_set in against.items() if is_set]
    if config.rollouts.ahead and found:
        yield (
            f"rollouts.ahead is set with {', '.join(found)}, where a round's rollouts depend on "
            "the training before it or exist already; leave one of them out"
        )


def _staleness_conflicts(config: Config) -> Iterator[str]:
    """Bounds that contradict each other, or that nothing can act on."""
    staleness, train = config.staleness, config.train
    if staleness.gated_from > staleness.policy_drift:
        yield (
            f"staleness.gated_from {staleness.gated_from:g} is above staleness.policy_drift "
            f"{staleness.policy_drift:g}, where training stops; lower gated_from"
        )
    if staleness.gated_from and train.gate is None and train.freshness is None:
        yield (
            f"staleness.gated_from is {staleness.gated_from:g} but nothing weighs tokens; add "
            "train.gate or train.freshness, or leave gated_from out"
        )
    if staleness.max_policies and config.replay is not None:
        yield (
            f"staleness.max_policies is {staleness.max_policies} in a replay, which samples "
            "nothing; leave it out"
        )
    elif staleness.max_policies and config.rollouts.extra_draws:
        yield (
            f"staleness.max_policies is {staleness.max_policies} with rollouts.extra_draws, whose "
            "candidates are lost when a rollout is continued; set one of the two to 0"
        )


def _alignment_conflicts(config: Config) -> Iterator[str]:
    """What a teacher with another tokenizer cannot give."""
    if config.scores.alignment is None or config.replay is not None:
        return
    if (problem := unserved_by_chunks(config.train)) is not None:
        yield f"scores.alignment is set: {problem}"
    if config.rollouts.extra_draws:
        yield (
            "scores.alignment is set with rollouts.extra_draws, ids that no text holds; a teacher "
            "with another tokenizer cannot score them; set rollouts.extra_draws=0"
        )
    if config.rollouts.student_top_k:
        yield (
            f"scores.alignment is set with rollouts.student_top_k "
            f"{config.rollouts.student_top_k}, ids of the student that are no tokens of a teacher "
            "with another tokenizer; leave student_top_k out"
        )
    if isinstance(config.scores.codec, SampledCodec):
        yield (
            "scores.alignment is set with codec sampled, whose draws may be no token of the "
            "student's; use codec exact or compact"
        )
    if isinstance(config.scores.codec, HiddenCodec):
        yield (
            "scores.alignment is set with codec hidden, whose distributions are over the teacher's "
            "tokens; use codec exact or compact"
        )
    reads_token = any(part.reads == "token" for part in config.train.objective)
    if config.staleness.student_top_mass and reads_token:
        yield (
            f"scores.alignment is set with staleness.student_top_mass "
            f"{config.staleness.student_top_mass:g} and sampled_pg, whose tokens have no "
            "candidates where the tokenizers differ; set staleness.student_top_mass=0"
        )


def _following_conflicts(config: Config) -> Iterator[str]:
    """A teacher that is each round's policy has to be the student, and to read something else."""
    student = config.student
    for field, teacher in config.all_teachers.items():
        if not teacher.follows_student:
            continue
        if (teacher.path, teacher.revision) != (student.path, student.revision):
            yield (
                f"{field}.follows_student is set with {field}.path {teacher.path}, which is not "
                f"student.path {student.path}; set the same path, or leave follows_student out"
            )
        if not teacher.is_rendering:
            yield (
                f"{field}.follows_student is set without {field}.view, so that the teacher would "
                "read what the student reads and agree with it; add a view"
            )
        if config.evaluation is not None and config.evaluation.has_distance():
            yield (
                f"evaluation of kind distance with {field}.follows_student, which is another "
                "teacher each round; use a judge"
            )


def _teachers_conflicts(config: Config) -> Iterator[str]:
    """What several teachers cannot be, or be together with."""
    if not config.teachers:
        return
    if config.teacher is not None:
        yield (
            "teacher and teachers are both set; expected one of them; give the single teacher a "
            "name under teachers, or leave one out"
        )
    for name in config.teachers:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"teachers has the name {name!r}; expected letters, digits, - and _; rename it"
    against = {
        "replay": (config.replay is not None, "replay the scores of one teacher at a time"),
        "rollouts.ahead": (config.rollouts.ahead, "leave it out"),
        "rollouts.given_share": (bool(config.rollouts.given_prompts), "leave it out"),
        "rollouts.window.kind=adaptive": (
            isinstance(config.rollouts.window, AdaptiveWindow),
            "use another window",
        ),
        "staleness.max_policies": (bool(config.staleness.max_policies), "leave it out"),
        "scores.codec hidden": (
            isinstance(config.scores.codec, HiddenCodec),
            "use codec compact or exact",
        ),
        "evaluation of kind distance": (
            config.evaluation is not None and config.evaluation.has_distance(),
            "use a judge",
        ),
    }
    for what, (is_set, way) in against.items():
        if is_set:
            yield (
                f"{what} is set with teachers, and it reads the scores of one teacher; {way}, or "
                "name one teacher"
            )


def counts_rounds(config: Config) -> bool:
    """Whether a round would be another one in a run of more rounds, as under a falling rate."""
    return (
        config.train.schedule != "constant"
        or config.train.warmup > 0
        or config.staleness.max_policies > 0
        or isinstance(config.rollouts.window, AdaptiveWindow)
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
