"""Floating-point operations of the stages, from a model's weights and token counts; needs no torch.

A forward pass over n tokens costs 2 operations a weight and token in the matrices of the layers
(of experts, those that a token is sent to), 4 d a layer for every (token, context token) pair of
causal attention, and 2 H V for every token whose logits are made. A backward pass costs twice its
forward pass; where the weights are frozen under adapters, what they multiply costs once, and the
adapters are counted beside them. Counts of tokens, of completion tokens and of attended pairs add
over rows, so a round's cost follows from its commit records. What is read to no end is left out:
padding, and the row that a process without work takes part with.

Matrices are counted as they stand in the checkpoint, whatever its fields are called. The scans of
recurrent layers are small beside them and left out; so is what does not follow from a checkpoint,
and that is said.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from opd_stream.config.sections import Lora
from opd_stream.section import is_object

OTHER_SENSES = ("vision", "visual", "audio", "image", "speech", "vq")  # in the name of a part
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    "moe_top_k",
)
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
ATTENDING = ("attn", "attention", "q_proj")  # in the name of a matrix
CROSSING = ("encoder_attn", "crossattention", "cross_attn")  # to another text: never read here
RECURRENT = ("linear_attention", "conv", "mamba", "recurrent")  # types of layers without pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the cost of a decoder depends on; of an unknown cost all numbers are 0.

    Example:
        >>> shape_of({"vocab_size": 606, ...}, {"model.layers.0.mlp.up.weight": [192, 64], ...})
    """

    weights: float = 0.0  # of the layers' matrices that a token meets
    attention_width: float = 0.0  # heads x head size, summed over the layers that attend
    head_weights: int = 0  # hidden size x vocabulary
    adapter_weights: int = 0  # that train instead of all others; 0: there are none
    unknown: str = ""  # why the cost is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Sums over rows; prompts count in `tokens`.

    Example:
        >>> counts_of(prompt_tokens=100, completion_tokens=50) + counts_of(...)
    """

    tokens: float
    completion_tokens: float
    pairs: float  # (token, context token), causal: n (n + 1) / 2 a row

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            tokens=self.tokens + other.tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            pairs=self.pairs + other.pairs,
        )

    def __mul__(self, times: float) -> "TokenCounts":
        return TokenCounts(
            tokens=self.tokens * times,
            completion_tokens=self.completion_tokens * times,
            pairs=self.pairs * times,
        )


def shape_of(settings: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> ModelShape:
    """The shape of a decoder.

    Args:
        settings: of the language model, as `config.json` has them.
        shapes: name -> shape of every weight of the checkpoint.
    """
    hidden, vocabulary = settings.get("hidden_size"), settings.get("vocab_size")
    layers = _layers(shapes, settings.get("num_hidden_layers"))
    if not isinstance(hidden, int) or not isinstance(vocabulary, int) or not layers:
        return ModelShape(unknown="hidden_size, vocab_size or numbered layers are missing")
    experts, chosen = _number(settings, EXPERTS), _number(settings, CHOSEN)
    weights = 0.0
    for layer in layers.values():
        for name, shape in layer.items():
            is_expert = len(shape) == 3 and shape[0] == experts and shape[1] > 1
            if is_expert or re.search(r"(^|\.)experts\b", name):
                if not experts or not chosen:
                    return ModelShape(unknown="how many of its experts a token meets is not said")
                weights += prod(shape) * chosen / experts
            elif 2 <= len(shape) <= 3 and not any(word in name for word in CROSSING):
                weights += prod(shape)
    return ModelShape(
        weights=weights,
        attention_width=_attending(layers, settings) * _width(settings, hidden),
        head_weights=hidden * vocabulary,
    )


def adapter_weights(shapes: Mapping[str, Sequence[int]], lora: Lora) -> int:
    """Of adapters: rank x (inputs + outputs) of each matrix they are put on."""
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed" not in name
    }
    return sum(
        lora.rank * sum(shape) for name, shape in matrices.items() if _is_target(name, lora.targets)
    )


def _is_target(name: str, targets: str | tuple[str, ...]) -> bool:
    """As peft reads names of modules: all but the head, a pattern, or ends of names."""
    if targets == "all-linear":
        return not name.endswith("lm_head")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _layers(
    shapes: Mapping[str, Sequence[int]], count: Any
) -> dict[tuple[str, int], dict[str, Sequence[int]]]:
    """(What stands before the first number, the number) -> name in the layer -> shape."""
    layers: dict[tuple[str, int], dict[str, Sequence[int]]] = defaultdict(dict)
    for name, shape in shapes.items():
        found = re.match(r"(.*?)\.(\d+)\.(.*)", name)
        if found is None or any(word in found[1].lower() for word in OTHER_SENSES):
            continue
        if not isinstance(count, int) or int(found[2]) < count:  # later: they guess ahead
            layers[found[1], int(found[2])][found[3]] = shape
    stacks = {stack for stack, _ in layers}
    unread = {stack for stack in stacks if stack.replace("encoder", "decoder") in stacks - {stack}}
    return {place: layer for place, layer in layers.items() if place[0] not in unread}


def _attending(
    layers: Mapping[tuple[str, int], Mapping[str, Sequence[int]]], settings: Mapping[str, Any]
) -> int:
    """Layers in which tokens attend to each other."""
    kinds = settings.get("layer_types") or settings.get("layers_block_type") or ()
    recurrent = {
        place for place, kind in enumerate(kinds) if any(word in kind for word in RECURRENT)
    }
    return sum(
        place not in recurrent
        and any(word in name.replace("linear_attn", "") for name in layer for word in ATTENDING)
        for (_, place), layer in layers.items()
    )


def _width(settings: Mapping[str, Any], hidden: int) -> float:
    """Heads x head size; of keys and of values, where these differ, the mean."""
    heads = _number(settings, HEADS)
    if not heads:
        return 0.0
    if settings.get("kv_lora_rank"):
        parts = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return heads * sum(settings.get(name) or 0 for name in parts) / 2
    return heads * (settings.get("head_dim") or hidden / heads)


def _number(settings: Mapping[str, Any], names: Sequence[str]) -> float:
    """The first of some settings that is a number, here or in a section; 0: none is."""
    sections = [settings, *filter(is_object, settings.values())]
    found: list[Any] = [section.get(name) for section in sections for name in names]
    return next((float(value) for value in found if isinstance(value, int) and value), 0.0)


def counts_of(*, prompt_tokens: int, completion_tokens: int) -> TokenCounts:
    """Counts of one row."""
    tokens = prompt_tokens + completion_tokens
    return TokenCounts(
        tokens=tokens, completion_tokens=completion_tokens, pairs=tokens * (tokens + 1) / 2
    )


def forward_flops(shape: ModelShape, counts: TokenCounts) -> float:
    """A forward pass with logits of the completion tokens: sampling (with a cache) or scoring."""
    return _products(shape, counts) + _attention(shape, counts)


def train_flops(
    shape: ModelShape,
    counts: TokenCounts,
    *,
    recomputed: bool = False,
    selects: bool = False,
    has_reference: bool = False,
) -> float:
    """Forward and backward; the gradients of audits and the points of extrapolation are not in it.

    Args:
        shape: of the student.
        counts: that training reads.
        recomputed: with gradient checkpointing, one forward pass more.
        selects: tokens are chosen by a pass of the head before.
        has_reference: the run's first student reads the rows too, and the student's head works for
            the distance between the two once more.
    """
    passes, is_frozen = 4 if recomputed else 3, shape.adapter_weights > 0
    adapters = 2 * shape.adapter_weights * counts.tokens
    products = (passes - is_frozen) * _products(shape, counts)
    head = 2 * shape.head_weights * counts.completion_tokens
    more = selects * head + has_reference * ((3 - is_frozen) * head + forward_flops(shape, counts))
    return products + passes * (adapters + _attention(shape, counts)) + more


def _products(shape: ModelShape, counts: TokenCounts) -> float:
    return 2 * (shape.weights * counts.tokens + shape.head_weights * counts.completion_tokens)


def _attention(shape: ModelShape, counts: TokenCounts) -> float:
    return 4 * shape.attention_width * counts.pairs


def unknown_costs(**shapes: ModelShape | None) -> tuple[str, ...]:
    """A line for each role whose cost is not known; `shapes` are by role, None: there is none."""
    return tuple(
        f"cost unknown: {shape.unknown}; the operations of the {role} are left out"
        for role, shape in shapes.items()
        if shape is not None and shape.unknown
    )
