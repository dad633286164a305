"""Loading the student: from safetensors, whatever else lies beside them."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.errors import UserError
from stages.student_model import load_student
from tests.conftest import MODELS
from tests.tiny_models import build

STUDENT = MODELS / "ledger-student"


def test_weights_that_name_the_student_are_those_that_train(tmp_path: Path) -> None:
    """Its identity is taken from *.safetensors, so other files may not be read in their place."""
    folder = tmp_path / "student"
    shutil.copytree(STUDENT, folder)
    stored = load_file(folder / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in stored.items()}, folder / "pytorch_model.bin")
    load = partial(load_student, folder, lora=None, initial=folder, gradient_checkpointing=False)
    whole = load().model.get_input_embeddings().weight
    assert torch.equal(whole.detach(), stored["model.embed_tokens.weight"].float())
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(
        UserError, match=r"student cannot be loaded as a causal language model \(.*check the folder"
    ):
        load()


@pytest.mark.parametrize("model_type", ["phimoe", "mixtral"])
def test_routers_draw_nothing_in_training(model_type: str, tmp_path: Path) -> None:
    model = build(model_type)
    model.config.router_jitter_noise = 0.5
    model.save_pretrained(tmp_path)
    student = load_student(tmp_path, lora=None, initial=tmp_path, gradient_checkpointing=True)
    ids = torch.arange(10, 30)[None]
    found = rows_hidden(decoder_of(student.model), ids, torch.ones_like(ids))
    expected = rows_hidden(decoder_of(student.eval().model), ids, torch.ones_like(ids))
    torch.testing.assert_close(found, expected)
    layers = decoder_of(student.train().model).layers
    assert all(layer.training for layer in layers)  # so that activations are recomputed
    noisy = load_student(
        tmp_path, lora=None, initial=tmp_path, gradient_checkpointing=False, drops=True
    )
    drawn = rows_hidden(decoder_of(noisy.model), ids, torch.ones_like(ids))
    assert not torch.allclose(drawn, expected)
