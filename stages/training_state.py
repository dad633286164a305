"""Training state that any number of processes can read: whole tensors by parameter name.

Optimizer moments and, in the middle of a round, weights are gathered to whole tensors before they
are written, so a run may continue with another number of processes or another strategy.
"""

import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from opd_stream.store.files import sync_tree
from opd_stream.store.tree import load_tree, save_tree

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{parameter name: moments}; every process takes part, the first one gets the tensors."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE).get("state", {})  # pyright: ignore


def load_optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Continue with moments that were saved before; settings stay those of the optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    whole: dict[str, Any] = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=_WHOLE)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained; every process takes part, the first one gets the tensors."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)  # pyright: ignore[reportReturnType]


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put saved weights back."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, state, options=options)  # pyright: ignore[reportArgumentType]


def save_checkpoint(scratch: Path, steps: int, state: dict[str, Any]) -> None:
    """A checkpoint named by the steps of the round; it appears whole, earlier ones go."""
    scratch.mkdir(parents=True, exist_ok=True)
    target = scratch / f"{steps:08d}"
    temporary = scratch / f".{target.name}.{uuid.uuid4().hex}.tmp"
    save_tree(state, temporary)
    sync_tree(temporary)
    temporary.rename(target)
    for older in _checkpoints(scratch)[:-1]:
        shutil.rmtree(older, ignore_errors=True)


def latest_checkpoint(scratch: Path) -> dict[str, Any] | None:
    """The state to continue from, if there is one."""
    found = _checkpoints(scratch)
    return load_tree(found[-1]) if found else None


def _checkpoints(scratch: Path) -> list[Path]:
    return sorted(path for path in scratch.glob("[0-9]*") if path.is_dir())
