"""The loss of cached rows inside another trainer.

`CachedLoss` gives the trainer that it is named before its data and its loss: `batch_loss`, one pass
over the head without dense logits, for every objective. It is one mean over the tokens of the
effective batch, whatever the accumulation.

    class Distiller(CachedLoss, trl.SFTTrainer): ...
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from opd_stream.batches import Batch
from opd_stream.drift import NAMES, means, named
from opd_stream.engines.head import output_head
from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.errors import UserError
from opd_stream.hidden_states import exact_head, read_head
from opd_stream.loss import BatchLoss, batch_loss, check_vocabulary
from opd_stream.objectives import AnyObjective
from opd_stream.rebuilt import TeacherHead
from opd_stream.store.store import Store
from opd_stream.trainers.cached_data import (
    UNCUT,
    CachedCollator,
    CachedDataset,
    CacheOrder,
    Locations,
)
from opd_stream.trainers.serving import (
    Cache,
    check_served,
    check_tokenizer,
    is_given,
    states_head,
)

LOGGED = ("policy_drift", "effective_sample_fraction", "reverse_kl", "teacher_top_mass")
_Trainer: Any = Trainer  # its types are not complete


class CachedLoss:
    """Data and loss of a cache for a class of trainers: name it before the trainer's class."""

    model: Any
    args: TrainingArguments
    accelerator: Any
    is_in_train: bool

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        scores: Locations,
        objectives: Sequence[AnyObjective],
        eval_scores: Locations | None = None,
        window_tokens: int = UNCUT,
        top_k: int | None = None,
        masked_ids: Sequence[int] = (),
        merge_terminators: bool = True,
        **options: Any,
    ) -> None:
        """Open caches and the trainer.

        Args:
            model: a causal language model, perhaps with LoRA adapters.
            args: of the trainer.
            scores: STORE/scores/FINGERPRINT, one or several of rollouts of one student.
            objectives: what to minimise; their weighted sum.
            eval_scores: caches that the evaluation loss is taken on.
            window_tokens: completion tokens used of each row.
            top_k: teacher candidates to use; None: all that are cached, of codec hidden the whole
                vocabulary.
            masked_ids: ids whose first occurrence does not train.
            merge_terminators: all terminators are one outcome.
            options: of the trainer.

        Raises:
            UserError: a cache is not complete, cannot serve an objective, or belongs to another
                tokenizer.
        """
        data: list[Any] = [CachedDataset(s) for s in (scores, eval_scores) if s is not None]
        caches = [cache for each in data for cache in each.caches]
        self.objectives, self.merge_terminators = tuple(objectives), merge_terminators
        check_served(caches, self.objectives, top_k=top_k, merge_terminators=merge_terminators)
        check_tokenizer(caches, options.get("processing_class"))
        if _leaves_rows_alone(args):
            data = [each.as_datasets() for each in data]
        trainer: Any = super()
        trainer.__init__(
            model=model,
            args=args,
            train_dataset=data[0],
            eval_dataset=data[1] if len(data) > 1 else None,
            data_collator=CachedCollator(
                window_tokens=window_tokens,
                top_k=None if states_head(caches) else top_k,
                masked_ids=tuple(masked_ids),
                same_tokens_only=any(part.reads != "token" for part in self.objectives),
                is_given=is_given(caches),
            ),
            **options,
        )
        self._refuse_replicas()
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens that are counted
        self.teacher = self._teacher(caches, top_k)
        self._train_sums, self._eval_sums = _no_sums(), _no_sums()

    def _refuse_replicas(self) -> None:
        if self.args.n_gpu > 1:
            raise UserError(
                f"{self.args.n_gpu} GPUs in one process; expected one; start a process for each "
                "with `accelerate launch`, or set CUDA_VISIBLE_DEVICES"
            )

    def _teacher(self, caches: Sequence[Cache], top_k: int | None) -> Any:
        """What rebuilds the teacher's distributions of hidden states; None: none are cached."""
        fingerprint = states_head(caches)
        if fingerprint is None:
            return None
        scores = caches[0][1]
        store = Store(str(scores.folder.parent.parent))
        head = exact_head(read_head(store.by_fingerprint("heads", fingerprint)))
        device = self.args.device
        bias_V = None if head.bias_V is None else head.bias_V.to(device)
        head = replace(head, weight_VH=head.weight_VH.to(device), bias_V=bias_V)
        most = len(head.weight_VH)
        student = len(self.model.get_output_embeddings().weight)
        known = min(scores.recipe.settings.get("vocabulary", most), student, most)
        return TeacherHead(head=head, top_k=top_k, vocabulary=known)

    def cached_loss(self, model: Any, batch: Batch) -> BatchLoss:
        """The loss of a batch under a model that no library wraps; see `batch_loss`."""
        head = output_head(model)
        check_vocabulary(batch, len(head.weight_VH))
        hidden_BLH = rows_hidden(decoder_of(model), batch.input_ids_BL, batch.attention_mask_BL)
        return batch_loss(
            hidden_BLH,
            head,
            batch,
            self.objectives,
            merge_terminators=self.merge_terminators,
            teacher=self.teacher,
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the mean over the tokens of the whole step.

        Args:
            model: as the trainer has it, perhaps wrapped.
            inputs: of `CachedCollator`.
            return_outputs: also return a dict with the loss.
            num_items_in_batch: tokens of the step, of all processes; None: of the micro-batch.
        """
        batch: Batch = inputs["cached"]
        if num_items_in_batch is not None:
            weights_N = torch.ones_like(batch.weights_N) / num_items_in_batch
            batch = replace(batch, weights_N=weights_N)
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self.accelerator.autocast():
            if plain is model:
                found = self.cached_loss(plain, batch)
            else:  # gradients travel between processes where the wrapper's own forward is called
                with _forward(plain, partial(self.cached_loss, plain)):
                    found = BatchLoss(*model(batch))
        own = self._train_sums if self.model.training else self._eval_sums
        own += found.sums.detach().cpu()
        loss = found.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which the trainer averages over
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone: there are no logits."""
        trainer: Any = self
        with torch.no_grad():
            loss = self.compute_loss(model, trainer._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *inputs: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """The evaluation, whose loss is the mean over its tokens."""
        self._eval_sums = _no_sums()
        trainer: Any = super()
        output = trainer.evaluation_loop(*inputs, metric_key_prefix=metric_key_prefix, **options)
        found = self._means(self._eval_sums)
        for name in ("loss", *LOGGED):
            output.metrics[f"{metric_key_prefix}_{name}"] = found[name]
        return output

    def log(self, logs: dict[str, float], *inputs: Any, **options: Any) -> None:
        """Also log what was measured since the last time: drift, reverse KL, the teacher's mass."""
        if "loss" in logs and self._train_sums.any():
            found = self._means(self._train_sums)
            logs = {**logs, **{name: found[name] for name in LOGGED}}
            self._train_sums = _no_sums()
        trainer: Any = super()
        trainer.log(logs, *inputs, **options)

    def _means(self, sums: torch.Tensor) -> dict[str, float]:
        """Means over the tokens of all processes."""
        return means(named(self.accelerator.reduce(sums.to(self.args.device), "sum")))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = super()
        rows: Any = trainer.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random":
            return trainer._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return CacheOrder(len(rows), seed=seed)


class CachedDistillationTrainer(CachedLoss, _Trainer):  # pyright: ignore[reportUntypedBaseClass]
    """Hugging Face's Trainer on cached teacher scores; see `CachedLoss`."""


def _leaves_rows_alone(args: Any) -> bool:
    """Have a trainer leave examples as they are; returns whether it is trl's."""
    args.remove_unused_columns = False  # the model does not read `cached`
    of_trl = getattr(args, "dataset_kwargs", ())
    if of_trl == ():
        return False
    args.dataset_kwargs = {**(of_trl or {}), "skip_prepare_dataset": True}
    return True


def _no_sums() -> torch.Tensor:
    return torch.zeros(len(NAMES), dtype=torch.float64)


@contextmanager
def _forward(model: Any, forward: Any) -> Generator[None]:
    """Put another forward in the place of a module's for the length of a block."""
    own: Any = model.__dict__
    before = own.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
