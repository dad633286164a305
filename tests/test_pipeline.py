"""Whole runs: what they leave, what they reuse, and what they refuse."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.store import Store
from pipeline.inspect.command import inspect_worst
from pipeline.run_folder import RunFolder
from pipeline.setup import open_to_look
from pipeline.single_stage import run_evaluation, run_stage
from pipeline.status import status_lines
from stages.step import Silent
from tests.conftest import MODELS, rewrite, run, small_config, summary_of


class Lines(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def warn(self, line: str) -> None:
        self.warnings.append(line)


def run_small(folder: Path, *overrides: str, name: str = "run") -> dict[str, Any]:
    return run(small_config(folder, *overrides), RunFolder(folder / name), Lines())


def test_offline_training_asks_who_taught_the_student(tmp_path: Path) -> None:
    teacher, student = MODELS / "ledger-teacher", MODELS / "ledger-student"
    cases = [
        ((), "that is unknown"),
        ((f"student.taught_by={student}",), "another model"),
        ((f"student.taught_by={teacher}",), None),
        (("rounds=2",), None),
    ]
    for number, (overrides, expected) in enumerate(cases):
        config = small_config(tmp_path, "rounds=1", "evaluation=null", *overrides)
        said = Lines()
        run(config, RunFolder(tmp_path / f"run{number}"), said)
        offline = [line for line in said.warnings if "trains offline" in line]
        assert len(offline) == (expected is not None)
        assert expected is None or expected in offline[0]


def test_scores_of_another_teacher_are_refused(tmp_path: Path) -> None:
    run_small(tmp_path, "rounds=1", "evaluation=null")
    other = (f"replay.run={tmp_path / 'run'}", f"teacher.path={MODELS / 'ledger-student'}")
    with pytest.raises(UserError, match=r"was scored by teacher .*as the config"):
        run_small(tmp_path, "rounds=1", "evaluation=null", *other, name="other")


def weights(summary: dict[str, Any]) -> list[str]:
    return [policy["weights_sha256"] for policy in summary["policies"]]


def test_a_run_leaves_what_other_programs_read(finished_run: Path) -> None:
    summary = json.loads((finished_run / "run" / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert summary["finished"]
    assert [entry["round"] for entry in summary["evaluations"]] == [0, 2]
    assert {"pass@1", "pass@2", "problems", "samples"} <= set(summary["evaluations"][0])
    generated = summary["tokens"]["generated"]
    assert 0 < generated <= 2 * 8 * 48
    assert summary["tokens"]["teacher_scored"] == generated
    assert summary["tokens"]["trained"] == 2 * generated  # two epochs
    assert summary["reused"] == {"rollout_units": 0, "score_units": 0}
    assert [policy["version"] for policy in summary["policies"]] == [0, 1, 2]
    assert len(set(weights(summary))) == 3
    metrics = [json.loads(line) for line in (finished_run / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in metrics] == list(range(8))
    assert sum(line["trained_tokens"] for line in metrics) == summary["tokens"]["trained"]


def test_the_first_step_of_a_round_has_no_drift_and_later_epochs_have(finished_run: Path) -> None:
    metrics = [json.loads(line) for line in (finished_run / "run" / "metrics.jsonl").open()]
    for round_index in (0, 1):
        drifts = [line["policy_drift"] for line in metrics if line["round"] == round_index]
        assert drifts[0] < 1e-9
        assert drifts[2] > 1e-6


def test_the_same_command_again_does_nothing(copied_run: Path) -> None:
    def artifacts() -> dict[Path, int]:
        files = [path for path in (copied_run / "store").glob("*/*/**/*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before = artifacts()
    summary = run(small_config(copied_run), RunFolder(copied_run / "run"), Silent())
    assert artifacts() == before
    assert summary["rounds"] == 2


def test_a_deleted_run_folder_is_made_again_without_sampling_or_scoring(copied_run: Path) -> None:
    first = json.loads((copied_run / "run" / "summary.json").read_text())
    metrics = (copied_run / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(copied_run / "run")
    summary = run_small(copied_run)
    assert weights(summary) == weights(first)
    assert summary["tokens"] == {"generated": 0, "teacher_scored": 0, "trained": 0}
    assert summary["reused"] == {"rollout_units": 4, "score_units": 4}
    assert (copied_run / "run" / "metrics.jsonl").read_text() == metrics


def test_other_workers_batches_and_units_train_the_same_policy(
    finished_run: Path, tmp_path: Path
) -> None:
    first = json.loads((finished_run / "run" / "summary.json").read_text())
    shutil.copytree(finished_run / "store", tmp_path / "store")
    for artifact in (tmp_path / "store" / "policies").iterdir():
        shutil.rmtree(artifact)
    overrides = ["prompts_per_unit=3", "student.batch_rows=2", "teacher.batch_rows=3"]
    again = run_small(tmp_path, *overrides)
    assert weights(again) == weights(first)
    assert again["tokens"]["generated"] == 0


def test_another_unit_size_from_scratch_trains_on_the_same_tokens(
    finished_run: Path, tmp_path: Path
) -> None:
    first = json.loads((finished_run / "run" / "summary.json").read_text())
    again = run_small(tmp_path, "prompts_per_unit=8", "rounds=1", "evaluation=null")
    recipes = [first["caches"][0][0]["rollouts"], again["caches"][0][0]["rollouts"]]
    assert recipes[0] == recipes[1]
    rows = [
        [row for unit in artifact.units() for row in artifact.read_unit(unit).to_pylist()]
        for artifact in (
            Store(folder / "store").by_fingerprint("rollouts", recipes[0])
            for folder in (finished_run, tmp_path)
        )
    ]
    assert [row["completion_ids"] for row in rows[0]] == [row["completion_ids"] for row in rows[1]]


def test_a_flipped_bit_is_named_and_only_that_unit_is_made_again(copied_run: Path) -> None:
    summary = json.loads((copied_run / "run" / "summary.json").read_text())
    shutil.rmtree(copied_run / "run")
    for artifact in (copied_run / "store" / "policies").iterdir():
        shutil.rmtree(artifact)
    store = Store(copied_run / "store")
    scores = store.by_fingerprint("scores", summary["caches"][0][0]["scores"])
    record = scores.commit_record(1)
    assert record is not None
    shard = scores.folder / record.file
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    shard.write_bytes(bytes(damaged))
    lines = Lines()
    again = run(small_config(copied_run), RunFolder(copied_run / "run"), lines)
    assert any(f"unit 1 of {scores.name} is damaged" in line for line in lines.warnings)
    assert weights(again) == weights(summary)
    assert again["reused"] == {"rollout_units": 4, "score_units": 3}
    assert again["tokens"]["generated"] == 0


def test_a_unit_that_is_damaged_again_at_once_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that does not keep what is written."""
    commit, commits = Artifact.commit, Counter[int]()

    def forgetting(self: Artifact, unit: int, *rest: Any, **named: Any) -> Any:
        done = commit(self, unit, *rest, **named)
        if self.recipe.kind == "scores" and unit == 1:
            record = self.commit_record(unit)
            assert record is not None
            (self.folder / record.file).write_bytes(b"")
            commits[unit] += 1
            assert commits[unit] < 5, "made again and again"
        return done

    monkeypatch.setattr(Artifact, "commit", forgetting)
    with pytest.raises(UserError, match=r"unit 1 of scores/.* right after it was made again"):
        run_small(tmp_path, "rounds=1", "evaluation=null")
    assert commits == {1: 2}


def test_a_torn_policy_is_trained_again(copied_run: Path) -> None:
    summary = json.loads((copied_run / "run" / "summary.json").read_text())
    folder = Path(summary["final_policy"])
    folder = next((copied_run / "store").rglob(folder.name))
    (folder / "model.safetensors").write_bytes(b"torn")
    lines = Lines()
    again = run(small_config(copied_run), RunFolder(copied_run / "run"), lines)
    assert any("is damaged" in line for line in lines.warnings)
    assert weights(again) == weights(summary)


def test_a_policy_that_was_trained_again_elsewhere_is_reported_here(copied_run: Path) -> None:
    config, here = small_config(copied_run), RunFolder(copied_run / "run")
    folder = Path(run(config, here, Silent())["final_policy"])
    assert copied_run in folder.parents
    (folder / "model.safetensors").write_bytes(b"torn")
    again = run(config, RunFolder(copied_run / "elsewhere"), Silent())
    assert again["final_policy"] != str(folder)
    assert run(config, here, Silent())["final_policy"] == again["final_policy"]


def test_two_objectives_share_the_first_round(copied_run: Path) -> None:
    other = run_small(copied_run, "train.objective={kind: lsm}", "rounds=1", name="other")
    assert other["tokens"]["generated"] == 0
    assert other["reused"] == {"rollout_units": 2, "score_units": 2}


@pytest.mark.parametrize("kind", ["sampled_pg", pytest.param("lsm", marks=pytest.mark.slow)])
def test_a_replay_trains_another_objective_without_generation_or_teacher(
    copied_run: Path, kind: str
) -> None:
    overrides = [
        f"replay.run={copied_run / 'run'}",
        f"train.objective={{kind: {kind}}}",
        "teacher=null",
    ]
    summary = run_small(copied_run, *overrides, name="replay")
    assert summary["tokens"]["generated"] == summary["tokens"]["teacher_scored"] == 0
    assert summary["tokens"]["trained"] > 0
    assert summary["reused"] == {"rollout_units": 4, "score_units": 4}
    assert len(set(weights(summary))) == 3


def test_cross_entropy_on_replayed_rollouts_of_the_student_is_refused(copied_run: Path) -> None:
    overrides = (f"replay.run={copied_run / 'run'}", "train.objective={kind: ce}")
    with pytest.raises(UserError, match=r"has rollouts that are not given: train.objective is ce"):
        run_small(copied_run, *overrides, name="replay")


def test_importance_on_replayed_rollouts_of_another_temperature_is_refused(tmp_path: Path) -> None:
    cold = ("rollouts.temperature=0.7", "rollouts.prompts_per_round=2", "rounds=1")
    run_small(tmp_path, *cold, "evaluation=null")
    overrides = ("rounds=1", f"replay.run={tmp_path / 'run'}", "train.objective={kind: hybrid}")
    with pytest.raises(UserError, match=r"temperature is 0\.7 with objective hybrid, which weighs"):
        run_small(tmp_path, *overrides, name="replay")


def test_a_replay_reads_no_more_rounds_than_it_trains(copied_run: Path) -> None:
    scores = [caches[0]["scores"] for caches in summary_of(RunFolder(copied_run / "run"))["caches"]]
    shutil.rmtree(copied_run / "store" / "scores" / scores[1][:16])
    named = f"replay.scores=[{', '.join(scores)}]"
    for number, source in enumerate((f"replay.run={copied_run / 'run'}", named)):
        overrides = (source, "train.objective={kind: lsm}", "rounds=1", "evaluation=null")
        assert run_small(copied_run, *overrides, name=f"replay{number}")["rounds"] == 1


def test_a_replay_reads_a_store_that_it_does_not_write_to(copied_run: Path, tmp_path: Path) -> None:
    source = copied_run / "store"
    min(source.glob("scores/*/manifest.json")).write_text("{")  # another one's to mend
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    overrides = (f"store={tmp_path / 'own'}", f"replay.store={source}", "evaluation=null")
    overrides += (f"replay.run={copied_run / 'run'}", "train.objective={kind: lsm}", "rounds=1")
    summary = run_small(copied_run, *overrides, name="replay")
    assert summary["reused"] == {"rollout_units": 2, "score_units": 2}
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before
    assert {path.name for path in (tmp_path / "own").iterdir()} >= {"policies", "prompts"}
    assert not (tmp_path / "own" / "scores").exists()


def test_a_replay_in_a_store_that_cannot_be_written_is_told_of_another(copied_run: Path) -> None:
    overrides = ("store=/proc/x", f"replay.run={copied_run / 'run'}")
    with pytest.raises(UserError, match=r"name it in replay\.store, and in store one for the new"):
        run_small(copied_run, *overrides, name="replay")


def test_a_replay_counts_the_units_that_it_reads(copied_run: Path) -> None:
    path = copied_run / "run" / "summary.json"
    summary = json.loads(path.read_text())
    summary["caches"][1][0]["units"] = [0]  # as where a round kept a part of an artifact
    rewrite(path, **summary)
    overrides = (f"replay.run={copied_run / 'run'}", "evaluation=null")
    replayed = run_small(copied_run, *overrides, name="replay")
    assert replayed["reused"] == {"rollout_units": 3, "score_units": 3}
    assert replayed["cache_bytes"] < summary["cache_bytes"]


def test_a_drift_bound_stops_the_epochs_and_says_so(tmp_path: Path) -> None:
    bounds = ["staleness.policy_drift=1e-4", "staleness.distance_share=0"]
    overrides = ["staleness.max_epochs=6", *bounds, "evaluation=null", "rounds=1"]
    summary = run_small(tmp_path, *overrides)
    assert all(line.startswith("drift passed its bound") for line in summary["decisions"])
    assert summary["steps"] < 6 * 2
    assert "(bound 0.0001)" in summary["decisions"][0]


def test_a_machine_that_only_scores_can_look_at_what_it_scored(tmp_path: Path) -> None:
    config, directories = small_config(tmp_path), {}
    for stage in ("generate", "score", "train"):
        directories[stage] = RunFolder(tmp_path / stage)
        run_stage(stage, config, directories[stage], round_index=0, progress=Silent())
    seen = [
        inspect_worst(directory, config, round_index=0, count=2)
        for directory in directories.values()
    ]
    assert [[worst.view.mean for worst in found] for found in seen[1:]] == [
        [worst.view.mean for worst in seen[0]]
    ] * 2
    plans = [directory.plan(0).as_json() for directory in directories.values()]
    assert plans[1:] == plans[:-1]


def test_stage_commands_in_turn_make_the_policies_of_a_run(
    finished_run: Path, tmp_path: Path
) -> None:
    config, directory = small_config(tmp_path), RunFolder(tmp_path / "run")
    for round_index in range(2):
        for stage in ("generate", "score", "train"):
            run_stage(stage, config, directory, round_index=round_index, progress=Silent())
        version = round_index + 1
        run_evaluation(config, directory, policy_version=version, progress=Silent())
    summary = run(config, directory, Silent())
    first = json.loads((finished_run / "run" / "summary.json").read_text())
    assert weights(summary) == weights(first)
    assert summary["tokens"] == first["tokens"]


@pytest.mark.parametrize(
    ("stage", "round_index", "line"),
    [
        ("generate", 1, "run train --round 0 first"),
        ("score", 0, "run generate --round 0 first"),
        ("train", 0, "run generate --round 0 first"),
        ("train", 7, "the config has rounds 0 to 1"),
    ],
)
def test_a_stage_before_its_time_says_which_comes_first(
    tmp_path: Path, stage: str, round_index: int, line: str
) -> None:
    directory = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=line):
        run_stage(
            stage, small_config(tmp_path), directory, round_index=round_index, progress=Silent()
        )


def test_status_names_the_field_in_which_the_nearest_artifact_differs(copied_run: Path) -> None:
    assert all("complete" in line for line in status_lines(open_to_look(small_config(copied_run))))
    lines = status_lines(open_to_look(small_config(copied_run, "rollouts.temperature=0.9")))
    assert any("settings.temperature: 1.0 there, 0.9 here" in line for line in lines)


def test_a_run_folder_with_other_settings_is_refused_by_field(copied_run: Path) -> None:
    config = small_config(copied_run, "train.learning_rate=0.5")
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.001 -> 0\.5"):
        run(config, RunFolder(copied_run / "run"), Silent())


def model_with(folder: Path, source: str, **changes: Any) -> Path:
    """A copy of a shipped model whose weights or tokenizer differ."""
    target = folder / source
    shutil.copytree(MODELS / source, target)
    if "weights" in changes:
        tensors = load_file(target / "model.safetensors")
        save_file(changes["weights"](tensors), target / "model.safetensors", {"format": "pt"})
    return target


def with_nan(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """NaN in the embedding of one digit: rows that contain it cannot be scored."""
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding[300] = np.nan
    return {**tensors, "model.embed_tokens.weight": embedding}


def test_a_teacher_that_computes_no_numbers_is_refused_before_the_student_samples(
    tmp_path: Path,
) -> None:
    teacher = model_with(tmp_path, "ledger-teacher", weights=with_nan)
    with pytest.raises(UserError, match="not finite on plain texts"):
        run_small(tmp_path, f"teacher.path={teacher}", "evaluation=null")
    assert not list((tmp_path / "store" / "rollouts").rglob("*.arrow"))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    teacher = model_with(tmp_path, "ledger-teacher")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<other>"
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="have different tokenizers"):
        run_small(tmp_path, f"teacher.path={teacher}")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_a_shorter_context_is_refused_before_any_work(tmp_path: Path) -> None:
    teacher = model_with(tmp_path, "ledger-teacher")
    settings = json.loads((teacher / "config.json").read_text())
    text = json.dumps({**settings, "max_position_embeddings": 60})
    (teacher / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"together \d+; the teacher reads 60; lower the window"):
        run_small(tmp_path, f"teacher.path={teacher}")
    assert not (tmp_path / "run").exists()


def test_an_adapter_alone_is_refused_with_the_way_to_merge_it(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"lora_A": np.zeros((2, 2), np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is an adapter; expected whole weights; merge it"):
        run_small(tmp_path, f"student.path={adapter}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("student.path=nowhere", "is no checkpoint: found nothing"),
        ("scores.top_k=1000", "scores.top_k is 1000 but the teacher has"),
        ("rollouts.prompts_per_round=64", "prompts_per_round is 64 but there are 32 prompts"),
        ("prompts.max_prompt_tokens=10", "tokens; the limit is 10"),
        ("scores.forced_tokens=[no such token]", "is no token of"),
        ("rollouts.window.tokens=5000", "lower the window or max_prompt_tokens"),
    ],
)
def test_what_does_not_fit_together_is_one_line(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        run_small(tmp_path, override, "evaluation=null")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a"):
        run_small(tmp_path, f"store={tmp_path / 'file'}")


def test_a_poisoned_prompt_stops_the_run_with_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not a user's mistake shows its traceback, then a line; the other unit stays."""
    sample, calls = TransformersEngine.sample, list[int]()

    def poisoned(self: Any, *asked: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("token 4711 poisons the kernel")
        return sample(self, *asked, **named)

    monkeypatch.setattr(TransformersEngine, "sample", poisoned)
    with pytest.raises(UserError, match=r"unit 1 of rollouts/\w+ failed \(ValueError: token 4711"):
        run_small(tmp_path, "evaluation=null")
    assert "Traceback" in caplog.text
    monkeypatch.undo()
    summary = run_small(tmp_path, "evaluation=null")
    assert summary["finished"]
    assert len(list((tmp_path / "store" / "rollouts").glob("*/units/00000.json"))) == 2
