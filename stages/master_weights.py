"""Training in bfloat16 with float32 weights behind it (`train.precision: bf16-true`).

Forward and backward passes read a bfloat16 copy; the optimizer steps on the float32 weights, whose
sums keep changes that bfloat16 would round away. Gradients are widened a few tensors at a time.
"""

from collections.abc import Iterator

import torch

AT_ONCE = 32 * 2**20  # numbers whose gradients are float32 at one time


class MasterWeights:
    """The float32 weights of a student, which computes with bfloat16 copies from now on."""

    def __init__(self, student: torch.nn.Module) -> None:
        self._working = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.parameters = {n: torch.nn.Parameter(p.data) for n, p in self._working.items()}
        for parameter in self._working.values():
            parameter.data = parameter.data.bfloat16()

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of the optimizer on the float32 weights; gradients are used up."""
        for names in self._groups():
            for name in names:
                grad, self._working[name].grad = self._working[name].grad, None
                self.parameters[name].grad = None if grad is None else grad.float()
            optimizer.step()
            for name in names:
                self.parameters[name].grad = None
                self._working[name].copy_(self.parameters[name])

    def put_back(self) -> None:
        """Give the student its float32 weights, for publishing."""
        for name, parameter in self._working.items():
            parameter.data = self.parameters[name].data

    def _groups(self) -> Iterator[list[str]]:
        names, size = list[str](), 0
        for name, parameter in self._working.items():
            if names and size + parameter.numel() > AT_ONCE:
                yield names
                names, size = [], 0
            names.append(name)
            size += parameter.numel()
        yield names
