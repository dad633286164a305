"""Lightning checkpoints without pickle: a folder of safetensors and JSON, published by a rename."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from opd_stream.store.files import sync_tree
from opd_stream.store.tree import load_tree, save_tree


class TreeCheckpointIO(CheckpointIO):
    """Saves and loads the trainer's state as a tree."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        target = Path(path)
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
        save_tree(checkpoint, temporary)
        sync_tree(temporary)
        temporary.rename(target)

    def load_checkpoint(self, path: str | os.PathLike[str], *unused: Any, **named: Any) -> Any:
        return load_tree(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        shutil.rmtree(path, ignore_errors=True)
