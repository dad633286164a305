"""The training stage: batches, processes, adapters, precision, and what it refuses."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_stream.errors import UserError
from pipeline.run_folder import RunFolder
from stages import train as train_stage
from stages.learner import Learner
from stages.step import Silent
from stages.train_data import bucketed
from tests.conftest import MODELS, run, small_config

TWO = ("executor=ray", "pools.trainer.devices=2", "pools.trainer.start_seconds=300")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round whose scores the tests train on again."""
    folder = tmp_path_factory.mktemp("collected")
    settings = ("rounds=1", "evaluation=null", "rollouts.extra_draws=2")
    run(small_config(folder, *settings), RunFolder(folder / "source"), Silent())
    return folder


def train(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """Train on the collected scores in a run of its own."""
    settings = ("rounds=1", "evaluation=null", f"replay.run={folder / 'source'}", *overrides)
    return run(small_config(folder, *settings), RunFolder(folder / name), Silent())


def stopped_after(
    steps: int, monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *overrides: str
) -> None:
    """Train, and stop after the checkpoint of so many steps."""
    saved = train_stage.checkpoint

    def stop(training: train_stage.Training) -> None:
        saved(training)
        if training.state.steps == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_stage, "checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train(folder, name, *overrides)
    monkeypatch.undo()


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]


def column(folder: Path, name: str, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(folder, name)]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    budget=st.integers(1, 1000),
    multiple=st.integers(1, 5),
)
def test_buckets_hold_every_row_once_within_their_budget(
    lengths: list[int], budget: int, multiple: int
) -> None:
    groups = bucketed(lengths, budget=budget, multiple=multiple)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert len(groups) % multiple == 0
    for group in groups:
        padded = len(group) * max((lengths[row] for row in group), default=0)
        assert len(group) <= 1 or padded <= budget


def test_microbatches_change_no_step(collected: Path) -> None:
    train(collected, "small", "train.tokens_per_microbatch=100", "train.weight_decay=0.001")
    train(collected, "large", "train.tokens_per_microbatch=9999", "train.weight_decay=0.0011")
    assert column(collected, "small")[0] == pytest.approx(column(collected, "large")[0], rel=1e-5)
    np.testing.assert_allclose(column(collected, "small"), column(collected, "large"), rtol=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_take_the_steps_of_one(collected: Path, strategy: str) -> None:
    own = f"train.betas=[0.9,{0.95 if strategy == 'ddp' else 0.951}]"
    train(collected, f"one-{strategy}", own, "staleness.max_epochs=1")
    alone = lines(collected, f"one-{strategy}")
    train(
        collected,
        f"two-{strategy}",
        own,
        "staleness.max_epochs=1",
        *TWO,
        f"pools.trainer.strategy={strategy}",
        "train.clip_norm=1.0000001",
    )
    together = lines(collected, f"two-{strategy}")
    report = collected / f"two-{strategy}" / "rounds" / "0000" / "report.json"
    assert json.loads(report.read_text())["processes"] == 2
    assert len(together) == len(alone) >= 2
    for name in ("loss", "grad_norm", "trained_tokens", "reverse_kl", "policy_drift"):
        np.testing.assert_allclose(
            [line[name] for line in together],
            [line[name] for line in alone],
            rtol=1e-3,
            atol=1e-6,
            err_msg=name,
        )


@pytest.mark.slow
def test_a_stopped_round_goes_on_with_another_number_of_processes(
    collected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "train.betas=[0.9,0.96]"
    whole = train(collected, "unbroken", own, *TWO)

    own = "train.betas=[0.9,0.9600001]"
    stopped_after(1, monkeypatch, collected, "broken", own)
    assert 0 < len(lines(collected, "broken")) < whole["steps"]
    summary = train(collected, "broken", own, *TWO)
    assert summary["steps"] == whole["steps"]
    np.testing.assert_allclose(
        column(collected, "broken"), column(collected, "unbroken"), rtol=1e-3, atol=1e-6
    )
    assert [line["step"] for line in lines(collected, "broken")] == list(range(whole["steps"]))


@pytest.mark.parametrize("steps", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_last_step_of_an_epoch_is_a_checkpoint_too(
    collected: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Two epochs of two steps each, and a checkpoint every two steps."""
    own = (f"train.betas=[0.9,0.97{steps}]", "train.checkpoint_steps=2")
    whole = train(collected, f"epochs-{steps}", *own)
    assert whole["steps"] == 4
    again = (f"train.betas=[0.9,0.97{steps}0001]", "train.checkpoint_steps=2")
    stopped_after(steps, monkeypatch, collected, f"stopped-{steps}", *again)
    taken = train_stage.take_step
    steps_done = list[int]()

    def counted(training: Any, step: Any, rate: float) -> Any:
        steps_done.append(step.number)
        return taken(training, step, rate)

    monkeypatch.setattr(train_stage, "take_step", counted)
    train(collected, f"stopped-{steps}", *again)
    assert steps_done == list(range(steps, 4))
    np.testing.assert_allclose(
        column(collected, f"stopped-{steps}"), column(collected, f"epochs-{steps}"), rtol=1e-4
    )


@pytest.mark.slow
def test_a_new_adapter_does_not_depend_on_what_the_process_did_before(tmp_path: Path) -> None:
    digests = set[str]()
    for seed in (1, 2):
        torch.manual_seed(seed)
        settings = ("rounds=1", "evaluation=null", "train.lora={rank: 2}")
        config = small_config(tmp_path / str(seed), *settings)
        summary = run(config, RunFolder(tmp_path / str(seed) / "run"), Silent())
        digests.add(summary["policies"][-1]["weights_sha256"])
    assert len(digests) == 1


def test_an_adapter_is_trained_merged_and_continued(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = ("evaluation=null", "train.lora={rank: 4, alpha: 8}", "train.learning_rate=3e-3")
    config = small_config(tmp_path, *settings)
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    first = config.student.path
    reports = [
        json.loads((tmp_path / "run" / "rounds" / f"{n:04d}" / "report.json").read_text())
        for n in range(2)
    ]
    folders = [Path(report["policy"]["folder"]) for report in reports]
    ids = torch.arange(3, 40)[None]
    for folder in folders:
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32),
            str(folder / "adapter"),
        )
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
    weights = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (first, *folders)
    ]
    name = "model.layers.0.self_attn.q_proj.weight"
    deltas = [weights[n][name] - weights[0][name] for n in (1, 2)]
    assert (deltas[1] - deltas[0]).norm() > 0
    assert torch.linalg.matrix_rank(deltas[1], rtol=1e-3) <= 4  # one adapter, not two on top
    assert torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])
    assert summary["finished"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.gradient_checkpointing=true", "train.weight_decay=0.002"),
        pytest.param(("train.precision=bf16-mixed",), marks=pytest.mark.slow),
        pytest.param(("train.guards.soft_clamp=3",), marks=pytest.mark.slow),
        ("train.objective={kind: hybrid}", "train.schedule=cosine", "train.warmup=0.1"),
        ("train.objective={kind: mc}",),
        ("train.gate={blocks: spans, statistic: abs}", "train.freshness={alpha: 2}"),
        ("train.objective=[{kind: skew}, {kind: entropy_aware, weight: 0.5}]",),
        ("train.top_k=2",),
    ],
)
def test_settings_train_and_lower_the_loss_or_say_why(
    collected: Path, overrides: tuple[str, ...]
) -> None:
    name = "-".join(overrides)[:60].replace("/", "")
    summary = train(collected, name, "staleness.max_epochs=4", *overrides)
    losses = column(collected, name)
    assert np.isfinite(losses).all()
    assert summary["steps"] == len(losses)
    if overrides[0].startswith("train.gradient_checkpointing"):
        plain = train(collected, "plain", "train.weight_decay=0.002001", "staleness.max_epochs=4")
        np.testing.assert_allclose(losses, column(collected, "plain"), rtol=1e-3)
        # One forward pass more than forward and backward.
        assert summary["flops"]["train"] == pytest.approx(plain["flops"]["train"] * 4 / 3)
    if overrides == ("train.precision=bf16-mixed",):
        train(collected, "float32", "train.weight_decay=0.0001")
        assert losses[0] == pytest.approx(column(collected, "float32")[0], rel=0.05)


def test_a_loss_that_is_not_finite_names_its_rows_and_leaves_no_policy(
    collected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Learner.loss

    def poisoned(self: Learner, batch: Any, model: Any = None) -> Any:
        found = plain(self, batch, model)
        found.losses_N[batch.row_N == 0] = torch.nan
        found.sums[2:] = torch.nan
        return found

    monkeypatch.setattr(Learner, "loss", poisoned)
    with pytest.raises(UserError, match=r"not finite in rows .*ledger.*/\d.* is intact"):
        train(collected, "poisoned", "train.learning_rate=2e-3")
    assert not (collected / "poisoned" / "rounds" / "0000" / "report.json").exists()


def test_memory_that_does_not_suffice_names_the_setting(
    collected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Learner, batch: Any, model: Any = None) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Learner, "loss", full)
    with pytest.raises(UserError, match=r"Tried to allocate.*tokens_per_microbatch"):
        train(collected, "full", "train.learning_rate=2.1e-3")


@pytest.mark.slow
def test_a_mistake_in_a_process_of_several_is_one_line(collected: Path) -> None:
    with pytest.raises(UserError, match="the rollouts are stale"):
        train(
            collected,
            "stale",
            *TWO,
            f"student.path={small_config(collected).teacher.path}",  # type: ignore[union-attr]
            "staleness.policy_drift=0.001",
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.top_k=9",), "holds 4 candidates a token"),
        (
            ("train.loggers=[wandb]", "train.learning_rate=1.2e-3"),
            "wandb, which is not installed; pip",
        ),
        (
            ("train.lora={targets: [no_such_module]}",),
            "fit no module of the student",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    collected: Path, overrides: tuple[str, ...], message: str
) -> None:
    if "wandb" in message and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(UserError, match=message):
        train(collected, f"refused-{len(message)}", *overrides)


def test_metrics_are_lines_a_table_and_tensorboard_events(collected: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(collected, "logged", "train.loggers=[tensorboard]", "train.learning_rate=1.1e-3")
    folder = collected / "logged"
    table = (folder / "metrics.csv").read_text().splitlines()
    assert len(table) == 1 + len(lines(collected, "logged"))
    assert "loss" in table[0].split(",")
    assert list((folder / "tensorboard").rglob("events.*"))


def test_a_report_says_what_was_measured(collected: Path) -> None:
    report = json.loads((collected / "source" / "rounds" / "0000" / "report.json").read_text())
    assert report["sampler_gap"] < 1e-5  # the engine's log-probabilities are the trainer's
    assert 0 <= report["length_share"] <= 1
    assert report["terminator_rate"] == pytest.approx(1 - report["length_share"])
    assert 0 <= report["repeat_ratio"] <= 1
    places = report["epochs"][0]["by_position"]
    assert sum(place["tokens"] for place in places) == report["tokens"]["generated"]


@pytest.mark.parametrize(
    "signal", ["kl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "both"))]
)
def test_an_extrapolation_is_searched_recorded_and_continued(tmp_path: Path, signal: str) -> None:
    settings = (
        f"train.extrapolation={{signal: {signal}, rows: 8, prompts: 4, candidates: 2}}",
        "staleness.policy_drift=10",
        "evaluation.max_new_tokens=8",
        *("rollouts.prompts_per_round=16", "train.rows_per_step=7"),  # 2 of the rows do not train
    )
    config = small_config(tmp_path, *settings)
    run(config, RunFolder(tmp_path / "run"), Silent())
    reports = [
        json.loads((tmp_path / "run" / "rounds" / f"{n:04d}" / "report.json").read_text())
        for n in range(2)
    ]
    searches = [entry for report in reports for entry in report["extrapolations"]]
    assert [entry["step"] for entry in searches] == [1, 2, 4, 8]
    for entry in searches:
        assert entry["scores"][0]["policy_drift"] >= 0
        asked = {name for name in ("kl", "reward") if entry["scores"][0][name] is not None}
        assert asked == ({"kl", "reward"} if signal == "both" else {signal})
        assert (entry["policy_drift"] is not None) == (entry["kept"] > 0)
    if signal == "kl":
        assert any(entry["kept"] for entry in searches)  # the first steps of a descent


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_stopped_extrapolating_round_goes_on_the_same_in_two_processes(
    collected: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    rate = 1.3e-3 if strategy == "ddp" else 1.4e-3
    prompts = 4 if strategy == "ddp" else 0  # sharded weights answer none
    own = (f"train.extrapolation={{rows: 8, prompts: {prompts}}}", "staleness.policy_drift=10")
    own += ("seed=5",)  # whose held-out row learns from the others
    whole = train(collected, f"jump-{strategy}", *own, f"train.learning_rate={rate}")
    again = (*own, f"train.learning_rate={rate + 1e-9}")
    stopped_after(3, monkeypatch, collected, f"jumped-{strategy}", *again)
    placed = (*again, *TWO, f"pools.trainer.strategy={strategy}")
    summary = train(collected, f"jumped-{strategy}", *placed)
    assert summary["steps"] == whole["steps"]
    np.testing.assert_allclose(
        column(collected, f"jumped-{strategy}"),
        column(collected, f"jump-{strategy}"),
        rtol=2e-3,
        atol=1e-6,
    )
    reports = [
        json.loads((collected / name / "rounds" / "0000" / "report.json").read_text())
        for name in (f"jump-{strategy}", f"jumped-{strategy}")
    ]
    kept = [[entry["kept"] for entry in report["extrapolations"]] for report in reports]
    assert kept[0] == kept[1]
    assert sum(kept[0]) > 0


def test_the_loop_of_the_objectives_page_lowers_the_loss(collected: Path) -> None:
    from transformers import AutoModelForCausalLM

    page = (MODELS.parent.parent / "docs" / "objectives.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (scores,) = (collected / "store" / "scores").iterdir()
    model = AutoModelForCausalLM.from_pretrained(MODELS / "ledger-student", dtype=torch.float32)
    printed: list[float] = []
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "print": printed.append,
    }
    exec(code.replace("store/scores/3f0c5d1a2b3c4d5e", str(scores)), names)
    assert len(printed) == 2
    assert printed[1] < printed[0]


@pytest.fixture(autouse=True)
def without_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of other tests leave none of their settings."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
