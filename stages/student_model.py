"""The student as a trainable module: loaded, adapted, sharded, and written as a policy."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opd_stream.batches import Batch
from opd_stream.config.sections import Lora
from opd_stream.engines.head import output_head
from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.errors import UserError
from opd_stream.loss import BatchLoss, batch_loss
from opd_stream.objectives import Objective
from opd_stream.weighting import Weighting

ADAPTER = "adapter"  # folder of the LoRA adapter inside a policy


class StudentModel(torch.nn.Module):
    """A causal language model whose forward pass is the loss of a batch.

    Decoder and head run inside one module's forward, so that sharded weights are whole there.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        batch: Batch,
        objectives: tuple[Objective, ...],
        *,
        merge_terminators: bool,
        limit: float | None,
        weighting: Weighting | None = None,
    ) -> BatchLoss:
        """See `batch_loss`."""
        decoder = decoder_of(self.model)
        hidden_BLH = rows_hidden(decoder, batch.input_ids_BL, batch.attention_mask_BL)
        return batch_loss(
            hidden_BLH,
            output_head(self.model),
            batch,
            objectives,
            merge_terminators=merge_terminators,
            limit=limit,
            weighting=weighting,
        )

    def shard(self, mesh: Any) -> None:
        """FSDP2: one group a decoder layer, and one for embeddings, norm and head."""
        from torch.distributed.fsdp import fully_shard

        for layer in self.model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


def load_student(
    base: Path,
    *,
    lora: Lora | None,
    initial: Path,
    gradient_checkpointing: bool,
    adapter: Path | None = None,
) -> StudentModel:
    """The student of a round, in float32.

    Args:
        base: policy the round starts from.
        lora: adapters; then weights are those of `initial`.
        initial: the run's first student.
        gradient_checkpointing: recompute activations in the backward pass.
        adapter: folder of the adapter that goes on; None: a new one.

    Raises:
        UserError: the weights are not safetensors, or no causal language model.
    """
    model = _whole_model(base if lora is None else initial)
    model.config.use_cache = False
    if lora is not None:
        model = _adapted(model, lora, adapter)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return StudentModel(model.train())


def save_student(
    student: StudentModel, weights: dict[str, torch.Tensor], base: Path, folder: Path
) -> None:
    """Write a policy: a Hugging Face folder, with the adapter beside the merged weights.

    Args:
        student: after training; a LoRA student is merged in place.
        weights: of `student`, whole.
        base: policy the round started from, for the tokenizer.
        folder: empty folder to fill.
    """
    model = student.model
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder / ADAPTER, state_dict=own)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)
        model = model.merge_and_unload()
        own = model.state_dict()
    model.save_pretrained(folder, state_dict=own)
    _copy_tokenizer(base, folder)


def _whole_model(folder: Path) -> Any:
    """From safetensors only, as the engines read it and as its identity is taken."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except OSError as error:
        raise UserError(
            f"{folder} cannot be trained ({' '.join(str(error).split())[:200]}); expected "
            "config.json and model.safetensors; check the folder"
        ) from error


def _adapted(model: Any, lora: Lora, adapter: Path | None) -> Any:
    import peft

    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(
            f"train.lora.targets {lora.targets!r} fit no module of the student "
            f"({' '.join(str(error).split())[:150]}); name modules of the model, or all-linear"
        ) from error


def _copy_tokenizer(base: Path, target: Path) -> None:
    """Everything of the base folder that is neither weights nor what `save_pretrained` wrote."""
    for path in sorted(base.iterdir()):
        is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        is_ours = path.name in ("metrics.jsonl", "model.safetensors.index.json")
        if path.is_file() and not is_weights and not is_ours and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


Loader = Callable[[], StudentModel]
