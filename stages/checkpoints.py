"""A checkpoint in a role: where it lies, what it is, and how it ends a text."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from opd_stream.config.sections import Lora, Model, Teacher
from opd_stream.costs import ModelShape, adapter_weights, shape_of
from opd_stream.errors import UserError
from opd_stream.model_config import ModelConfig, read_model_config
from opd_stream.section import is_object
from opd_stream.store.files import INDEX, checkpoint_json, indexed_files, real
from opd_stream.store.policy import Identity
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import (
    TOKENIZER,
    folder_meaning,
    open_tokenizer,
    read_settings,
)
from opd_stream.store.tokenizer_identity import (
    TokenizerComparison,
    TokenizerMeaning,
    compare_tokenizers,
)

if TYPE_CHECKING:
    from opd_stream.engines.server_engine import ServerEngine

NARROW = ("bfloat16", "float16")
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A Hugging Face folder and its identity.

    Example:
        >>> Checkpoint(folder=Path("configs/models/ledger-student"), identity=Identity(...))
    """

    folder: Path
    identity: Identity
    policy: str | None = None  # fingerprint of the artifact in the store, if it is one
    is_served: bool = False  # its weights are a server's, and not in the folder

    def tokenizer(self) -> Any:
        """The tokenizer of the folder."""
        return open_tokenizer(self.folder)

    @property
    def config(self) -> ModelConfig:
        """What the folder's config files say."""
        return read_model_config(self.folder)

    @property
    def known_ids(self) -> int:
        """Ids from 0 on that both the tokenizer and the head have."""
        return min(self.config.vocabulary, tokenizer_size(self.folder))

    def terminators(self) -> tuple[int, ...]:
        """The ids that end a text, from the generation config and the model config."""
        return tuple(sorted(set().union(*self.config.terminators.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The ids of a student's completions.

    Example:
        >>> Vocabulary(size=151_669, head=151_936, stop_ids=(151_643, 151_645))
    """

    size: int  # ids from 0 on that may be drawn: every model that reads them has them
    head: int  # ids that the student has logits for
    stop_ids: tuple[int, ...]  # any of them ends a completion

    @property
    def recipe(self) -> dict[str, Any]:
        """What a recipe of rollouts says of it."""
        limit = {"vocabulary": self.size} if self.size < self.head else {}
        return {"stop_ids": list(self.stop_ids), **limit}


def shared_vocabulary(models: Sequence[Checkpoint], *, stops: Iterable[int] = ()) -> Vocabulary:
    """The ids that all of some checkpoints of one tokenizer know, and all that end a text.

    Args:
        models: the student, and others that read what it writes.
        stops: further ids that end a completion.
    """
    size = min(model.known_ids for model in models)
    ends = {token for model in models for token in model.terminators()} | set(stops)
    stop_ids = tuple(sorted(token for token in ends if token < size))
    return Vocabulary(size=size, head=models[0].config.vocabulary, stop_ids=stop_ids)


def open_checkpoint(store: Store, folder: Path) -> Checkpoint:
    """Identify a checkpoint folder.

    Raises:
        UserError: it is no checkpoint.
    """
    return Checkpoint(folder=real(folder), identity=store.identify(folder))


def open_served_checkpoint(
    store: Store, teacher: Teacher, *, first_contact: "Callable[[ServerEngine], None] | None"
) -> Checkpoint:
    """Identify a teacher that a server runs; see `served_identity`.

    Raises:
        UserError: its folder lacks a file, or the server cannot be asked.
    """
    from opd_stream.store.served import served_identity

    assert teacher.server is not None
    folder = teacher.folder
    identity = served_identity(store, folder, teacher.server, first_contact=first_contact)
    return Checkpoint(folder=folder.resolve(), identity=identity, is_served=True)


def open_model(store: Store, settings: Model) -> Checkpoint:
    """The checkpoint of a role; a server is not asked.

    Raises:
        UserError: it is no checkpoint.
    """
    if isinstance(settings, Teacher) and settings.server is not None:
        return open_served_checkpoint(store, settings, first_contact=None)
    return open_checkpoint(store, settings.folder)


def check_pair(student: Checkpoint, teacher: Checkpoint, *, aligns: bool = False) -> None:
    """Refuse a teacher that does not read the student's tokens, unless scores are aligned.

    Raises:
        UserError: the tokenizers differ, or the student has no terminator that may be drawn.
    """
    compared = compare_pair(student, teacher)
    if compared.difference is not None and not aligns:
        other = ", or set scores.alignment={kind: bytes}" if compared.aligns else ""
        raise UserError(
            f"student {student.folder} and teacher {teacher.folder} have different tokenizers: "
            f"{compared.difference}; use a teacher with the student's tokenizer{other}"
        )
    if not student.terminators():
        raise UserError(
            f"student {student.folder} names no eos_token_id; expected one in "
            "generation_config.json or config.json; add it"
        )
    readers = [student] if compared.difference is not None else [student, teacher]
    known, ends = min(model.known_ids for model in readers), student.terminators()
    if min(ends) >= known:
        raise UserError(
            f"student {student.folder} ends texts with id {ends[0]}, and the models share ids "
            f"below {known}, so that it could never end one; name an eos_token_id that both know "
            "in its generation_config.json, or use a teacher whose tokenizer has that token"
        )


@lru_cache(maxsize=4)
def compare_pair(student: Checkpoint, teacher: Checkpoint) -> TokenizerComparison:
    """Whether the ids of a student mean the same to its teacher.

    Raises:
        UserError: a tokenizer cannot be read.
    """
    if student.identity.tokenizer_sha256 == teacher.identity.tokenizer_sha256:
        return TokenizerComparison()
    return compare_tokenizers(_meaning(student), _meaning(teacher))


def _meaning(model: Checkpoint) -> TokenizerMeaning:
    meaning = folder_meaning(model.folder)
    if meaning is None:
        raise UserError(
            f"the tokenizer of {model.folder} is not a fast one, and is compared with another; "
            "save it with a fast tokenizer (tokenizer.json)"
        )
    return meaning


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor of a checkpoint; see `weight_files`."""
    return {name: stored.shape for name, stored in weight_files(folder).items()}


class StoredTensor(NamedTuple):
    """Where a tensor of a checkpoint lies, and what it is."""

    path: Path
    shape: list[int]
    dtype: str  # as torch names it, of floating numbers


def weight_files(folder: Path) -> dict[str, StoredTensor]:
    """Name -> file, shape and dtype of every tensor of a checkpoint, off the headers of its files.

    Raises:
        UserError: a file is missing, cut off, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    listed = indexed_files(folder)
    found: dict[str, StoredTensor] = {}
    for name in sorted(listed or {path.name for path in folder.glob("*.safetensors")}):
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"{folder / INDEX} lists {name}, which is not there; copy the checkpoint again"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                for key in list(file.keys()):
                    part = file.get_slice(key)
                    dtype = str(part.get_dtype())
                    found[key] = StoredTensor(path, part.get_shape(), FLOATS.get(dtype, dtype))
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} is no whole safetensors file ({reason}); copy the checkpoint again"
            ) from error
    return found


def published_dtype(folder: Path) -> str:
    """The dtype of policies that start from a checkpoint: float32, or one of 16 bits.

    It is that of config.json, or where it names none that of most weights. Policies of a quantised
    checkpoint are whole, and float32.
    """
    raw = checkpoint_json(folder / "config.json")
    nested = raw.get("text_config")
    sections = [raw, nested if is_object(nested) else {}]
    named = [each.get(key) for each in sections for key in ("dtype", "torch_dtype")]
    found = next((name for name in named if isinstance(name, str)), None)
    if raw.get("quantization_config"):
        return "float32"
    if found is None:
        sizes: Counter[str] = Counter()
        for stored in weight_files(folder).values():
            sizes[stored.dtype] += prod(stored.shape)
        found = max(sizes, key=lambda name: sizes[name], default="float32")
    return found if found in NARROW else "float32"


def tokenizer_size(folder: Path) -> int:
    """One more than the largest id of a folder's tokenizer; needs no transformers."""
    return _tokenizer_size(folder.resolve())


@lru_cache(maxsize=8)
def _tokenizer_size(folder: Path) -> int:
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    found = Tokenizer.from_file(str(path)) if path.is_file() else open_tokenizer(folder)
    added = map(int, read_settings(folder).get("added_tokens_decoder", ()))
    return max([*found.get_vocab().values(), *added], default=-1) + 1


def student_shape(checkpoint: Checkpoint, lora: Lora | None) -> ModelShape:
    """The same of a student in training, perhaps under adapters."""
    shape = model_shape(checkpoint)
    if lora is None or shape.unknown:
        return shape
    return replace(shape, adapter_weights=adapter_weights(weight_shapes(checkpoint.folder), lora))


def model_shape(checkpoint: Checkpoint) -> ModelShape:
    """What a model's cost follows from; unknown, with the reason, where its files do not say it."""
    config = checkpoint.config
    if checkpoint.is_served:
        return ModelShape(unknown="it is served, and its weights are not here")
    if config.is_quantised:
        return ModelShape(unknown="its weights are packed")
    try:
        return shape_of(config.settings, weight_shapes(checkpoint.folder))
    except UserError as error:
        return ModelShape(unknown=str(error))
