"""What a checkpoint's config files say of its language model; torch where they leave it open.

A multimodal checkpoint keeps the settings of its language model in a section of `config.json`,
older families use names of their own, and a config may leave out what its class fills in. What the
file does not say in the usual words is asked of transformers.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard, cast

from opd_stream.errors import UserError
from opd_stream.section import is_object
from opd_stream.store.files import checkpoint_json

USUAL = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The language model of a checkpoint folder.

    Example:
        >>> read_model_config(Path("configs/models/ledger-student")).vocabulary
        606
    """

    settings: dict[str, Any]  # of the language model, in the usual words
    vocabulary: int  # logits of a token
    context: int | None  # tokens that it reads at once; None: no limit is named
    terminators: dict[str, frozenset[int]]  # file -> ids that end a text, of files that name any
    is_quantised: bool
    shares_head: bool  # head and embeddings are one matrix


def read_model_config(folder: Path) -> ModelConfig:
    """Read the config files of a checkpoint folder.

    Raises:
        UserError: a file is no JSON object, or holds what no model has.
    """
    path = folder / "config.json"
    stats = [_stamp(path), _stamp(folder / GENERATION)]
    return _read(folder, tuple(stats))


def _stamp(path: Path) -> tuple[int, int] | None:
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None


@lru_cache(maxsize=16)
def _read(folder: Path, _stamps: tuple[Any, ...]) -> ModelConfig:
    raw = checkpoint_json(folder / "config.json")
    settings = raw if all(_is_count(raw.get(name)) for name in USUAL) else _filled_in(folder)
    vocabulary = settings.get("vocab_size")
    if not _is_count(vocabulary):
        raise UserError(
            f"{folder}/config.json names no vocab_size ({vocabulary!r:.40}); expected the config "
            "of a language model; check the folder"
        )
    terminators: dict[str, frozenset[int]] = {}
    generation = checkpoint_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    own, default = raw.get("eos_token_id"), settings.get("eos_token_id")
    if own is None and not (_is_count(default) and default >= vocabulary):
        own = default  # of the section of the language model, or of its class
    for name, value in ((GENERATION, generation.get("eos_token_id")), ("config.json", own)):
        if found := _terminators(folder / name, value, vocabulary):
            terminators[name] = found
    return ModelConfig(
        settings=settings,
        vocabulary=vocabulary,
        context=context_of(settings),
        terminators=terminators,
        is_quantised=bool(raw.get("quantization_config")),
        shares_head=bool(raw.get("tie_word_embeddings", settings.get("tie_word_embeddings"))),
    )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _filled_in(folder: Path) -> dict[str, Any]:
    """The language model's settings with what its class fills in, in the usual words."""
    from transformers import AutoConfig

    auto: Any = AutoConfig
    try:
        config = auto.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config(decoder=True)
        usual = {name: getattr(text, name, None) for name in USUAL}
        tied = getattr(config, "tie_word_embeddings", False)
        return {**text.to_dict(), **usual, "tie_word_embeddings": tied}
    except Exception as error:  # whatever the class of the config says of its values
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}/config.json cannot be read by transformers ({reason}); expected the config "
            "of a causal language model; check the folder, or update transformers"
        ) from error


def _terminators(path: Path, value: Any, vocabulary: int) -> frozenset[int]:
    if value is None:
        return frozenset()
    ids: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    for each in ids:
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < vocabulary:
            raise UserError(
                f"{path} names eos_token_id {each!r:.40}; expected ids from 0 to "
                f"{vocabulary - 1}, which the model has logits for; correct it"
            )
    return frozenset(ids)


def context_of(settings: dict[str, Any]) -> int | None:
    """Tokens that are read at once with one set of position factors.

    Rotations of kind longrope are others for every token of a text that is longer than the original
    context, so a cache of short texts cannot be continued beyond it.
    """
    found = settings.get("max_position_embeddings")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling")
    if is_object(rope) and "longrope" in (rope.get("rope_type"), rope.get("type")):
        original = rope.get("original_max_position_embeddings")
        found = original or settings.get("original_max_position_embeddings") or found
    return found if _is_count(found) else None
