"""`tokenizer_config.json`: the types that tokenizer classes rely on, checked before one does."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, StrictStr, ValidationError

from opd_stream.errors import UserError
from opd_stream.section import is_object
from opd_stream.store.files import checkpoint_json


def _content(token: Any) -> Any:
    return token.get("content") if is_object(token) else token


Token = Annotated[StrictStr, BeforeValidator(_content)]  # text, or an object with its content
Side = Literal["left", "right"]


class _Settings(BaseModel):
    """Fields that break the loading of a tokenizer where they are of another type."""

    model_config = ConfigDict(extra="allow")

    bos_token: Token | None = None
    eos_token: Token | None = None
    pad_token: Token | None = None
    unk_token: Token | None = None
    added_tokens_decoder: dict[int, Token] = {}
    additional_special_tokens: list[Token] | dict[str, Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    model_specific_special_tokens: dict[str, Token] | None = None
    chat_template: StrictStr | list[dict[str, StrictStr]] | None = None
    tokenizer_class: StrictStr | None = None
    model_max_length: float | None = None
    padding_side: Side = "left"
    truncation_side: Side = "left"
    split_special_tokens: StrictBool = False
    model_input_names: list[StrictStr] = []
    auto_map: dict[str, Any] = {}
    init_inputs: list[Any] = []


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint's tokenizer; empty without the file.

    Raises:
        UserError: it is no JSON object, or a field is of a type that no tokenizer reads.
    """
    path = folder / "tokenizer_config.json"
    settings = checkpoint_json(path) if path.is_file() else {}
    try:
        _Settings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path}: {first['loc'][0]} is {settings[str(first['loc'][0])]!r:.60}: "
            f"{first['msg']}; correct it, or copy the checkpoint again"
        ) from error
    return settings
