"""How far a student's distributions are from a teacher's, over the whole vocabulary.

Both sides are hidden states and an output head, so logits exist for a chunk of tokens at a time.
Where one head is longer than the other, as with padded vocabularies, both distributions are those
given the ids that both heads have.

Shapes: N tokens, H hidden of the student, G of the teacher, V vocabulary.
"""

from typing import NamedTuple

import torch

from opd_stream.fused import OutputHead


class TokenDistances(NamedTuple):
    """Of N tokens, float32, nats."""

    reverse_kl: torch.Tensor  # [N], KL(student | teacher)
    forward_kl: torch.Tensor  # [N], KL(teacher | student)
    agreement: torch.Tensor  # [N], 1 where both find the same id most probable, else 0
    cross_entropy: torch.Tensor  # [N], of the student under the teacher: -sum of p log q
    teacher_logprobs: torch.Tensor  # [N], of the tokens themselves, over the teacher's whole head


@torch.inference_mode()
def token_distances(
    student_NH: torch.Tensor,
    student_head: OutputHead,
    teacher_NG: torch.Tensor,
    teacher_head: OutputHead,
    ids_N: torch.Tensor,
) -> TokenDistances:
    """The distances of N tokens.

    Args:
        student_NH: hidden states of the student that predict the tokens.
        student_head: its head.
        teacher_NG: hidden states of the teacher.
        teacher_head: its head.
        ids_N: the tokens.
    """
    shared = min(len(student_head.weight_VH), len(teacher_head.weight_VH))
    rows = max(1, min(student_head.chunk_rows, teacher_head.chunk_rows) // 2)
    found = torch.empty(len(TokenDistances._fields), len(ids_N), device=student_NH.device)
    for start in range(0, len(ids_N), rows):
        chunk = slice(start, start + rows)
        teacher_NV = teacher_head(teacher_NG[chunk]).float().log_softmax(1)
        own_N = teacher_NV.gather(1, ids_N[chunk, None])[:, 0]
        p_NV = _given(teacher_NV, shared)
        q_NV = _given(student_head(student_NH[chunk]).float().log_softmax(1), shared)
        difference_NV = p_NV - q_NV
        teachers_NV = p_NV.exp()
        found[:, chunk] = torch.stack(
            [
                -_expected(q_NV.exp(), difference_NV),
                _expected(teachers_NV, difference_NV),
                (p_NV.argmax(1) == q_NV.argmax(1)).float(),
                -_expected(teachers_NV, q_NV),
                own_N,
            ]
        )
    return TokenDistances(*found)


def _given(logprobs_NV: torch.Tensor, shared: int) -> torch.Tensor:
    """Log-probabilities given that the id is one of the first."""
    if shared == logprobs_NV.shape[1]:
        return logprobs_NV
    return logprobs_NV[:, :shared].log_softmax(1)


def _expected(weights_NV: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """The sum of weighted values [N]; what has no weight counts nothing, were it infinite."""
    return (weights_NV * values_NV).masked_fill_(weights_NV == 0, 0.0).sum(1)
