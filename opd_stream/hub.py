"""Folders to and from the Hugging Face hub; everything that it refuses is one line."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from opd_stream.errors import UserError, shortened
from opd_stream.store.files import inside

RepoKind = Literal["model", "dataset"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKEN = "set HF_TOKEN to a token that may write, or call `hf auth login`"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def has_hub_form(text: str) -> bool:
    """Whether a text has the form ORGANISATION/NAME."""
    return _HUB_ID.fullmatch(text) is not None


def check_push(hub_id: str) -> None:
    """Refuse, before any work, what cannot be pushed.

    Raises:
        UserError: the id is none, or there is no token.
    """
    import huggingface_hub

    hub: Any = huggingface_hub
    if not has_hub_form(hub_id):
        raise UserError(f"{shortened(hub_id)} is no id of the hub; expected ORGANISATION/NAME")
    if hub.get_token() is None:
        raise UserError(f"{hub_id} cannot be pushed: there is no token of the hub; {_TOKEN}")


def push_folder(folder: Path, hub_id: str, *, kind: RepoKind, is_public: bool) -> str:
    """Upload a folder in one commit, to a repository that is made where there is none.

    Weights that the folder does not have are removed there: a loader might read both.

    Args:
        folder: all of it is uploaded.
        hub_id: ORGANISATION/NAME.
        kind: of the repository.
        is_public: whether everybody may read it.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub refuses or is not reached, or the repository is public and should not be.
    """
    import huggingface_hub

    check_push(hub_id)
    hub: Any = huggingface_hub
    api = hub.HfApi()
    with _refusals(f"{hub_id} cannot be pushed", _TOKEN):
        address = api.create_repo(hub_id, repo_type=kind, private=not is_public, exist_ok=True)
        found = api.repo_info(hub_id, repo_type=kind)
    if not is_public and not found.private:
        raise UserError(
            f"{hub_id} is public, and everybody would read what is pushed; say --public, or name "
            "another repository"
        )
    with _refusals(f"{hub_id} cannot be pushed", _TOKEN):
        api.upload_folder(
            repo_id=hub_id,
            repo_type=kind,
            folder_path=folder,
            commit_message="Push from opd-stream",
            delete_patterns=list(_WEIGHTS) if kind == "model" else None,
        )
    return str(address)


def pull_folder(hub_id: str, folder: Path, *, revision: str | None, wanted: Sequence[str]) -> None:
    """Fetch files of a data set of the hub.

    Args:
        hub_id: ORGANISATION/NAME.
        folder: empty; its files lie there by their names in the repository.
        revision: branch, tag or commit; None: the main branch.
        wanted: patterns of names; nothing else is fetched.

    Raises:
        UserError: the hub does not give it, or a name leads out of the folder.
    """
    import huggingface_hub

    hub: Any = huggingface_hub
    api = hub.HfApi()
    with _refusals(f"{hub_id} cannot be pulled", "check id and revision, or set HF_TOKEN"):
        found = api.repo_info(hub_id, repo_type="dataset", revision=revision)
        names = [each.rfilename for each in found.siblings]
        for name in names:
            inside(folder, name)
        hub.snapshot_download(
            hub_id,
            repo_type="dataset",
            revision=found.sha,
            local_dir=folder,
            allow_patterns=list(wanted),
        )


@contextmanager
def _refusals(what: str, remedy: str) -> Generator[None]:
    """Turn what the hub or the network says into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the hub, its library, or the network
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = " ".join(str(error).split())[:160]
        if status in (401, 403):
            reason = f"the hub refuses it, status {status}; {remedy}"
        elif status is not None:
            reason = f"the hub answers with status {status}: {text}; {remedy}"
        else:
            reason = f"{type(error).__name__}: {text}; check the network and HF_ENDPOINT"
        raise UserError(f"{what}: {reason}") from error
