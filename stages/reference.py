"""The run's first student beside the one in training: a term of the loss keeps the two near."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from opd_stream.batches import Batch
from opd_stream.config.sections import Reference
from opd_stream.engines.head import output_head
from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.hidden_states import exact_head
from opd_stream.loss import batch_loss
from opd_stream.objectives import Bucket
from opd_stream.rebuilt import TeacherHead


class FirstStudent:
    """What the run began with: the base under adapters, or else a copy that does not train."""

    def __init__(self, settings: Reference, load: Callable[[], Any]) -> None:
        """`load` makes the copy, when it is first needed."""
        self._settings, self._load = settings, load

    @cached_property
    def _copy(self) -> Any:
        with torch.random.fork_rng():  # a round that goes on draws the same dropout
            return self._load().eval().requires_grad_(False)

    def loss(
        self, model: Any, hidden_BLH: torch.Tensor, batch: Batch, *, merge_terminators: bool
    ) -> torch.Tensor:
        """weight * KL(student || first student) over its candidates and tail, as a token mean.

        Where several teachers score, rows count as often, and with the weight, as in the objective.

        Args:
            model: the student in training.
            hidden_BLH: its hidden states of the batch.
            batch: rows that it wrote.
            merge_terminators: all terminators are one outcome.
        """
        is_adapted = hasattr(model, "peft_config")
        first = model if is_adapted else self._copy.to(hidden_BLH.device)
        with torch.no_grad(), model.disable_adapter() if is_adapted else nullcontext():
            own_BLH = rows_hidden(decoder_of(first), batch.input_ids_BL, batch.attention_mask_BL)
            head = exact_head(output_head(first))
        states_NH = own_BLH.flatten(0, 1)[batch.hidden_rows_N]
        vocabulary = len(head.weight_VH)
        return batch_loss(
            hidden_BLH,
            output_head(model),
            replace(batch, teacher_states_NG=states_NH, chunk_N=None, draws=None),
            (Bucket(weight=self._settings.weight),),
            merge_terminators=merge_terminators,
            teacher=TeacherHead(
                head=head, top_k=min(self._settings.top_k, vocabulary), vocabulary=vocabulary
            ),
        ).loss
