"""The tokenizer of a checkpoint folder: its settings checked, opened, and what it means as opened.

`tokenizer.json` alone does not say which ids a text gets: transformers adds the tokens that
`tokenizer_config.json` names, and a class that either file chooses may build parts anew. So the
identity of a folder is that of the tokenizer that `open_tokenizer` gives.
"""

from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, StrictStr, ValidationError

from opd_stream.errors import UserError
from opd_stream.section import is_object
from opd_stream.store.files import canonical_json, checkpoint_json, sha256, sha256_file
from opd_stream.store.tokenizer_identity import (
    TokenizerMeaning,
    read_meaning,
    reads_otherwise,
    tokenizer_meaning,
)

TOKENIZER = "tokenizer.json"
OLDER_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt")  # where there is none
TEMPLATES = ("chat_template.jinja", "chat_template.json")
NAMED_TEMPLATES = "additional_chat_templates"  # folder
READ_WITH = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def _text(token: Any) -> Any:
    return token.get("content") if is_object(token) else token


Token = Annotated[StrictStr, BeforeValidator(_text)]  # text, or an object with its content
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


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide which ids a text gets."""
    names = (TOKENIZER, *OLDER_TOKENIZERS, *READ_WITH)
    return [path for name in names if (path := folder / name).is_file()]


def template_files(folder: Path) -> list[Path]:
    """The files that hold chat templates."""
    named = sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))
    return [path for path in (*(folder / name for name in TEMPLATES), *named) if path.is_file()]


def library_versions() -> list[str]:
    """Of the libraries that turn the files into a tokenizer."""
    return [version("transformers"), version("tokenizers")]


def tokenizer_digest(folder: Path) -> str:
    """The identity of a folder's tokenizer; the same files are read once.

    Raises:
        UserError: it is no tokenizer that the libraries read.
    """
    return _digest(folder.resolve(), _content(folder))


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; where its class misreads `tokenizer.json`, that file as it is.

    Raises:
        UserError: there is none that can be read.
    """
    return _tokenizer(folder.resolve(), _content(folder, *template_files(folder)))[0]


def folder_meaning(folder: Path) -> TokenizerMeaning | None:
    """What the tokenizer of a folder means; None: it is not a fast one.

    Raises:
        UserError: there is none that can be read.
    """
    path, named = folder / TOKENIZER, None
    if path.is_file():
        read_meaning(path)  # refuses what the library passes over
        named = checkpoint_json(path).get("added_tokens")
    backend = getattr(open_tokenizer(folder), "backend_tokenizer", None)
    return None if backend is None else tokenizer_meaning(backend, named=named)


def misread_line(folder: Path) -> Iterator[str]:
    """What to know of a tokenizer that transformers misreads."""
    reader = _tokenizer(folder.resolve(), _content(folder, *template_files(folder)))[1]
    if reader is not None:
        yield (
            f"AutoTokenizer reads {folder} as {reader}, which cuts texts otherwise than its "
            "tokenizer.json; the file is used here; elsewhere too, load it with "
            "PreTrainedTokenizerFast.from_pretrained"
        )


@lru_cache(maxsize=8)
def open_vocabulary(folder: Path) -> Any:
    """The tokenizer of a folder for ids and what they stand for: its `tokenizer.json` as it is.

    That needs no torch, which the class for a family of models loads; it is read that way where
    there is no such file.

    Raises:
        UserError: there is none that can be read.
    """
    if not (folder / TOKENIZER).is_file():
        return open_tokenizer(folder)
    from transformers import PreTrainedTokenizerFast

    return _opened(PreTrainedTokenizerFast, folder)


def _content(folder: Path, *more: Path) -> str:
    """One digest of the files that decide, so that an edit in place is seen."""
    files = [*tokenizer_files(folder), *more]
    return sha256(canonical_json([[path.name, sha256_file(path)] for path in files]))


@lru_cache(maxsize=64)
def _digest(folder: Path, content: str) -> str:
    meaning = folder_meaning(folder)
    return content if meaning is None else meaning.digest


@lru_cache(maxsize=8)
def _tokenizer(folder: Path, content: str) -> tuple[Any, str | None]:
    """The tokenizer of a folder, and the class of transformers that misreads its file, if so."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer, path = _opened(AutoTokenizer, folder), folder / TOKENIZER
    is_own = type(tokenizer) is not PreTrainedTokenizerFast and path.is_file()
    is_fast = getattr(tokenizer, "backend_tokenizer", None) is not None
    if is_own and is_fast and reads_otherwise(tokenizer, path):
        return _opened(PreTrainedTokenizerFast, folder), type(tokenizer).__name__
    return tokenizer, None


def _opened(kind: Any, folder: Path) -> Any:
    read_settings(folder)
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the libraries say of the values in its files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} has no readable tokenizer ({reason}); check the folder"
        ) from error
