"""What every objective reads and is; everything per completion token, flat, in nats.

Shapes: N tokens, K teacher candidates, K + 1 outcomes with the tail. Nothing here needs torch until
a loss is computed, so that a config can name its objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from opd_stream.section import Part

if TYPE_CHECKING:
    from torch import Tensor

# Stands for probability 0: exp(-60) adds nothing in float32, and no divergence is infinite.
SMALLEST_LOGPROB = -60.0
LARGEST_TOP_LOGPROB = -1e-6  # a head closer to 1 has no tail that float32 can tell from rounding

Reads = Literal["candidates", "token", "draws", "drawn"]
"""The teacher's ranked candidates; the student's token alone; its further draws; ids drawn from the
teacher (codec sampled)."""


class Objective(Part):
    """A loss of each completion token. A config names yours by import path: docs/extend.md."""

    weight: float = Field(default=1.0, gt=0, description="factor among several objectives")

    reads: ClassVar[Reads] = "candidates"
    is_sampled: ClassVar[bool] = False  # needs samples at temperature 1, and may be negative
    is_zero_at_teacher: ClassVar[bool] = False  # where the student is the teacher

    @property
    def tolerates_staleness(self) -> bool:
        """Whether rows of an older student teach the same.

        A reverse KL weighs positions and tokens by the current student, so rows of an older one
        teach it for prefixes it no longer writes; AsyncOPD (2606.24143) measured the forward KL
        flat and the reverse KL falling.
        """
        return False

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The loss of each token [N], before the weight."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveInputs:
    """Student and teacher at N completion tokens; K teacher candidates in rank order.

    Log-probabilities are normalised over the full vocabulary; where a position has fewer than K
    candidates, both sides hold SMALLEST_LOGPROB. The fields named `student` carry gradients; the
    others are read from the cache. An outcome is a token, or a set of tokens that count as one (all
    terminators): `reverse_kl_N` compares outcomes, `student_logprobs_N` is of the token itself.
    """

    student_logprobs_N: Tensor  # of the sampled token, under the weights in training
    student_top_logprobs_NK: Tensor  # of the teacher's K candidates, same weights
    teacher_top_logprobs_NK: Tensor
    teacher_tail_logprobs_N: Tensor  # log(1 - sum of the K), computed before any rounding
    behavior_logprobs_N: Tensor  # of the sampled token, under the weights that sampled it
    reverse_kl_N: Tensor  # log p - log q of the sampled outcome, detached
    sampled_in_top_N: Tensor  # bool: the sampled token is among the candidates
    draws: Draws | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """M ids per token, drawn with replacement from the behavior student; the first is the sampled.

    Example:
        >>> Draws(student_logprobs_NM=p, behavior_logprobs_NM=b, reverse_kl_NM=(p - q).detach())
    """

    student_logprobs_NM: Tensor
    behavior_logprobs_NM: Tensor
    reverse_kl_NM: Tensor  # log p - log q of the outcomes, detached


def outcomes(inputs: ObjectiveInputs) -> tuple[Tensor, Tensor]:
    """K + 1 log-probabilities of student and teacher [N, K + 1].

    The student's tail is computed from its head so that it carries a gradient; the teacher's was
    summed over the tail itself, so it stays right where the head's rounding would swallow it.
    """
    student_NK = inputs.student_top_logprobs_NK
    student = _joined(student_NK, log_tail(student_NK))
    teacher = _joined(inputs.teacher_top_logprobs_NK, inputs.teacher_tail_logprobs_N.to(student))
    return student, teacher.clamp(min=SMALLEST_LOGPROB)


def log_tail(logprobs_NK: Tensor) -> Tensor:
    """log(1 - sum of exp(logprobs)) [N], clamped where the sum is 1 but for rounding."""
    head_N = logprobs_NK.logsumexp(1).clamp(max=LARGEST_TOP_LOGPROB)
    return (-head_N.expm1()).log()


def teacher_entropy(inputs: ObjectiveInputs) -> Tensor:
    """Entropy of the teacher's K + 1 outcomes [N], nats: at most that over the vocabulary."""
    teacher = _joined(inputs.teacher_top_logprobs_NK, inputs.teacher_tail_logprobs_N)
    teacher = teacher.clamp(min=SMALLEST_LOGPROB)
    return -(teacher.exp() * teacher).sum(1)


def kl(left: Tensor, right: Tensor) -> Tensor:
    """sum of exp(left) * (left - right) over the last dimension."""
    return (left.exp() * (left - right)).sum(dim=1)


def _joined(head_NK: Tensor, tail_N: Tensor) -> Tensor:
    import torch

    return torch.cat([head_NK, tail_N[:, None]], dim=1)
