"""Where prompts come from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from opd_stream.section import Section


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


class EmbeddedPrompts(Section):
    """The embedded tasks: generated problems with answers a program can check."""

    kind: Literal["ledger", "routine"] = Field(
        description="ledger: a few days, solutions of 170 tokens; routine: some weeks, of 600"
    )
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


Prompts = Annotated[EmbeddedPrompts | JsonlPrompts | DatasetPrompts, Field(discriminator="kind")]
