"""One-token-at-a-time decoding with a preallocated key-value cache.

Prompts are padded on the left, so all rows write the same column. Keys and values are written in
place and attention reads the filled slice only; the query heads that share a key head are laid
side by side as queries, so keys are never repeated. Rows that have ended are taken out.

Shapes: B rows, C columns filled so far, G query heads per key head, D head size.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

COLUMNS_PER_GROWTH = 256
ATTENTION = "opd_stream_decode"


class SlicedCache(Cache):
    """Keys and values of every layer, [B, heads, capacity, D], with the filled columns counted."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.filled = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns; returns everything up to them."""
        end = self.filled + key_states.shape[2]
        for side, new in ((self._keys, key_states), (self._values, value_states)):
            if len(side) == layer_idx:
                side.append(new.new_empty(*new.shape[:2], 0, new.shape[3]))
            if side[layer_idx].shape[2] < end:
                side[layer_idx] = _grown(side[layer_idx], end + COLUMNS_PER_GROWTH)
            side[layer_idx][:, :, self.filled : end] = new
        return self._keys[layer_idx][:, :, :end], self._values[layer_idx][:, :, :end]

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kw: Any) -> int:
        """Filled columns."""
        return self.filled

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        for side in (self._keys, self._values):
            side[:] = [layer.index_select(0, rows) for layer in side]


class Decoder:
    """A batch of rows in decoding, over any causal language model."""

    def __init__(self, model: Any, mask_BC: torch.Tensor) -> None:
        self._model, self._decoder = model, model.get_decoder()
        self._mask = mask_BC  # True where a real token stands
        layer_types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        # Layers with a window or a recurrent state need the library's own cache and masks.
        self._sliced = layer_types == {"full_attention"} and _reads_positions(model.config)
        self._cache: Any = SlicedCache() if self._sliced else DynamicCache(config=model.config)
        self._next_position = mask_BC.sum(1, keepdim=True)

    def prefill(self, ids_BC: torch.Tensor) -> torch.Tensor:
        """Read the left-padded prompts; returns the last hidden state [B, H]."""
        positions = (self._mask.long().cumsum(1) - 1).clamp(min=0)
        hidden = self._forward(ids_BC, positions, self._mask.long())
        return hidden[:, -1]

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Append one token to every row; returns its hidden state [B, H]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids_B), 1)], dim=1)
        if self._sliced:
            blocked = torch.zeros_like(self._mask, dtype=self._model.dtype)
            blocked.masked_fill_(~self._mask, -torch.inf)
            with _attention(self._model.config):
                hidden = self._forward(
                    ids_B[:, None], self._next_position, blocked[:, None, None, :]
                )
        else:
            hidden = self._forward(ids_B[:, None], self._next_position, self._mask.long())
        self._next_position = self._next_position + 1
        return hidden[:, 0]

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        self._mask, self._next_position = self._mask[rows], self._next_position[rows]
        if self._sliced:
            self._cache.select(rows)
        else:
            self._cache.batch_select_indices(rows)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        hidden = self._decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        if self._sliced:
            self._cache.filled += ids.shape[1]
        return hidden


class _attention:
    """The grouped attention below for the duration of a step; prefill and training keep theirs."""

    def __init__(self, config: Any) -> None:
        self._config, self._before = config, config._attn_implementation

    def __enter__(self) -> None:
        self._config._attn_implementation = ATTENTION

    def __exit__(self, *exception: object) -> None:
        self._config._attn_implementation = self._before


def _grouped_attention(
    module: Any,
    query: torch.Tensor,  # [B, heads, 1, D]
    key: torch.Tensor,  # [B, key heads, C, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # [B, 1, 1, C], 0 = read, -inf = do not
    scaling: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token; G query heads of a key head are G queries of it.

    On a CPU two batched products are several times faster than the fused kernel, which is made for
    many queries.
    """
    rows, heads, _, size = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)
    scale = size**-0.5 if scaling is None else scaling
    if key.device.type != "cpu":
        output = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scale
        )
    else:
        weights = torch.matmul(grouped * scale, key.transpose(2, 3)) + attention_mask
        output = torch.matmul(torch.softmax(weights.float(), dim=3).to(value.dtype), value)
    return output.reshape(rows, 1, heads, value.shape[3]), None


def _grown(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    grown = tensor.new_empty(*tensor.shape[:2], columns, tensor.shape[3])
    grown[:, :, : tensor.shape[2]] = tensor
    return grown


def _reads_positions(config: Any) -> bool:
    """Whether attention is the plain kind that goes through the attention interface."""
    return config._attn_implementation in ("sdpa", "eager") and not config.is_encoder_decoder


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _grouped_attention)
