"""What every objective reads: N completion tokens, flat, everything in nats."""

from dataclasses import dataclass

import torch

# Stands for probability 0: exp(-60) adds nothing in float32, and no divergence is infinite.
SMALLEST_LOGPROB = -60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveInputs:
    """Student and teacher at N completion tokens; K teacher candidates in rank order.

    Log-probabilities are normalised over the full vocabulary; where a position has fewer than K
    candidates, both sides hold SMALLEST_LOGPROB. The two student fields carry
    gradients; the others are read from the cache.
    """

    student_logprobs_N: torch.Tensor  # of the sampled token, under the weights in training
    student_top_logprobs_NK: torch.Tensor  # of the teacher's K candidates, same weights
    teacher_logprobs_N: torch.Tensor  # of the sampled token
    teacher_top_logprobs_NK: torch.Tensor
    teacher_tail_logprobs_N: torch.Tensor  # log(1 - sum of the K), computed before any rounding
    behavior_logprobs_N: torch.Tensor  # of the sampled token, under the weights that sampled it
