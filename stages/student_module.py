"""The student in training: one forward pass gives the loss and, for free, the measured drift.

`student_logprobs` of the sampled tokens are needed by the objective anyway; their difference to the
cached `behavior_logprobs` is the policy drift, so staleness is measured on every row at every step
without another pass.
"""

from pathlib import Path
from typing import Any

import lightning
import torch

from opd_stream.batches import Batch
from opd_stream.drift import DriftSums, drift_sums
from opd_stream.engines.head import logits_head
from opd_stream.logprobs import student_logprobs
from opd_stream.objectives import SMALLEST_LOGPROB, Objective, ObjectiveInputs, token_losses
from opd_stream.store.tree import load_tree

HEAD_ROWS_PER_CHUNK = 4096  # rows whose logits exist at one time


class StudentModule(lightning.LightningModule):
    """A causal language model, an objective and an optimizer."""

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        optimizer: dict[str, Any],
        optimizer_state: Path | None,
        *,
        micro_steps: int,
    ) -> None:
        super().__init__()
        self._folder, self._objective, self._micro_steps = folder, objective, micro_steps
        self._optimizer, self._optimizer_state = optimizer, optimizer_state
        self.model: Any = None
        self.step_sums: list[dict[str, float]] = []  # one entry per micro-batch of the step

    def configure_model(self) -> None:
        if self.model is not None:
            return
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=torch.float32, trust_remote_code=False
        )
        self.model.config.use_cache = False
        self.model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        hidden_BLH = self.model.get_decoder()(
            input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL, use_cache=False
        ).last_hidden_state
        hidden_NH = hidden_BLH.flatten(0, 1)[batch.hidden_rows_N]
        ids_NJ = torch.cat([batch.completion_ids_N[:, None], batch.teacher_top_ids_NK], dim=1)
        logprobs_NJ, entropy_N = student_logprobs(
            hidden_NH, logits_head(self.model), ids_NJ, chunk_rows=HEAD_ROWS_PER_CHUNK
        )
        absent_NK = batch.teacher_top_logprobs_NK == -torch.inf
        inputs = ObjectiveInputs(
            student_logprobs_N=logprobs_NJ[:, 0],
            student_top_logprobs_NK=logprobs_NJ[:, 1:].masked_fill(absent_NK, SMALLEST_LOGPROB),
            teacher_logprobs_N=batch.teacher_logprobs_N.clamp(min=SMALLEST_LOGPROB),
            teacher_top_logprobs_NK=batch.teacher_top_logprobs_NK.clamp(min=SMALLEST_LOGPROB),
            teacher_tail_logprobs_N=batch.teacher_tail_logprobs_N,
            behavior_logprobs_N=batch.behavior_logprobs_N,
        )
        losses_N = token_losses(self._objective, inputs)
        self._measure(inputs, losses_N.detach(), entropy_N)
        # Lightning divides by the number of micro-batches; the token mean already runs over them.
        return losses_N.sum() / batch.tokens_of_step * self._micro_steps

    @torch.no_grad()
    def _measure(
        self, inputs: ObjectiveInputs, losses_N: torch.Tensor, entropy_N: torch.Tensor
    ) -> None:
        reverse_kl_N = inputs.student_logprobs_N - inputs.teacher_logprobs_N
        drift: DriftSums = drift_sums(inputs.student_logprobs_N, inputs.behavior_logprobs_N)
        sums = {
            "tokens": float(len(losses_N)),
            "loss": losses_N.double().sum().item(),
            "reverse_kl": reverse_kl_N.double().sum().item(),
            "student_top_mass": inputs.student_top_logprobs_NK.exp().double().sum().item(),
            "teacher_top_mass": inputs.teacher_top_logprobs_NK.exp().double().sum().item(),
            "student_entropy": entropy_N.double().sum().item(),
        }
        self.step_sums.append({**sums, **{f"drift.{k}": v for k, v in drift.as_dict().items()}})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.model.parameters(), **self._optimizer)
        if self._optimizer_state is not None:
            previous = load_tree(self._optimizer_state)
            settings = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": previous["state"], "param_groups": settings})
        return optimizer
