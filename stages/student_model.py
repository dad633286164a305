"""The student as a trainable module: loaded, adapted, sharded, and written as a policy."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from opd_stream.batches import Batch
from opd_stream.config.sections import Lora
from opd_stream.engines.head import output_head
from opd_stream.engines.loading import check_training, load_model, unquantised
from opd_stream.engines.reading import decoder_of, layers_of, rows_hidden
from opd_stream.errors import UserError
from opd_stream.loss import BatchLoss, batch_loss
from opd_stream.model_config import read_model_config
from opd_stream.objectives import Objective
from opd_stream.rebuilt import TeacherHead
from opd_stream.store.files import INDEX, WEIGHTS
from opd_stream.store.policy import ADAPTER, EXACT
from opd_stream.store.tokenizer_folder import NAMED_TEMPLATES
from opd_stream.store.tree import save_tree
from opd_stream.weighting import Weighting
from stages.checkpoints import published_dtype, weight_files
from stages.frozen_base import (
    check_quantised,
    is_quantised,
    load_frozen,
    make_whole,
    quantise,
    seen_as_float32,
)
from stages.reference import FirstStudent
from stages.train_state import trained_weights

OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth"),
    *(".gguf", ".h5", ".msgpack", ".onnx"),
)
CONFIG, GENERATION = "config.json", "generation_config.json"
TRAINED, KEPT = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class StudentModel(torch.nn.Module):
    """A causal language model whose forward pass is the loss of a batch.

    Decoder and head run inside one module's forward, so that sharded weights are whole there.
    """

    reference: FirstStudent | None = None  # of steps that train, on rows of the student's own

    def __init__(self, model: Any, *, drops: bool = False) -> None:
        super().__init__()
        self.model, self._drops = model, drops

    def train(self, mode: bool = True) -> Self:
        """Without dropout of its own a model does in training what it does else.

        So routers draw no experts and no noise. What recomputes activations asks for the mode, and
        so does the dropout of adapters.
        """
        super().train(mode)
        if mode and not self._drops:
            for module in self.model.modules():
                recomputes = getattr(module, "gradient_checkpointing", False)
                module.training = recomputes or isinstance(module, torch.nn.Dropout)
        return self

    def forward(
        self,
        batch: Batch,
        objectives: tuple[Objective, ...],
        *,
        merge_terminators: bool,
        limit: float | None,
        weighting: Weighting | None = None,
        teacher: TeacherHead | None = None,
    ) -> BatchLoss:
        """See `batch_loss`."""
        decoder = decoder_of(self.model)
        hidden_BLH = rows_hidden(decoder, batch.input_ids_BL, batch.attention_mask_BL)
        found = batch_loss(
            hidden_BLH,
            output_head(self.model),
            batch,
            objectives,
            merge_terminators=merge_terminators,
            limit=limit,
            weighting=weighting,
            teacher=teacher,
        )
        if self.reference is None or batch.is_given or not torch.is_grad_enabled():
            return found
        kept = self.reference.loss(
            self.model, hidden_BLH, batch, merge_terminators=merge_terminators
        )
        return found._replace(loss=found.loss + kept)

    @property
    def vocabulary(self) -> int:
        """Ids that its head has."""
        return len(self.model.get_output_embeddings().weight)

    def shard(self, mesh: Any) -> None:
        """FSDP2: one group a decoder layer, and one for embeddings, norm and head."""
        from torch.distributed.fsdp import fully_shard

        for layer in layers_of(decoder_of(self.model)):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


def load_student(
    base: Path,
    *,
    lora: Lora | None,
    initial: Path,
    gradient_checkpointing: bool,
    adapter: Path | None = None,
    drops: bool = False,
    widens: bool = False,
) -> StudentModel:
    """The student of a round, in float32; the frozen base of adapters as `load_frozen` has it.

    Args:
        base: policy the round starts from.
        lora: adapters; then weights are those of `initial`.
        initial: the run's first student.
        gradient_checkpointing: recompute activations in the backward pass.
        adapter: folder of the adapter that goes on; None: a new one.
        drops: keep the model's own dropout; the adapters' is a setting of theirs.
        widens: a frozen base is float32, too (shards have one dtype).

    Raises:
        UserError: the folder cannot be loaded, or cannot be trained exactly.
    """
    folder = base if lora is None else initial
    is_whole = lora is None or widens or read_model_config(folder).is_quantised
    model = load_model(folder, dtype=torch.float32) if is_whole else load_frozen(folder)
    if getattr(model, "hf_quantizer", None) is not None:
        model = _dequantised(model, folder)
    check_training(model, folder)
    if not drops:
        _leave_out_dropout(model)
    model.config.use_cache = False
    if lora is not None:
        if lora.base != "stored":
            quantise(model, lora.base)
        model = _adapted(model, lora, adapter)
    _freeze_unread(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return StudentModel(model, drops=drops).train()


def check_lora(folder: Path, lora: Lora) -> None:
    """Refuse adapters that a checkpoint cannot have, without its weights.

    Raises:
        UserError: no module has such a name, the policy could not be published, or the library
            of a quantised base does not work here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        _adapted(auto.from_config(config.from_pretrained(folder)), lora, None)
    if lora.base != "stored":
        check_quantised(lora.base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def save_student(student: StudentModel, base: Path, folder: Path) -> None:
    """Write a policy: a Hugging Face folder, with the adapter beside the merged weights.

    Its config files and dtypes are those of `base`, and so are tensors that training does not read,
    such as a vision tower's: the next round, an engine and any other program find what they found
    there. Weights that lose bits are left beside them, too, as they are in training.

    Args:
        student: after training, its weights whole; it is merged and rounded in place.
        base: policy the round started from.
        folder: empty folder to fill.
    """
    model, dtypes = student.model, _dtypes(base)
    if not hasattr(model, "peft_config") and dtypes[""] != torch.float32:
        save_tree(trained_weights(student, is_kept=True), folder / EXACT)
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder / ADAPTER)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)
        model = _merged(model, dtypes[""])
    _round(model, dtypes)
    model.generation_config = GenerationConfig()  # the base's is copied, whatever it says
    model.save_pretrained(folder)
    (folder / GENERATION).unlink(missing_ok=True)
    _copy_texts(base, folder)
    _keep_unread(model, base, folder)


def _dtypes(base: Path) -> dict[str, torch.dtype]:
    """Name of a stored tensor -> its dtype in a policy; "" is that of most tensors."""
    most = getattr(torch, published_dtype(base))
    found = {"": most}
    if most != torch.float32:
        wide = (name for name, stored in weight_files(base).items() if stored.dtype == "float32")
        found |= dict.fromkeys(wide, torch.float32)
    return found


def _merged(model: Any, dtype: torch.dtype) -> Any:
    """The base with its adapters added in float32, one matrix at a time."""
    for module in model.modules():
        if hasattr(module, "base_layer"):
            is_narrow, weight = make_whole(module.base_layer), module.base_layer.weight
            module.merge()
            weight.data = weight.data.to(dtype if is_narrow else torch.float32)
        elif is_quantised(module):  # and without an adapter
            make_whole(module)
            module.weight.data = module.weight.data.to(dtype)
    return model.unload()


def _round(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Give weights and buffers the dtypes they are published in, one by one."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes.get(name, dtypes[""]))


def _dequantised(model: Any, folder: Path) -> Any:
    try:
        return unquantised(model.dequantize().float())
    except Exception as error:  # of the quantisation's library
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{folder} is quantised, and its weights cannot be made whole ({reason}); train a "
            "checkpoint that is not quantised"
        ) from error


def _leave_out_dropout(model: Any) -> None:
    """Set every rate of dropout to 0, in modules and in the configs that some of them read."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


def _freeze_unread(model: Any) -> None:
    """Parameters that a text does not reach get no gradient, and so no optimizer state."""
    head, decoder = model.get_output_embeddings(), decoder_of(model)
    read = {id(p) for module in (head, decoder) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


def _adapted(model: Any, lora: Lora, adapter: Path | None) -> Any:
    import peft

    if adapter is not None:
        with seen_as_float32(model):
            return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_shared = head is not None and head.weight is embeddings.weight
    try:
        with seen_as_float32(model):
            adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(
            f"train.lora.targets {lora.targets!r} fit no module of the student "
            f"({' '.join(str(error).split())[:150]}); name modules of the model, or all-linear"
        ) from error
    ends = (adapted.get_output_embeddings(), adapted.get_input_embeddings())
    if is_shared and any(hasattr(module, "lora_A") for module in ends):
        raise UserError(
            f"train.lora.targets {lora.targets!r} adapt the student's head or embeddings, which "
            "are one matrix: no checkpoint of this kind could hold the result; leave them out"
        )
    return adapted


def _copy_texts(base: Path, target: Path) -> None:
    """Config files, tokenizer and whatever else of the base folder is no weight and no metrics."""
    for path in sorted(base.iterdir()):
        is_other = path.suffix in OTHER_WEIGHTS or path.name in ("metrics.jsonl", INDEX)
        if path.is_file() and not is_other:
            shutil.copyfile(path, target / path.name)
    if (base / NAMED_TEMPLATES).is_dir():
        shutil.copytree(base / NAMED_TEMPLATES, target / NAMED_TEMPLATES)
    config: dict[str, Any] = json.loads((base / CONFIG).read_bytes())
    if config.pop("quantization_config", None) is not None:  # the published weights are whole
        (target / CONFIG).write_text(json.dumps(config, indent=2))


def _keep_unread(model: Any, base: Path, target: Path) -> None:
    """Add the base's tensors that the class of the model does not read.

    What a quantisation keeps beside a weight is no such tensor: the weight is written whole.
    """
    old, new = weight_files(base), weight_files(target)
    tied = {_end(name) for name in getattr(model, "all_tied_weights_keys", {})}
    kept = {name: at for name, at in old.items() if name not in new and _end(name) not in tied}
    if read_model_config(base).is_quantised:
        whole = tuple(name.removesuffix("weight") for name in new if name.endswith(".weight"))
        kept = {name: at for name, at in kept.items() if not name.startswith(whole)}
    elif not new.keys() <= old.keys():  # other names than the base has for the same tensors
        read = _names_read(
            type(model), model.config, {n: stored.shape for n, stored in old.items()}
        )
        kept = {name: at for name, at in kept.items() if name not in read}
    if not kept:
        return
    tensors: dict[str, torch.Tensor] = {}
    for name, stored in kept.items():
        with safe_open(stored.path, framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    save_file(tensors, target / KEPT, {"format": "pt"})
    if (target / WEIGHTS).exists():
        (target / WEIGHTS).rename(target / TRAINED)
    found = {name: stored.path.name for name, stored in weight_files(target).items()}
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found}, indent=2))


class _Watched(torch.Tensor):
    """A tensor without numbers that notes when a loader reads it."""

    note: Callable[[], None]

    def __getitem__(self, place: Any) -> torch.Tensor:
        self.note()
        return torch.empty(self.shape, device="meta")


def _names_read(kind: Any, config: Any, shapes: dict[str, list[int]]) -> set[str]:
    """Names of the tensors of a checkpoint that a class of model reads, whatever it calls them."""
    read: set[str] = set()
    tensors: dict[str, _Watched] = {}
    for name, shape in shapes.items():
        tensors[name] = torch.empty(shape, device="meta").as_subclass(_Watched)
        tensors[name].note = partial(read.add, name)
    kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        device_map="meta",
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
    )
    return read


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])
