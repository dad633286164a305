"""Log-probabilities from logits and hidden states: the only place, with the engines, that shifts.

Everything here is normalised over the full vocabulary and never holds a [B, T, V] tensor: logits
exist for a chunk of rows at a time.

Shapes: B rows, L padded length, N completion tokens (flat), H hidden, V vocabulary, K top-k,
J gathered ids, F forced ids.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK_IDS = 32  # of a vocabulary, compared by their largest logit
Head = Callable[[torch.Tensor], torch.Tensor]  # hidden [n, H] -> logits [n, V]

LARGEST_TOP_LOGPROB = -1e-6  # a head closer to 1 has no tail that float32 can tell from rounding


def logprobs_at(logits_NV: torch.Tensor, ids_NJ: torch.Tensor) -> torch.Tensor:
    """log p of given ids: z[ids] - logsumexp(z), float32 (or float64) [N, J]."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return logits_NV.gather(1, ids_NJ) - logits_NV.logsumexp(1, keepdim=True)


def log_tail(logprobs_NK: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of exp(logprobs)) [N], clamped where the sum is 1 but for rounding."""
    head_N = logprobs_NK.logsumexp(1).clamp(max=LARGEST_TOP_LOGPROB)
    return torch.log(-torch.expm1(head_N))


def completion_rows(
    prompt_lengths_B: torch.Tensor, completion_lengths_B: torch.Tensor, *, padded_length: int
) -> torch.Tensor:
    """Rows of the flattened hidden states [B * L] that predict each completion token, in order [N].

    Rows of the batch are right-padded prompt + completion; the token at place t of a completion is
    predicted one position before it.
    """
    rows = [
        torch.arange(completion) + (row * padded_length + prompt - 1)
        for row, (prompt, completion) in enumerate(
            zip(prompt_lengths_B.tolist(), completion_lengths_B.tolist(), strict=True)
        )
    ]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)


@torch.no_grad()
def sampled_logprobs(
    hidden_NH: torch.Tensor, head: Head, ids_N: torch.Tensor, *, chunk_rows: int
) -> torch.Tensor:
    """log p of one id a row [N], logits in chunks of rows; without gradient."""
    chunks = zip(hidden_NH.split(chunk_rows), ids_N.split(chunk_rows), strict=True)
    return torch.cat([logprobs_at(head(hidden), ids[:, None])[:, 0] for hidden, ids in chunks])


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadScores:
    """A teacher's scores of N completion tokens; log-probabilities in nats, float32."""

    asked_NJ: torch.Tensor  # of the sampled token, then of the candidates
    top_ids_NK: torch.Tensor
    top_NK: torch.Tensor  # rank order
    tail_N: torch.Tensor  # log of the mass outside the K, summed there: exact however small
    forced_NF: torch.Tensor


@torch.inference_mode()
def head_scores(
    hidden_NH: torch.Tensor,
    head: Head,
    *,
    asked_ids_NJ: torch.Tensor,
    forced_ids_F: torch.Tensor,
    top_k: int,
    chunk_rows: int,
    draws_ND: torch.Tensor | None = None,
) -> HeadScores:
    """Top-k (or drawn ids), tail, asked and forced ids, logits in chunks of rows.

    What `head` returns is overwritten.

    With `draws_ND`, D uniform numbers a token, the K entries are the distinct ids drawn with them
    from the teacher, with log(count / D); -inf after the last, and an empty tail.
    """
    # What stays is allocated once: small columns kept between large logits would hold the memory of
    # every chunk open.
    columns: dict[str, torch.Tensor] = {}
    for start in range(0, len(hidden_NH), chunk_rows):
        rows = slice(start, start + chunk_rows)
        chunk = _chunk_scores(
            head(hidden_NH[rows]).float(),
            asked_ids_NJ[rows],
            forced_ids_F,
            top_k,
            None if draws_ND is None else draws_ND[rows],
        )
        for name in HeadScores.__slots__:
            part = getattr(chunk, name)
            if name not in columns:
                columns[name] = part.new_empty(len(hidden_NH), *part.shape[1:])
            columns[name][rows] = part
    return HeadScores(**columns)


def _chunk_scores(
    logits_NV: torch.Tensor,
    asked_ids_NJ: torch.Tensor,
    forced_ids_F: torch.Tensor,
    top_k: int,
    draws_ND: torch.Tensor | None,
) -> HeadScores:
    asked_NJ, forced_NF = logits_NV.gather(1, asked_ids_NJ), logits_NV[:, forced_ids_F]
    if draws_ND is not None:
        norm_N1 = logits_NV.logsumexp(1, keepdim=True)
        ids_ND, logprobs_ND = _drawn(logits_NV, draws_ND)
        return HeadScores(
            asked_NJ=asked_NJ - norm_N1,
            top_ids_NK=ids_ND,
            top_NK=logprobs_ND,
            tail_N=torch.full_like(norm_N1[:, 0], -torch.inf),
            forced_NF=forced_NF - norm_N1,
        )
    top_NK, top_ids_NK = _largest(logits_NV, top_k)
    largest_N1 = top_NK[:, :1]
    # The logits are ours: one pass turns them into weights, of which the top K are taken out, so
    # the rest is summed by itself and is exact however small.
    weights_NV = logits_NV.sub_(largest_N1).exp_().scatter_(1, top_ids_NK, 0.0)
    rest_N = weights_NV.sum(1)
    norm_N1 = (rest_N + (top_NK - largest_N1).exp().sum(1)).log()[:, None] + largest_N1
    return HeadScores(
        asked_NJ=asked_NJ - norm_N1,
        top_ids_NK=top_ids_NK,
        top_NK=top_NK - norm_N1,
        tail_N=rest_N.log() + (largest_N1 - norm_N1)[:, 0],
        forced_NF=forced_NF - norm_N1,
    )


def _largest(logits_NV: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `topk`, faster on a CPU: all of the top K stand in the K best blocks of ids."""
    rows, vocabulary = logits_NV.shape
    blocks = vocabulary // BLOCK_IDS
    if logits_NV.is_cuda or blocks < 4 * top_k:
        return logits_NV.topk(top_k, dim=1)
    whole_NBI = logits_NV[:, : blocks * BLOCK_IDS].unflatten(1, (blocks, BLOCK_IDS))
    best_NK = whole_NBI.amax(2).topk(top_k, dim=1, sorted=False).indices
    within_I = torch.arange(BLOCK_IDS, device=logits_NV.device)
    ids_NC = (best_NK[:, :, None] * BLOCK_IDS + within_I).flatten(1)
    left = torch.arange(blocks * BLOCK_IDS, vocabulary, device=logits_NV.device)
    ids_NC = torch.cat([ids_NC, left.expand(rows, -1)], dim=1)
    top_NK, places_NK = logits_NV.gather(1, ids_NC).topk(top_k, dim=1)
    return top_NK, ids_NC.gather(1, places_NK)


def _drawn(logits_NV: torch.Tensor, draws_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids drawn with uniform numbers, and log(count / D); -inf behind the last [N, D]."""
    cumulative_NV = torch.softmax(logits_NV.double(), dim=1).cumsum(1)
    drawn_ND = torch.searchsorted(cumulative_NV, draws_ND * cumulative_NV[:, -1:], right=True)
    ids_ND = drawn_ND.clamp(max=logits_NV.shape[1] - 1).sort(dim=1).values
    is_new_ND = torch.ones_like(ids_ND, dtype=torch.bool)
    is_new_ND[:, 1:] = ids_ND[:, 1:] != ids_ND[:, :-1]
    place_ND = is_new_ND.cumsum(1) - 1
    counts_ND = torch.zeros_like(logits_NV[:, :1]).expand(ids_ND.shape).contiguous()
    counts_ND.scatter_add_(1, place_ND, torch.ones_like(counts_ND))
    distinct_ND = torch.zeros_like(ids_ND).scatter(1, place_ND, ids_ND)
    return distinct_ND, (counts_ND / ids_ND.shape[1]).log()
