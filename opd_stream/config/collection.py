"""What the student writes and what is cached of the teacher."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from opd_stream.engines import EngineName
from opd_stream.engines.vllm_engine import VllmOptions
from opd_stream.section import Section
from opd_stream.store.codecs import Codec, ExactCodec
from opd_stream.windows import AnyWindow


class Model(Section):
    """A checkpoint in a role, and the engine that runs it."""

    path: Path = Field(description="Hugging Face folder: config.json, safetensors, tokenizer")
    engine: EngineName = Field(
        default="transformers",
        description="what runs it: transformers, vllm, fake, or yours: docs/extend.md",
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
    window: AnyWindow
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
