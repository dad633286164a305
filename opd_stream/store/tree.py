"""Nested state (optimizers, checkpoints) as safetensors and JSON: no pickle, exact round trip.

Tensors go to `tensors.safetensors`; everything else, with a reference where a tensor stood, goes to
`tree.json`. Dictionaries with integer keys (optimizer state) keep them.
"""

# The values of a tree may be anything.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from opd_stream.section import is_list, is_object
from opd_stream.store.files import canonical_json, explained, publish
from opd_stream.store.sealed import read_json


def save_tree(tree: Any, folder: Path) -> None:
    """Write a tree of dicts, lists, tuples, numbers, strings, None and tensors.

    Raises:
        TypeError: the tree holds something else (says what and where).
    """
    tensors: dict[str, torch.Tensor] = {}
    value = _encode(tree, tensors, {}, "")
    folder.mkdir(parents=True, exist_ok=True)
    with explained(folder):
        save_file(tensors, folder / "tensors.safetensors")
    publish(folder / "tree.json", canonical_json(value))


def load_tree(folder: Path) -> Any:
    """Read a tree back."""
    return _decode(read_json(folder / "tree.json"), load_file(folder / "tensors.safetensors"))


def _encode(
    value: Any, tensors: dict[str, torch.Tensor], names: dict[Any, str], path: str
) -> object:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()  # no copy where it is: it is written at once
        place = (tensor.data_ptr() if tensor.numel() else path, tensor.shape, tensor.dtype)
        if place not in names:  # tied weights are one tensor
            names[place] = f"{len(tensors)}{path}"
            tensors[names[place]] = tensor
        return {"tensor": names[place]}
    if is_object(value):
        items = [
            [key, _encode(item, tensors, names, f"{path}.{key}")] for key, item in value.items()
        ]
        return {"ordered" if isinstance(value, OrderedDict) else "dict": items}
    if is_list(value) or isinstance(value, tuple):
        parts = cast("Sequence[Any]", value)
        items = [_encode(part, tensors, names, f"{path}.{n}") for n, part in enumerate(parts)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot save a {type(value).__name__} at {path or 'the root'} of a tree")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if is_list(value):
        return [_decode(item, tensors) for item in value]
    if not is_object(value):
        return value
    tag: str
    content: Any
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    pairs = [(key, _decode(item, tensors)) for key, item in content]
    return OrderedDict(pairs) if tag == "ordered" else dict(pairs)
