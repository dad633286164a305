"""Decoder and head of any causal language model, run apart.

Engines and training call the two apart, so that logits exist only for the rows that need them. This
file says which hidden states those are, and what a model does between its head and its logits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opd_stream.engines.base import Ids
from opd_stream.engines.reading import (
    CachedRows,
    is_worth_it,
    passes_of,
    reading_of,
    rows_hidden,
    saves_enough,
)
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.logprobs import Head, completion_rows

FACTOR = "lm_head_multiplier"  # Falcon H1; Cohere's logit_scale is an attribute of the model
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM; Inkling
MULTIPLYING = ("hyperclovax",)  # where logits_scaling is a factor
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logits_head(model: Any) -> Head:
    """hidden [n, H] -> logits [n, V], by the model's own module (sampling and scoring)."""
    head, (scale, cap) = model.get_output_embeddings(), _scale_and_cap(model)
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
    module, (scale, cap) = model.get_output_embeddings(), _scale_and_cap(model)
    base = getattr(module, "base_layer", module)
    if not isinstance(base, torch.nn.Linear):
        raise UserError(
            f"the student's output head is a {type(base).__name__}; the fused loss needs a linear "
            "layer; train an unquantised student"
        )
    weight_VH = base.weight
    is_plain = getattr(module, "disable_adapters", False)
    for name in () if is_plain else getattr(module, "active_adapters", ()):
        if not isinstance(module.lora_dropout[name], torch.nn.Identity):
            raise UserError("train.lora.dropout on the output head; leave lm_head out of targets")
        delta_VH = module.lora_B[name].weight @ module.lora_A[name].weight
        weight_VH = weight_VH + delta_VH * module.scaling[name]
    return OutputHead(weight_VH=weight_VH, bias_V=base.bias, scale=scale, cap=cap)


def _scale_and_cap(model: Any) -> tuple[float, float | None]:
    """What stands between head and logits, by the names that the library's models have for it."""
    text = model.config.get_text_config()
    scale = getattr(model, "logit_scale", None) or 1.0
    scale *= getattr(text, FACTOR, None) or 1.0
    for name in DIVISORS:
        divisor = getattr(text, name, None) or 1.0
        scale = scale * divisor if text.model_type in MULTIPLYING else scale / divisor
    caps = [getattr(text, name, None) for name in CAPS]
    return scale, next((cap for cap in caps if cap is not None), None)


def completion_hidden(
    decoder: Any, prompts: Sequence[Ids], completions: Sequence[Ids], device: torch.device
) -> torch.Tensor:
    """Hidden states that predict the completion tokens [N, H], row after row.

    Args:
        decoder: of a Hugging Face causal language model, without its head.
        prompts: ids of each row; equal ones are read once where that saves enough.
        completions: ids of each row; some may be empty.
        device: of the model.
    """
    place_of: dict[bytes, int] = {}
    shared_R = [
        place_of.setdefault(ids.astype(np.int64).tobytes(), len(place_of)) for ids in prompts
    ]
    unique = [prompts[shared_R.index(place)] for place in range(len(place_of))]
    completion_tokens = sum(map(len, completions))
    separately = sum(map(len, prompts)) + completion_tokens
    together = sum(map(len, unique)) + completion_tokens
    if max(map(len, completions)) <= 1 or not (reading := reading_of(decoder)).continues:
        return _hidden_of_whole_rows(decoder, prompts, completions, device)
    beginning = _common_beginning(unique)
    shared, of_prompts = len(beginning), sum(map(len, unique))
    if reading.shares and is_worth_it(shared, len(unique), of_prompts):
        together -= shared * (len(unique) - 1)
    after_beginning = separately - shared * (len(prompts) - 1)
    if saves_enough(together, separately) and together <= after_beginning:
        return _hidden_after_shared_prompts(decoder, unique, shared_R, completions, device)
    if is_worth_it(shared, len(prompts), separately):
        return _hidden_after_beginning(decoder, beginning, prompts, completions, device)
    return _hidden_of_whole_rows(decoder, prompts, completions, device)


def _common_beginning(rows: Sequence[Ids]) -> Ids:
    """The ids that all rows begin with."""
    shortest = min(map(len, rows))
    differs = np.stack([row[:shortest] != rows[0][:shortest] for row in rows]).any(0)
    return rows[0][: int(differs.argmax()) if differs.any() else shortest]


def _hidden_after_beginning(
    decoder: Any,
    beginning: Ids,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    device: torch.device,
) -> torch.Tensor:
    """What all prompts begin with once; then the rest of each row as if it were a completion."""
    rests = [ids[len(beginning) :] for ids in prompts]
    texts = [np.concatenate(pair) for pair in zip(rests, completions, strict=True)]
    hidden = _hidden_after_shared_prompts(decoder, [beginning], [0] * len(texts), texts, device)
    counts = [(len(rest), len(each)) for rest, each in zip(rests, completions, strict=True)]
    is_completion = np.repeat([[False, True]] * len(texts), np.ravel(counts))
    return hidden[from_numpy(is_completion, device)]


def _hidden_of_whole_rows(
    decoder: Any, prompts: Sequence[Ids], completions: Sequence[Ids], device: torch.device
) -> torch.Tensor:
    """Each row whole, padded on the right."""
    rows = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    found: list[torch.Tensor] = []
    for chosen in passes_of([len(row) for row in rows]):
        ids, mask = padded(rows[chosen], device, side="right")
        hidden = rows_hidden(decoder, ids, mask)
        places = completion_rows(
            torch.tensor([len(prompt) for prompt in prompts[chosen]]),
            torch.tensor([len(completion) for completion in completions[chosen]]),
            padded_length=ids.shape[1],
        )
        found.append(hidden.flatten(0, 1)[places.to(device)])
    return torch.cat(found)


def _hidden_after_shared_prompts(
    decoder: Any,
    prompts: Sequence[Ids],
    shared_R: Sequence[int],
    completions: Sequence[Ids],
    device: torch.device,
) -> torch.Tensor:
    """Prompts once, padded on the left; then completions on their keys and values."""
    reading = reading_of(decoder)
    read = CachedRows(decoder, reading)
    of_prompts = read.prefill(*padded(prompts, device, side="left"))
    found: list[torch.Tensor] = []
    passes = passes_of([len(completion) for completion in completions])
    if reading.rereads:  # one column alone is not exact, which a pass of short rows would be
        passes = [slice(0, len(completions))]
    for chosen in passes:
        part = read if chosen == passes[-1] else read.copy()
        rows = torch.tensor(shared_R[chosen], device=device)
        part.select(rows)
        new = [completion[:-1] for completion in completions[chosen]]
        hidden = of_prompts[rows][:, None]
        if any(map(len, new)):
            more = part.read(*padded(new, device, side="right"))
            hidden = torch.cat([hidden, more], dim=1)
        counts = torch.tensor([len(each) for each in completions[chosen]], device=device)
        found.append(hidden[torch.arange(hidden.shape[1], device=device) < counts[:, None]])
    return torch.cat(found)


def padded(
    rows: Sequence[Ids], device: torch.device, *, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [R, L]; padding is id 0 and never read."""
    width = max(map(len, rows))
    ids, mask = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    for place, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[place, start : start + len(row)] = row
        mask[place, start : start + len(row)] = 1
    return from_numpy(ids, device), from_numpy(mask, device)


def from_numpy(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on a device."""
    return torch.from_numpy(array).to(device)  # pyright: ignore[reportUnknownMemberType]
