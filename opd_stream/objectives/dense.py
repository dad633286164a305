"""Objectives over the teacher's K candidates: exact sums, no sampled term.

Shapes: N tokens, K teacher candidates, K + 1 outcomes with the tail. None of them can see which
token of the tail is wrong.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from opd_stream.objectives.base import Objective, ObjectiveInputs, kl, outcomes, teacher_entropy

if TYPE_CHECKING:
    from torch import Tensor


class Bucket(Objective):
    """A divergence over the K teacher candidates and one bucket for everything else.

    Source: GKD 2306.13649. At most the full divergence, since merging outcomes can only lower it.

    * reverse: KL(student || teacher). Gradient in the logits: p_j (A_j - loss) inside the support,
      A = log p - log q; outside p_j (A_tail - loss), so the tail moves as one block.
    * forward: KL(teacher || student). Gradient: p_j - q_j inside, p_j (1 - q_tail / p_tail)
      outside.
    * js: beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (equation 1), at
      most -(beta log beta + (1 - beta) log(1 - beta)).
    """

    kind: Literal["bucket"] = "bucket"
    direction: Literal["reverse", "forward", "js"] = "reverse"
    beta: float = Field(
        default=0.5, ge=0, le=1, description="of direction js: 0 is forward, 1 is reverse"
    )

    is_zero_at_teacher: ClassVar[bool] = True

    @property
    def tolerates_staleness(self) -> bool:
        """A forward KL does."""
        return self.direction == "forward"

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The divergence [N]."""
        student, teacher = outcomes(inputs)
        beta = {"reverse": 1.0, "forward": 0.0, "js": self.beta}[self.direction]
        if beta == 1:
            return kl(student, teacher)
        if beta == 0:
            return kl(teacher, student)
        mixture = (teacher + math.log(beta)).logaddexp(student + math.log1p(-beta))
        return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


class Skew(Objective):
    """KL to a mixture with alpha of its own left side (DistiLLM, 2402.03898).

    reverse: KL(student || alpha student + (1 - alpha) teacher); forward: the same with the two
    exchanged. Over the K + 1 outcomes, never above log(1 / alpha), so no outcome can blow up.
    """

    kind: Literal["skew"] = "skew"
    direction: Literal["reverse", "forward"] = "reverse"
    alpha: float = Field(default=0.1, ge=0, lt=1, description="0 is the plain KL")

    is_zero_at_teacher: ClassVar[bool] = True

    @property
    def tolerates_staleness(self) -> bool:
        """A forward KL does."""
        return self.direction == "forward"

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The divergence [N]."""
        student, teacher = outcomes(inputs)
        left, right = (teacher, student) if self.direction == "forward" else (student, teacher)
        if self.alpha > 0:
            right = (left + math.log(self.alpha)).logaddexp(right + math.log1p(-self.alpha))
        return kl(left, right)


class Lsm(Objective):
    """Reverse KL with both sides renormalised over the K candidates (2603.25562).

    Gradient in the logits: p'_j (A'_j - loss) inside the support, renormalised; exactly 0 for every
    logit outside. It cannot see mass that the student keeps there, and it is no bound of the full
    KL in either direction.
    """

    kind: Literal["lsm"] = "lsm"

    is_zero_at_teacher: ClassVar[bool] = True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The divergence [N]."""
        student = inputs.student_top_logprobs_NK.log_softmax(1)
        return kl(student, inputs.teacher_top_logprobs_NK.log_softmax(1))


class EntropyAware(Objective):
    """Forward KL where the teacher is unsure: a term to add to another objective.

    1[H(q) > threshold] * sum over the candidates of q' log(q' / p), q' the teacher renormalised, p
    the student over the full vocabulary; gradient p_j - q'_j (q' = 0 outside). H(q) is the entropy
    of the K + 1 outcomes, at most the teacher's. Alone it teaches nothing where the teacher is sure
    (entropy-aware OPD).
    """

    kind: Literal["entropy_aware"] = "entropy_aware"
    threshold: float = Field(default=0.67, ge=0, description="teacher entropy above it, nats")

    is_zero_at_teacher: ClassVar[bool] = True

    @property
    def tolerates_staleness(self) -> bool:
        """A forward KL does."""
        return True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The divergence where the teacher is unsure, 0 elsewhere [N]."""
        teacher = inputs.teacher_top_logprobs_NK.log_softmax(1)
        unsure_N = teacher_entropy(inputs) > self.threshold
        return kl(teacher, inputs.student_top_logprobs_NK) * unsure_N
