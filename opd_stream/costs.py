"""Floating-point operations of the stages, from a model's shape and token counts; needs no torch.

A forward pass over n tokens costs 2 operations a weight and token in the matrices of the layers,
4 d a layer for every (token, context token) pair of causal attention, and 2 H V for every token
whose logits are made. A backward pass costs twice its forward pass. Counts of tokens, of completion
tokens and of attended pairs add over rows, so a round's cost follows from its commit records.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the cost of a decoder depends on.

    Example:
        >>> shape_of(json.loads(Path("model/config.json").read_text()))
    """

    layers: int
    hidden: int
    attention_width: int  # heads x head size
    key_value_width: int
    intermediate: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Matrix weights of one layer."""
        attention = self.hidden * (2 * self.attention_width + 2 * self.key_value_width)
        return attention + 3 * self.hidden * self.intermediate


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


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape of a Hugging Face config of the gated-MLP family (Llama, Qwen, Mistral, Gemma)."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        attention_width=heads * size,
        key_value_width=config.get("num_key_value_heads", heads) * size,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
    )


def counts_of(*, prompt_tokens: int, completion_tokens: int) -> TokenCounts:
    """Counts of one row."""
    tokens = prompt_tokens + completion_tokens
    return TokenCounts(
        tokens=tokens, completion_tokens=completion_tokens, pairs=tokens * (tokens + 1) / 2
    )


def forward_flops(shape: ModelShape, counts: TokenCounts) -> float:
    """A forward pass with logits of the completion tokens: sampling (with a cache) or scoring."""
    linear = 2 * shape.layers * shape.layer_weights * counts.tokens
    attention = 4 * shape.layers * shape.attention_width * counts.pairs
    head = 2 * shape.hidden * shape.vocabulary * counts.completion_tokens
    return linear + attention + head


def train_flops(shape: ModelShape, counts: TokenCounts, *, recomputed: bool = False) -> float:
    """Forward and backward; with gradient checkpointing one forward pass more."""
    return (4 if recomputed else 3) * forward_flops(shape, counts)
