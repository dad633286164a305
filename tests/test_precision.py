"""Narrow weights in training: what is rounded is said, and what is not is exact."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.config.sections import Lora
from opd_stream.engines.head import output_head
from opd_stream.engines.loading import load_model
from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.errors import UserError
from pipeline.run_folder import RunFolder
from stages import train as train_stage
from stages.frozen_base import is_quantised, make_whole
from stages.master_weights import MasterWeights
from stages.step import Silent
from stages.student_model import StudentModel, load_student, save_student
from tests.conftest import run, small_config
from tests.tiny_models import build


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "mixtral"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_frozen_base_computes_as_a_float32_model(
    model_type: str, autocast: bool, stored: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    build(model_type).to(stored).save_pretrained(tmp_path)
    ids, found = torch.arange(10, 30)[None], dict[bool, Any]()
    for widens in (True, False):
        torch.manual_seed(1)
        student = load_student(
            tmp_path,
            lora=Lora(rank=2),
            initial=tmp_path,
            gradient_checkpointing=False,
            widens=widens,
        )
        trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        frozen = [p for p in student.parameters() if not p.requires_grad]
        widths = {p.dtype for p in frozen if p.ndim == 2}
        assert widths == {torch.float32} if widens else stored in widths
        for number, parameter in enumerate(trained.values()):
            torch.manual_seed(number)
            torch.nn.init.normal_(parameter, std=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = rows_hidden(decoder_of(student.model), ids, torch.ones_like(ids))
            logits = output_head(student.model)(hidden.float())
        logits.float().logsumexp(-1).sum().backward()
        found[widens] = (logits, {n: p.grad for n, p in trained.items()})
    (right, gradients), (mine, own) = found[True], found[False]
    assert torch.equal(mine, right)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_step_keeps_no_copy_of_a_frozen_matrix(stored: torch.dtype, tmp_path: Path) -> None:
    build("llama").to(stored).save_pretrained(tmp_path)
    student = load_student(
        tmp_path, lora=Lora(rank=2), initial=tmp_path, gradient_checkpointing=False
    )
    frozen = [p for p in student.parameters() if not p.requires_grad and p.ndim == 2]
    shapes, places = {p.shape for p in frozen}, {p.data_ptr() for p in frozen}
    copies, seen = list[bool](), list[Any]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.shape)
        if tensor.shape in shapes or (tensor.ndim == 2 and tensor.t().shape in shapes):
            copies.append(tensor.data_ptr() not in places)
        return tensor

    ids = torch.arange(10, 33)[None]
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        rows_hidden(decoder_of(student.model), ids, torch.ones_like(ids))
    assert len(seen) > len(frozen)
    assert not any(copies)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_policy_is_the_function_that_was_trained_on_a_quantised_base(
    bits: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    build("llama").to(torch.float32).save_pretrained(tmp_path / "base")
    lora = Lora.model_validate({"rank": 2, "targets": ["q_proj", "down_proj"], "base": bits})
    student = load(tmp_path / "base", lora)
    packed = [p for p in student.parameters() if p.dtype == torch.uint8]
    assert len(packed) == sum(map(is_quantised, student.modules())) > 10
    ids = torch.arange(10, 33)[None]

    def logits(model: Any) -> torch.Tensor:
        hidden = rows_hidden(decoder_of(model), ids, torch.ones_like(ids))
        return output_head(model)(hidden)

    for parameter in student.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    trained = logits(student.model)
    trained.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    again = load(tmp_path / "base", lora).model
    assert all(map(torch.equal, packed, (p for p in again.parameters() if p.dtype == torch.uint8)))
    stored = dict(load_model(tmp_path / "base", dtype=torch.float32).named_parameters())
    for name, layer in again.unload().named_modules():
        if is_quantised(layer):
            make_whole(layer)
            right = stored[f"{name}.weight"]
            off = (layer.get_parameter("weight") - right).norm() / right.norm()
            assert 1e-3 < off < {"8bit": 0.02, "4bit": 0.12}[bits], name
    (tmp_path / "policy").mkdir()
    save_student(student, tmp_path / "base", tmp_path / "policy")
    published = load_model(tmp_path / "policy", dtype=torch.float32)
    torch.testing.assert_close(logits(published), trained, rtol=1e-4, atol=1e-5)


def load(folder: Path, lora: Lora) -> StudentModel:
    return load_student(folder, lora=lora, initial=folder, gradient_checkpointing=False)


def test_small_steps_add_up_behind_a_bfloat16_copy() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(40, 30)
    right = [p.detach().double().clone() for p in module.parameters()]
    masters = MasterWeights(module)
    optimizer = torch.optim.AdamW(list(masters.parameters.values()), lr=1e-6, fused=True)
    others = [p.requires_grad_() for p in right]
    reference = torch.optim.AdamW(others, lr=1e-6)
    start = [p.detach().clone() for p in others]
    for step in range(60):
        torch.manual_seed(step % 3)
        for parameter, other in zip(module.parameters(), others, strict=True):
            assert parameter.dtype == torch.bfloat16
            parameter.grad = torch.randn(parameter.shape).abs().bfloat16()
            other.grad = parameter.grad.double()
        masters.step(optimizer)
        reference.step()
    for master, other, before in zip(masters.parameters.values(), others, start, strict=True):
        moved = (other - before).abs().min()
        assert moved > 3e-5  # of which one in bfloat16 would keep nothing
        np.testing.assert_allclose(master.detach(), other.detach(), rtol=0, atol=moved.item() / 20)
    masters.put_back()
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def result(folder: Path, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = run(small_config(folder, *overrides), RunFolder(folder / "run"), Silent())
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    return summary, lines


HAS_8BIT = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("train.precision=bf16-true", marks=pytest.mark.slow),
        "train.optimizer=adafactor",
        pytest.param(
            "train.optimizer=adamw-8bit",
            marks=pytest.mark.skipif(not HAS_8BIT, reason="bitsandbytes is not installed"),
        ),
        pytest.param(
            "train.lora={rank: 4, base: 8bit}",
            marks=pytest.mark.skipif(not HAS_8BIT, reason="bitsandbytes is not installed"),
        ),
    ],
)
def test_a_killed_run_ends_in_the_same_weights(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("rounds=2", "evaluation=null", "staleness.max_epochs=1", setting)
    whole, lines = result(tmp_path / "whole", *settings)
    saved, count = train_stage.checkpoint, 0

    def stop(training: train_stage.Training) -> None:
        nonlocal count
        saved(training)
        count += 1
        if count % 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_stage, "checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        result(tmp_path / "killed", *settings)
    while True:
        try:
            killed, again = result(tmp_path / "killed", *settings)
            break
        except KeyboardInterrupt:
            pass
    monkeypatch.undo()
    assert [p["weights_sha256"] for p in killed["policies"]] == [
        p["weights_sha256"] for p in whole["policies"]
    ]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    plain, reference = result(tmp_path / "plain", *settings[:-1])
    assert lines[0]["loss"] == pytest.approx(reference[0]["loss"], rel=0.02)
    assert whole["policies"][1]["weights_sha256"] != plain["policies"][1]["weights_sha256"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.precision=bf16-true", "train.lora={}"), "adapters are float32"),
        (("train.precision=bf16-true", "train.extrapolation={}"), "moves the weights"),
        (
            ("train.optimizer=adafactor", "train.extrapolation={reset_moments: true}"),
            "reads the moments of adamw",
        ),
        (
            (
                *("train.precision=bf16-true", "executor=ray"),
                "pools.trainer={devices: 2, strategy: fsdp2}",
            ),
            "shards have one dtype",
        ),
        (
            (
                *("train.lora={base: 8bit}", "executor=ray"),
                "pools.trainer={devices: 2, strategy: fsdp2}",
            ),
            "train.lora.base is 8bit with strategy fsdp2",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(
    settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, *settings)


@pytest.mark.skipif(HAS_8BIT, reason="bitsandbytes is installed")
@pytest.mark.parametrize("setting", ["train.optimizer=adamw-8bit", "train.lora={base: 4bit}"])
def test_a_missing_library_is_named_before_any_work(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the library bitsandbytes, which is not installed"):
        result(tmp_path, setting)
