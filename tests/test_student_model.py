"""Loading the student: on the CPU whatever device is asked for around it, and from safetensors."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file

from opd_stream.config.training import Lora
from opd_stream.errors import UserError
from opd_stream.objectives import Bucket
from stages.student_model import load_student
from stages.student_module import StudentModule
from tests.conftest import MODELS

STUDENT = MODELS / "ledger-student"


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_the_device_of_a_strategy_is_no_device_map(lora: Lora | None) -> None:
    """Lightning configures under its strategy's device; `meta` is one that is not the CPU."""
    if lora is not None:
        pytest.importorskip("peft", reason="peft is not installed")
    load = partial(load_student, STUDENT, lora=lora, initial=STUDENT, gradient_checkpointing=True)
    module = StudentModule(load, (Bucket(),), optimizer={})
    with SingleDeviceStrategy(torch.device("meta")).tensor_init_context():
        module.configure_model()
    assert module.student is not None
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    assert {tensor.device.type for tensor in module.buffers()} == {"cpu"}
    whole = module.student.model.get_input_embeddings().weight
    stored = load_file(STUDENT / "model.safetensors")
    assert torch.equal(whole.detach(), stored["model.embed_tokens.weight"].float())


def test_weights_that_name_the_student_are_those_that_train(tmp_path: Path) -> None:
    """Its identity is taken from *.safetensors, so other files may not be read in their place."""
    folder = tmp_path / "student"
    shutil.copytree(STUDENT, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    load = partial(load_student, folder, lora=None, initial=folder, gradient_checkpointing=False)
    load()
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(UserError, match=r"student cannot be trained \(.*check the folder"):
        load()
