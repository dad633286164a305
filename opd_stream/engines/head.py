"""The output head of any causal language model, apart from its decoder.

Engines and training call the decoder and the head apart, so that logits exist only for the rows
that need them. What a model does between its head and its logits is read off its config here.
"""

from typing import Any

import torch

from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.logprobs import Head


def logits_head(model: Any) -> Head:
    """hidden [n, H] -> logits [n, V], by the model's own module (sampling and scoring)."""
    head, (scale, cap) = model.get_output_embeddings(), _scale_and_cap(model.config)
    if cap is None and scale == 1.0:
        return head

    def capped(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden) * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return capped


def output_head(model: Any) -> OutputHead:
    """The head's weights, for the fused loss; a LoRA adapter on it is added to the weight.

    Raises:
        UserError: the head is no linear layer, or its adapter has dropout.
    """
    module, (scale, cap) = model.get_output_embeddings(), _scale_and_cap(model.config)
    base = getattr(module, "base_layer", module)
    if not isinstance(base, torch.nn.Linear):
        raise UserError(
            f"the student's output head is a {type(base).__name__}; the fused loss needs a linear "
            "layer; train an unquantised student"
        )
    weight_VH = base.weight
    for name in getattr(module, "active_adapters", ()):
        if not isinstance(module.lora_dropout[name], torch.nn.Identity):
            raise UserError("train.lora.dropout on the output head; leave lm_head out of targets")
        delta_VH = module.lora_B[name].weight @ module.lora_A[name].weight
        weight_VH = weight_VH + delta_VH * module.scaling[name]
    return OutputHead(weight_VH=weight_VH, bias_V=base.bias, scale=scale, cap=cap)


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What stands between head and logits: Cohere's and Granite's scales, Gemma's soft cap."""
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return factor / divisor, getattr(config, "final_logit_softcapping", None)
