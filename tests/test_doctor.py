"""The doctor: a healthy config passes, and each planted fault is found by its own check."""

import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import pipeline.setup
from opd_stream.config import Config
from opd_stream.engines import decoding, transformers_engine
from opd_stream.engines.base import SamplingSettings
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.policy import identify
from opd_stream.store.store import Store
from opd_stream.types import ScoreBatch
from pipeline import console
from pipeline.cli import app
from pipeline.doctor import findings, inputs, machine, trial
from pipeline.doctor.examination import CHECKS, examine
from pipeline.doctor.findings import Check, Finding, Report, Screen
from pipeline.doctor.machine import Gpu, Machine
from pipeline.doctor.subject import Subject
from pipeline.estimate.reading import read_inputs
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from stages.checkpoints import Checkpoint
from tests.conftest import MODELS, SmallRuns, small_config

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SMALL_GPU = Gpu(name="Tesla T4", bytes=16_000_000_000, capability=(7, 5))
ONE_ROLE = 7_000_000  # bytes: training of the small model fits, and both engines beside it do not
Change = Callable[[Path], None]


def quick(folder: Path, *overrides: str) -> Report:
    return examine(small_config(folder, *overrides), quick=True)


def only(report: Report, level: str, check: Check) -> Finding:
    """The one finding of a level; there is no other trouble."""
    (found,) = [finding for finding in report.findings if finding.level != "ok"]
    assert (found.level, found.check) == (level, check.name), found
    assert report.may_start == (level != "error")
    return found


def with_json(name: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, **fields}))

    return change


def with_terminator(token: int) -> Change:
    def change(folder: Path) -> None:
        with_json("config.json", eos_token_id=token)(folder)
        with_json("generation_config.json", eos_token_id=token)(folder)

    return change


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def changed_model(folder: Path, source: str, change: Change) -> Path:
    target = folder / source
    shutil.copytree(MODELS / source, target)
    change(target)
    return target


def test_quick_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersEngine, "__init__", lambda *_, **__: pytest.fail("loaded"))
    report = quick(tmp_path)
    assert report.may_start
    assert set(report.not_checked) == {check.name for check in CHECKS if check.loads_models}


def test_another_tokenizer(tmp_path: Path) -> None:
    def other(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        known = tokenizer["model"]["vocab"]
        known["A"], known["B"] = known["B"], known["A"]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    teacher = changed_model(tmp_path, "ledger-teacher", other)
    found = only(quick(tmp_path, f"teacher.path={teacher}"), "error", inputs.tokenizers)
    assert "different tokenizers" in found.found


def test_heads_of_different_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_stream.engines.loading.check_files", lambda _: None)  # of old sizes
    longer = changed_model(tmp_path, "ledger-teacher", with_json("config.json", vocab_size=640))
    report = quick(tmp_path, f"teacher.path={longer}")
    assert not [finding for finding in report.findings if finding.level != "ok"]
    shorter = changed_model(tmp_path, "ledger-student", with_json("config.json", vocab_size=600))
    found = only(quick(tmp_path, f"student.path={shorter}"), "warning", inputs.tokenizers)
    assert found.found == "the tokenizer has 606 ids, the student has logits for 600"


def test_the_teacher_ends_with_another_token(tmp_path: Path) -> None:
    teacher = changed_model(tmp_path, "ledger-teacher", with_terminator(5))
    where = f"teacher.path={teacher}"
    found = only(quick(tmp_path, where), "warning", inputs.terminators)
    assert "student ends with 1" in found.found
    assert "teacher with 5" in found.found
    unmerged = quick(tmp_path, where, "train.guards.merge_terminators=false")
    only(unmerged, "error", inputs.terminators)


def test_files_of_a_model_that_name_different_ends(tmp_path: Path) -> None:
    student = changed_model(
        tmp_path, "ledger-student", with_json("generation_config.json", eos_token_id=[1, 7])
    )
    report = quick(tmp_path, f"student.path={student}")
    told = [finding.found for finding in report.findings if finding.level == "warning"]
    assert "the student's files disagree" in told[0]


def test_the_end_of_the_tokenizer_does_not_stop_generation(tmp_path: Path) -> None:
    student = changed_model(tmp_path, "ledger-student", with_terminator(5))
    teacher = changed_model(tmp_path, "ledger-teacher", with_terminator(5))
    report = quick(tmp_path, *report_of(student, teacher))
    told = [finding for finding in report.findings if finding.level == "error"]
    assert {finding.check for finding in told} == {"terminators"}
    assert "on which the run does not stop" in told[0].found
    end = identified(student).tokenizer().eos_token
    asked = quick(tmp_path, *report_of(student, teacher), f"rollouts.stop_tokens=['{end}']")
    assert not [finding for finding in asked.findings if finding.level == "error"]


def report_of(student: Path, teacher: Path) -> tuple[str, str]:
    return f"student.path={student}", f"teacher.path={teacher}"


def identified(folder: Path) -> Checkpoint:
    return Checkpoint(folder=folder, identity=identify(folder))


def test_a_missing_chat_template(tmp_path: Path) -> None:
    report = quick(tmp_path, "prompts.template={kind: chat}", "evaluation=null")
    found = next(f for f in report.findings if f.check == "templates")
    assert found.level == "error"
    assert "has no chat template" in found.found
    assert not report.may_start


def test_chat_templates_that_differ(tmp_path: Path) -> None:
    def chat(text: str) -> Change:
        return with_json("tokenizer_config.json", chat_template=text)

    student = changed_model(tmp_path, "ledger-student", chat(CHAT + "<eos>"))
    teacher = changed_model(tmp_path, "ledger-teacher", chat(CHAT.replace("<", "[") + "<eos>"))
    models_of = (f"student.path={student}", f"teacher.path={teacher}")
    report = quick(tmp_path, *models_of, "prompts.template={kind: chat}")
    assert "write the same turns differently" in only(report, "warning", inputs.templates).found


def test_a_turn_that_ends_without_a_terminator(tmp_path: Path) -> None:
    chat = with_json("tokenizer_config.json", chat_template=CHAT + "<pad>")
    where = [changed_model(tmp_path, f"ledger-{role}", chat) for role in ("student", "teacher")]
    paths = (f"student.path={where[0]}", f"teacher.path={where[1]}")
    report = quick(tmp_path, *paths, "prompts.template={kind: chat}")
    assert "none of the ids the run stops on" in only(report, "warning", inputs.templates).found


@pytest.mark.parametrize("change", [{"num_key_value_heads": 7}, {"model_type": "t5"}])
def test_weights_of_another_config(tmp_path: Path, change: dict[str, Any]) -> None:
    teacher = changed_model(tmp_path, "ledger-teacher", with_json("config.json", **change))
    report = quick(tmp_path, f"teacher.path={teacher}")
    assert {found.check for found in report.findings if found.level == "error"} == {"weights"}


def test_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*given: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr(pipeline.setup, "fetch", fetch)
    monkeypatch.setattr("opd_stream.fetching._download", fetch)
    found = only(quick(tmp_path, "teacher.path=org/none"), "error", inputs.weights)
    assert "hf download org/none" in found.found


def test_rounds_of_more_prompts_than_there_are_are_refused_before_any_work(tmp_path: Path) -> None:
    """The initial student's evaluation would be paid for."""
    config = small_config(tmp_path, "prompts.count=2")
    for look in (open_setup, read_inputs):
        with pytest.raises(UserError, match="prompts_per_round is 8 but there are 2 prompts"):
            look(config)


def test_answers_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    config = small_config(tmp_path, "evaluation.max_new_tokens=5000")
    line = r"evaluation \(ledger\): a prompt has .* and a window 5000.* lower max_new_tokens"
    with pytest.raises(UserError, match=line):
        open_setup(config)
    with pytest.raises(UserError, match=line):
        read_inputs(config)


def test_a_context_that_is_too_short(tmp_path: Path) -> None:
    teacher = changed_model(
        tmp_path, "ledger-teacher", with_json("config.json", max_position_embeddings=100)
    )
    found = only(quick(tmp_path, f"teacher.path={teacher}"), "error", inputs.context)
    assert "the teacher reads 100" in found.found


def test_the_window_of_the_last_round_counts(tmp_path: Path) -> None:
    linear = "{kind: linear, h0: 8, delta: 500, every: 4, max_window_tokens: 9000}"
    assert quick(tmp_path, f"rollouts.window={linear}").may_start
    found = quick(tmp_path, f"rollouts.window={linear}", "rounds=12")
    assert {f.check for f in found.findings if f.level == "error"} == {"context"}


def test_a_checkpoint_that_is_cut_off(tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    teacher = changed_model(tmp_path, "ledger-teacher", cut)
    found = only(quick(tmp_path, f"teacher.path={teacher}"), "error", inputs.weights)
    assert "no whole safetensors file" in found.found


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    report = quick(tmp_path)
    assert {f.check for f in report.findings if f.level == "error"} == {"disk"}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 16_500_000))
    found = only(quick(tmp_path, "rollouts.samples_per_prompt=64"), "warning", machine.disk)
    assert "16.5 MB free" in found.found


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = only(quick(tmp_path, f"store={tmp_path / 'file' / 'store'}"), "error", machine.store)
    assert "cannot write" in found.found


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    empty = jsonl(tmp_path, [])
    report = quick(tmp_path, f"prompts={{kind: jsonl, path: {empty}}}", "evaluation=null")
    found = [f for f in report.findings if f.check == "prompts" and f.level == "error"]
    assert "holds no prompts" in found[0].found
    absent = quick(tmp_path, "prompts={kind: jsonl, path: nowhere.jsonl}")
    assert "does not exist" in only(absent, "error", inputs.prompts).found
    few = quick(tmp_path, "prompts.count=4")
    assert "there are 4 prompts" in only(few, "error", inputs.prompts).found


def test_missing_answers_and_answers_the_judge_cannot_read(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "1 + 1?", "answer": "two"}])
    source = f"kind: jsonl, path: {path}"
    found = only(quick(tmp_path, f"evaluation.prompts={{{source}}}"), "error", inputs.answers)
    assert "none of 1 prompts has a reference answer that judge ledger can read" in found.found
    assert "(row-0: none)" in found.found
    rows = [{"prompt": "1 + 1?", "answer": answer} for answer in ("two", "02", None)]
    jsonl(tmp_path, rows)
    read = f"evaluation.prompts={{{source}, answer_field: answer}}"
    for kind, said in (("ledger", "2 of 3"), ("exact", "1 of 3")):
        report = quick(tmp_path, read, f"evaluation.judge.kind={kind}")
        found = [each for each in report.findings if each.check == "answers"]
        assert found[0].level == "warning"
        assert f"{said} prompts are left out of the verdicts" in found[0].found
        assert found[1].level == "ok"


def test_evaluation_on_training_prompts(tmp_path: Path) -> None:
    found = only(quick(tmp_path, "evaluation.prompts.seed=11"), "warning", inputs.prompts)
    assert "4 of 4 are training prompts too" in found.found


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: name != "ray" and find_spec(name))
    assert quick(tmp_path).may_start
    found = only(quick(tmp_path, "executor=ray"), "error", machine.packages)
    assert found.todo == "pip install ray"


def test_a_package_in_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "4.57.1")
    report = quick(tmp_path)
    told = [f.found for f in report.findings if f.check == "packages" and f.level == "warning"]
    assert any(line.startswith("transformers is 4.57.1") for line in told)


def having(*gpus: Gpu, **fields: Any) -> Machine:
    plain = Machine(gpus=gpus, cpus=8, bytes=32_000_000_000, cpu_bfloat16=True)
    return replace(plain, **fields)


@pytest.mark.parametrize(
    ("have", "overrides", "level", "check", "words"),
    [
        (having(), ["pools.teacher.gpus=1"], "error", "devices", "asks for 1 GPU"),
        (
            having(SMALL_GPU),
            ["executor=ray", "pools.teacher.gpus=1", "pools.student.gpus=1"],
            "error",
            "devices",
            "ask for 2 GPU together",
        ),
        (
            having(SMALL_GPU),
            ["executor=ray", "pools.teacher.accelerator=H100"],
            "error",
            "devices",
            "accelerator_type:H100",
        ),
        (
            having(),
            ["executor=ray", "pools.student.labels={pool: a}"],
            "error",
            "devices",
            "label",
        ),
        (
            having(SMALL_GPU),
            ["executor=ray", "pools.trainer.devices=2"],
            "error",
            "devices",
            "has 1 GPU",
        ),
        (having(SMALL_GPU), ["teacher.dtype=bfloat16"], "warning", "precision", "Tesla T4"),
        (having(SMALL_GPU), ["train.precision=bf16-mixed"], "warning", "precision", "train.pre"),
        (
            having(cpu_bfloat16=False),
            ["student.dtype=bfloat16"],
            "warning",
            "precision",
            "only emulates",
        ),
        (having(bytes=2_000_000), ["executor=local"], "error", "memory", "training"),
        (
            having(SMALL_GPU._replace(bytes=ONE_ROLE)),
            ["executor=ray"],
            "error",
            "memory",
            "student, teacher and training at once",
        ),
    ],
)
def test_devices_that_are_not_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    have: Machine,
    overrides: list[str],
    level: str,
    check: str,
    words: str,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "this_machine", lambda: have)
    found = [f for f in quick(tmp_path, *overrides).findings if f.level != "ok"]
    assert (level, check) in {(f.level, f.check) for f in found}
    assert any(words in f.found for f in found)


def test_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(pools: Any) -> bool:
        raise ConnectionError("no answer")

    monkeypatch.setenv("RAY_ADDRESS", "nowhere:6379")
    monkeypatch.setattr("stages.ray_stream.start_cluster", silent)
    config = small_config(tmp_path, "executor=ray", "teacher.engine=fake", "student.engine=fake")
    found = [f for f in examine(config, quick=False).findings if f.level == "error"]
    assert [f.check for f in found] == ["devices"]
    assert "nowhere:6379" in found[0].found
    assert "does not ask the cluster" in examine(config, quick=True).not_checked["devices"]


def test_what_a_run_refuses_is_found(tmp_path: Path) -> None:
    found = only(quick(tmp_path, "scores.top_k=1000"), "error", inputs.setup)
    assert "scores.top_k is 1000" in found.found
    replay = quick(tmp_path, f"replay.run={tmp_path}")
    assert "has no summary.json" in only(replay, "error", inputs.setup).found


def test_the_command_says_it_in_lines_in_json_and_by_exit_code(tmp_path: Path) -> None:
    small_config(tmp_path)
    command = ["doctor", str(tmp_path / "small.yaml"), "--quick"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0
    assert found.stdout.splitlines()[-1] == "the run may start: errors 0, warnings 0"
    faulty = [*command, "--set", "rollouts.window.tokens=5000"]
    found = CliRunner().invoke(app, faulty)
    assert found.exit_code == 1
    assert "do:  lower the window" in found.stdout
    found = CliRunner().invoke(app, [*faulty, "--json"])
    value = json.loads(found.stdout)
    assert found.exit_code == 1
    assert not value["may_start"]
    assert value["errors"] == 2
    assert {tuple(each) for each in value["findings"]} == {
        ("check", "level", "found", "why", "todo")
    }


def test_findings_are_written_as_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before: list[str] = []

    def looked_at_late(config: Config, folder: RunFolder) -> SimpleNamespace:
        before.append(capsys.readouterr().out)
        return SimpleNamespace(disk=(), training=None)

    monkeypatch.setattr(machine, "estimate", looked_at_late)
    small_config(tmp_path)
    command = ["doctor", str(tmp_path / "small.yaml"), "--quick"]
    app(command, standalone_mode=False)
    seen = {line.split()[1] for line in "".join(before).splitlines()}
    assert {"packages", "weights", "prompts", "memory"} <= seen
    capsys.readouterr()
    before.clear()
    app([*command, "--json"], standalone_mode=False)
    assert not any(before)
    assert json.loads(capsys.readouterr().out)["may_start"]


def test_the_check_at_work_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a terminal at once, elsewhere by a line when it takes its time."""
    fine = machine.disk.ok("room")
    with monkeypatch.context() as patched:
        patched.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
        patched.setattr(console, "shows_bars", lambda: True)
        with Screen(as_json=False) as page:
            page.begin("sampler")
            page.found(fine)
            page.begin("cached-scores")
    said = capsys.readouterr()
    assert said.out == "ok       disk                room\n"
    assert said.err.index("sampler") < said.err.index("cached-scores")
    monkeypatch.setattr(findings, "QUIET_SECONDS", 0)
    caplog.set_level("INFO", "opd_stream")
    with Screen(as_json=False) as page:
        page.begin("sampler")
        assert page._timer is not None
        page._timer.join()
    assert caplog.messages == ["checking sampler ..."]


def test_every_check_has_room_in_its_column_and_a_row_in_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text()
    assert max(len(check.name) for check in CHECKS) == findings.WIDTH
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for check in CHECKS:
        assert any(f"`{check.name}`" in row.split("|")[1] for row in rows), check.name


def with_other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def healthy(small_runs: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A finished round, and all checks on its config."""
    folder = small_runs.copy(tmp_path_factory.mktemp("healthy"), "rounds=1", "evaluation=null")
    return folder, examine(small_config(folder), quick=False)


def test_a_healthy_config_passes_every_check(healthy: tuple[Path, Report]) -> None:
    report = healthy[1]
    assert [finding for finding in report.findings if finding.level != "ok"] == []
    assert report.not_checked == {}
    seen = {finding.check for finding in report.findings}
    assert seen == {check.name for check in CHECKS} - {"served"}  # the teacher is no server
    assert any("scores/" in f.found for f in report.findings if f.check == "cached-scores")


def test_a_replay_needs_no_teacher(healthy: tuple[Path, Report]) -> None:
    replay = (f"replay.run={healthy[0] / 'run'}", "rounds=1", "evaluation=null")
    report = examine(small_config(healthy[0], *replay, "teacher=null"), quick=False)
    assert {finding.level for finding in report.findings} == {"ok"}
    loading = {check.name for check in CHECKS if check.loads_models}
    assert set(report.not_checked) == loading - {"served"}  # nothing to say
    assert report.not_checked["cached-scores"] == "the config names no teacher"
    with_teacher = examine(small_config(healthy[0], *replay), quick=False)
    assert {finding.level for finding in with_teacher.findings} == {"ok"}
    assert "cached-scores" not in with_teacher.not_checked


def first(check: Check, config: Config) -> Finding:
    """What a check that loads models says first."""
    return next(check.look(Subject(config, quick=False)))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough tokens for a law; a judgement of temperatures takes more."""
    monkeypatch.setattr(trial, "TOKENS", 16)
    monkeypatch.setattr(trial, "gc", SimpleNamespace(collect=lambda: 0))  # room for the next model


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
@pytest.mark.usefixtures("short")
def test_the_teacher_agrees_with_itself(tmp_path: Path, overrides: list[str]) -> None:
    config = small_config(tmp_path, *overrides)
    assert first(trial.teacher_as_student, config).level == "ok"


@pytest.mark.usefixtures("short")
def test_scores_that_stand_one_token_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = TransformersEngine.score

    def shifted(self: Any, *batch: Any, **asked: Any) -> ScoreBatch:
        found = score(self, *batch, **asked)
        rolled = tuple(np.roll(row, 1, axis=0) for row in found.teacher_top_logprobs)
        return replace(found, teacher_top_logprobs=rolled)

    monkeypatch.setattr(TransformersEngine, "score", shifted)
    found = first(trial.teacher_as_student, small_config(tmp_path))
    assert found.level == "error"


@pytest.mark.usefixtures("short")
def test_a_teacher_with_nan(tmp_path: Path) -> None:
    def nan(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    teacher = changed_model(tmp_path, "ledger-teacher", nan)
    config = small_config(tmp_path, f"teacher.path={teacher}")
    with pytest.raises(UserError, match="not finite on plain texts"):
        first(trial.teacher_as_student, config)


def undecided(folder: Path) -> None:
    """A student whose next token is never certain, as that of a larger model often is."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float16(0.25)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.usefixtures("short")
def test_a_sampler_that_is_right(tmp_path: Path, temperature: float) -> None:
    student = changed_model(tmp_path, "ledger-student", undecided)
    where = (f"student.path={student}", f"rollouts.temperature={temperature}")
    found = first(trial.sampler, small_config(tmp_path, *where))
    assert found.level == ("warning" if temperature == 0.7 else "ok")


def test_a_sampler_that_records_after_its_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tempered(logits: torch.Tensor, numbers: torch.Tensor, settings: SamplingSettings) -> Any:
        return decoding.draw(
            logits / settings.temperature, numbers, replace(settings, temperature=1.0)
        )

    monkeypatch.setattr(transformers_engine, "draw", tempered)
    found = first(trial.sampler, small_config(tmp_path, "rollouts.temperature=0.7"))
    assert found.level == "error"
    assert "differ from a forward pass" in found.found


@pytest.mark.parametrize(("shift", "level"), [(0.0, "ok"), (0.05, "error")])
@pytest.mark.usefixtures("short")
def test_a_sampler_in_16_bits_is_held_against_plain_16_bit_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, level: str
) -> None:
    student = changed_model(tmp_path, "ledger-student", undecided)
    drawn = decoding.draw

    def shifted(*asked: Any) -> Any:
        ids, logprobs, *rest = drawn(*asked)
        return (ids, logprobs - shift, *rest)

    monkeypatch.setattr(transformers_engine, "draw", shifted)
    where = (f"student.path={student}", "student.dtype=bfloat16")
    found = first(trial.sampler, small_config(tmp_path, *where))
    assert found.level == level
    assert "of which plain bfloat16 arithmetic explains" in found.found


def test_the_distance_says_what_there_is_to_learn(tmp_path: Path) -> None:
    found = first(trial.distance, small_config(tmp_path))
    assert found.level == "ok"
    nats, error = (float(found.found.split()[place]) for place in (0, 2))
    assert nats > error > 0
    teacher = MODELS / "ledger-teacher"
    same = first(trial.distance, small_config(tmp_path, f"student.path={teacher}"))
    assert same.level == "warning"
    assert "the student is as its teacher already" in same.todo


@pytest.mark.slow
def test_the_doctor_says_which_candidates_see_the_distance(tmp_path: Path) -> None:
    few = first(trial.coverage, small_config(tmp_path, "scores.top_k=1"))
    assert few.level == "warning"
    assert few.found.startswith("scores.top_k=1 with rollouts.student_top_k=0 sees ")
    wider = re.search(r"to see 90%: scores.top_k=(\d+) ", few.todo)
    assert wider is not None
    settings = (f"scores.top_k={wider[1]}", "rollouts.student_top_k=3")
    assert first(trial.coverage, small_config(tmp_path, *settings)).level == "ok"
    teacher = MODELS / "ledger-teacher"
    same = first(trial.coverage, small_config(tmp_path, f"student.path={teacher}"))
    assert "sees 100%" in same.found


def test_a_sampler_at_another_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cold(logits: torch.Tensor, numbers: torch.Tensor, settings: SamplingSettings) -> Any:
        return decoding.draw(logits, numbers, replace(settings, temperature=0.7))

    assert "too little to tell" in first(trial.sampler, small_config(tmp_path)).found
    student = changed_model(tmp_path, "ledger-student", undecided)
    monkeypatch.setattr(transformers_engine, "draw", cold)
    found = first(trial.sampler, small_config(tmp_path, f"student.path={student}"))
    assert found.level == "error"
    assert "less surprising than at temperature 1" in found.found


@pytest.fixture
def copied(healthy: tuple[Path, Report], tmp_path: Path) -> Path:
    """The store of the finished round, to damage."""
    shutil.copytree(healthy[0] / "store", tmp_path / "store")
    return tmp_path


def on_cache(folder: Path, *overrides: str) -> Finding:
    try:
        return first(trial.cached_scores, small_config(folder, *overrides))
    except DamagedUnit as error:
        return trial.cached_scores.refused(error)


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
    monkeypatch.setattr(machine, "this_machine", lambda: having(small, small, small))
    monkeypatch.setattr(machine, "_forecast", lambda _: None)  # of activations, which do not fit
    half = ("student.dtype=bfloat16", "teacher.dtype=bfloat16", "train.lora={}")
    apart = ("executor=ray", "pools.student.gpus=1", "pools.teacher.gpus=1")
    report = examine(small_config(tmp_path, *half, *apart), quick=False)
    assert report.may_start
    assert "does not fit here in float32" in report.not_checked["sampler"]
