"""Objectives: from one cache row and the current student to one loss a token.

    losses_N = token_losses((Bucket(direction="reverse"),), inputs)

Each is declared once, as the section of the config that names it, with its loss as a method. All
but two train from the columns that every ranked cache has, so the choice is made when training, not
when scoring. docs/objectives.md says what each computes, reads and cannot see.

Shapes: N tokens, K teacher candidates, K + 1 outcomes with the tail, M draws. Importance is p / b,
the probability of a token now over its probability under the weights that drew it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from opd_stream.section import Kinds, Part, later

if TYPE_CHECKING:
    from torch import Tensor

# Stands for probability 0: exp(-60) adds nothing in float32, and no divergence is infinite.
SMALLEST_LOGPROB = -60.0
LARGEST_TOP_LOGPROB = -1e-6  # a head closer to 1 has no tail that float32 can tell from rounding
SMALLEST_TAIL_LOGPROB = math.log(-LARGEST_TOP_LOGPROB) + 1e-4  # of such a head, with room to round
LARGEST_LOG_IMPORTANCE = 20.0  # exp(20): nothing trains well from there; keeps float32 finite

Reads = Literal["candidates", "token", "draws", "drawn", "completion"]
"""The teacher's ranked candidates; the student's token alone; its further draws; ids drawn from the
teacher (codec sampled); the completion, and nothing of the teacher."""


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
    Where the student's is at its floor, what the teacher's lies below is rounding, too: both are
    at the floor, so that equal sides have no loss (K = V: two empty tails).
    """
    student_NK = inputs.student_top_logprobs_NK
    student_tail_N, tail_N = log_tail(student_NK), inputs.teacher_tail_logprobs_N.to(student_NK)
    floor_N = student_tail_N.detach()
    tail_N = tail_N.maximum(floor_N).where(floor_N <= SMALLEST_TAIL_LOGPROB, tail_N)
    teacher = _joined(inputs.teacher_top_logprobs_NK.to(student_NK), tail_N)
    return _joined(student_NK, student_tail_N), teacher.clamp(min=SMALLEST_LOGPROB)


def log_tail(logprobs_NK: Tensor) -> Tensor:
    """log(1 - sum of exp(logprobs)) [N], clamped where the sum is 1 but for rounding."""
    head_N = logprobs_NK.logsumexp(1).clamp(max=LARGEST_TOP_LOGPROB)
    return (-head_N.expm1()).log()


def teacher_entropy(inputs: ObjectiveInputs) -> Tensor:
    """Entropy of the teacher's K + 1 outcomes [N], nats: at most that over the vocabulary."""
    teacher = _joined(inputs.teacher_top_logprobs_NK, inputs.teacher_tail_logprobs_N)
    teacher = teacher.clamp(min=SMALLEST_LOGPROB)
    return -(teacher.exp() * teacher).sum(1)


def seen_reverse_kl(inputs: ObjectiveInputs) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) over the K + 1 outcomes, and what these do not see [N], nats.

    The second is an estimate from the drawn token, as in `Hybrid`: its mean over draws of the
    behavior student at temperature 1 is the full divergence less the first.
    """
    student, teacher = outcomes(inputs)
    importance_N = _importance(inputs.student_logprobs_N, inputs.behavior_logprobs_N)
    return kl(student, teacher), importance_N * _beyond_tail(inputs, student, teacher)


def _beyond_tail(inputs: ObjectiveInputs, student: Tensor, teacher: Tensor) -> Tensor:
    """The drawn token's log-ratio less that of the tails; 0 if it is a candidate; detached [N]."""
    tail_advantage_N = (student[:, -1] - teacher[:, -1]).detach()
    return (inputs.reverse_kl_N - tail_advantage_N).masked_fill(inputs.sampled_in_top_N, 0.0)


def kl(left: Tensor, right: Tensor) -> Tensor:
    """sum of exp(left) * (left - right) over the last dimension."""
    return (left.exp() * (left - right)).sum(dim=1)


def _joined(head_NK: Tensor, tail_N: Tensor) -> Tensor:
    import torch

    return torch.cat([head_NK, tail_N[:, None]], dim=1)


def _importance(student: Tensor, behavior: Tensor) -> Tensor:
    return (student - behavior).clamp(max=LARGEST_LOG_IMPORTANCE).exp()


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


class EntropyMix(Objective):
    """Both directions of the KL, the forward one the more the less sure the teacher is.

    w KL(teacher || student) + (1 - w) KL(student || teacher) over the K + 1 outcomes, with
    w = H(q) / (H(q) + half), H(q) the entropy of the teacher's outcomes. A teacher that is sure is
    followed mode by mode, one that is not is covered. The gradient is the same mean of both.

    Source: our reading of KL mixtures weighted by teacher entropy (2605.16826).
    """

    kind: Literal["entropy_mix"] = "entropy_mix"
    half: float = Field(
        default=1.0, gt=0, description="teacher entropy at which both count alike, nats"
    )

    is_zero_at_teacher: ClassVar[bool] = True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The mean of both divergences [N]."""
        student, teacher = outcomes(inputs)
        entropy_N = teacher_entropy(inputs)
        forward_N = entropy_N / (entropy_N + self.half)
        return forward_N * kl(teacher, student) + (1 - forward_N) * kl(student, teacher)


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
        live_N = inputs.student_logprobs_N
        importance_N = _importance(live_N.detach(), inputs.behavior_logprobs_N)
        carried_N = (live_N - live_N.detach()).exp()  # 1 in value, with the gradient of log p
        tail_N = importance_N.clamp(max=self.importance_cap) * carried_N
        return kl(student, teacher) + tail_N * _beyond_tail(inputs, student, teacher)


class SampledPg(Objective):
    """Policy gradient on the sampled token, with importance weights.

    importance * sg(reverse_kl - baseline), importance with its gradient. The expectation of its
    gradient over the behavior distribution is the gradient of the full KL(student || teacher), also
    when the behavior is stale; the advantage is recomputed under the current student. Token level
    (gamma 0), no clipping. The baseline `bucket` is the detached bucket KL of the position: same
    expectation, a little less variance. It sees the drawn token only, so its variance is high.

    `bound` limits the log-ratio before the baseline: to [-bound, bound], or smoothly by bound
    tanh(log-ratio / bound). The expected gradient is then sum of p_v * limited_v * grad log p_v.

    Source: 2605.11182, 2606.24143; baseline after vOPD, bound after TOP-D (2607.04751).
    """

    kind: Literal["sampled_pg"] = "sampled_pg"
    baseline: Literal["none", "bucket"] = Field(
        default="none", description="subtracted from the advantage; bucket: a little less variance"
    )
    bound: float | None = later(
        default=None, gt=0, description="largest size of the log-ratio, nats; null: none"
    )
    bounded: Literal["clamp", "tanh"] = later(
        default="clamp", description="how: cut off there, or smoothly"
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.bound is None and self.bounded != "clamp":
            raise ValueError(
                f"bounded is {self.bounded} without bound, so that nothing is; expected nats, "
                "such as bound=2; set it, or leave bounded out"
            )
        return self

    reads: ClassVar[Reads] = "token"
    is_sampled: ClassVar[bool] = True
    is_zero_at_teacher: ClassVar[bool] = True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """Importance times advantage [N]."""
        advantage_N, bound = inputs.reverse_kl_N, self.bound
        if bound is not None:
            is_smooth = self.bounded == "tanh"
            advantage_N = (
                bound * (advantage_N / bound).tanh()
                if is_smooth
                else advantage_N.clamp(-bound, bound)
            )
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


class CrossEntropy(Objective):
    """-log p of the completion's tokens: fine-tuning on given rollouts, without a teacher.

    Of rollouts that the student wrote it teaches nothing, so it is for `train.given_objective`.
    """

    kind: Literal["ce"] = "ce"

    reads: ClassVar[Reads] = "completion"

    @property
    def tolerates_staleness(self) -> bool:
        """Nothing of it is the student's."""
        return True

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """-log p [N]."""
        return -inputs.student_logprobs_N


AnyObjective = Annotated[
    Objective,
    Kinds(
        Bucket,
        EntropyMix,
        Skew,
        Lsm,
        Hybrid,
        SampledPg,
        MonteCarlo,
        DrawnForward,
        EntropyAware,
        CrossEntropy,
        group="opd_stream.objectives",
    ),
]


def token_losses(objectives: Sequence[Objective], inputs: ObjectiveInputs) -> Tensor:
    """The loss of each completion token [N], nats: the weighted sum of the objectives."""
    import torch

    return torch.stack([part.weight * part.token_losses(inputs) for part in objectives]).sum(0)


def tolerates_staleness(objectives: Sequence[Objective]) -> bool:
    """Whether stale rows leave the objectives what they are: no reverse KL among them."""
    return all(part.tolerates_staleness for part in objectives)
