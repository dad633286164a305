"""The output head of any causal language model as one function from hidden states to logits.

Engines and training call the decoder and the head apart, so that logits exist only for the rows
that need them. What a model does between its head and its logits is done here too.
"""

from typing import Any

import torch

from opd_stream.logprobs import Head


def logits_head(model: Any) -> Head:
    """hidden [n, H] -> logits [n, V], with the soft cap or scale of the model's config."""
    head, config = model.get_output_embeddings(), model.config
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    if cap is None and factor == divisor == 1.0:
        return head

    def capped(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden) * (factor / divisor)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return capped
