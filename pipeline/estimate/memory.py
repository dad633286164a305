"""Memory of training at its peak, from the shapes of the student's weights and of its layers.

A step holds weights and moments throughout. Activations are there before all gradients are, so the
larger of the two counts. What a layer leaves for its backward pass is counted as in the Llama
family: six tensors as wide as the hidden states, five as the queries and four as the MLP.
"""

from math import prod
from pathlib import Path
from typing import Any

from pydantic import computed_field

from opd_stream.config import Config
from opd_stream.config.sections import Lora
from opd_stream.costs import adapter_weights
from opd_stream.model_config import read_model_config
from opd_stream.section import Record
from opd_stream.store.codecs import HiddenCodec
from opd_stream.windows import AdaptiveWindow
from pipeline.estimate.sizes import FLOAT32
from stages.checkpoints import NARROW, weight_files

PROCESS = 420_000_000  # Python and the libraries of training on a CPU, measured
CHUNK = 3 * 24 * 2**20  # logits of a chunk on a CPU, and what is computed of them
MOMENTS = {"adamw": 8, "adamw-8bit": 2, "adafactor": 0}  # bytes a trained parameter
WIDENED = 1.2  # of 16-bit activations: norms and softmax are float32


class TrainingMemory(Record):
    """Bytes of one process that trains, on one device."""

    parts: dict[str, int]
    tokens: int  # of a micro-batch, padding included

    @computed_field
    @property
    def bytes(self) -> int:
        """At the peak."""
        parts = self.parts
        both = max(parts["gradients"], parts["activations"])
        return sum(parts.values()) - parts["gradients"] - parts["activations"] + both


def training_memory(config: Config, folder: Path, *, row_tokens: float) -> TrainingMemory | None:
    """The forecast for a student, on a CPU; None where its files do not say enough.

    Args:
        config: the run.
        folder: of the student.
        row_tokens: prompt and completion of a row.

    Raises:
        UserError: the weights cannot be read.
    """
    train, trainer = config.train, config.pools.trainer
    model = read_model_config(folder)
    stored, settings = weight_files(folder), model.settings
    named = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if model.is_quantised or not all(settings.get(name) for name in named):
        return None
    weights = sum(prod(tensor.shape) for tensor in stored.values())
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    trained = weights if train.lora is None else adapter_weights(shapes, train.lora)
    shards = trainer.devices if trainer.strategy == "fsdp2" else 1
    is_narrow = {tensor.dtype for tensor in stored.values()} <= set(NARROW) and shards == 1
    width = 2 if train.precision == "bf16-true" else FLOAT32
    base = weights * width
    if train.lora is not None:
        base = _frozen_base(shapes, train.lora, 2 if is_narrow else FLOAT32) + trained * FLOAT32
    master = trained * FLOAT32 if train.precision == "bf16-true" else 0
    tokens = min(train.tokens_per_microbatch, round(train.rows_per_step * row_tokens))
    vocabulary, hidden = settings["vocab_size"], settings["hidden_size"]
    head = vocabulary * hidden * width
    if train.lora is not None:  # no gradient; widened or narrowed for its product
        computed = FLOAT32 if train.precision == "float32" else 2
        head *= computed / FLOAT32 if is_narrow == (computed == FLOAT32) else 0
    activations = tokens * activation_numbers(settings, recomputes=train.gradient_checkpointing)
    activations *= FLOAT32 if train.precision == "float32" else 2 * WIDENED
    has_copy = train.reference is not None and train.lora is None
    is_audited = isinstance(config.rollouts.window, AdaptiveWindow)
    casts = weights * 2 if train.precision == "bf16-mixed" and train.lora is None else 0
    return TrainingMemory(
        parts={
            "process": PROCESS,
            "weights": (base + master) // shards,
            "moments": trained * MOMENTS[train.optimizer] // shards,
            "gradients": trained * width // shards,
            "activations": round(activations) + casts,
            "head": round(head) + CHUNK,
            "teacher_head": states_bytes(config, scoring=False),
            **({"reference": weights * FLOAT32} if has_copy else {}),
            **({"audit": base} if is_audited else {}),  # which loads the student again
        },
        tokens=tokens,
    )


def states_bytes(config: Config, *, scoring: bool) -> int:
    """What codec hidden holds beside the models: the teacher's head in float32, and the basis.

    0 with another codec, and where the teacher is not known.

    Raises:
        UserError: the teacher's config cannot be read.
    """
    codec, teacher = config.scores.codec, config.teacher
    if teacher is None or not isinstance(codec, HiddenCodec):
        return 0
    model = read_model_config(teacher.folder)
    width = model.settings.get("hidden_size") or 0
    head = 0 if scoring and teacher.dtype == "float32" else model.vocabulary * width
    basis = 0 if codec.max_kl is None else (3 if scoring else 1) * width**2
    return (head + basis) * FLOAT32


def _frozen_base(shapes: dict[str, list[int]], lora: Lora, stored: int) -> int:
    """Bytes of the weights under adapters; of a quantised matrix with a scale for 64 numbers."""
    width = {"stored": stored, "8bit": 1 + FLOAT32 / 64, "4bit": 0.5 + FLOAT32 / 64}[lora.base]
    total = 0.0
    for name, shape in shapes.items():
        is_packed = len(shape) == 2 and "embed" not in name and "lm_head" not in name
        total += prod(shape) * (width if is_packed else stored)
    return round(total)


def activation_numbers(settings: dict[str, Any], *, recomputes: bool) -> int:
    """Numbers that a forward pass leaves for the backward pass, of one token."""
    hidden, layers = settings["hidden_size"], settings["num_hidden_layers"]
    heads = settings["num_attention_heads"]
    queries = heads * (settings.get("head_dim") or hidden // heads)
    layer = 6 * hidden + 5 * queries + 4 * (settings.get("intermediate_size") or 4 * hidden)
    return layers * hidden + layer if recomputes else layers * layer
