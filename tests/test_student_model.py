"""Loading the student: from safetensors, whatever else lies beside them."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd_stream.errors import UserError
from stages.student_model import load_student
from tests.conftest import MODELS

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
