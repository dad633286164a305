"""The doctor: a healthy config passes, and each planted fault is found by its own check."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opd_stream.config import Config
from opd_stream.engines.transformers_engine import TransformersEngine
from pipeline import live
from pipeline.cli import app
from pipeline.doctor import cached, devices, models, packages, places, prompts, screen, trial
from pipeline.doctor.devices import Gpu, Machine
from pipeline.doctor.examination import SETUP, examine
from pipeline.doctor.findings import Check, Finding, Report
from tests.conftest import MODELS, small_config

CHECKS = [
    packages.PACKAGES,
    places.STORE,
    places.DISK,
    models.WEIGHTS,
    models.TOKENIZERS,
    models.TERMINATORS,
    models.TEMPLATES,
    prompts.PROMPTS,
    prompts.ANSWERS,
    prompts.CONTEXT,
    devices.DEVICES,
    devices.PRECISION,
    devices.MEMORY,
    SETUP,
    trial.SELF,
    trial.SAMPLER,
    cached.CACHED,
]
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
    assert found.todo
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
    assert set(report.not_checked) == {"teacher-as-student", "sampler", "cached-scores"}


def test_another_tokenizer(tmp_path: Path) -> None:
    def other(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["added_tokens"][0]["content"] = "<other>"
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    teacher = changed_model(tmp_path, "ledger-teacher", other)
    found = only(quick(tmp_path, f"teacher.path={teacher}"), "error", models.TOKENIZERS)
    assert "different tokenizers" in found.found


def test_heads_of_different_sizes(tmp_path: Path) -> None:
    teacher = changed_model(tmp_path, "ledger-teacher", with_json("config.json", vocab_size=640))
    found = only(quick(tmp_path, f"teacher.path={teacher}"), "warning", models.TOKENIZERS)
    assert "logits for 606 ids, the teacher for 640" in found.found


def test_the_teacher_ends_with_another_token(tmp_path: Path) -> None:
    teacher = changed_model(tmp_path, "ledger-teacher", with_terminator(5))
    where = f"teacher.path={teacher}"
    found = only(quick(tmp_path, where), "warning", models.TERMINATORS)
    assert "student ends with 1" in found.found
    assert "teacher with 5" in found.found
    unmerged = quick(tmp_path, where, "train.guards.merge_terminators=false")
    only(unmerged, "error", models.TERMINATORS)


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
    report = quick(tmp_path, f"student.path={student}", f"teacher.path={teacher}")
    told = [finding for finding in report.findings if finding.level == "error"]
    assert {finding.check for finding in told} == {"terminators"}
    assert "on which the run does not stop" in told[0].found


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
    assert "write the same turns differently" in only(report, "warning", models.TEMPLATES).found


def test_a_turn_that_ends_without_a_terminator(tmp_path: Path) -> None:
    chat = with_json("tokenizer_config.json", chat_template=CHAT + "<pad>")
    where = [changed_model(tmp_path, f"ledger-{role}", chat) for role in ("student", "teacher")]
    paths = (f"student.path={where[0]}", f"teacher.path={where[1]}")
    report = quick(tmp_path, *paths, "prompts.template={kind: chat}")
    assert "none of the ids the run stops on" in only(report, "warning", models.TEMPLATES).found


def test_a_context_that_is_too_short(tmp_path: Path) -> None:
    teacher = changed_model(
        tmp_path, "ledger-teacher", with_json("config.json", max_position_embeddings=100)
    )
    found = only(quick(tmp_path, f"teacher.path={teacher}"), "error", prompts.CONTEXT)
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
    found = only(quick(tmp_path, f"teacher.path={teacher}"), "error", models.WEIGHTS)
    assert "no whole safetensors file" in found.found


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    report = quick(tmp_path)
    assert {f.check for f in report.findings if f.level == "error"} == {"disk"}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 9_200_000))
    found = only(quick(tmp_path, "rollouts.samples_per_prompt=64"), "warning", places.DISK)
    assert "9.2 MB free" in found.found


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = only(quick(tmp_path, f"store={tmp_path / 'file' / 'store'}"), "error", places.STORE)
    assert "cannot write" in found.found


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    empty = jsonl(tmp_path, [])
    report = quick(tmp_path, f"prompts={{kind: jsonl, path: {empty}}}", "evaluation=null")
    found = [f for f in report.findings if f.check == "prompts" and f.level == "error"]
    assert "holds no prompts" in found[0].found
    absent = quick(tmp_path, "prompts={kind: jsonl, path: nowhere.jsonl}")
    assert "does not exist" in only(absent, "error", prompts.PROMPTS).found
    few = quick(tmp_path, "prompts.count=4")
    assert "there are 4 prompts" in only(few, "error", prompts.PROMPTS).found


def test_missing_answers_and_answers_the_judge_cannot_read(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "1 + 1?", "answer": "two"}])
    source = f"kind: jsonl, path: {path}"
    found = only(quick(tmp_path, f"evaluation.prompts={{{source}}}"), "error", prompts.ANSWERS)
    assert "1 of 1 prompts have no reference answer" in found.found
    read = (
        f"evaluation.prompts={{{source}, answer_field: answer}}",
        "evaluation.judge.kind=ledger",
    )
    assert "are wrong answers" in only(quick(tmp_path, *read), "error", prompts.ANSWERS).found


def test_evaluation_on_training_prompts(tmp_path: Path) -> None:
    found = only(quick(tmp_path, "evaluation.prompts.seed=11"), "warning", prompts.PROMPTS)
    assert "4 of 4 are training prompts too" in found.found


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: name != "ray" and find_spec(name))
    assert quick(tmp_path).may_start
    found = only(quick(tmp_path, "executor=ray"), "error", packages.PACKAGES)
    assert found.todo == "pip install ray"


def test_a_package_in_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: "4.57.1")
    report = quick(tmp_path)
    told = [f.found for f in report.findings if f.check == "packages" and f.level == "warning"]
    assert any(line.startswith("transformers is 4.57.1") for line in told)


def machine(*gpus: Gpu, **fields: Any) -> Machine:
    plain = Machine(gpus=gpus, cpus=8, bytes=32_000_000_000, cpu_bfloat16=True)
    return replace(plain, **fields)


@pytest.mark.parametrize(
    ("have", "overrides", "level", "check", "words"),
    [
        (machine(), ["pools.teacher.gpus=1"], "error", "devices", "asks for 1 GPU"),
        (
            machine(SMALL_GPU),
            ["executor=ray", "pools.teacher.gpus=1", "pools.student.gpus=1"],
            "error",
            "devices",
            "ask for 2 GPU together",
        ),
        (
            machine(SMALL_GPU),
            ["executor=ray", "pools.teacher.accelerator=H100"],
            "error",
            "devices",
            "accelerator_type:H100",
        ),
        (
            machine(),
            ["executor=ray", "pools.student.labels={pool: a}"],
            "error",
            "devices",
            "label",
        ),
        (machine(SMALL_GPU), ["pools.trainer.devices=2"], "error", "devices", "has 1 GPU"),
        (machine(), ["pools.trainer.strategy=fsdp2"], "warning", "devices", "one device"),
        (machine(SMALL_GPU), ["teacher.dtype=bfloat16"], "warning", "precision", "Tesla T4"),
        (machine(SMALL_GPU), ["train.precision=bf16-mixed"], "warning", "precision", "train.pre"),
        (
            machine(cpu_bfloat16=False),
            ["student.dtype=bfloat16"],
            "warning",
            "precision",
            "only emulates",
        ),
        (machine(bytes=2_000_000), ["executor=local"], "error", "memory", "training"),
        (
            machine(replace(SMALL_GPU, bytes=ONE_ROLE)),
            ["executor=local"],
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
    monkeypatch.setattr(devices, "this_machine", lambda: have)
    found = [f for f in quick(tmp_path, *overrides).findings if f.level != "ok"]
    assert (level, check) in {(f.level, f.check) for f in found}
    assert any(words in f.found for f in found)


def test_a_cluster_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(config: Config) -> list[dict[str, Any]]:
        raise ConnectionError("no answer")

    monkeypatch.setenv("RAY_ADDRESS", "nowhere:6379")
    monkeypatch.setattr(devices, "cluster_nodes", silent)
    config = small_config(tmp_path, "executor=ray", "teacher.engine=fake", "student.engine=fake")
    found = [f for f in examine(config, quick=False).findings if f.level == "error"]
    assert [f.check for f in found] == ["devices"]
    assert "nowhere:6379" in found[0].found
    assert "pools" in examine(config, quick=True).not_checked


def test_what_a_run_refuses_is_found(tmp_path: Path) -> None:
    found = only(quick(tmp_path, "scores.top_k=1000"), "error", SETUP)
    assert "scores.top_k is 1000" in found.found
    replay = quick(tmp_path, f"replay.run={tmp_path}")
    assert "has no summary.json" in only(replay, "error", SETUP).found


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

    def looked_at_late(*_: Any) -> list[Finding]:
        before.append(capsys.readouterr().out)
        return [places.DISK.ok("room")]

    monkeypatch.setattr(places, "disk", looked_at_late)
    small_config(tmp_path)
    command = ["doctor", str(tmp_path / "small.yaml"), "--quick"]
    app(command, standalone_mode=False)
    after = capsys.readouterr()
    seen = {line.split()[1] for line in before[0].splitlines()}
    assert {"packages", "weights", "prompts", "memory"} <= seen
    assert after.out.startswith("ok       disk")
    assert after.err == ""  # no terminal: nothing moves
    app([*command, "--json"], standalone_mode=False)
    assert before[1] == ""
    assert json.loads(capsys.readouterr().out)["may_start"]


def test_a_terminal_names_the_check_at_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    monkeypatch.setattr(live, "shows_bars", lambda: True)
    with screen.Screen(as_json=False) as page:
        page.begin(trial.SAMPLER)
        page.found(places.DISK.ok("room"))
        page.begin(trial.SELF)
    told = capsys.readouterr()
    assert told.out == "ok       disk                room\n"
    assert told.err.index(trial.SAMPLER.name) < told.err.index(trial.SELF.name)


def test_columns_have_room_for_every_check() -> None:
    assert max(len(check.name) for check in CHECKS) == screen.WIDTH
