"""Where a checkpoint lies: a local folder, a model of the Hugging Face hub, or a GGUF file.

Models that come with the package are opd-stream/NAME, hub models are found in the library's own
cache, GGUF files are converted once to a folder of safetensors; `fetch` does the latter two where
something is missing, and nothing else does.
"""

import hashlib
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from opd_stream.embedded import embedded_model
from opd_stream.errors import UserError
from opd_stream.hub import has_hub_form
from opd_stream.store.files import indexed_files

log = logging.getLogger("opd_stream")

# Weights as safetensors, and everything that is text: no pickles.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def is_hub_id(path: Path | str) -> bool:
    """Whether a path has the form ORGANISATION/NAME and is no local folder or file."""
    return has_hub_form(str(path)) and not Path(path).exists()


def local_folder(path: Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint on this machine, fetched or converted before.

    Unless `weights`, one with config and tokenizer alone will do.

    Raises:
        UserError: it has to be fetched or converted first (says how).
    """
    if is_hub_id(path):
        found = _here(path, revision, weights=weights)
        if found is None:
            raise UserError(
                f"{path} is no local folder, and no model of that name was fetched from the "
                f"Hugging Face hub; fetch it with `{_command(path, revision)}`, or correct the path"
            )
        return found
    if revision is not None:
        raise UserError(
            f"revision is {revision!r} and {path} is no model of the hub; revisions are of hub "
            "models alone; leave it out, or name the model as ORGANISATION/NAME"
        )
    if (file := _gguf_file(path)) is None:
        return path
    folder = _converted(file)
    if not folder.is_dir():
        raise UserError(
            f"{file} was not converted yet; `opd-stream fetch CONFIG` makes a folder of "
            "safetensors of it once"
        )
    return folder


def fetch(path: Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The same, fetched from the hub or converted where that is missing.

    Raises:
        UserError: the hub does not give it, or the GGUF file cannot be read.
    """
    if is_hub_id(path):
        found = _here(path, revision, weights=weights)
        return found or _download(path, revision, weights=weights)
    file = None if revision is not None else _gguf_file(path)  # refused below
    if file is not None and not _converted(file).is_dir():
        _convert(file, _converted(file))
    return local_folder(path, revision, weights=weights)


def _command(path: Path, revision: str | None) -> str:
    return f"hf download {path}" + ("" if revision is None else f" --revision {revision}")


def _here(path: Path, revision: str | None, *, weights: bool) -> Path | None:
    """The folder of a model that has a name, if it came with the package or was fetched."""
    own = embedded_model(path) if revision is None else None
    return own or _in_hub_cache(path, revision, weights=weights)


def _in_hub_cache(path: Path, revision: str | None, *, weights: bool) -> Path | None:
    """A fetched snapshot with config and weights; a listing alone may have left some out."""
    from huggingface_hub import constants, try_to_load_from_cache

    at = constants.HF_HUB_CACHE
    found = try_to_load_from_cache(str(path), "config.json", revision=revision, cache_dir=at)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    if not weights:
        return folder
    is_whole = all((folder / name).exists() for name in indexed_files(folder))
    return folder if is_whole and any(folder.glob("*.safetensors")) else None


def _download(path: Path, revision: str | None, *, weights: bool) -> Path:
    import huggingface_hub

    hub: Any = huggingface_hub
    patterns = [name for name in _WANTED if weights or name != "*.safetensors"]
    wanted = {"revision": revision, "allow_patterns": patterns}
    log.info("fetching %s from the Hugging Face hub", path)
    try:
        return Path(
            hub.snapshot_download(str(path), cache_dir=hub.constants.HF_HUB_CACHE, **wanted)
        )
    except Exception as error:  # of the network, the hub, or its access rules
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(
            f"{path} is no local folder, and cannot be fetched from the Hugging Face hub "
            f"({reason}); fetch it where there is a network with `{_command(path, revision)}`, or "
            "correct the path"
        ) from error


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path names; None: it is a folder with weights of its own.

    Raises:
        UserError: a folder holds several.
    """
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path} does not exist; expected a GGUF file; check the path")
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise UserError(f"{path} holds {len(files)} GGUF files ({names}); name one of them")
    return files[0] if files else None


def _converted(file: Path) -> Path:
    """Where the safetensors of a GGUF file are kept, as long as the file does not change."""
    stat = file.stat()
    key = f"{file.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode()
    cache = os.environ.get("OPD_STREAM_CACHE") or "~/.cache/opd-stream"
    return Path(cache).expanduser() / "gguf" / f"{file.stem}-{hashlib.sha256(key).hexdigest()[:16]}"


def _convert(file: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as float32 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from opd_stream.engines.loading import unquantised

    disable_progress_bar()
    log.info("converting %s to safetensors in %s", file, folder)
    auto: Any = AutoModelForCausalLM
    tokenizers: Any = AutoTokenizer
    given: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(file, folder, error) from error
    try:
        read = auto.from_pretrained(file.parent, dtype=torch.float32, **given)
        with torch.device("meta"):
            model = unquantised(read)
        model.generation_config = read.generation_config
        model.save_pretrained(temporary)
        tokenizers.from_pretrained(file.parent, **given).save_pretrained(temporary)
    except Exception as error:  # of the library, or of the file format
        shutil.rmtree(temporary, ignore_errors=True)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{file} cannot be read as a language model ({reason}); expected a GGUF file of an "
            "architecture that transformers reads, and the package gguf (pip install gguf)"
        ) from error
    try:
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # else another process was faster
            raise _unwritable(file, folder, error) from error


def _unwritable(file: Path, folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{file} is to be converted, and {folder} cannot be written ({error.strerror}); set "
        "OPD_STREAM_CACHE to a folder that can"
    )
