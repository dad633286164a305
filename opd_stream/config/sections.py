"""Sections: a checkpoint in a role, rollouts, what is cached, training, evaluation."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from opd_stream.curriculum import Select
from opd_stream.engines import EngineName
from opd_stream.engines.base import VllmOptions
from opd_stream.engines.server_client import ServerOptions
from opd_stream.environments import Environment
from opd_stream.errors import UserError
from opd_stream.fetching import local_folder
from opd_stream.filters import Keep
from opd_stream.loggers import AnyLogger
from opd_stream.objectives import AnyObjective, SampledPg
from opd_stream.rendering import ChatTemplate, Rendering, Template
from opd_stream.section import SEEDS, Section, Temperature, is_list, is_object, later
from opd_stream.sources import (
    DatasetPrompts,
    EmbeddedPrompts,
    FilePrompts,
    Prompts,
    view_flaw,
)
from opd_stream.store.codecs import Codec, ExactCodec, HiddenCodec
from opd_stream.tasks.judges import AnyJudge
from opd_stream.weighting import DriftGate, Freshness, Segment, TokenSelection
from opd_stream.windows import AnyWindow

Beta = Annotated[float, Field(ge=0, lt=1)]


class Model(Section):
    """A checkpoint in a role, and the engine that runs it."""

    path: Path = Field(
        description="Hugging Face folder (config.json, safetensors, tokenizer), hub model "
        "ORGANISATION/NAME, or GGUF file"
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub model; null: its main branch"
    )
    engine: EngineName = Field(
        default="transformers",
        description="what runs it: transformers, vllm, server (a teacher that is served: "
        "docs/served_teacher.md), fake, or yours: docs/interfaces.md",
    )
    vllm: VllmOptions = Field(default=VllmOptions(), description="settings of engine vllm")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the engine"
    )
    batch_rows: int = Field(
        default=64, ge=1, description="rows the engine runs at once; placement only"
    )

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies on this machine; see `local_folder`."""
        return local_folder(self.path, self.revision, weights=self.engine != "server")

    @property
    def is_here(self) -> bool:
        """Whether there is such a folder on this machine."""
        try:
            return self.folder.is_dir()
        except UserError:
            return False


class Student(Model):
    """The checkpoint that is trained."""

    taught_by: Path | None = Field(
        default=None,
        description="checkpoint that wrote the student's fine-tuning data; offline distillation "
        "from another teacher is biased, and a run of one round warns of it",
    )


def _with_fields(view: str) -> str:
    if (flaw := view_flaw(view)) is not None:
        raise PydanticCustomError("flaw", "{flaw}", {"flaw": flaw})
    return view


View = Annotated[str, AfterValidator(_with_fields)]


class Teacher(Model):
    """The checkpoint that scores."""

    template: Template | None = later(
        default=None,
        description="the teacher's own rendering of the prompts, such as another system turn; "
        "null: it reads what the student reads",
    )
    view: View | None = later(
        default=None,
        description="text that the teacher reads in place of the prompt's, such as a reference "
        "solution beside it: {prompt}, {answer}, {field} of the prompt's row ({{ is a brace); the "
        "student never reads it",
    )
    follows_student: bool = later(
        default=False,
        description="each round's policy scores its own rollouts, behind `view` or `template`; "
        "path is the student's",
    )
    server: ServerOptions | None = later(
        default=None,
        description="the server that engine server asks; `path` is then a folder with config.json "
        "and tokenizer of the same model, and needs no weights",
    )

    @property
    def is_rendering(self) -> bool:
        """Whether it reads anything else than the student."""
        return self.template is not None or self.view is not None

    def rendering(self, source: Prompts) -> Rendering | None:
        """How it reads the prompts of a source; None: as the student does."""
        if not self.is_rendering:
            return None
        return Rendering(template=self.template or source.template, view=self.view)

    @model_validator(mode="after")
    def _reads_every_prompt(self) -> Self:
        if isinstance(self.template, ChatTemplate) and self.template.control_tokens == "skip":
            raise ValueError(
                "teacher.template.control_tokens is skip, but the teacher reads every prompt that "
                "the student answers; set it to escape or allow"
            )
        return self


def _as_texts(value: Any) -> Any:
    """A value of a field, or several, as text."""
    many: list[Any] = value if is_list(value) else [value]
    if not many or not all(isinstance(each, str | bool | int | float) for each in many):
        expected = "expected a value, or a list of some: text, numbers, yes or no"
        raise PydanticCustomError("flaw", "{flaw}", {"flaw": expected})
    return tuple(map(str, many))


Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_texts, json_schema_input_type=Any),
]


class OneTeacher(Teacher):
    """One of several checkpoints that score, each the rollouts of some prompts or of all."""

    when: dict[str, Texts] = Field(
        default={},
        description="scores rollouts of prompts whose row has this value, or one of these, in each "
        "named field; left out: of all prompts",
    )
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="of its terms in the loss; see docs/teachers.md"
    )

    def rendering(self, source: Prompts) -> Rendering | None:
        """How it reads the prompts of a source, and which; None: as the student does, all."""
        found = super().rendering(source) or Rendering(template=None)
        found = replace(found, when=self.when, is_of_several=True)
        return found if self.when or self.is_rendering else None


class Rollouts(Section):
    """How the student writes."""

    @model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, raw: Any) -> Any:
        """Say why settings that every sampler has are missing."""
        found = [name for name in ("top_p", "top_k", "min_p") if is_object(raw) and name in raw]
        if found:
            raise ValueError(
                f"rollouts.{found[0]} is set, which leaves out tokens that the student may write: "
                "the cached log-probabilities would not be those of its draws, and the gradient "
                f"would be another one; leave it out (evaluation.{found[0]} works)"
            )
        return raw

    prompts_per_round: int = Field(
        ge=1,
        description="prompts of a round; rounds take consecutive slices of a permutation of all "
        "prompts, a new one for each pass, and the remainder of a pass is left out",
    )
    samples_per_prompt: int = Field(default=1, ge=1, description="rollouts of one prompt")
    temperature: Temperature = Field(
        default=1.0, ge=0, le=100, description="1 keeps the objectives' gradients exact"
    )
    extra_draws: int = Field(
        default=0,
        ge=0,
        le=63,
        description="further ids drawn at each position, for objective mc",
    )
    student_top_k: int = later(
        default=0,
        ge=0,
        le=1024,
        description="the student's own most probable ids at each position that the teacher scores "
        "beside its candidates: objectives over candidates see both; 0: its candidates alone",
    )
    stop_tokens: tuple[str, ...] = Field(
        default=(),
        description="tokens that end a rollout beside the checkpoints' own terminators; each as it "
        "stands in the vocabulary, or as a text that is one token",
    )
    window: AnyWindow
    given_share: float = later(
        default=0.0,
        ge=0,
        le=1,
        description="share of a round's prompts whose rollouts are not the student's "
        "(docs/rollouts.md)",
    )
    given_by: Literal["rows", "teacher"] = later(
        default="rows",
        description="who wrote them: rows: prompts.completion_field, one a prompt; teacher: it "
        "samples them as the student would, samples_per_prompt a prompt",
    )
    prefix_tokens: int = later(
        default=0,
        ge=0,
        description="the student's rollouts begin with so many tokens of the prompt's given "
        "completion, which do not train, and it goes on; 0: it begins itself (docs/rollouts.md)",
    )
    environment: Environment | None = later(
        default=None,
        description="what answers the student's turns, in training and evaluation: rollouts are "
        "then conversations of several turns (docs/trajectories.md); left out: one answer",
    )
    keep: Keep | None = later(
        default=None,
        description="which rollouts are scored and train; left out: all (docs/rollouts.md)",
    )
    select: Select | None = later(
        default=None,
        description="which prompts a round draws, by the pass rate of their level in the rounds "
        "before; left out: each as often as others (docs/rollouts.md)",
    )
    ahead: bool = Field(
        default=False,
        description="sample and score the next round's rollouts while a round trains, by the "
        "policy it starts from, where the round before stayed within staleness.policy_drift",
    )

    @property
    def given_prompts(self) -> int:
        """Prompts of a round whose rollouts are given."""
        return round(self.given_share * self.prompts_per_round)

    @property
    def own_prompts(self) -> int:
        """Prompts of a round that the student answers."""
        return self.prompts_per_round - self.given_prompts

    @property
    def given_samples(self) -> int:
        """Given rollouts of a prompt that has some."""
        return self.samples_per_prompt if self.given_by == "teacher" else 1


class Alignment(Section):
    """A teacher with another tokenizer: scores of stretches of bytes (docs/alignment.md)."""

    kind: Literal["bytes"] = Field(description="chunks end where both tokenizations end")
    max_chunk_tokens: int = Field(
        default=6, ge=1, description="tokens of the student; longer chunks do not train"
    )


class Scores(Section):
    """What is cached of the teacher, per completion token."""

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

    @property
    def stored_candidates(self) -> int:
        """Teacher candidates that a token has in the cache."""
        return self.codec.candidates if isinstance(self.codec, HiddenCodec) else self.top_k


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


class Lora(Section):
    """Low-rank adapters instead of all weights (needs the extra `lora`)."""

    rank: int = Field(default=32, ge=1, le=65536, description="of each adapter")
    alpha: float = Field(default=64, gt=0, description="the adapters' scale is alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the adapters' input")
    targets: str | tuple[str, ...] = Field(
        default="all-linear", description="module names, or all-linear: all but the head"
    )
    base: Literal["stored", "8bit", "4bit"] = later(
        default="stored",
        description="the frozen weights under the adapters: as they are stored, or linear layers "
        "of the decoder in 8 or 4 bits (bitsandbytes), with which policies are published",
    )

    @field_validator("targets")
    @classmethod
    def _pattern(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        try:
            re.compile(targets if isinstance(targets, str) else "")
        except re.error as error:
            raise ValueError(
                f"train.lora.targets is {targets!r}, which is no pattern ({error}); expected "
                "module names or all-linear; change it"
            ) from error
        names = (targets,) if isinstance(targets, str) else targets
        if not all(names) or not names:
            raise PydanticCustomError("no_targets", "expected module names or all-linear")
        return targets


class Reference(Section):
    """The student is kept near the run's first one, against completions that grow and grow."""

    weight: float = Field(
        gt=0, description="of KL(student | first student) at each token, beside the objective"
    )
    top_k: int = Field(
        default=16, ge=1, le=1024, description="of the first student's candidates, with a tail"
    )


class Extrapolation(Section):
    """After steps 1, 2, 4, 8, ... jump further along the way the weights came (EffOPD)."""

    signal: Literal["kl", "reward", "both"] = Field(
        default="kl",
        description="kl: KL to the teacher over cached candidates and tail, whatever trains, on "
        "rows that do not train; reward: judged answers to `prompts` training prompts (published); "
        "both: neither may fall",
    )
    base: Literal["accepted", "previous"] = Field(
        default="accepted",
        description="start of the direction: last accepted point, or ordinary point (paper)",
    )
    acceptance: Literal["strict", "equal"] = Field(
        default="strict", description="equal: an equal score is accepted too (paper)"
    )
    candidates: int = Field(default=5, ge=1, description="points W + 2 k (W - base), k = 1, 2, ...")
    parameters: Literal["matrices", "official"] = Field(
        default="matrices",
        description="what moves: matrices of attention and MLP; official: also their biases, the "
        "norms of queries and keys, and post_attention_layernorm, as in the official code",
    )
    rows: int = Field(
        default=64,
        ge=1,
        description="cached rows that score a point; with kl they do not train in their round (an "
        "eighth of its rows at most)",
    )
    prompts: int = Field(
        default=50,
        ge=0,
        description="random training prompts, whose answers a reward judges, and which tell "
        "whether a jump made answers longer; 0: not looked at",
    )
    reset_moments: bool = Field(
        default=False, description="forget the optimizer's moments of what jumped"
    )


def unserved_by_chunks(
    objectives: Sequence[AnyObjective], *, merge_terminators: bool
) -> str | None:
    """What of objectives scores with alignment cannot serve, with the way out; or None."""
    lost = sorted(part.kind for part in objectives if part.reads in ("draws", "drawn"))
    if lost:
        return (
            f"objective {lost[0]} reads the teacher at ids that no text holds, which a teacher "
            "with another tokenizer cannot score; use sampled_pg, or an objective over candidates"
        )
    if any(isinstance(part, SampledPg) and part.baseline != "none" for part in objectives):
        return (
            "objective sampled_pg with baseline bucket reads candidates at every token, which a "
            "teacher with another tokenizer has at some; set baseline=none"
        )
    kinds = {part.kind for part in objectives}
    if len(kinds) > 1 and any(part.reads == "token" for part in objectives):
        return (
            f"objectives {', '.join(sorted(kinds))} train at different tokens where the teacher "
            "has another tokenizer; use sampled_pg alone, or leave it out"
        )
    if not merge_terminators:
        return (
            "train.guards.merge_terminators is no, but the terminators of a teacher with another "
            "tokenizer can only be one outcome; set it to yes"
        )
    return None


def unserved_by_temperature(train: "Train", temperature: float) -> str | None:
    """What tokens drawn at a temperature cannot serve of a training section; or None.

    Importance is over the probability that a token was drawn with, and the one in the cache is that
    at temperature 1.
    """
    sampled = sorted(part.kind for part in train.objective if part.is_sampled)
    if not sampled or temperature == 1:
        return None
    return (
        f"rollouts.temperature is {temperature:g} with objective {sampled[0]}, which weighs tokens "
        "by what they were drawn with, and temperature 1 is what the cache has of it; set "
        "rollouts.temperature=1 or another objective"
    )


def unserved_by_jumps(jump: Extrapolation, *, codec: str, is_aligned: bool) -> str | None:
    """What scores cannot serve of an extrapolation; or None."""
    if jump.signal == "reward" or (codec != "sampled" and not is_aligned):
        return None
    cause = "alignment" if is_aligned else "codec sampled"
    return (
        f"train.extrapolation.signal is {jump.signal}, the KL over cached candidates, which scores "
        f"with {cause} do not hold at every token; use signal=reward"
    )


def unserved_by_selection(select: TokenSelection, *, codec: str, is_aligned: bool) -> str | None:
    """What scores cannot serve of a choice of tokens; or None."""
    if is_aligned:
        return (
            "train.select is set with scores.alignment, whose chunks of tokens train whole or not "
            "at all; leave train.select out"
        )
    if codec != "sampled" or select.by == "student_entropy":
        return None
    return (
        f"train.select.by is {select.by} with scores.codec sampled, whose ids are draws and no "
        "distribution; set by=student_entropy, or use codec compact or exact"
    )


def unserved_by_given(train: "Train") -> str | None:
    """What given rollouts cannot serve of a training section, with the way out; or None."""
    field = "train.objective" if train.given_objective is None else "train.given_objective"
    lost = sorted(
        part.kind
        for part in train.given_objective or train.objective
        if part.is_sampled or part.reads == "draws"
    )
    if not lost:
        return None
    return (
        f"{field} is {lost[0]}, which needs draws of the student, and given rollouts are none; set "
        "train.given_objective to a divergence over candidates (bucket, skew, lsm, "
        "entropy_aware), or to ce"
    )


def unserved_by_own(train: "Train") -> str | None:
    """What the student's own rollouts cannot serve of a training section, and the way out."""
    if not any(part.reads == "completion" for part in train.objective):
        return None
    return (
        "train.objective is ce, and cross-entropy on the student's own rollouts teaches nothing; "
        "set another objective, with ce as train.given_objective"
    )


def _as_tuple(value: Any) -> Any:
    many = isinstance(value, list | tuple)
    return value if many else (value,)  # pyright: ignore[reportUnknownVariableType]


class Train(Section):
    """How the student trains on the scores."""

    objective: Annotated[
        tuple[AnyObjective, ...],
        BeforeValidator(_as_tuple, json_schema_input_type=AnyObjective | tuple[AnyObjective, ...]),
    ] = Field(description="one, or a list whose weighted sum is the loss")
    given_objective: Annotated[
        tuple[AnyObjective, ...] | None,
        BeforeValidator(
            lambda value: None if value is None else _as_tuple(value),
            json_schema_input_type=AnyObjective | tuple[AnyObjective, ...] | None,
        ),
    ] = later(
        default=None,
        description="of rollouts.given_share: a divergence over candidates, or ce, which reads no "
        "teacher; null: `objective`",
    )

    top_k: int | None = Field(
        default=None,
        ge=1,
        description="use only so many of the cached candidates; null: all (of codec hidden: the "
        "whole vocabulary)",
    )
    guards: Guards = Guards()
    gate: DriftGate | None = Field(default=None, description="left out: every block counts")
    freshness: Freshness | None = Field(default=None, description="left out: every row counts")
    select: TokenSelection | None = later(default=None, description="left out: every token trains")
    segment: Segment | None = later(default=None, description="left out: every place trains")
    reference: Reference | None = later(default=None, description="left out: none")
    extrapolation: Extrapolation | None = Field(default=None, description="left out: none")
    learning_rate: float = Field(
        gt=0,
        le=100,
        description="peak; about 1e-3 for the embedded models, 5e-5 for 135 million parameters, "
        "1e-6 for billions",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="over the whole run; linear and cosine: down to 0"
    )
    warmup: float = Field(
        default=0.0, ge=0, lt=1, description="share of the run with a rising rate"
    )
    warmup_steps: int = Field(
        default=10,
        ge=0,
        description="first optimizer steps of a run with a rising rate, where warmup is 0: AdamW "
        "makes a full step of the least gradient",
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW")
    weight_decay: float = Field(default=0.0, ge=0, le=100, description="AdamW")
    clip_norm: float = Field(default=1.0, gt=0, description="largest gradient norm")
    rows_per_step: int = Field(default=16, ge=1, description="rollouts of an optimizer step")
    precision: Literal["float32", "bf16-mixed", "bf16-true"] = Field(
        default="float32",
        description="bf16-mixed: float32 weights, bfloat16 products; bf16-true: all in bfloat16 "
        "but the weights and moments of the optimizer, which are float32",
    )
    optimizer: Literal["adamw", "adamw-8bit", "adafactor"] = later(
        default="adamw",
        description="adamw-8bit: moments in 8 bits (needs bitsandbytes); adafactor: factored ones, "
        "no betas, and learning_rate is a share of a matrix's root mean square",
    )
    lora: Lora | None = Field(default=None, description="left out: all weights are trained")
    dropout: Literal["none", "model"] = Field(
        default="none",
        description="model: keep the student's own; drift is then measured in a pass without it",
    )
    tokens_per_microbatch: int = Field(
        default=16384, ge=1, description="tokens in memory at once, padding included"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="less memory, a second forward pass"
    )
    loggers: tuple[AnyLogger, ...] = Field(
        default=(), description="beside metrics.jsonl and metrics.csv; a name stands for its kind"
    )
    threads: int = Field(
        default=1, ge=1, le=1024, description="CPU threads; more help on idle cores only"
    )
    checkpoint_steps: int = Field(
        default=50, ge=1, description="optimizer steps between two checkpoints"
    )

    @property
    def given_reads_nothing(self) -> bool:
        """Whether given rollouts train without a teacher's scores."""
        given = self.given_objective or self.objective
        return all(part.reads == "completion" for part in given)

    @property
    def rising_steps(self) -> int:
        """First optimizer steps of the run whose rate rises, where no share of the run does."""
        return 0 if self.warmup else self.warmup_steps

    def learning_rate_at(self, progress: float, step: int) -> float:
        """The rate of a step at `progress` in [0, 1) of the run, after a linear rise.

        Progress counts rounds, not steps, because the number of epochs on a cache is an outcome: a
        round that stops early because of drift moves the schedule to the next round's place.
        """
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        rate = self.learning_rate * min(1.0, (step + 0.5) / max(self.rising_steps, 0.5))
        if self.schedule == "constant":
            return rate
        left = (1 - progress) / (1 - self.warmup)
        factor = left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
        return rate * factor


BenchmarkFormat = Literal["gsm8k", "math500", "amc23", "aime", "humaneval", "mbpp"]

# Fields as the data sets are published, and the usual judge.
_FORMATS: dict[str, tuple[str, str | tuple[str, ...], str]] = {
    "gsm8k": ("question", "answer", "final_number"),
    "math500": ("problem", "answer", "math"),
    "amc23": ("question", "answer", "math"),
    "aime": ("problem", "answer", "math"),
    "humaneval": ("prompt", ("prompt", "entry_point", "test"), "code"),
    "mbpp": (
        "{text}\nYour code should pass these tests:\n{test_list}",
        ("test_list", "test_setup_code?", "test_imports?"),
        "code",
    ),
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Benchmark(Section):
    """One named set of problems; what is left out is as in the evaluation."""

    format: BenchmarkFormat | None = Field(
        default=None,
        description="fills in prompt_field, the fields of the answer, and judge, as the data set "
        "is published",
    )
    kind: Literal["judged", "distance"] = later(
        default="judged", description="distance: to the teacher, and no judge; see evaluation.kind"
    )
    prompts: Prompts
    judge: AnyJudge | None = Field(default=None, description="of answers; needed by kind judged")
    samples_per_prompt: int | None = Field(default=None, ge=1, description="answers a problem")
    max_new_tokens: int | None = Field(default=None, ge=1, description="of an answer")
    temperature: Temperature | None = Field(default=None, ge=0, le=100, description="0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1, description="nucleus; 1: all tokens")
    top_k: int | None = Field(default=None, ge=0, description="most probable tokens; 0: all")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="least share of the largest probability"
    )
    seed: int | None = Field(default=None, ge=0, lt=SEEDS, description="of the sampling")

    @model_validator(mode="before")
    @classmethod
    def _published(cls, raw: Any) -> Any:
        """What the format says stands below what the config says."""
        known = _FORMATS.get(str(raw.get("format"))) if is_object(raw) else None
        if known is None or not is_object(raw.get("prompts")):
            return raw
        prompt_field, answer, kind = known
        answer_field = "answer_field" if isinstance(answer, str) else "answer_fields"
        fields = {"prompt_field": prompt_field, answer_field: answer}
        judge = raw.get("judge", {})
        judge = {"kind": kind, **judge} if is_object(judge) else judge
        return {**raw, "judge": judge, "prompts": {**fields, **raw["prompts"]}}


DISTANCE = {"samples_per_prompt": 1, "max_new_tokens": 64}  # what kind distance has by default
WHOLE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}  # leave no token out


class Evaluation(Section):
    """Sampling on held-out prompts, judged by program: one set of problems, or several by name.

    Or, of kind distance, compared with the teacher on its samples and on the teacher's text.
    """

    kind: Literal["judged", "distance"] = later(
        default="judged",
        description="judged: right answers; distance: KL to the teacher in both directions, top-1 "
        "agreement and cross-entropy, over the whole vocabulary",
    )
    held_out: int | None = later(
        default=None,
        description="of kind distance: only so many of the prompts, the last ones that rounds "
        "would read; a run without evaluation sets it (held_out_prompts)",
    )
    prompts: Prompts | None = Field(default=None, description="of a single set of problems")
    judge: AnyJudge | None = Field(default=None, description="of a single set of problems")
    benchmarks: dict[str, Benchmark] | None = Field(
        default=None, description="or several sets, each under its name"
    )
    samples_per_prompt: int = Field(default=8, ge=1, description="for pass@k up to this k")
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, description="k of pass@k; null: 1, 2, 4, ... 64"
    )
    max_new_tokens: int = Field(ge=1, description="never shortened by the training window")
    temperature: Temperature = Field(default=1.0, ge=0, le=100, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus; 1: all tokens")
    top_k: int = Field(default=0, ge=0, description="most probable tokens; 0: all")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="least share of the largest probability"
    )
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="of the sampling")
    every_rounds: int | None = Field(
        default=None,
        ge=1,
        description="also between rounds; default: before the first and after the last",
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        """A distance needs no long answers."""
        return {**DISTANCE, **raw} if is_object(raw) and raw.get("kind") == "distance" else raw

    def conflicts(self) -> Iterator[str]:
        """What fields say against each other, one line each."""
        has_one = self.prompts is not None or self.judge is not None
        if self.benchmarks is None:
            needed = ("prompts",) if self.kind == "distance" else ("prompts", "judge")
            missing = [name for name in needed if getattr(self, name) is None]
            if missing:
                yield (
                    f"'evaluation.{missing[0]}' is missing; expected {' and '.join(needed)}, or "
                    "benchmarks with names; add it"
                )
                return
        elif not self.benchmarks or has_one or self.kind == "distance":
            found = "is empty" if not self.benchmarks else "stands beside kind, prompts or judge"
            yield (
                f"evaluation.benchmarks {found}; expected named entries, each with prompts and "
                "judge of its own, or only evaluation.prompts and evaluation.judge; keep one form"
            )
        if self.pass_at == ():
            yield "evaluation.pass_at is empty; expected numbers of samples; leave it out"
        largest = max(self.pass_at or (1,))
        for name, part in self.parts().items():
            if not _NAME.fullmatch(name):
                yield (
                    f"evaluation.benchmarks has the name {name!r}; expected letters, digits, - "
                    "and _; rename it"
                )
            field = "evaluation" if self.benchmarks is None else f"evaluation.benchmarks.{name}"
            if part.kind == "distance":
                yield from part.unserved(field)
            elif part.judge is None:
                yield (
                    f"'{field}.judge' is missing; expected what marks the answers; add it, or set "
                    "kind: distance"
                )
            if part.kind == "judged" and largest > part.samples_per_prompt:
                yield (
                    f"evaluation.pass_at asks for pass@{largest} but {name} has "
                    f"{part.samples_per_prompt} samples a problem; raise samples_per_prompt or "
                    "lower pass_at"
                )

    def unserved(self, field: str) -> Iterator[str]:
        """What of a part of kind distance cannot be, one line each."""
        if self.judge is not None:
            yield (
                f"{field} has a judge with kind distance, which asks none; leave judge out, or "
                "have two benchmarks, one of each kind"
            )
        for name, value in WHOLE.items():
            if getattr(self, name) != value:
                yield (
                    f"{field}.{name} is {getattr(self, name):g} with kind distance, whose samples "
                    "are of the whole distribution; leave it out"
                )

    def parts(self) -> dict[str, "Evaluation"]:
        """Name -> one set of problems with every setting it is measured by."""
        if self.benchmarks is None:
            assert self.prompts is not None  # validated
            return {"held_out" if self.held_out else _source_name(self.prompts): self}
        parts: dict[str, Evaluation] = {}
        for name, benchmark in self.benchmarks.items():
            own = {field: value for field, value in benchmark if value is not None}
            own.pop("format", None)
            if benchmark.kind == "distance":  # what answers are drawn with is not for samples
                own = {**WHOLE, **DISTANCE, "judge": None, **own}
            parts[name] = self.model_copy(update={"benchmarks": None, **own})
        return parts

    def judged(self) -> "Evaluation | None":
        """The first set of problems with a judge, if there is one."""
        return next((part for part in self.parts().values() if part.kind == "judged"), None)

    def has_distance(self) -> bool:
        """Whether a part of it is the distance to the teacher."""
        return any(part.kind == "distance" for part in self.parts().values())


def _source_name(source: EmbeddedPrompts | FilePrompts | DatasetPrompts) -> str:
    """The name of a set of problems that was given none."""
    if isinstance(source, EmbeddedPrompts):
        return source.kind
    path = Path(source.path)
    if isinstance(source, DatasetPrompts):
        path = source.data_files or path
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.name.split(".")[0]).strip("-") or "evaluation"
