"""Objectives over the teacher's K candidates: exact sums, no sampled term.

Shapes: N tokens, K teacher candidates, K + 1 outcomes with the tail. Every function returns one
value a token, to be averaged over the completion tokens of the global batch.
"""

import math

import torch

from opd_stream.logprobs import log_tail
from opd_stream.objectives.inputs import SMALLEST_LOGPROB, ObjectiveInputs


def bucket_reverse(inputs: ObjectiveInputs) -> torch.Tensor:
    """KL(student || teacher) over K candidates and one bucket for everything else [N], nats.

    Gradient in the logits: p_j (A_j - loss) inside the support, A = log p - log q; outside
    p_j (A_tail - loss), so the tail moves as one block. At most the full KL. It cannot see which
    tail token is wrong. Source: GKD 2306.13649 (reverse KL), merged outcomes.
    """
    student, teacher = outcomes(inputs)
    return kl(student, teacher)


def bucket_forward(inputs: ObjectiveInputs) -> torch.Tensor:
    """KL(teacher || student) over K candidates and one bucket for everything else [N], nats.

    Gradient in the logits: p_j - q_j inside the support, p_j (1 - q_tail / p_tail) outside. At most
    the full KL. It cannot see which tail token is wrong. Source: GKD 2306.13649 (forward KL).
    """
    student, teacher = outcomes(inputs)
    return kl(teacher, student)


def bucket_js(inputs: ObjectiveInputs, *, beta: float) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence over the K + 1 outcomes [N], nats.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p, for 0 < beta < 1. At
    most -(beta log beta + (1 - beta) log(1 - beta)), and at most the full divergence. It cannot see
    which tail token is wrong. Source: GKD 2306.13649, equation 1.
    """
    student, teacher = outcomes(inputs)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def skew_forward(inputs: ObjectiveInputs, *, alpha: float) -> torch.Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student) over the K + 1 outcomes [N], nats.

    Never above log(1 / alpha), so no outcome can blow up; alpha 0 is the forward KL. It cannot see
    which tail token is wrong. Source: DistiLLM 2402.03898.
    """
    student, teacher = outcomes(inputs)
    return kl(teacher, _mixed(teacher, student, alpha))


def skew_reverse(inputs: ObjectiveInputs, *, alpha: float) -> torch.Tensor:
    """KL(student || alpha student + (1 - alpha) teacher) over the K + 1 outcomes [N], nats.

    Never above log(1 / alpha); alpha 0 is the reverse KL. It cannot see which tail token is wrong.
    Source: DistiLLM 2402.03898.
    """
    student, teacher = outcomes(inputs)
    return kl(student, _mixed(student, teacher, alpha))


def lsm(inputs: ObjectiveInputs) -> torch.Tensor:
    """KL(student || teacher), both renormalised over the K candidates [N], nats (2603.25562).

    Gradient in the logits: p'_j (A'_j - loss) inside the support, renormalised; exactly 0 for every
    logit outside. It cannot see mass that the student keeps there, and it is no bound of the full
    KL in either direction.
    """
    student = torch.log_softmax(inputs.student_top_logprobs_NK, dim=1)
    teacher = torch.log_softmax(inputs.teacher_top_logprobs_NK, dim=1)
    return kl(student, teacher)


def entropy_aware(inputs: ObjectiveInputs, *, threshold: float) -> torch.Tensor:
    """Forward KL where the teacher is unsure, 0 elsewhere [N], nats (entropy-aware OPD).

    1[H(q) > threshold] * sum over the candidates of q' log(q' / p), q' the teacher renormalised, p
    the student over the full vocabulary; gradient p_j - q'_j (q' = 0 outside). H(q) is the entropy
    of the K + 1 outcomes, at most the teacher's. A term to add to another objective: alone it
    teaches nothing where the teacher is sure.
    """
    teacher = torch.log_softmax(inputs.teacher_top_logprobs_NK, dim=1)
    unsure_N = teacher_entropy(inputs) > threshold
    return kl(teacher, inputs.student_top_logprobs_NK) * unsure_N


def teacher_entropy(inputs: ObjectiveInputs) -> torch.Tensor:
    """Entropy of the teacher's K + 1 outcomes [N], nats: at most that over the vocabulary."""
    teacher = torch.cat(
        [inputs.teacher_top_logprobs_NK, inputs.teacher_tail_logprobs_N[:, None]], dim=1
    ).clamp(min=SMALLEST_LOGPROB)
    return -(teacher.exp() * teacher).sum(1)


def outcomes(inputs: ObjectiveInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """K + 1 log-probabilities of student and teacher [N, K + 1].

    The student's tail is computed from its head so that it carries a gradient; the teacher's was
    summed over the tail itself, so it stays right where the head's rounding would swallow it.
    """
    student = with_tail(inputs.student_top_logprobs_NK)
    tail_N = inputs.teacher_tail_logprobs_N
    teacher = torch.cat([inputs.teacher_top_logprobs_NK, tail_N[:, None].to(student.dtype)], dim=1)
    return student, teacher.clamp(min=SMALLEST_LOGPROB)


def with_tail(logprobs_NK: torch.Tensor) -> torch.Tensor:
    """K log-probabilities and that of everything else [N, K + 1]."""
    return torch.cat([logprobs_NK, log_tail(logprobs_NK)[:, None]], dim=1)


def kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """sum of exp(left) * (left - right) over the last dimension."""
    return (left.exp() * (left - right)).sum(dim=1)


def _mixed(first: torch.Tensor, second: torch.Tensor, alpha: float) -> torch.Tensor:
    """log(alpha exp(first) + (1 - alpha) exp(second))."""
    if alpha == 0:
        return second
    return torch.logaddexp(first + math.log(alpha), second + math.log1p(-alpha))
