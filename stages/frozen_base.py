"""The frozen base of adapters in the 16 bits that it is stored in, computed as if it were float32.

A number of 16 bits is one of 32, so nothing is rounded: outputs and gradients are those of a
float32 copy, bit for bit, and a matrix is only widened for the product it is in. What is no plain
linear layer or embedding becomes float32.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import linear

from opd_stream.engines.loading import load_model
from stages.checkpoints import NARROW, weight_files


def load_frozen(folder: Path) -> Any:
    """A causal language model whose weights get no gradients.

    Of a checkpoint that does not have all of its tensors in one dtype of 16 bits it is float32.

    Raises:
        UserError: as `load_model`.
    """
    stored = {tensor.dtype for tensor in weight_files(folder).values()}
    (dtype,) = stored if len(stored) == 1 else ("float32",)
    narrow = getattr(torch, dtype if dtype in NARROW else "float32")
    model = load_model(folder, dtype=narrow)
    if dtype in NARROW:
        if any(buffer.dtype == narrow for buffer in model.buffers()):  # constants, now rounded
            model = load_model(folder, dtype=torch.float32)
        _compute_in_float32(model, narrow)
    return model


@contextlib.contextmanager
def seen_as_float32(model: Any) -> Iterator[None]:
    """Inside, narrow weights look like float32 ones: peft makes adapters in the base's dtype."""
    held = {p: p.data for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for parameter, data in held.items():
        parameter.data = torch.empty(0, device=data.device)
    try:
        yield
    finally:
        for parameter, data in held.items():
            parameter.data = data


def _compute_in_float32(model: Any, narrow: torch.dtype) -> None:
    plain = {torch.nn.Linear: _Linear, torch.nn.Embedding: _Embedding}
    chosen = [module for module in model.modules() if type(module) in plain]
    others = [module for module in model.modules() if type(module) not in plain]
    shared = {id(p) for module in others for p in module._parameters.values()}
    kept = {id(module.weight) for module in chosen} - shared
    for module in chosen:
        module.__class__ = plain[type(module)]
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(narrow if id(tensor) in kept else torch.float32)


class _Linear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if self.weight.dtype == dtype:
            return super().forward(input)
        apply = cast(Any, _Product.apply)
        return apply(input.to(dtype), self.weight, self.bias)


class _Embedding(torch.nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


class _Product(torch.autograd.Function):
    """x @ W.T + b, for whose backward pass W is widened again."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        with torch.autocast(input.device.type, enabled=False):
            wide = None if bias is None else bias.to(input.dtype)
            return linear(input, weight.to(input.dtype), wide)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,), (weight,) = grads, ctx.saved_tensors
        return torch.matmul(grad, weight.to(grad.dtype)), None, None
