"""Other trainers on cached scores: the same losses, gradients and weights as our own."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from opd_stream.batches import collate
from opd_stream.engines.head import output_head
from opd_stream.engines.reading import decoder_of, rows_hidden
from opd_stream.errors import UserError
from opd_stream.loss import batch_loss
from opd_stream.objectives import (
    Bucket,
    CrossEntropy,
    DrawnForward,
    Hybrid,
    MonteCarlo,
    SampledPg,
    Skew,
)
from opd_stream.store import open_scores
from opd_stream.store.reader import epoch_order
from opd_stream.trainers import (
    CachedCollator,
    CachedDataset,
    CachedDistillationTrainer,
    CachedLoss,
    CacheOrder,
    check_served,
)
from pipeline.run_folder import RunFolder
from tests.conftest import MODELS, SmallRuns
from tests.test_hidden_runs import HIDDEN

PAGE = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text()
STUDENT = MODELS / "ledger-student"
WINDOW = 48


def student() -> Any:
    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)


def scores_of(run: Path, round_index: int = 0) -> Path:
    cache = RunFolder(run / "run").plan(round_index).caches[0]
    return run / "store" / "scores" / cache.scores[:16]


def arguments(folder: Path, kind: Any = TrainingArguments, **changes: Any) -> Any:
    plain: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
    }
    return kind(output_dir=str(folder), **plain | changes)


def trainer_on(
    scores: Path, folder: Path, model: Any = None, kind: Any = None, **changes: Any
) -> Any:
    options = {k: changes.pop(k) for k in ("optimizers", "eval_scores") if k in changes}
    options |= {k: changes.pop(k) for k in ("top_k", "processing_class") if k in changes}
    objectives = changes.pop("objectives", [Bucket()])
    return (kind or CachedDistillationTrainer)(
        model or student(),
        arguments(folder, **changes),
        scores=scores,
        objectives=objectives,
        window_tokens=WINDOW,
        **options,
    )


def our_loss(model: Any, scores: Path, objectives: Sequence[Any], rows: int) -> torch.Tensor:
    """The loss of our own training of the first rows as one batch."""
    cached = open_scores(scores)
    batch = collate([cached[place] for place in range(rows)], window_tokens=WINDOW)
    hidden = rows_hidden(decoder_of(model), batch.input_ids_BL, batch.attention_mask_BL)
    return batch_loss(hidden, output_head(model), batch, objectives).loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "objectives", [[Bucket()], [Skew(), SampledPg()], [Hybrid()]], ids=lambda each: each[0].kind
)
def test_loss_and_gradients_are_ours(
    finished_run: Path, tmp_path: Path, objectives: list[Any]
) -> None:
    scores, ours = scores_of(finished_run), student()
    our_loss(ours, scores, objectives, 4).backward()
    trainer = trainer_on(scores, tmp_path, objectives=objectives)
    inputs = trainer.data_collator([trainer.train_dataset[place] for place in range(4)])
    theirs = trainer.training_step(trainer.model, inputs, (inputs["labels"] != -100).sum())
    assert theirs.item() == pytest.approx(our_loss(student(), scores, objectives, 4).item(), 1e-6)
    expected, found = gradients(ours), gradients(trainer.model)
    assert set(expected) == set(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)


def test_accumulated_micro_batches_are_one_large_batch(finished_run: Path, tmp_path: Path) -> None:
    """Of rows of unequal lengths, whose means by micro-batch would be another loss."""
    scores = scores_of(finished_run)
    changes = {"lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 0.1}
    found = []
    for size in (8, 2, 1):
        trainer = trainer_on(
            scores,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **changes,
        )
        # Half of some rows, so that micro-batches differ in their tokens.
        trainer.train_dataset._rows = _Cut(trainer.train_dataset._rows)
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], trainer.model.state_dict()))
    (loss, weights), *others = found
    for other, state in others:
        assert other == pytest.approx(loss, rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-7)


class _Cut:
    """Rows of which every third has 5 completion tokens that train."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        row = self.rows[place]
        mask = torch.arange(len(row.completion_ids)).numpy() < (5 if place % 3 == 0 else 10**6)
        return replace(row, loss_mask=mask)


def test_a_whole_training_gives_the_weights_of_ours(finished_run: Path, tmp_path: Path) -> None:
    """The first round of a run: the same rows in the same order, optimizer and rates."""
    run = RunFolder(finished_run / "run")
    config, report = run.config(), run.report(0)
    assert report is not None
    assert report.steps == 4
    train, model = config.train, student()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=train.betas, weight_decay=train.weight_decay, fused=True
    )

    def rate(step: int) -> float:
        return train.learning_rate_at((min(step, 3) + 0.5) / 4 / config.rounds, step)

    trainer = trainer_on(
        scores_of(finished_run),
        tmp_path,
        model,
        num_train_epochs=2,
        seed=config.seed,
        max_grad_norm=train.clip_norm,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
    )
    trainer.train()
    policy = AutoModelForCausalLM.from_pretrained(report.policy.folder, dtype=torch.float32)
    start, moved = student().state_dict(), 0.0
    for name, tensor in policy.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=2e-6)
        moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-4
    ours = [epoch.policy_drift for epoch in report.epochs]
    logged = [line["policy_drift"] for line in trainer.state.log_history if "policy_drift" in line]
    assert sum(logged[:2]) / 2 == pytest.approx(ours[0], rel=1e-3)


def test_the_evaluation_loss_is_the_mean_over_all_tokens(
    finished_run: Path, tmp_path: Path
) -> None:
    scores = scores_of(finished_run)
    trainer = trainer_on(scores, tmp_path, eval_scores=scores, per_device_eval_batch_size=3)
    trainer.eval_dataset._rows = _Cut(trainer.eval_dataset._rows)
    model, rows = student(), [trainer.eval_dataset[place]["scored_row"] for place in range(8)]
    batch = collate(rows, window_tokens=WINDOW)
    hidden = rows_hidden(decoder_of(model), batch.input_ids_BL, batch.attention_mask_BL)
    with torch.no_grad():
        whole = batch_loss(hidden, output_head(model), batch, [Bucket()]).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)


def test_mixed_precision_keeps_the_loss_within_its_rounding(
    finished_run: Path, tmp_path: Path
) -> None:
    scores = scores_of(finished_run)
    losses = [
        trainer_on(scores, tmp_path, eval_scores=scores, bf16=bf16).evaluate()["eval_loss"]
        for bf16 in (False, True)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_adapters_train_alone(finished_run: Path, tmp_path: Path) -> None:
    """With recomputed activations; new adapters leave the first loss what it is."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(student(), settings)
    first = {name: p.clone() for name, p in model.named_parameters()}
    scores = scores_of(finished_run)
    trainer = trainer_on(scores, tmp_path, model, gradient_checkpointing=True)
    trainer.train()
    plain = trainer_on(scores, tmp_path)
    plain.train()
    losses = [each.state.log_history[0]["loss"] for each in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, first[n])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_hidden_states_serve_the_whole_vocabulary(small_runs: SmallRuns, tmp_path: Path) -> None:
    """As our own training reads them, of which the run's first loss is a figure."""
    run = small_runs(*HIDDEN)
    trainer = trainer_on(scores_of(run), tmp_path, learning_rate=0.0)
    trainer.train()
    assert trainer.teacher.top_k is None
    first = json.loads(RunFolder(run / "run").metrics.read_text().splitlines()[0])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(first["loss"], 1e-5)


def test_several_caches_are_one_dataset(finished_run: Path, tmp_path: Path) -> None:
    both = [scores_of(finished_run, index) for index in (0, 1)]
    dataset = CachedDataset(both)
    assert len(dataset) == sum(len(open_scores(each)) for each in both)
    assert {dataset[place]["scored_row"].cache for place in range(len(dataset))} == {0, 1}


def test_a_dataset_travels_to_a_worker(finished_run: Path) -> None:
    dataset = CachedDataset(scores_of(finished_run))
    other = pickle.loads(pickle.dumps(dataset))
    assert other[3]["input_ids"] == dataset[3]["input_ids"]


def test_labels_count_what_trains(finished_run: Path) -> None:
    dataset = CachedDataset(scores_of(finished_run))
    inputs = CachedCollator(window_tokens=7)([dataset[0], dataset[1]])
    assert (inputs["labels"] != -100).sum() == len(inputs["cached"].completion_ids_N) == 14
    is_label = inputs["labels"] != -100
    assert torch.equal(inputs["labels"][is_label], inputs["input_ids"][is_label])


def test_the_order_of_an_epoch_is_ours(finished_run: Path) -> None:
    rows = open_scores(scores_of(finished_run))
    order = CacheOrder(len(rows), seed=3)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        plain = [row.prompt_id for row in rows.ahead(list(order))]
        expected = epoch_order(len(rows), (3, 0, epoch)).tolist()
        assert plain == [rows[place].prompt_id for place in expected]


@pytest.mark.parametrize(
    ("objectives", "top_k", "line"),
    [
        ([], None, "there is no objective"),
        ([DrawnForward()], None, "ranked candidates, which objective drawn_forward does not read"),
        ([MonteCarlo()], None, "no further draws, which objective mc reads"),
        ([Bucket()], 9, "holds 4 candidates a token, and top_k is 9"),
    ],
)
def test_what_a_cache_cannot_serve_is_one_line(
    finished_run: Path, tmp_path: Path, objectives: list[Any], top_k: int | None, line: str
) -> None:
    with pytest.raises(UserError, match=line):
        trainer_on(scores_of(finished_run), tmp_path, objectives=objectives, top_k=top_k)


def test_what_recipes_say_decides_which_objectives_are_served(finished_run: Path) -> None:
    (_, scores), *_ = caches = CachedDataset(scores_of(finished_run)).caches
    rollouts, settings = caches[0][0].recipe.settings, scores.recipe.settings
    settings["codec"] = {"kind": "sampled", "draws": 8}
    check_served(caches, [DrawnForward()], top_k=None)
    with pytest.raises(UserError, match="which objective bucket does not read"):
        check_served(caches, [Bucket()], top_k=None)
    with pytest.raises(UserError, match="have no ranks; leave top_k out"):
        check_served(caches, [DrawnForward()], top_k=2)
    settings["codec"], rollouts["origin"] = {"kind": "exact"}, "given"
    check_served(caches, [CrossEntropy()], top_k=None)
    with pytest.raises(UserError, match="are given, and objective sampled_pg needs draws"):
        check_served(caches, [SampledPg()], top_k=None)
    settings["unscored"] = True
    with pytest.raises(UserError, match="which serve objective ce alone"):
        check_served(caches, [Bucket()], top_k=None)


def test_another_tokenizer_is_refused(finished_run: Path, tmp_path: Path) -> None:
    scores = scores_of(finished_run)
    trainer_on(scores, tmp_path, processing_class=AutoTokenizer.from_pretrained(STUDENT))
    other = AutoTokenizer.from_pretrained(MODELS / "routine-student")
    with pytest.raises(UserError, match="they give texts other ids"):
        trainer_on(scores, tmp_path, processing_class=other)


def test_a_model_with_fewer_tokens_is_refused(finished_run: Path, tmp_path: Path) -> None:
    model = student()
    model.resize_token_embeddings(8)
    trainer = trainer_on(scores_of(finished_run), tmp_path, model)
    with pytest.raises(UserError, match=r"holds token id \d+; the student has 8 tokens"):
        trainer.train()


def test_a_cache_that_is_not_whole_is_one_line(copied_run: Path, tmp_path: Path) -> None:
    scores = scores_of(copied_run)
    shard = next((scores / "units").glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"is damaged.*cache verify STORE --repair"):
        list(CachedDataset(scores))
    (scores / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not complete"):
        CachedDataset(scores)
    with pytest.raises(UserError, match="is no scores artifact"):
        CachedDataset(tmp_path)


def test_trl_trains_on_a_cache_with_our_loss(finished_run: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="`make bench-loss` installs trl beside the project")

    class Distiller(CachedLoss, trl.SFTTrainer):
        pass

    scores, tokenizer = scores_of(finished_run), AutoTokenizer.from_pretrained(STUDENT)
    config = arguments(tmp_path, trl.SFTConfig, num_train_epochs=2, optim="sgd", learning_rate=0.1)
    options = {"scores": scores, "objectives": [Skew()], "window_tokens": WINDOW}
    theirs = Distiller(student(), config, processing_class=tokenizer, **options)
    inputs = theirs.data_collator([theirs.train_dataset[place] for place in range(4)])
    loss = theirs.training_step(theirs.model, inputs, (inputs["labels"] != -100).sum())
    ours = student()
    expected = our_loss(ours, scores, [Skew()], 4)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradients(theirs.model)[name], gradient, rtol=1e-6, atol=1e-8)
    theirs.model.zero_grad()
    theirs.train()
    plain = CachedDistillationTrainer(
        student(),
        arguments(tmp_path, num_train_epochs=2, optim="sgd", learning_rate=0.1),
        **options,
    )
    plain.train()
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(theirs.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("number", [0, 1], ids=["transformers", "trl"])
def test_the_trainers_of_the_page_run(finished_run: Path, tmp_path: Path, number: int) -> None:
    if number:
        pytest.importorskip("trl", reason="`make bench-loss` installs trl beside the project")
    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[number]
    code = code.replace('"store/scores/3f0c5d1a2b3c4d5e"', repr(str(scores_of(finished_run))))
    options = "max_steps=2, use_cpu=True, bf16=False, save_strategy='no'"
    code = code.replace('"out"', repr(str(tmp_path))).replace("max_steps=20", options)
    names: dict[str, Any] = {
        "model": student(),
        "tokenizer": AutoTokenizer.from_pretrained(STUDENT),
    }
    exec(code, names)
    assert names["trainer"].state.global_step == 2


PROCESSES = """
import json
import sys
from pathlib import Path
import torch
from tests.test_trainers import trainer_on

torch.set_num_threads(1)
scores, out, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
trainer = trainer_on(
    scores, out, per_device_train_batch_size=size, per_device_eval_batch_size=size,
    optim="sgd", learning_rate=0.1, num_train_epochs=2, eval_scores=scores,
)
trainer.train()
figures = trainer.evaluate()
if trainer.is_world_process_zero():
    trainer.save_model()
    (out / "figures.json").write_text(json.dumps([figures["eval_loss"], trainer.state.log_history]))
"""


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(finished_run: Path, tmp_path: Path) -> None:
    """DistributedDataParallel on CPUs: the gradient is that of one mean over both."""
    (tmp_path / "script.py").write_text(PROCESSES)
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = [str(tmp_path / "script.py"), str(scores_of(finished_run)), str(out)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), *words, str(4 // processes)]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        found.append((model.state_dict(), *json.loads((out / "figures.json").read_text())))
    (weights, loss, lines), (other, other_loss, other_lines) = found
    for name, tensor in weights.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert other_lines[0]["policy_drift"] == pytest.approx(lines[0]["policy_drift"], rel=1e-4)
    assert other_lines[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
