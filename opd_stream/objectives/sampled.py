"""Objectives on drawn tokens: the student's own, or the teacher's.

Shapes: N tokens, M draws. Importance is p / b, the probability of a token now over its probability
under the weights that drew it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from opd_stream.objectives.base import Objective, ObjectiveInputs, Reads, kl, outcomes

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_LOG_IMPORTANCE = 20.0  # exp(20): nothing trains well from there; keeps float32 finite


class Hybrid(Objective):
    """The full reverse KL: the bucket, and the sampled token where the bucket is blind.

    bucket + 1[y outside the candidates] * w * p(y) / sg(p(y)) * sg(reverse_kl - A_tail), with
    w = sg(min(p / b, importance_cap)) and A_tail the log-ratio of the tails. Without the cap the
    expectation over the behavior distribution, of value and gradient, is that of the full KL, also
    for stale behavior; the cap is a small bias on a rare term, taken on the detached factor so that
    no gradient is lost. Needs samples from the untruncated distribution (temperature 1).

    Source: the tail-baseline form; idea of EMA-PG, without its extra gradient of p(S).
    """

    kind: Literal["hybrid"] = "hybrid"
    importance_cap: float = Field(default=5.0, gt=0, description="largest p / b of that token")

    is_sampled: ClassVar[bool] = True
    is_zero_at_teacher: ClassVar[bool] = True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """Bucket and tail term [N]."""
        student, teacher = outcomes(inputs)
        tail_advantage_N = (student[:, -1] - teacher[:, -1]).detach()
        live_N = inputs.student_logprobs_N
        importance_N = _importance(live_N.detach(), inputs.behavior_logprobs_N)
        carried_N = (live_N - live_N.detach()).exp()  # 1 in value, with the gradient of log p
        tail_N = importance_N.clamp(max=self.importance_cap) * carried_N
        tail_N = tail_N * (inputs.reverse_kl_N - tail_advantage_N)
        return kl(student, teacher) + tail_N.masked_fill(inputs.sampled_in_top_N, 0.0)


class SampledPg(Objective):
    """Policy gradient on the sampled token, with importance weights.

    importance * sg(reverse_kl - baseline), importance with its gradient. The expectation of its
    gradient over the behavior distribution is the gradient of the full KL(student || teacher), also
    when the behavior is stale; the advantage is recomputed under the current student. Token level
    (gamma 0), no clipping. The baseline `bucket` is the detached bucket KL of the position: same
    expectation, a little less variance. It sees the drawn token only, so its variance is high.

    Source: 2605.11182, 2606.24143; baseline after vOPD.
    """

    kind: Literal["sampled_pg"] = "sampled_pg"
    baseline: Literal["none", "bucket"] = Field(
        default="none", description="subtracted from the advantage; bucket: a little less variance"
    )

    reads: ClassVar[Reads] = "token"
    is_sampled: ClassVar[bool] = True
    is_zero_at_teacher: ClassVar[bool] = True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """Importance times advantage [N]."""
        advantage_N = inputs.reverse_kl_N
        if self.baseline == "bucket":
            advantage_N = advantage_N - kl(*outcomes(inputs)).detach()
        return _importance(inputs.student_logprobs_N, inputs.behavior_logprobs_N) * advantage_N


class MonteCarlo(Objective):
    """Policy gradient on several draws from the student; needs rollouts.extra_draws.

    Mean over M draws of importance * sg(reverse_kl): the expectation of `sampled_pg`, 1 / M of its
    variance; M = 1 is `sampled_pg`. It sees drawn tokens only. Source: AsyncOPD, 2606.24143.
    """

    kind: Literal["mc"] = "mc"

    reads: ClassVar[Reads] = "draws"
    is_sampled: ClassVar[bool] = True
    is_zero_at_teacher: ClassVar[bool] = True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The mean over the draws [N].

        Raises:
            ValueError: the inputs have no draws.
        """
        if inputs.draws is None:
            raise ValueError("objective mc reads draws; the inputs have none")
        draws = inputs.draws
        importance_NM = _importance(draws.student_logprobs_NM, draws.behavior_logprobs_NM)
        return (importance_NM * draws.reverse_kl_NM).mean(1)


class DrawnForward(Objective):
    """Cross-entropy to ids drawn from the teacher (RS-KD); needs codec sampled.

    -sum of count / D * log p over the drawn ids. Its expectation is the cross-entropy H(teacher,
    student), whose gradient is that of the full KL(teacher || student), p - q; a renormalised top-K
    is biased instead. Differs from the KL by the teacher's entropy. It sees drawn tokens only.
    Source: Sparse Logit Sampling (2503.16870).
    """

    kind: Literal["drawn_forward"] = "drawn_forward"

    reads: ClassVar[Reads] = "drawn"

    @property
    def tolerates_staleness(self) -> bool:
        """A forward KL does."""
        return True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The cross-entropy [N]."""
        weights_NK = inputs.teacher_top_logprobs_NK.exp()
        return -(weights_NK * inputs.student_top_logprobs_NK).sum(1)


def _importance(student: Tensor, behavior: Tensor) -> Tensor:
    return (student - behavior).clamp(max=LARGEST_LOG_IMPORTANCE).exp()
