"""Drawing tokens: every rollout has its own random numbers, and a number decides one token.

Shapes: B rows, M draws of a position, V vocabulary, T tokens.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

LARGEST_UNIFORM = 1 - 2**-50


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
    logits_BV: torch.Tensor, uniforms_BM: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """M ids a row by inverting the cumulative distribution, and their raw log-probabilities."""
    logprobs_BV = torch.log_softmax(logits_BV.float(), dim=1)
    if temperature == 0:
        drawn_BM = logprobs_BV.argmax(1, keepdim=True).expand(uniforms_BM.shape)
    else:
        probabilities_BV = logprobs_BV.exp()
        if temperature != 1:
            probabilities_BV = torch.softmax(logits_BV.float() / temperature, dim=1)
        columns = [_inverted(probabilities_BV, uniforms_B) for uniforms_B in uniforms_BM.unbind(1)]
        drawn_BM = torch.stack(columns, dim=1)
    return drawn_BM, logprobs_BV.gather(1, drawn_BM)


def _inverted(probabilities_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The id at which the cumulative distribution passes the uniform; never one of probability 0.

    A cumulative sum over the vocabulary is slow, so blocks of about sqrt(V) ids are summed first
    and only the block that is hit is walked through.
    """
    rows, vocab = probabilities_BV.shape
    size = max(1, round(vocab**0.5))
    blocks = torch.nn.functional.pad(probabilities_BV, (0, -vocab % size)).view(rows, -1, size)
    block_B, rest_B = _passed(blocks.sum(2), uniforms_B)
    within_B, _ = _passed(blocks[torch.arange(rows, device=block_B.device), block_B], rest_B)
    return block_B * size + within_B


def _passed(masses_BM: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass in which the uniform falls, and how far into it, in [0, 1)."""
    cumulative_BM = masses_BM.double().cumsum(1)
    total_B1 = cumulative_BM[:, -1:]
    # Rounding must not reach the total: what lies there may have no mass.
    sought_B1 = (
        torch.minimum(uniforms_B[:, None], uniforms_B.new_tensor(LARGEST_UNIFORM)) * total_B1
    )
    hit_B1 = torch.searchsorted(cumulative_BM, sought_B1, right=True)
    mass_B1 = masses_BM.double().gather(1, hit_B1)
    into_B1 = (sought_B1 - (cumulative_BM.gather(1, hit_B1) - mass_B1)) / mass_B1
    return hit_B1[:, 0], into_B1[:, 0].clamp(0, LARGEST_UNIFORM)
