"""The doctor's checks that load models: laws that hold, and planted faults that break them."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from opd_stream.config import Config
from opd_stream.engines import sampling, transformers_engine
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.store import Store
from opd_stream.types import ScoreBatch
from pipeline.doctor import cached, devices, prompts, trial
from pipeline.doctor.devices import Gpu
from pipeline.doctor.examination import SETUP, examine
from pipeline.doctor.findings import Finding, Report
from pipeline.rounds import run
from pipeline.run_directory import RunDirectory
from pipeline.setup import open_setup
from stages.progress import Silent
from tests.conftest import small_config
from tests.test_doctor import CHECKS, changed_model, machine


def with_other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A finished round, and all checks on its config."""
    folder = tmp_path_factory.mktemp("healthy")
    config = small_config(folder)
    first = config.model_copy(update={"rounds": 1, "evaluation": None})
    run(first, RunDirectory(folder / "run"), Silent())
    return folder, examine(config, quick=False)


def test_a_healthy_config_passes_every_check(healthy: tuple[Path, Report]) -> None:
    report = healthy[1]
    assert [finding for finding in report.findings if finding.level != "ok"] == []
    assert report.not_checked == {}
    seen = {finding.check for finding in report.findings}
    assert seen == {check.name for check in CHECKS} - {SETUP.name}
    assert any("scores/" in f.found for f in report.findings if f.check == "cached-scores")


def heavy(check: Callable[..., list[Finding]], config: Config, *more: Any) -> Finding:
    """The first finding of one check that loads a model."""
    setup = open_setup(config, make=False)
    tables, _ = prompts.read(config, setup.student)
    extra = [setup.teacher if each == "teacher" else each for each in more]
    return check(setup, tables["prompts"], *extra)[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["scores.codec={kind: exact, dtype: float32}", "train.objective={kind: skew}"],
        ["scores.codec={kind: compact, mass: 0.99}", "train.objective={kind: hybrid}"],
        ["scores.codec={kind: sampled}", "train.objective={kind: drawn_forward}"],
        ["train.objective=[{kind: lsm}, {kind: entropy_aware, threshold: 0}]"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_teacher_agrees_with_itself(tmp_path: Path, overrides: list[str]) -> None:
    config = small_config(tmp_path, *overrides)
    assert heavy(trial.teacher_as_student, config, "teacher").level == "ok"


def test_scores_that_stand_one_token_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = TransformersEngine.score

    def shifted(self: Any, *batch: Any, **asked: Any) -> ScoreBatch:
        found = score(self, *batch, **asked)
        rolled = tuple(np.roll(row, 1, axis=0) for row in found.teacher_top_logprobs)
        return replace(found, teacher_top_logprobs=rolled)

    monkeypatch.setattr(TransformersEngine, "score", shifted)
    found = heavy(trial.teacher_as_student, small_config(tmp_path), "teacher")
    assert found.level == "error"


def test_a_teacher_with_nan(tmp_path: Path) -> None:
    def nan(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    teacher = changed_model(tmp_path, "ledger-teacher", nan)
    config = small_config(tmp_path, f"teacher.path={teacher}")
    found = heavy(trial.teacher_as_student, config, "teacher")
    assert (found.level, found.check) == ("error", "teacher-as-student")
    assert "not finite" in found.found


def undecided(folder: Path) -> None:
    """A student whose next token is never certain, as that of a larger model often is."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float16(0.25)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_sampler_that_is_right(tmp_path: Path, temperature: float) -> None:
    student = changed_model(tmp_path, "ledger-student", undecided)
    where = (f"student.path={student}", f"rollouts.temperature={temperature}")
    found = heavy(trial.sampler, small_config(tmp_path, *where))
    assert found.level == ("warning" if temperature == 0.7 else "ok")


def test_a_sampler_that_records_after_its_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tempered(logits: torch.Tensor, numbers: torch.Tensor, temperature: float) -> Any:
        return sampling.draw(logits / temperature, numbers, 1.0)

    monkeypatch.setattr(transformers_engine, "draw", tempered)
    found = heavy(trial.sampler, small_config(tmp_path, "rollouts.temperature=0.7"))
    assert found.level == "error"
    assert "differ from a forward pass" in found.found


def test_a_sampler_at_another_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cold(logits: torch.Tensor, numbers: torch.Tensor, temperature: float) -> Any:
        return sampling.draw(logits, numbers, 0.7)

    assert "too little to tell" in heavy(trial.sampler, small_config(tmp_path)).found
    student = changed_model(tmp_path, "ledger-student", undecided)
    monkeypatch.setattr(transformers_engine, "draw", cold)
    found = heavy(trial.sampler, small_config(tmp_path, f"student.path={student}"))
    assert found.level == "error"
    assert "less surprising than at temperature 1" in found.found


@pytest.fixture
def copied(healthy: tuple[Path, Report], tmp_path: Path) -> Path:
    """The store of the finished round, to damage."""
    shutil.copytree(healthy[0] / "store", tmp_path / "store")
    return tmp_path


def on_cache(folder: Path, *overrides: str) -> Finding:
    config = small_config(folder, *overrides)
    report = Report()
    setup = open_setup(config, make=False)
    try:
        report.findings += cached.cached_scores(setup, setup.teacher)  # type: ignore[arg-type]
    except (UserError, DamagedUnit) as error:
        report.findings.append(cached.CACHED.refused(error))
    return report.findings[0]


def scores_of(folder: Path) -> Iterator[Artifact]:
    store = Store(folder / "store")
    for recipe in store.recipes("scores"):
        yield store.artifact(recipe)


def test_a_cache_in_which_bytes_changed(copied: Path) -> None:
    for path in (copied / "store" / "scores").rglob("*.arrow"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    found = on_cache(copied)
    assert found.level == "error"
    assert "is damaged" in found.found


def test_a_cache_with_other_values_and_honest_digests(copied: Path) -> None:
    for scores in scores_of(copied):
        for unit in list(scores.units()):
            commit, table = scores.commit_record(unit), scores.read_unit(unit)
            assert commit is not None
            column = table["teacher_logprobs"].combine_chunks()
            values = type(column).from_arrays(column.offsets, np.asarray(column.values) - 0.05)
            place = table.schema.get_field_index("teacher_logprobs")
            scores.invalidate(unit)
            scores.commit(
                unit,
                table.set_column(place, table.schema.field(place), values),
                counts=commit.counts,
                source_sha256=commit.source_sha256,
                skipped_rows=commit.skipped_rows,
                fidelity=commit.fidelity,
            )
    found = on_cache(copied)
    assert found.level == "error"
    assert "cached and live differ by" in found.found


def test_a_teacher_that_changed_since_the_cache(copied: Path) -> None:
    teacher = changed_model(copied, "ledger-teacher", with_other_weights)
    found = on_cache(copied, f"teacher.path={teacher}")
    assert found.level == "warning"
    assert "its weights, tokenizer or architecture are others" in found.found


def test_a_teacher_that_changed_behind_its_remembered_digest(copied: Path) -> None:
    teacher = changed_model(copied, "ledger-teacher", lambda _: None)
    assert on_cache(copied, f"teacher.path={teacher}").level == "ok"
    weights = teacher / "model.safetensors"
    before = weights.stat()
    with_other_weights(teacher)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = on_cache(copied, f"teacher.path={teacher}")
    assert found.level == "error"
    assert "cached and live differ by" in found.found


def test_an_engine_that_changes_its_process_gets_its_own() -> None:
    assert trial.in_own_process("transformers", os.getpid) == os.getpid()
    assert trial.in_own_process("vllm", os.getpid) != os.getpid()


def test_models_that_only_fit_in_16_bits_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Gpu(name="small", bytes=1_700_000, capability=(9, 0))
    monkeypatch.setattr(devices, "this_machine", lambda: machine(small, small, small))
    half = ("student.dtype=bfloat16", "teacher.dtype=bfloat16", "train.lora={}")
    apart = ("executor=ray", "pools.student.gpus=1", "pools.teacher.gpus=1")
    report = examine(small_config(tmp_path, *half, *apart), quick=False)
    assert report.may_start
    assert "does not fit here in float32" in report.not_checked["sampler"]


def test_the_page_names_every_check() -> None:
    page = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text()
    for check in CHECKS:
        assert f"| `{check.name}` |" in page
