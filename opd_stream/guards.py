"""Guards against known ways in which distillation on cached scores goes wrong.

Shapes: N tokens, K teacher candidates, T terminators. Each guard is a pure function; they are on
unless the config says otherwise. docs/objectives.md tells what each is for.
"""

from dataclasses import dataclass

import torch

from opd_stream.objectives import SMALLEST_LOGPROB

SMALLEST_TAIL = 1e-7  # of a difference of stored probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminators:
    """The T ids that end a text for student or teacher, with what both sides give them."""

    ids_T: torch.Tensor
    student_logprobs_NT: torch.Tensor
    teacher_logprobs_NT: torch.Tensor

    @property
    def student_N(self) -> torch.Tensor:
        """log of the student's probability to stop."""
        return self.student_logprobs_NT.logsumexp(1)

    @property
    def teacher_N(self) -> torch.Tensor:
        """log of the teacher's probability to stop."""
        return self.teacher_logprobs_NT.logsumexp(1)


def merge_into_candidates(
    stop: Terminators,
    *,
    top_ids_NK: torch.Tensor,
    student_top_NK: torch.Tensor,
    teacher_top_NK: torch.Tensor,
    teacher_tail_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates in which all terminators are one: student, teacher [N, K + 1] and the tail [N].

    A base student ends with one id and its teacher with another, to which each gives the other's
    almost nothing; compared as tokens, stopping costs 25 nats and the student unlearns it. Merging
    outcomes keeps every law of the divergences (SimOPD's audit of terminators).

    Where a cached tail holds little but terminators, the rest is a difference of rounded numbers:
    below `SMALLEST_TAIL` it is noise, and counts as that much.
    """
    is_stop_NK = torch.isin(top_ids_NK, stop.ids_T)
    student = student_top_NK.masked_fill(is_stop_NK, SMALLEST_LOGPROB)
    teacher = teacher_top_NK.masked_fill(is_stop_NK, SMALLEST_LOGPROB)
    is_there_NK = teacher_top_NK > SMALLEST_LOGPROB  # padding has an id as well
    in_top_NT = ((top_ids_NK[:, :, None] == stop.ids_T) & is_there_NK[:, :, None]).any(1)
    outside_N = (stop.teacher_logprobs_NT.exp() * ~in_top_NT).sum(1)
    whole_N = teacher_tail_N.exp()
    rest_N = torch.maximum(whole_N - outside_N, whole_N.clamp(max=SMALLEST_TAIL))
    tail_N = rest_N.log().clamp(min=SMALLEST_LOGPROB)
    return (
        torch.cat([student, stop.student_N[:, None]], dim=1),
        torch.cat([teacher, stop.teacher_N[:, None].to(teacher.dtype)], dim=1),
        torch.where(outside_N > 0, tail_N, teacher_tail_N),
    )


def soft_clamp(losses_N: torch.Tensor, limit: float) -> torch.Tensor:
    """Losses above the limit count as the limit, their gradient scaled by limit / loss [N].

    The limit is a multiple of the mean loss of the optimizer step before, so that it depends
    neither on micro-batches nor on ranks. For non-negative losses (SimOPD's audit: k = 3).
    """
    return torch.where(losses_N <= limit, losses_N, losses_N * (limit / losses_N.detach()))
