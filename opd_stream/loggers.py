"""Which loggers a run tells beside its own files; `stages/loggers.py` opens them."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from opd_stream.section import IMPORT_PATH, Section

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


class Logger(Section):
    """A logger of experiments.

    Example:
        >>> Logger(kind="wandb", project="math", tags=("adwin",)).library
        'wandb'
    """

    kind: str = Field(
        description="tensorboard, wandb, mlflow, trackio, or the import path package.module:Name "
        "of a Lightning logger"
    )
    project: str | None = Field(
        default=None, description="wandb, trackio; mlflow: the experiment; null: opd-stream"
    )
    tags: tuple[str, ...] = Field(default=(), description="of the run")
    options: dict[str, str | int | float | bool | None] = Field(
        default={}, description="further arguments of the logger's class (trackio: of trackio.init)"
    )

    @property
    def library(self) -> str:
        """The module that has to be installed."""
        return self.kind.partition(":")[0]

    @property
    def is_named(self) -> bool:
        """Whether it is one of `NAMES`."""
        return self.kind in NAMES

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in NAMES and not re.match(IMPORT_PATH, kind):
            expected = (
                f"expected {', '.join(NAMES)}, or the import path package.module:Name of a "
                "Lightning logger"
            )
            raise PydanticCustomError("logger", "{expected}", {"expected": expected})
        return kind

    @field_validator("project", "tags")
    @classmethod
    def _fits(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("kind") == "tensorboard":
            expected = "expected nothing, since tensorboard has neither projects nor tags"
            raise PydanticCustomError("logger", "{expected}", {"expected": expected})
        return value


def _of_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyLogger = Annotated[Logger, BeforeValidator(_of_name, json_schema_input_type=str | Logger)]
