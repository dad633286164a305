"""Objectives on drawn tokens: the student's own, or the teacher's.

Shapes: N tokens, M draws. Every function returns one value a token. Importance is p / b, the
probability of a token now over its probability under the weights that drew it.
"""

from typing import Literal

import torch

from opd_stream.objectives.dense import bucket_reverse, kl, outcomes
from opd_stream.objectives.inputs import ObjectiveInputs

LARGEST_LOG_IMPORTANCE = 20.0  # exp(20): nothing trains well from there; keeps float32 finite


def sampled_pg(
    inputs: ObjectiveInputs, *, baseline: Literal["none", "bucket"] = "none"
) -> torch.Tensor:
    """Policy gradient on reverse_kl = log p - log q of the sampled token [N].

    importance * sg(reverse_kl - baseline), importance with its gradient. The expectation of its
    gradient over the behavior distribution is the gradient of the full KL(student || teacher), also
    when the behavior is stale; the advantage is recomputed under the current student. Token level
    (gamma 0), no clipping. The baseline `bucket` is the detached bucket KL of the position: same
    expectation, a little less variance. It sees the drawn token only, so its variance is high.

    Source: 2605.11182, 2606.24143; baseline after vOPD.
    """
    advantage_N = inputs.reverse_kl_N
    if baseline == "bucket":
        advantage_N = advantage_N - bucket_reverse(inputs).detach()
    return _importance(inputs.student_logprobs_N, inputs.behavior_logprobs_N) * advantage_N


def hybrid(inputs: ObjectiveInputs, *, importance_cap: float) -> torch.Tensor:
    """Bucket reverse KL, and the drawn token where the bucket is blind [N]: the full reverse KL.

    bucket + 1[y outside the candidates] * w * p(y) / sg(p(y)) * sg(reverse_kl - A_tail), with
    w = sg(min(p / b, importance_cap)) and A_tail the log-ratio of the tails. Without the cap the
    expectation over the behavior distribution, of value and gradient, is that of the full KL, also
    for stale behavior; the cap is a small bias on a rare term, taken on the detached factor so that
    no gradient is lost. Needs samples from the untruncated distribution (temperature 1).

    Source: the tail-baseline form; idea of EMA-PG, without its extra gradient of p(S).
    """
    student, teacher = outcomes(inputs)
    tail_advantage_N = (student[:, -1] - teacher[:, -1]).detach()
    live_N = inputs.student_logprobs_N
    importance_N = _importance(live_N.detach(), inputs.behavior_logprobs_N)
    carried_N = (live_N - live_N.detach()).exp()  # 1 in value, with the gradient of log p
    tail_N = importance_N.clamp(max=importance_cap) * carried_N
    tail_N = tail_N * (inputs.reverse_kl_N - tail_advantage_N)
    return kl(student, teacher) + torch.where(inputs.sampled_in_top_N, 0.0, tail_N)


def mc(inputs: ObjectiveInputs) -> torch.Tensor:
    """Mean over M draws from the behavior student of importance * sg(reverse_kl) [N].

    Same expectation as `sampled_pg`, 1 / M of its variance; M = 1 is `sampled_pg`. It sees drawn
    tokens only. Source: AsyncOPD, 2606.24143.

    Raises:
        ValueError: the inputs have no draws.
    """
    if inputs.draws is None:
        raise ValueError("objective mc reads draws; the inputs have none")
    draws = inputs.draws
    importance_NM = _importance(draws.student_logprobs_NM, draws.behavior_logprobs_NM)
    return (importance_NM * draws.reverse_kl_NM).mean(1)


def drawn_forward(inputs: ObjectiveInputs) -> torch.Tensor:
    """Cross-entropy to D ids drawn from the teacher [N]: -sum of count / D * log p over them.

    Its expectation over the draws is the cross-entropy H(teacher, student), whose gradient is that
    of the full KL(teacher || student), p - q; a renormalised top-K is biased instead. Differs from
    the KL by the teacher's entropy. It sees drawn tokens only. Source: Sparse Logit Sampling
    (RS-KD, 2503.16870).
    """
    weights_NK = inputs.teacher_top_logprobs_NK.exp()
    return -(weights_NK * inputs.student_top_logprobs_NK).sum(1)


def _importance(student: torch.Tensor, behavior: torch.Tensor) -> torch.Tensor:
    return (student - behavior).clamp(max=LARGEST_LOG_IMPORTANCE).exp()
