"""One token at a time for a batch of rows: prefill, draw, step, select.

`library_decoder` drives any causal language model through the library's own forward pass, in the
way that `reading.py` found for it. `LlamaDecoder` has the same three verbs. It is a step of its own
for the plain Llama family, where a small model spends most of its time between the matrix products:
keys and values are written in place, those of a beginning that all rows share are held once, the
projections that read the same input are one product, and the query heads that share a key head are
laid side by side so that keys are never repeated.

Every rollout has its own random numbers, and a number decides one token. Prompts are padded on the
left, so all rows write the same column. Shapes: B rows, C filled columns, P columns that all rows
share, H hidden, D head size, N query heads, M key heads or draws of a position, G = N / M,
V vocabulary, T tokens.
"""

import hashlib
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention, silu
from transformers.cache_utils import DynamicLayer

from opd_stream.engines.base import SamplingSettings
from opd_stream.engines.reading import (
    FASTEST,
    LLAMA_FAMILY,
    CachedRows,
    Decoder,
    decoder_of,
    first_tokens,
    passes_of,
    reading_of,
    shared_tokens,
    without_first,
)

MAX_UNIFORM = 1 - 2**-50
COLUMNS_PER_GROWTH = 256
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others depend on the length read


def open_decoder(model: Any) -> Decoder:
    """The fast decoder where the architecture is the plain one it knows, else the library's."""
    return LlamaDecoder(model) if is_plain_llama(model) else library_decoder(model)


def library_decoder(model: Any) -> Decoder:
    """Any causal language model, through the library's own forward pass, as `reading` found it."""
    decoder = decoder_of(model)
    return reading_of(decoder).open(decoder)


def is_plain_llama(model: Any) -> bool:
    """Whether `LlamaDecoder` computes exactly this model."""
    config = model.config
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in LLAMA_FAMILY
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and model.model.layers[0].self_attn.o_proj.bias is None
        and rope.get("rope_type", "default") in STATIC_ROPE
        and getattr(model, "hf_quantizer", None) is None
    )


class LlamaDecoder:
    """Llama, Qwen2, Qwen3 and Mistral with full attention.

    In half precision the library's attention reads the cache, because products of that size are
    slower in it than in float32, and sums are kept in float32.
    """

    def __init__(self, model: Any) -> None:
        self._decoder, config = model.get_decoder(), model.config
        self._layers = [_Layer(layer) for layer in self._decoder.layers]
        self._queries, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._size = self._decoder.layers[0].self_attn.head_dim
        self._epsilon = config.rms_norm_eps

    def prefill(self, ids_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
        """Passes of the library's forward; their keys and values start ours.

        Those of a beginning that all rows share are held once.
        """
        self._positions = mask_BC.sum(1)
        shared = shared_tokens(ids_BC, mask_BC)
        beginning = CachedRows(self._decoder, FASTEST)
        if shared:
            beginning.read_once(first_tokens(ids_BC, mask_BC, shared), 1)
            ids_BC, mask_BC = without_first(ids_BC, mask_BC, shared)
        self._shared = [_shared(layer) for layer in beginning.cache.layers] if shared else []
        self._filled = ids_BC.shape[1]
        self._keys, self._values = [], []
        passes = passes_of(cast("list[int]", mask_BC.sum(1).tolist()))  # pyright: ignore
        hidden: list[torch.Tensor] = []
        for chosen in passes:
            width = int(mask_BC[chosen].sum(1).max())
            rows = beginning if chosen == passes[-1] else beginning.copy()
            if shared:
                rows.select(torch.zeros_like(self._positions[chosen]))
            hidden.append(rows.prefill(ids_BC[chosen, -width:], mask_BC[chosen, -width:]))
            self._hold(rows, chosen, width, len(ids_BC))
        blocked_BC = torch.zeros(mask_BC.shape, device=mask_BC.device, dtype=hidden[0].dtype)
        blocked_BC = blocked_BC.masked_fill(mask_BC == 0, -torch.inf)
        self._blocked = blocked_BC.repeat_interleave(self._key_heads, 0)[:, None]  # [B*M, 1, C]
        self._blocked = pad(self._blocked, (0, COLUMNS_PER_GROWTH))
        return torch.cat(hidden)

    def _hold(self, read: CachedRows, chosen: slice, width: int, rows: int) -> None:
        """Keep keys and values of the columns that a pass read, with room for more."""
        layers = cast(list[DynamicLayer], read.cache.layers)
        shape = (rows * self._key_heads, self._filled + COLUMNS_PER_GROWTH, self._size)
        places = slice(chosen.start * self._key_heads, chosen.stop * self._key_heads)
        columns = slice(self._filled - width, self._filled)
        for held, name in ((self._keys, "keys"), (self._values, "values")):
            for number, layer in enumerate(layers):
                own = _tensor(getattr(layer, name))[:, :, -width:]
                if number == len(held):
                    held.append(own.new_zeros(shape))
                held[number][places, columns] = own.flatten(0, 1)

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        if self._filled == self._keys[0].shape[1]:
            self._reserve(COLUMNS_PER_GROWTH)
        hidden_BH = self._decoder.embed_tokens(ids_B)
        cos_B1D, sin_B1D = self._rotation()
        for number, layer in enumerate(self._layers):
            attended = self._attend(number, layer, hidden_BH, cos_B1D, sin_B1D)
            hidden_BH = torch.addmm(hidden_BH, attended, layer.out.t())
            normed = rms_norm(hidden_BH, hidden_BH.shape[1:], layer.mlp_norm, self._epsilon)
            gate, up = linear(normed, layer.gate_up).chunk(2, dim=1)
            hidden_BH = torch.addmm(hidden_BH, silu(gate) * up, layer.down.t())
        self._filled += 1
        self._positions = self._positions + 1
        return self._decoder.norm(hidden_BH)

    def select(self, rows: torch.Tensor) -> None:
        heads = torch.arange(self._key_heads, device=rows.device)
        flat = (rows[:, None] * self._key_heads + heads).flatten()
        self._positions, self._blocked = self._positions[rows], self._blocked[flat]
        self._keys = [keys[flat] for keys in self._keys]
        self._values = [values[flat] for values in self._values]

    def _attend(
        self,
        number: int,
        layer: "_Layer",
        hidden_BH: torch.Tensor,
        cos_B1D: torch.Tensor,
        sin_B1D: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of the new token over everything read so far [B, N * D]."""
        rows, size, end = len(hidden_BH), self._size, self._filled + 1
        normed = rms_norm(hidden_BH, hidden_BH.shape[1:], layer.attention_norm, self._epsilon)
        heads = linear(normed, layer.qkv, layer.qkv_bias).view(rows, -1, size)
        turned = heads[:, : self._queries + self._key_heads]
        if layer.head_norm is not None:
            turned = rms_norm(turned, (size,), None, self._epsilon) * layer.head_norm
        swapped = torch.cat([turned[..., size // 2 :], turned[..., : size // 2]], dim=2)
        turned = torch.addcmul(turned * cos_B1D, swapped, sin_B1D)
        keys, values = self._keys[number], self._values[number]
        keys[:, self._filled] = turned[:, self._queries :].flatten(0, 1)
        values[:, self._filled] = heads[:, self._queries + self._key_heads :].flatten(0, 1)
        queries = turned[:, : self._queries].reshape(rows * self._key_heads, -1, size)
        keys, values, blocked = keys[:, :end], values[:, :end], self._blocked[:, :, :end]
        if self._shared:
            return self._attend_shared(number, queries, keys, values, blocked, layer.scale)
        if queries.dtype != torch.float32:
            mask = blocked.expand(-1, queries.shape[1], -1)[:, None]
            found = scaled_dot_product_attention(
                queries[:, None], keys[:, None], values[:, None], mask, scale=layer.scale
            )
            return found.view(rows, -1)
        weights = torch.baddbmm(blocked, queries, keys.transpose(1, 2), alpha=layer.scale)
        return torch.bmm(torch.softmax(weights, dim=2), values).view(rows, -1)

    def _attend_shared(
        self,
        number: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        blocked: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The same where rows share a beginning: its keys meet the queries of all rows at once."""
        shared_keys, shared_values = self._shared[number]  # [M, P, D], float32
        heads, size, dtype = self._key_heads, self._size, queries.dtype
        queries, keys, values = queries.float(), keys.float(), values.float()
        by_head = queries.view(-1, heads, queries.shape[1], size).transpose(0, 1)  # [M, B, G, D]
        first = torch.bmm(by_head.flatten(1, 2), shared_keys.transpose(1, 2)) * scale
        first = first.view(*by_head.shape[:3], -1).transpose(0, 1).flatten(0, 1)  # [B*M, G, P]
        own = torch.baddbmm(blocked.float(), queries, keys.transpose(1, 2), alpha=scale)
        weights = torch.softmax(torch.cat([first, own], dim=2), dim=2)
        first, own = weights[..., : first.shape[2]], weights[..., first.shape[2] :]
        by_head = first.view(-1, heads, *first.shape[1:]).transpose(0, 1)  # [M, B, G, P]
        found = torch.bmm(by_head.flatten(1, 2), shared_values)
        found = found.view(heads, -1, first.shape[1], size).transpose(0, 1).flatten(0, 1)
        return torch.baddbmm(found, own, values).to(dtype).view(-1, self._queries * size)

    def _rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [B, 1, D]: x * cos + swapped halves of x * sin turns x."""
        if not hasattr(self, "_cos") or int(self._positions.max()) >= len(self._cos):
            longest = int(self._positions.max()) + COLUMNS_PER_GROWTH
            places = torch.arange(longest, device=self._positions.device)[None]
            cos, sin = self._decoder.rotary_emb(self._decoder.embed_tokens.weight, places)
            sign = torch.ones_like(sin[0])
            sign[:, : self._size // 2] = -1
            self._cos, self._sin = cos[0], sin[0] * sign
        return self._cos[self._positions][:, None], self._sin[self._positions][:, None]

    def _reserve(self, columns: int) -> None:
        """Room for more columns; the mask of new ones says that they may be read."""
        self._keys = [pad(keys, (0, 0, 0, columns)) for keys in self._keys]
        self._values = [pad(values, (0, 0, 0, columns)) for values in self._values]
        self._blocked = pad(self._blocked, (0, columns))


class _Layer:
    """One layer's weights; the projections of one input are views of one matrix.

    The module's own parameters become views too, so nothing is held twice.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm = layer.input_layernorm.weight
        self.mlp_norm = layer.post_attention_layernorm.weight
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.qkv = _joined([projection.weight for projection in projections])
        has_bias = attention.q_proj.bias is not None
        self.qkv_bias = _joined([p.bias for p in projections]) if has_bias else None
        self.gate_up = _joined([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.out, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.scale = attention.scaling
        self.head_norm = None
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm.weight, attention.k_norm.weight
            counts = [p.out_features // len(query) for p in projections[:2]]
            self.head_norm = torch.cat([query.expand(counts[0], -1), key.expand(counts[1], -1)])


def _joined(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """One tensor that holds all of them, each parameter a view into it."""
    sizes = [len(parameter) for parameter in parameters]
    whole = parameters[0].data._base
    if whole is None or len(whole) != sum(sizes):
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, view in zip(parameters, torch.split(whole, sizes), strict=True):
            parameter.data = view
    return whole


def _shared(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one row [M, P, D], float32."""
    return _tensor(layer.keys)[0].float(), _tensor(layer.values)[0].float()


def _tensor(filled: torch.Tensor | None) -> torch.Tensor:
    assert filled is not None  # by the forward pass
    return filled


def uniforms(seed: int, prompt_id: str, sample: int, window: int) -> NDArray[np.float64]:
    """The rollout's own random numbers in [0, 1); a longer window only adds to them."""
    digest = hashlib.sha256(f"{seed}/{sample}/{prompt_id}".encode()).digest()
    key = int.from_bytes(digest[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(window)


def draw_uniforms(
    seed: int, prompt_id: str, sample: int, window: int, extra_draws: int
) -> NDArray[np.float64]:
    """Numbers for the sampled token and for further draws [T, 1 + M], from streams of their own."""
    sampled = uniforms(seed, prompt_id, sample, window)[:, None]
    if not extra_draws:
        return sampled
    extra = uniforms(seed, f"{prompt_id}/extra", sample, window * extra_draws)
    return np.concatenate([sampled, extra.reshape(window, extra_draws)], axis=1)


def draw(
    logits_BV: torch.Tensor, uniforms_BM: torch.Tensor, settings: SamplingSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """M ids a row by inverting the cumulative distribution, and their raw log-probabilities."""
    logprobs_BV = torch.log_softmax(logits_BV.float(), dim=1)
    if settings.temperature == 0:
        known_BV = logprobs_BV[:, : settings.vocabulary]
        drawn_BM = known_BV.argmax(1, keepdim=True).expand(uniforms_BM.shape)
    else:
        probabilities_BV = logprobs_BV.exp()
        if settings.temperature != 1:
            probabilities_BV = torch.softmax(logits_BV.float() / settings.temperature, dim=1)
        probabilities_BV = _kept(probabilities_BV[:, : settings.vocabulary], settings)
        columns = [_inverted(probabilities_BV, uniforms_B) for uniforms_B in uniforms_BM.unbind(1)]
        drawn_BM = torch.stack(columns, dim=1)
    return drawn_BM, logprobs_BV.gather(1, drawn_BM)


def _kept(probabilities_BV: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Probabilities with 0 for what top-k, then top-p, then min-p leave out (not normalised)."""
    if 0 < settings.top_k < probabilities_BV.shape[1]:
        least_B1 = probabilities_BV.topk(settings.top_k, dim=1).values[:, -1:]
        probabilities_BV = probabilities_BV.where(probabilities_BV >= least_B1, 0)
    if settings.top_p < 1:
        ordered_BV, order_BV = probabilities_BV.sort(dim=1, descending=True, stable=True)
        before_BV = ordered_BV.cumsum(1) - ordered_BV
        is_in_BV = before_BV < settings.top_p * ordered_BV.sum(1, keepdim=True)
        is_in_BV[:, 0] = True
        is_kept_BV = torch.zeros_like(is_in_BV).scatter(1, order_BV, is_in_BV)
        probabilities_BV = probabilities_BV.where(is_kept_BV, 0)
    if settings.min_p > 0:
        least_B1 = settings.min_p * probabilities_BV.amax(1, keepdim=True)
        probabilities_BV = probabilities_BV.where(probabilities_BV >= least_B1, 0)
    return probabilities_BV


def _inverted(probabilities_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The id at which the cumulative distribution passes the uniform; never one of probability 0.

    A cumulative sum over the vocabulary is slow, so blocks of about sqrt(V) ids are summed first
    and only the block that is hit is walked through.
    """
    rows, vocab = probabilities_BV.shape
    size = max(1, round(vocab**0.5))
    blocks = pad(probabilities_BV, (0, -vocab % size)).view(rows, -1, size)
    block_B, rest_B = _passed(blocks.sum(2), uniforms_B)
    within_B, _ = _passed(blocks[torch.arange(rows, device=block_B.device), block_B], rest_B)
    return block_B * size + within_B


def _passed(masses_BM: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass in which the uniform falls, and how far into it, in [0, 1)."""
    cumulative_BM = masses_BM.double().cumsum(1)
    total_B1 = cumulative_BM[:, -1:]
    # Rounding must not reach the total: what lies there may have no mass.
    sought_B1 = torch.minimum(uniforms_B[:, None], uniforms_B.new_tensor(MAX_UNIFORM)) * total_B1
    hit_B1 = torch.searchsorted(cumulative_BM, sought_B1, right=True)
    mass_B1 = masses_BM.double().gather(1, hit_B1)
    into_B1 = (sought_B1 - (cumulative_BM.gather(1, hit_B1) - mass_B1)) / mass_B1
    return hit_B1[:, 0], into_B1[:, 0].clamp(0, MAX_UNIFORM)
