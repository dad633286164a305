"""Controls: what a student learns when its teacher, or the order of its windows, says nothing."""

import random
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from opd_stream.objectives import Bucket, ObjectiveInputs, Reads, SampledPg
from opd_stream.windows import Window


class Shuffled(Bucket):
    """The bucket, with the teacher's probabilities dealt out anew among its candidates."""

    kind: str = "benchmarks.controls:Shuffled"  # type: ignore[assignment]

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """The divergence from the shuffled teacher [N]."""
        from dataclasses import replace

        teacher_NK = inputs.teacher_top_logprobs_NK
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(teacher_NK.shape[1], generator=generator)
        return super().token_losses(replace(inputs, teacher_top_logprobs_NK=teacher_NK[:, order]))


class Constant(SampledPg):
    """A policy gradient whose advantage is the same negative number at every token (2608.31046)."""

    kind: str = "benchmarks.controls:Constant"  # type: ignore[assignment]

    reads: ClassVar[Reads] = "token"
    is_zero_at_teacher: ClassVar[bool] = False

    def token_losses(self, inputs: ObjectiveInputs) -> Tensor:
        """Importance of each drawn token, whose gradient makes it less probable [N]."""
        return (inputs.student_logprobs_N - inputs.behavior_logprobs_N).exp()


class RandomOrder(Window):
    """The windows of a schedule in a random order: the same mean, and no growth."""

    windows: tuple[int, ...] = Field(min_length=1, description="new tokens, a round each")
    steps: int = Field(ge=1, description="optimizer steps of a round")
    seed: int = Field(default=0, ge=0, description="of the order")

    def tokens_at(self, step: int) -> int:
        """That of the step's round."""
        order = random.Random(self.seed).sample(self.windows, len(self.windows))
        return order[min(step // self.steps, len(order) - 1)]
