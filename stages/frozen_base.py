"""The frozen base of adapters: as it is stored or in fewer bits, and never twice.

A number of 16 bits is one of 32, so nothing is rounded: outputs and gradients are those of a
float32 copy, bit for bit, and a matrix is only widened for the product it is in. One that is stored
in float32 is narrowed likewise where products have 16 bits: autocast would keep a copy for the
backward pass. What is no plain linear layer or embedding becomes float32.

A quantised base (`train.lora.base`) is another function than the student that it was made of. It is
the one that adapters are trained on, so a policy is published with it: matrices are made whole,
adapters added in float32. The same student always gives the same bits.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.nn.functional import linear

from opd_stream.engines.loading import load_model
from opd_stream.engines.reading import decoder_of
from opd_stream.errors import UserError
from stages.checkpoints import NARROW, weight_files

Bits = Literal["8bit", "4bit"]


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
    if dtype in NARROW and any(buffer.dtype == narrow for buffer in model.buffers()):
        model = load_model(folder, dtype=torch.float32)  # their constants would be rounded
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


def quantise(model: Any, bits: Bits) -> None:
    """Keep the plain linear layers of a model's decoder in 8 or 4 bits, in place, one by one."""
    for module in decoder_of(model).modules():
        if type(module) in (torch.nn.Linear, _Linear):
            module.__class__ = _Quantised
            module.pack(bits)
    for parameter in model.parameters():  # of which one would keep the whole file mapped
        if parameter.dtype != torch.uint8:
            parameter.data = parameter.data.clone()


def make_whole(layer: Any) -> bool:
    """Give a linear layer of a frozen base its weight in float32; whether it had 16 bits or fewer.

    A quantised one becomes a plain one.
    """
    weight = layer.weight
    is_narrow = weight.itemsize <= 2
    if isinstance(layer, _Quantised):
        weight.data = layer.whole(torch.float32)
        cast(Any, layer).__class__ = torch.nn.Linear
    weight.data = weight.data.float()
    return is_narrow


def is_quantised(layer: torch.nn.Module) -> bool:
    """Whether `quantise` has packed a layer."""
    return isinstance(layer, _Quantised)


def check_quantised(bits: Bits, device: torch.device) -> None:
    """Try the library on one small matrix.

    Raises:
        UserError: it does not work on the device.
    """
    layer = torch.nn.Linear(64, 64, device=device)
    layer.__class__ = _Quantised
    try:
        cast(_Quantised, layer).pack(bits)
        layer(torch.ones(1, 64, device=device))
    except Exception as error:  # of the library
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"train.lora.base is {bits}, which bitsandbytes does not do on {device.type} "
            f"({reason}); leave base out, or install a version that does"
        ) from error


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


def _product(
    input: torch.Tensor, whole: Callable[[torch.dtype], torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """input @ W.T + bias in the dtype of products, for which W is made twice and not kept."""
    device = input.device.type
    is_mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_mixed else input.dtype
    return cast(Any, _Product.apply)(input.to(dtype), whole, bias)


class _Linear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device, dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if self.weight.dtype == dtype:
            return super().forward(input)
        return _product(input, self.weight.to, self.bias)


class _Quantised(torch.nn.Linear):
    """Blocks of 64 numbers with one scale: NF4, or 8 bits that are denser at zero."""

    def pack(self, bits: Bits) -> None:
        import bitsandbytes.functional as library  # pyright: ignore[reportMissingImports]

        pack, self._unpack = {
            "8bit": (library.quantize_blockwise, library.dequantize_blockwise),
            "4bit": (library.quantize_nf4, library.dequantize_nf4),
        }[bits]
        self.weight.requires_grad_(False)
        flat = self.weight.data.float().flatten()  # 0.50 misreads odd rows on a CPU
        self.weight.data, self._state = pack(flat, blocksize=64)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        if self._state.absmax.device != self.weight.device:
            self._state.to(self.weight.device)
        flat = self._unpack(self.weight, self._state)
        return flat.view(self.out_features, self.in_features).to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _product(input, self.whole, self.bias)


class _Embedding(torch.nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        whole: Callable[[torch.dtype], torch.Tensor],
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.whole = whole
        with torch.autocast(input.device.type, enabled=False):
            wide = None if bias is None else bias.to(input.dtype)
            return linear(input, whole(input.dtype), wide)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        return torch.matmul(grad, ctx.whole(grad.dtype)), None, None
