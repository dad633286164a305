"""The term that keeps a student near the run's first one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_stream.batches import collate
from opd_stream.config.sections import Lora, Reference
from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.errors import UserError
from opd_stream.loss import BatchLoss, batch_loss
from opd_stream.objectives import Bucket
from opd_stream.rebuilt import TeacherHead
from pipeline.run_folder import RunFolder
from stages.reference import FirstStudent
from stages.step import Silent
from stages.student_model import StudentModel, load_student
from tests.conftest import MODELS, run, small_config
from tests.test_guards import ROWS

STUDENT = MODELS / "ledger-student"
BATCH = collate(ROWS, window_tokens=9)


def first(**settings: Any) -> FirstStudent:
    return FirstStudent(Reference(weight=0.5, **settings), lambda: loaded().model)


def loaded(lora: Lora | None = None, noise: float = 0.0) -> StudentModel:
    """The first student, with noise on the weights that train."""
    torch.manual_seed(0)
    student = load_student(STUDENT, lora=lora, initial=STUDENT, gradient_checkpointing=False)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn_like(parameter)
    return student


def term(student: StudentModel, reference: FirstStudent) -> torch.Tensor:
    decoder = decoder_of(student.model)
    hidden = rows_hidden(decoder, BATCH.input_ids_BL, BATCH.attention_mask_BL)
    return reference.loss(student.model, hidden, BATCH, merge_terminators=False)


def dense_logprobs(student: StudentModel) -> torch.Tensor:
    logits = student.model(BATCH.input_ids_BL, attention_mask=BATCH.attention_mask_BL).logits
    return logits.flatten(0, 1)[BATCH.hidden_rows_N].double().log_softmax(1)


def test_over_all_candidates_it_is_the_dense_reverse_kl_with_its_gradient() -> None:
    student, other = loaded(noise=0.3), loaded(noise=0.3)
    found = term(student, first(top_k=1024))
    found.backward()
    p, q = dense_logprobs(other), dense_logprobs(loaded()).detach()
    expected = 0.5 * (p.exp() * (p - q)).sum(1).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert found.item() > 0.01
    for one, two in zip(student.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None and two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=5e-3, atol=2e-5)


def test_at_the_first_student_it_is_0_without_a_gradient() -> None:
    student = loaded()
    found = term(student, first())
    found.backward()
    assert abs(found.item()) < 1e-6
    largest = [p.grad.abs().max().item() for p in student.parameters() if p.grad is not None]
    assert largest
    assert max(largest) < 1e-5


def test_under_adapters_the_base_is_the_first_student() -> None:
    student = loaded(Lora(rank=4, alpha=8), noise=0.1)
    no_copy = FirstStudent(Reference(weight=0.5), lambda: pytest.fail("a copy was loaded"))
    found = term(student, no_copy)
    merged = student.model.merge_and_unload()
    expected = term(StudentModel(merged), first())
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)  # tails of about 1e-6
    assert found.item() > 0.001


def test_the_first_students_head_is_read_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    student = loaded(Lora(rank=4))
    student.model.bfloat16()
    seen: list[torch.dtype] = []

    def lost(*arguments: Any, teacher: TeacherHead, **options: Any) -> BatchLoss:
        seen.append(teacher.head.weight_VH.dtype)
        return batch_loss(*arguments, teacher=teacher, **options)

    monkeypatch.setattr("stages.reference.batch_loss", lost)
    assert term(student, first()).isfinite()
    assert seen == [torch.float32]


def test_it_is_in_the_loss_of_steps_that_train_and_in_no_measurement() -> None:
    student = loaded(noise=0.3)
    settings: dict[str, Any] = {"merge_terminators": False, "limit": None}
    plain = student(BATCH, (Bucket(),), **settings)
    student.reference = first()
    kept = student(BATCH, (Bucket(),), **settings)
    assert (kept.loss - plain.loss).item() == pytest.approx(term(student, first()).item(), rel=1e-4)
    assert torch.equal(kept.sums, plain.sums)
    with torch.no_grad():
        assert torch.equal(student(BATCH, (Bucket(),), **settings).loss, plain.loss)
    assert set(student.state_dict()) == set(loaded().state_dict())  # the copy is no part of it


def test_a_run_with_a_reference_stays_near_its_first_student(
    finished_run: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path, "train.reference={weight: 1000}", "evaluation=null")
    run(config, RunFolder(tmp_path / "run"), Silent())
    start = load_file(STUDENT / "model.safetensors")

    def moved(folder: Path) -> float:
        """Root of the sum of squares that the weights of the last round went."""
        report = json.loads((folder / "rounds" / "0001" / "report.json").read_text())
        found = load_file(Path(report["policy"]["folder"]) / "model.safetensors")
        return sum((found[name] - start[name]).square().sum().item() for name in start) ** 0.5

    assert 0 < moved(tmp_path / "run") < 0.8 * moved(finished_run / "run")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("train.gate={}",), "train.reference is set with train.gate"),
        (
            ("executor=ray", "pools.trainer={devices: 2, strategy: fsdp2}"),
            "train.reference is set with strategy fsdp2",
        ),
        (
            ("train.lora={rank: 2}", "train.dropout=model"),
            "reference is set with train.dropout=model",
        ),
        (
            ("rollouts.given_share=1", "prompts.solutions=true"),
            "given_share is 1 with train.reference",
        ),
    ],
)
def test_what_it_cannot_be_together_with(
    settings: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line):
        small_config(tmp_path, "train.reference={weight: 0.1}", *settings)
