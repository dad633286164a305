"""Log-probabilities from logits and hidden states: the only place, with the engines, that shifts.

Everything here is normalised over the full vocabulary and never holds a [B, T, V] tensor: logits
exist for a chunk of rows at a time.

Shapes: B rows, L padded length, N completion tokens (flat), H hidden, V vocabulary, K top-k,
J gathered ids, F forced ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

GROUP_SIZES = (64, 8)  # of places compared by their largest value, where many or few stand
Head = Callable[[torch.Tensor], torch.Tensor]  # hidden [n, H] -> logits [n, V]


def logprobs_at(logits_NV: torch.Tensor, ids_NJ: torch.Tensor) -> torch.Tensor:
    """log p of given ids: z[ids] - logsumexp(z), float32 (or float64) [N, J]."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return logits_NV.gather(1, ids_NJ) - logits_NV.logsumexp(1, keepdim=True)


def completion_rows(
    prompt_lengths_B: torch.Tensor, completion_lengths_B: torch.Tensor, *, padded_length: int
) -> torch.Tensor:
    """Rows of the flattened hidden states [B * L] that predict each completion token, in order [N].

    Rows of the batch are right-padded prompt + completion; the token at place t of a completion is
    predicted one position before it.
    """
    prompts = cast("list[int]", prompt_lengths_B.tolist())  # pyright: ignore
    completions = cast("list[int]", completion_lengths_B.tolist())  # pyright: ignore
    rows = [
        torch.arange(completion) + (row * padded_length + prompt - 1)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)


@torch.no_grad()
def sampled_logprobs(
    hidden_NH: torch.Tensor, head: Head, ids_N: torch.Tensor, *, chunk_rows: int
) -> torch.Tensor:
    """log p of one id a row [N], logits in chunks of rows; without gradient."""
    chunks = zip(torch.split(hidden_NH, chunk_rows), torch.split(ids_N, chunk_rows), strict=True)
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
    student_ids_NM: torch.Tensor | None = None,
    vocabulary: int | None = None,
) -> HeadScores:
    """Top-k (or drawn ids), tail, asked and forced ids, logits in chunks of rows.

    With `draws_ND`, D uniform numbers a token, the K entries are the distinct ids drawn with them
    from the teacher, with log(count / D); -inf after the last, and an empty tail. With
    `student_ids_NM`, M distinct ids a token, the K + M entries are the union of these and the top
    K, still by rank; -inf after the last. Ids from `vocabulary` on are neither candidates nor
    drawn; their mass is in the tail.
    """
    # What stays is allocated once: small columns kept between large logits would hold the memory of
    # every chunk open.
    columns: dict[str, torch.Tensor] = {}
    buffer_RV: torch.Tensor | None = None
    for start in range(0, max(len(hidden_NH), 1), chunk_rows):
        rows = slice(start, start + chunk_rows)
        buffer_RV = _logits(head, hidden_NH[rows], buffer_RV)
        logits_NV = buffer_RV[: len(hidden_NH[rows])]
        asked_NJ = logits_NV.gather(1, asked_ids_NJ[rows])
        forced_NF = logits_NV[:, forced_ids_F]
        if draws_ND is None:
            own_NM = None if student_ids_NM is None else student_ids_NM[rows]
            chunk = _top_scores(logits_NV, asked_NJ, forced_NF, top_k, vocabulary, own_NM)
        else:
            chunk = _drawn_scores(logits_NV, asked_NJ, forced_NF, draws_ND[rows], vocabulary)
        for name in HeadScores.__slots__:
            part = getattr(chunk, name)
            if name not in columns:
                columns[name] = part.new_empty(len(hidden_NH), *part.shape[1:])
            columns[name][rows] = part
    return HeadScores(**columns)


def _logits(head: Head, hidden_NH: torch.Tensor, buffer_RV: torch.Tensor | None) -> torch.Tensor:
    """The buffer [R, V], float32, with the logits in its first N rows; made by the first call."""
    if isinstance(head, torch.nn.Linear) and _is_plain(head):
        if buffer_RV is None:
            buffer_RV = hidden_NH.new_empty(len(hidden_NH), head.out_features)
        into_NV, weight_HV = buffer_RV[: len(hidden_NH)], head.weight.t()
        if head.bias is None:  # pyright: ignore[reportUnnecessaryComparison]
            torch.mm(hidden_NH, weight_HV, out=into_NV)
        else:
            torch.addmm(head.bias, hidden_NH, weight_HV, out=into_NV)
        return buffer_RV
    found_NV = head(hidden_NH)
    if buffer_RV is None:
        buffer_RV = torch.empty(found_NV.shape, dtype=torch.float32, device=found_NV.device)
    buffer_RV[: len(found_NV)] = found_NV
    return buffer_RV


def _is_plain(head: torch.nn.Linear) -> bool:
    """Whether its float32 product can be written where the logits should stand."""
    return type(head) is torch.nn.Linear and head.weight.dtype == torch.float32


def _top_scores(
    logits_NV: torch.Tensor,
    asked_NJ: torch.Tensor,
    forced_NF: torch.Tensor,
    top_k: int,
    vocabulary: int | None,
    student_ids_NM: torch.Tensor | None,
) -> HeadScores:
    """The candidates and the mass of the rest, summed by itself; the logits are used up."""
    beyond_N1 = None
    if vocabulary is not None and vocabulary < logits_NV.shape[1]:
        beyond_N1 = logits_NV[:, vocabulary:].logsumexp(1, keepdim=True)
        logits_NV = logits_NV[:, :vocabulary].contiguous()
    found_NL, ids_NL = largest(logits_NV, min(top_k + 1, logits_NV.shape[1]))
    top_NK, top_ids_NK = found_NL[:, :top_k], ids_NL[:, :top_k]
    next_N1, next_ids_N1 = found_NL[:, top_k:], ids_NL[:, top_k:]  # none if K is the vocabulary
    logits_NV.scatter_(1, top_ids_NK, -torch.inf)
    if student_ids_NM is not None:
        more_NM = logits_NV.gather(1, student_ids_NM)  # -inf: among the top K already
        logits_NV.scatter_(1, student_ids_NM, -torch.inf)
        next_N1, next_ids_N1 = logits_NV.max(1, keepdim=True)
        every_NK = torch.cat([top_NK, more_NM], dim=1)
        order_NK = every_NK.argsort(dim=1, descending=True, stable=True)
        top_NK = every_NK.gather(1, order_NK)
        top_ids_NK = torch.cat([top_ids_NK, student_ids_NM], dim=1).gather(1, order_NK)
        top_ids_NK = top_ids_NK.masked_fill(top_NK == -torch.inf, 0)
    # A softmax of the rest is one pass in cache, though its own sum is rounded at every step: that
    # of its shares sets it right.
    torch.softmax(logits_NV, 1, out=logits_NV)
    shares_N1 = logits_NV.gather(1, next_ids_N1) / logits_NV.sum(1, keepdim=True)
    rest_N1 = (next_N1 - shares_N1.log()).masked_fill_(next_N1 == -torch.inf, -torch.inf)
    if beyond_N1 is not None:
        rest_N1 = torch.cat([rest_N1, beyond_N1], dim=1).logsumexp(1, keepdim=True)
    norm_N1 = torch.cat([top_NK, rest_N1], dim=1).logsumexp(1, keepdim=True)
    return HeadScores(
        asked_NJ=asked_NJ - norm_N1,
        top_ids_NK=top_ids_NK,
        top_NK=top_NK - norm_N1,
        tail_N=rest_N1.logsumexp(1) - norm_N1[:, 0],
        forced_NF=forced_NF - norm_N1,
    )


def _drawn_scores(
    logits_NV: torch.Tensor,
    asked_NJ: torch.Tensor,
    forced_NF: torch.Tensor,
    draws_ND: torch.Tensor,
    vocabulary: int | None,
) -> HeadScores:
    norm_N1 = logits_NV.logsumexp(1, keepdim=True)
    ids_ND, logprobs_ND = _drawn(logits_NV[:, :vocabulary], draws_ND)
    return HeadScores(
        asked_NJ=asked_NJ - norm_N1,
        top_ids_NK=ids_ND,
        top_NK=logprobs_ND,
        tail_N=torch.full_like(norm_N1[:, 0], -torch.inf),
        forced_NF=forced_NF - norm_N1,
    )


def largest(
    values_NC: torch.Tensor, count: int, *, in_order: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `topk` of contiguous rows, faster on a CPU: values and their places [N, count].

    The largest all stand in as many groups, those whose own largest are largest. The groups are
    sought in the same way, and then the places within them.
    """
    rows, places = values_NC.shape
    size = next((size for size in GROUP_SIZES if places >= 4 * size * count), 0)
    if values_NC.is_cuda or not size:
        return values_NC.topk(count, dim=1, sorted=in_order)
    groups = places // size
    whole_NGS = values_NC[:, : groups * size].reshape(rows, groups, size)
    best_NL = largest(whole_NGS.amax(2), count, in_order=False)[1]
    starts_NL = (
        best_NL * size + torch.arange(0, rows * places, places, device=best_NL.device)[:, None]
    )
    from_any_place = values_NC.as_strided((rows * places - size + 1, size), (1, 1))
    held_NH = from_any_place.index_select(0, starts_NL.flatten()).view(rows, -1)
    if groups * size < places:
        held_NH = torch.cat([held_NH, values_NC[:, groups * size :]], dim=1)
    found_NL, within_NL = largest(held_NH, count, in_order=in_order)
    # What no group holds follows the last one, as if it were one more.
    best_NL = torch.cat([best_NL, torch.full_like(best_NL[:, :1], groups)], dim=1)
    return found_NL, best_NL.gather(1, within_NL // size) * size + within_NL % size


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
