"""Causal language models from checkpoint folders: whole, and doing what the rest assumes of them.

Engines and training run decoder and head apart, read rows in batches and go on from caches. A model
that does something else somewhere (a head that scales, a cache that is not one) would be wrong by
some nats and nothing else would show it. So two short texts are compared at load.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from opd_stream.engines.decoding import open_decoder
from opd_stream.engines.head import logits_head, output_head
from opd_stream.engines.reading import decoder_of, rows_hidden, short_texts
from opd_stream.errors import UserError
from opd_stream.logprobs import Head

NAMED = 3  # missing tensors in a message
STEPS = 2  # tokens that are read one by one


def check_files(folder: Path) -> None:
    """Refuse what `load_model` would refuse of config and weights, reading no weights.

    Raises:
        UserError: as `load_model`.
    """
    load_model(folder, dtype=torch.float32, device="meta")


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """The causal language model of a folder, from safetensors, with every tensor of it.

    Raises:
        UserError: it cannot be loaded, or a tensor is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar per load of a policy would bury the stages' own
    auto: Any = AutoModelForCausalLM
    where = {"device_map": "meta"} if device == "meta" else {}
    try:
        model, found = auto.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **where,
        )
        missing, other = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    except Exception as error:  # of the library, of the file format, of a quantisation's library
        raise UserError(
            f"{folder} cannot be loaded as a causal language model ({_line(error)}); expected "
            "config.json and safetensors; check the folder"
        ) from error
    if other:
        name, stored, expected = other[0]
        raise UserError(
            f"{folder} has {len(other)} tensors of other sizes than its config says ({name} is "
            f"{[*stored]}, the model's {[*expected]}); copy weights and config.json together"
        )
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors of the model ({', '.join(missing[:NAMED])}"
            f"{', ...' if len(missing) > NAMED else ''}); expected all of them; copy the "
            "checkpoint again"
        )
    if model.get_output_embeddings() is None:
        raise UserError(
            f"{folder} is a {type(model).__name__} without an output head; expected a causal "
            "language model; use another checkpoint"
        )
    return model.eval() if where else model.to(device).eval()


def unquantised(model: Any) -> Any:
    """A model with the same whole weights that knows nothing of how they were stored.

    The library saves no model that it read from a quantised file.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    config: Any = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    plain = auto.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain.eval()


def check_engine(model: Any, folder: Path) -> None:
    """Refuse a model that an engine would not run exactly.

    Raises:
        UserError: with the gap in nats.
    """
    head, rows, texts = logits_head(model), open_decoder(model), short_texts(model)
    _check(model, folder, head)
    with torch.inference_mode():
        prompts = [text[:-STEPS] for text in texts]
        marks = [torch.ones_like(prompt) for prompt in prompts]
        ids_BC, mask_BC = (pad_sequence(x, True, padding_side="left") for x in (prompts, marks))
        read = [rows.prefill(ids_BC, mask_BC)]
        for place in range(-STEPS, 0):
            read.append(rows.step(torch.stack([text[place] for text in texts])))
        logits_SBV = [head(hidden) for hidden in read]
        for row, text in enumerate(texts):
            right = _logits(model, text)[-STEPS - 1 :]
            mine = torch.stack([logits_BV[row] for logits_BV in logits_SBV])
            _compare(model, folder, mine, right, "decoding in a batch, token by token,")


def check_training(model: Any, folder: Path) -> None:
    """Refuse a model whose loss would be computed from other logits than its own.

    Raises:
        UserError: with the gap in nats, or the head is no linear layer.
    """
    _check(model, folder, output_head(model))


def _check(model: Any, folder: Path, head: Head) -> None:
    says_anything = False
    with torch.inference_mode():
        for text in short_texts(model):
            ids, right_LV = text[None], _logits(model, text)
            hidden_LH = rows_hidden(decoder_of(model), ids, torch.ones_like(ids))[0]
            _compare(model, folder, head(hidden_LH), right_LV, "decoder and head apart")
            says_anything |= not right_LV.isnan().any(1).all()
    if not says_anything:
        raise UserError(
            f"{folder} is a {type(model).__name__} whose log-probabilities are not finite on plain "
            "texts; look at its weights and config.json, or load it with dtype float32"
        )


def _logits(model: Any, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text[None], use_cache=False).logits[0]


def _compare(
    model: Any, folder: Path, mine_LV: torch.Tensor, right_LV: torch.Tensor, how: str
) -> None:
    """Compare the log-probabilities that two computations give, weighed by the probabilities.

    Behind a token whose own are not numbers there is nothing to compare: rows that meet it are
    refused one by one.
    """
    mine, right = (logits.float().log_softmax(1) for logits in (mine_LV, right_LV))
    gap_L = (right.exp() * (mine - right).abs()).where(right > -torch.inf, 0).sum(1)
    gap = float(gap_L[~right.isnan().any(1)].sum()) / len(gap_L)
    most = 4 * float(torch.finfo(model.dtype).eps) ** 0.5
    if not gap <= most:
        raise UserError(
            f"{folder} is a {type(model).__name__}: {how} gives log-probabilities {gap:.2g} nats "
            f"from the model's own (rounding explains {most:.2g}); scores and losses would be "
            "wrong; use a checkpoint of another architecture"
        )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
