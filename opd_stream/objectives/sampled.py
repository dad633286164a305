"""Objectives on drawn tokens: the student's own, or the teacher's.

Shapes: N tokens. Every function returns one value a token.
"""

import torch

from opd_stream.objectives.inputs import ObjectiveInputs

LARGEST_LOG_IMPORTANCE = 20.0  # exp(20): nothing trains well from there; keeps float32 finite


def sampled_pg(inputs: ObjectiveInputs) -> torch.Tensor:
    """Policy gradient on reverse_kl = log p - log q of the sampled token [N].

    importance * sg(reverse_kl), importance = exp(student_logprobs - behavior_logprobs) with its
    gradient. The expectation of its gradient over the behavior distribution is the gradient of the
    full KL(student || teacher), also when the behavior is stale; the advantage is recomputed under
    the current student. Token level (gamma 0), no clipping. High variance.

    Source: 2605.11182, 2606.24143.
    """
    log_importance = inputs.student_logprobs_N - inputs.behavior_logprobs_N
    importance = log_importance.clamp(max=LARGEST_LOG_IMPORTANCE).exp()
    reverse_kl = (inputs.student_logprobs_N - inputs.teacher_logprobs_N).detach()
    return importance * reverse_kl


def drawn_forward(inputs: ObjectiveInputs) -> torch.Tensor:
    """Cross-entropy to D ids drawn from the teacher [N]: -sum of count / D * log p over them.

    Its expectation over the draws is the cross-entropy H(teacher, student), whose gradient is that
    of the full KL(teacher || student), p - q; a renormalised top-K is biased instead. Differs from
    the KL by the teacher's entropy. Source: Sparse Logit Sampling (RS-KD).
    """
    weights_NK = inputs.teacher_top_logprobs_NK.exp()
    return -(weights_NK * inputs.student_top_logprobs_NK).sum(1)
