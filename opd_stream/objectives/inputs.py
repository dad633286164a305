"""What every objective reads: N completion tokens, flat, everything in nats."""

from dataclasses import dataclass

import torch

# Stands for probability 0: exp(-60) adds nothing in float32, and no divergence is infinite.
SMALLEST_LOGPROB = -60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveInputs:
    """Student and teacher at N completion tokens; K teacher candidates in rank order.

    Log-probabilities are normalised over the full vocabulary; where a position has fewer than K
    candidates, both sides hold SMALLEST_LOGPROB. The fields named `student` carry gradients; the
    others are read from the cache. An outcome is a token, or a set of tokens that count as one (all
    terminators): `reverse_kl_N` compares outcomes, `student_logprobs_N` is of the token itself.
    """

    student_logprobs_N: torch.Tensor  # of the sampled token, under the weights in training
    student_top_logprobs_NK: torch.Tensor  # of the teacher's K candidates, same weights
    teacher_top_logprobs_NK: torch.Tensor
    teacher_tail_logprobs_N: torch.Tensor  # log(1 - sum of the K), computed before any rounding
    behavior_logprobs_N: torch.Tensor  # of the sampled token, under the weights that sampled it
    reverse_kl_N: torch.Tensor  # log p - log q of the sampled outcome, detached
    sampled_in_top_N: torch.Tensor  # bool: the sampled token is among the candidates
    draws: "Draws | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """M ids per token, drawn with replacement from the behavior student; the first is the sampled.

    Example:
        >>> Draws(student_logprobs_NM=p, behavior_logprobs_NM=b, reverse_kl_NM=(p - q).detach())
    """

    student_logprobs_NM: torch.Tensor
    behavior_logprobs_NM: torch.Tensor
    reverse_kl_NM: torch.Tensor  # log p - log q of the outcomes, detached
