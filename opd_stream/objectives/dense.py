"""Objectives over the teacher's K candidates: exact sums, no sampled term.

Shapes: N tokens, K teacher candidates, K + 1 outcomes with the tail. Every function returns one
value a token, to be averaged over the completion tokens of the global batch.
"""

import torch

from opd_stream.logprobs import log_tail
from opd_stream.objectives.inputs import SMALLEST_LOGPROB, ObjectiveInputs


def bucket_reverse(inputs: ObjectiveInputs) -> torch.Tensor:
    """KL(student || teacher) over K candidates and one bucket for everything else [N], nats.

    Gradient in the logits: p_j (A_j - loss) inside the support, A = log p - log q; outside
    p_j (A_tail - loss), so the tail moves as one block. At most the full KL. It cannot see which
    tail token is wrong. Source: GKD 2306.13649 (reverse KL), merged outcomes.
    """
    student, teacher = _with_tails(inputs)
    return _kl(student, teacher)


def bucket_forward(inputs: ObjectiveInputs) -> torch.Tensor:
    """KL(teacher || student) over K candidates and one bucket for everything else [N], nats.

    Gradient in the logits: p_j - q_j inside the support, p_j (1 - q_tail / p_tail) outside. At most
    the full KL. Source: GKD 2306.13649 (forward KL), merged outcomes.
    """
    student, teacher = _with_tails(inputs)
    return _kl(teacher, student)


def lsm(inputs: ObjectiveInputs) -> torch.Tensor:
    """KL(student || teacher), both renormalised over the K candidates [N], nats (2603.25562).

    The gradient is exactly 0 for every logit outside the support: it cannot see mass that the
    student keeps there, and it is no bound of the full KL in either direction.
    """
    student = torch.log_softmax(inputs.student_top_logprobs_NK, dim=1)
    teacher = torch.log_softmax(inputs.teacher_top_logprobs_NK, dim=1)
    return _kl(student, teacher)


def _with_tails(inputs: ObjectiveInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """K + 1 log-probabilities of both sides.

    The student's tail is computed from its head so that it carries a gradient; the teacher's was
    summed over the tail itself, so it stays right where the head's rounding would swallow it.
    """
    student_NK = inputs.student_top_logprobs_NK
    student = torch.cat([student_NK, log_tail(student_NK)[:, None]], dim=1)
    tail_N = inputs.teacher_tail_logprobs_N
    teacher = torch.cat([inputs.teacher_top_logprobs_NK, tail_N[:, None].to(student.dtype)], dim=1)
    return student, teacher.clamp(min=SMALLEST_LOGPROB)


def _kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """sum of exp(left) * (left - right) over the last dimension."""
    return (left.exp() * (left - right)).sum(dim=1)
