"""Rollouts that the student did not write, beside its own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.batches import Batch, collate
from opd_stream.drift import DriftSums, means, named
from opd_stream.engines.base import CheckedEngine
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.loss import batch_loss
from opd_stream.objectives import Bucket, CrossEntropy, ObjectiveInputs
from opd_stream.prompts import prompts_table
from opd_stream.rendering import ChatTemplate, Prompt, RawTemplate, Renderer
from opd_stream.sources import FilePrompts
from opd_stream.store.reader import ScoredRow, ScoredRows
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_batch
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.tasks.ledger import make_problems
from opd_stream.windows import FixedWindow
from pipeline.caches import replayed_caches
from pipeline.inspect.command import inspect_worst
from pipeline.rounds import rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from pipeline.single_stage import run_stage
from stages.filtering import RolloutFilter
from stages.given import ended, given_batch
from stages.prompts import prompts_of, round_prompts, selected_rows
from stages.recipes import is_given, is_unscored, unscored_recipe
from stages.score import ScoreWorker, unscored
from stages.step import Silent, Stage
from stages.train_data import BatchPlan, step_batches
from stages.workers import Role, WorkerSettings
from tests.conftest import MODELS, Command, reports_of, run, small_config, summary_of
from tests.test_codecs import random_scores, rollouts_of

STUDENT = MODELS / "ledger-student"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORT = ("evaluation=null", "held_out_prompts=0", "rollouts.window.tokens=24")


def problems(folder: Path, *, every: int = 1, count: int = 32) -> str:
    """A file of ledger problems, every so many with a solution; the setting that names it."""
    path = folder / "problems.jsonl"
    lines = [
        {"prompt": p.question, "answer": p.answer, "solution": None if n % every else p.solution}
        for n, p in enumerate(make_problems(count=count, seed=11))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (
        f"prompts={{kind: jsonl, path: {path}, answer_field: answer, completion_field: solution, "
        'template: {kind: raw, text: "{prompt}\\n", bos: always}}'
    )


def test_a_part_of_a_round_is_given_and_the_rest_is_the_students_own() -> None:
    answered = [row % 3 > 0 for row in range(40)]
    for index in range(4):
        whole = selected_rows(round_prompts(seed=5, round_index=index, per_round=10), 40)
        parts = {
            part: selected_rows(
                round_prompts(
                    seed=5,
                    round_index=index,
                    per_round=10,
                    given={"rows": 4, "by": "rows", "part": part},
                ),
                40,
                lambda rows: [answered[row] for row in rows],
            )
            for part in ("own", "given")
        }
        assert sorted([*parts["own"], *parts["given"]]) == sorted(whole)
        assert len(parts["given"]) == 4
        assert all(answered[row] for row in parts["given"])


def test_a_completion_ends_with_its_first_terminator() -> None:
    assert ended(np.array([4, 5]), [2, 3], 2).tolist() == [4, 5, 2]
    assert ended(np.array([4, 3, 9]), [2, 3], 2).tolist() == [4, 3]


def test_ids_are_those_of_the_chat_template_behind_the_prompts() -> None:
    tokenizer: Any = open_tokenizer(STUDENT)
    tokenizer.chat_template = CHAT
    renderer = Renderer(ChatTemplate(), tokenizer)
    prompt = Prompt(prompt_id="a", text="12+3", answer=None)
    turns = [{"role": "user", "content": "12+3"}, {"role": "assistant", "content": "so 15."}]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    ids = renderer.completion_ids(prompt, "so 15.").tolist()
    assert [*renderer.ids(prompt), *ids] == whole
    assert ids[-1] == tokenizer.eos_token_id
    with pytest.raises(UserError, match="spells '<eos>'"):
        renderer.completion_ids(prompt, "so<eos> 15.")


def test_the_answer_that_ends_messages_is_given(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "12+3"}, {"role": "assistant", "content": "so 15."}]
    rows = [said, said[:1], [*said, said[0], {"role": "assistant", "content": "again 15."}]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    template = ChatTemplate(final_answer="given")
    source = FilePrompts(kind="jsonl", path=path, template=template)
    tokenizer: Any = open_tokenizer(STUDENT)
    tokenizer.chat_template = CHAT
    table = prompts_table(source, tokenizer)
    found = [[tokenizer.decode(ids) for ids in each] for each in table["completions"].to_pylist()]
    assert found == [["so 15.<eos>"], [], ["again 15.<eos>"]]
    prompts = [tokenizer.decode(ids) for ids in table["prompt_ids"].to_pylist()]
    assert prompts[0] == prompts[1]
    assert prompts[2].endswith("so 15.<eos><user>12+3<eos><assistant>")


def test_a_template_that_does_not_mark_the_assistants_turn_is_refused() -> None:
    tokenizer: Any = open_tokenizer(STUDENT)
    tokenizer.chat_template = CHAT.replace("<assistant>{%", "<assistant><think>{%")
    renderer = Renderer(ChatTemplate(), tokenizer)
    with pytest.raises(UserError, match="does not mark where the assistant's turn begins"):
        renderer.completion_ids(Prompt(prompt_id="a", text="12+3", answer=None), "15.")


def test_ids_of_raw_text_go_on_from_the_prompts() -> None:
    renderer = Renderer(RawTemplate(text="{prompt}\n", bos="always"), open_tokenizer(STUDENT))
    problem = make_problems(count=1, seed=3)[0]
    prompt = Prompt(prompt_id="a", text=problem.question, answer=None)
    ids = renderer.completion_ids(prompt, problem.solution)
    assert open_tokenizer(STUDENT).decode(ids.tolist()) == problem.solution


def test_a_round_of_both_kinds_scores_and_trains_them(tmp_path: Path) -> None:
    share = (
        "rollouts.given_share=0.25",
        "train.given_objective={kind: bucket, direction: forward}",
    )
    config = small_config(tmp_path, *SHORT, problems(tmp_path, every=2), *share)
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    reports = reports_of(RunFolder(tmp_path / "run"))
    store = Store(config.store)
    assert [[c["origin"] for c in r["caches"]] for r in reports] == [["given", "fresh"]] * 2
    for report in reports:
        given, own = report["caches"]
        batches = [
            rollouts_batch(artifact.read_unit(unit))
            for artifact in [store.by_fingerprint("rollouts", given["rollouts"])]
            for unit in artifact.units()
        ]
        solutions = {p.question: p.solution for p in make_problems(count=32, seed=11)}
        tokenizer = open_tokenizer(STUDENT)
        for batch in batches:
            for prompt, ids in zip(batch.prompt_ids, batch.completion_ids, strict=True):
                question = tokenizer.decode(prompt, skip_special_tokens=True).removesuffix("\n")
                assert solutions[question].startswith(tokenizer.decode(ids))
        assert sum(map(len, batches)) == 2
        scores = store.by_fingerprint("scores", given["scores"])
        assert len(ScoredRows([(store.by_fingerprint("rollouts", given["rollouts"]), scores)])) == 2
        assert report["rows"] == 8
        sampled = store.by_fingerprint("rollouts", own["rollouts"])
        tokens = sum(c.counts["completion_tokens"] for c in sampled.commits().values())
        assert report["tokens"]["generated"] == tokens
        assert report["tokens"]["teacher_scored"] > tokens
        assert report["epochs"][0]["given_loss"] > 0
        assert report["trained_share"] == pytest.approx(1.0)
    assert summary["finished"]


@pytest.mark.slow
def test_stages_one_by_one_come_to_the_same_policy(tmp_path: Path) -> None:
    """Also where units outlive their policy: those of the student, beside new given ones."""
    settings = (
        *SHORT,
        problems(tmp_path),
        "rollouts.given_share=0.5",
        "rollouts.given_by=teacher",
        "staleness.max_policies=1",
        "staleness.policy_drift=5",
    )
    whole = small_config(tmp_path / "a", *settings)
    summary = run(whole, RunFolder(tmp_path / "a" / "run"), Silent())
    parts, folder = small_config(tmp_path / "b", *settings), RunFolder(tmp_path / "b" / "run")
    stages: list[tuple[Stage, Role]] = [
        ("generate", "student"),
        ("generate", "teacher"),
        ("score", "student"),
        ("train", "student"),
    ]
    for index in range(2):
        for stage, author in stages:
            run_stage(stage, parts, folder, round_index=index, progress=Silent(), author=author)
    found = summary_of(folder)
    assert [p["weights_sha256"] for p in found["policies"]] == [
        p["weights_sha256"] for p in summary["policies"]
    ]
    assert [c["origin"] for c in found["caches"][1]] == ["given", "kept"]


@pytest.mark.parametrize("stage", ["score", "train"])
def test_the_command_to_run_first_says_who_writes(tmp_path: Path, stage: Stage) -> None:
    config = small_config(tmp_path, *SHORT, "rollouts.given_share=0.5", "rollouts.given_by=teacher")
    with pytest.raises(UserError, match=r"run generate --by teacher --round 0 first"):
        run_stage(stage, config, RunFolder(tmp_path / "run"), round_index=0, progress=Silent())


def test_cross_entropy_asks_no_teacher(tmp_path: Path) -> None:
    settings = ("rollouts.given_share=1", "train.objective={kind: ce}")
    config = small_config(tmp_path, *SHORT, problems(tmp_path), *settings)
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    assert summary["tokens"]["teacher_scored"] == summary["tokens"]["generated"] == 0
    first, last = reports_of(RunFolder(tmp_path / "run"))
    assert first["caches"][0]["origin"] == "given"
    assert last["epochs"][-1]["loss"] < first["epochs"][0]["loss"]
    assert first["epochs"][0]["policy_drift"] == 0
    store = Store(config.store)
    scores = store.by_fingerprint("scores", first["caches"][0]["scores"])
    assert is_unscored(scores.recipe)
    assert is_given(store.by_fingerprint("rollouts", first["caches"][0]["rollouts"]).recipe)


class ServedEngine(CheckedEngine):
    """Of a teacher that a worker holds since the rounds before."""

    noise = 0.25


class HoldingWorker(ScoreWorker):
    """One whose engine is open."""

    def noise_of(self, recipe: Recipe) -> float | None:
        self._engine = ServedEngine()  # pyright: ignore[reportAbstractUsage]
        scores = random_scores([2], top_k=2, vocabulary=8, forced=0, seed=0)
        return self._errors(recipe, unscored(rollouts_of(scores)))["teacher_noise"]


def test_rollouts_that_nobody_drew_have_no_worst_reverse_kl(tmp_path: Path) -> None:
    settings = ("rollouts.given_share=1", "train.objective={kind: ce}", "rounds=1")
    config = small_config(tmp_path, *SHORT, problems(tmp_path), *settings)
    folder = RunFolder(tmp_path / "run")
    run(config, folder, Silent())
    with pytest.raises(UserError, match=r"round 0 are given, .*choose --by teacher_nll"):
        inspect_worst(folder, config, round_index=0, count=3)
    assert len(inspect_worst(folder, config, round_index=0, count=3, by="teacher_nll")) == 3


def test_rows_that_no_teacher_was_asked_of_have_no_noise_of_one(tmp_path: Path) -> None:
    recipe = unscored_recipe(rollouts="0" * 64, keep=None)
    asked = replace(recipe, inputs={**recipe.inputs, "teacher": "1" * 64})
    worker = HoldingWorker(WorkerSettings(store=str(tmp_path)))
    assert worker.noise_of(recipe) is None
    assert worker.noise_of(asked) == 0.25


def test_a_replay_of_given_rows_needs_an_objective_for_them(tmp_path: Path) -> None:
    settings = ("rollouts.given_share=1", "train.objective={kind: ce}", "rounds=1")
    config = small_config(tmp_path, *SHORT, problems(tmp_path), *settings)
    run(config, RunFolder(tmp_path / "run"), Silent())
    again = (*SHORT, problems(tmp_path), "rounds=1", f"replay.run={tmp_path / 'run'}")
    for objective, words in (
        ("sampled_pg", "needs draws of the student"),
        ("bucket", "has no teacher's scores"),
    ):
        other = small_config(tmp_path, *again, f"train.objective={{kind: {objective}}}")
        with pytest.raises(UserError, match=words):
            run(other, RunFolder(tmp_path / objective), Silent())
    same = small_config(tmp_path, *again, "train.objective={kind: ce}")
    summary = run(same, RunFolder(tmp_path / "replay"), Silent())
    first = summary_of(RunFolder(tmp_path / "run"))
    assert summary["policies"][1]["weights_sha256"] == first["policies"][1]["weights_sha256"]


def test_inspect_says_that_a_row_is_not_the_students(tmp_path: Path, opd_stream: Command) -> None:
    settings = ("rollouts.given_share=0.5", "rounds=1")
    config = small_config(tmp_path, *SHORT, problems(tmp_path), *settings)
    run(config, RunFolder(tmp_path / "run"), Silent())
    (report,) = reports_of(RunFolder(tmp_path / "run"))
    artifact = Store(config.store).by_fingerprint("rollouts", report["caches"][0]["rollouts"])
    name = rollouts_batch(artifact.read_unit(0)).prompt_id[0]
    where = ("inspect", str(tmp_path / "run"), "--round", "0")
    _, shown, _ = opd_stream(*where, "--prompt", name)
    assert "given, not the student's" in shown
    assert "teacher_nll" in shown
    _, worst, _ = opd_stream(*where, "--worst", "9")
    assert worst.count("--cache 1") == 4
    assert "--cache 0" not in worst
    scores = f"scores/{report['caches'][0]['scores'][:16]}"
    code, _, said = opd_stream("cache", "residual", config.store, scores)
    assert code == 2
    assert "is of given rollouts" in said


def test_the_loss_of_cross_entropy_is_that_of_the_completion() -> None:
    logprobs = torch.randn(5).abs().neg().requires_grad_()
    inputs = ObjectiveInputs(
        student_logprobs_N=logprobs,
        student_top_logprobs_NK=torch.zeros(5, 0),
        teacher_top_logprobs_NK=torch.zeros(5, 0),
        teacher_tail_logprobs_N=torch.zeros(5),
        behavior_logprobs_N=torch.zeros(5),
        reverse_kl_N=torch.zeros(5),
        sampled_in_top_N=torch.zeros(5, dtype=torch.bool),
    )
    losses = CrossEntropy().token_losses(inputs)
    losses.sum().backward()
    assert torch.equal(losses, -logprobs)
    assert torch.equal(logprobs.grad, torch.full((5,), -1.0))  # pyright: ignore


def test_the_teacher_writes_and_the_best_are_kept(tmp_path: Path) -> None:
    settings = (
        "rollouts.given_share=0.5",
        "rollouts.given_by=teacher",
        "rollouts.samples_per_prompt=2",
        "rollouts.keep={min_tokens: 2, per_prompt: 1}",
        "train.given_objective={kind: ce}",
    )
    config = small_config(tmp_path, *SHORT, "rounds=1", *settings)
    run(config, RunFolder(tmp_path / "run"), Silent())
    (report,) = reports_of(RunFolder(tmp_path / "run"))
    given, own = report["caches"]
    assert (given["origin"], own["origin"]) == ("given", "fresh")
    assert report["dropped_rows"] == {"per_prompt": 8}
    recipe = Store(config.store).by_fingerprint("rollouts", given["rollouts"]).recipe
    setup = open_setup(config)
    assert setup.teacher is not None
    assert recipe.inputs["student"] == setup.teacher.identity.fingerprint
    assert report["tokens"]["generated"] > report["tokens"]["teacher_scored"]


def test_rows_are_what_a_config_without_given_ones_has(tmp_path: Path) -> None:
    """The names of the artifacts of a round do not know that there could be given ones."""
    plain = small_config(tmp_path)
    setup = open_setup(plain)
    recipe = next(rounds(setup)).caches[0].rollouts.artifact.recipe
    assert set(recipe.settings["selection"]) == {"order", "seed", "round", "per_round"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"solution": "   "}], "holds an empty completion"),
        ([{"solution": 3.5, "prompt": None}], "is null"),
        ([{"solution": {"a": 1}}], "expected text, a number or a list"),
        ([{"solution": None}], "0 of the 8 prompts of round 0 have a completion"),
        ([{"solution": "so 15. " * 2000}], "the student reads"),
    ],
    ids=["empty", "prompt", "object", "none", "long"],
)
def test_completions_that_cannot_be_used_are_refused_before_work(
    lines: list[dict[str, Any]], words: str, tmp_path: Path
) -> None:
    setting = problems(tmp_path, count=8)
    path = tmp_path / "problems.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, **lines[0]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config(tmp_path, *SHORT, setting, "rollouts.given_share=0.5")
    with pytest.raises(UserError, match=words) as caught:
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "store").glob("rollouts/*"))


def row_of(cache: int, tokens: int) -> ScoredRow:
    halves = np.full((tokens, 2), np.log(0.5), np.float32)
    return ScoredRow(
        prompt_id=f"{cache}-{tokens}",
        sample_index=0,
        prompt_ids=np.array([5, 6]),
        completion_ids=np.full(tokens, 3),
        behavior_logprobs=np.full(tokens, -0.5, np.float32),
        loss_mask=None,
        finish_reason="stop",
        teacher_logprobs=halves[:, 0],
        teacher_top_ids=np.tile(np.array([3, 4], np.uint32), (tokens, 1)),
        teacher_top_logprobs=halves,
        teacher_tail_logprobs=np.full(tokens, -np.inf, np.float32),
        teacher_forced_logprobs=np.zeros((tokens, 0), np.float32),
        candidate_ids=None,
        candidate_behavior_logprobs=None,
        candidate_teacher_logprobs=None,
        terminators=((), ()),
        cache=cache,
    )


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_batch_has_rows_of_one_kind_and_the_step_is_one_mean(processes: int) -> None:
    rows = [row_of(number % 3 // 2, 3 + number) for number in range(7)]
    plan = BatchPlan(
        rows_per_step=7,
        tokens_per_microbatch=24,
        seed=0,
        first_step=0,
        window=FixedWindow(tokens=64),
        given=(False, True),
    )
    found = [
        batch
        for rank in range(processes)
        for batch in step_batches(rows, plan, 0, rank=rank, world_size=processes)
    ]
    counted = [batch for batch in found if bool(batch.weights_N.any())]
    names = sorted(name for batch in counted for name in batch.names)
    assert names == sorted(f"{row.prompt_id}/0" for row in rows)
    assert sum(float(batch.weights_N.sum()) for batch in counted) == pytest.approx(1.0)
    for batch in counted:
        assert {name[0] for name in batch.names} == ({"1"} if batch.is_given else {"0"})


def sums_of(batch: Batch) -> dict[str, float]:
    """Of the bucket, under a random student."""
    shape = (*batch.input_ids_BL.shape, 4)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    head = OutputHead(weight_VH=weight, bias_V=None)
    return named(batch_loss(hidden, head, batch, (Bucket(),)).sums)


def test_a_row_that_fills_up_a_process_is_not_read() -> None:
    """Counts of tokens, from which operations follow, are those of one process."""
    rows = [row_of(0, 3 + number) for number in range(2)]
    plan = BatchPlan(
        rows_per_step=2,
        tokens_per_microbatch=64,
        seed=0,
        first_step=0,
        window=FixedWindow(tokens=64),
    )
    (alone,) = step_batches(rows, plan, 0)
    three = [b for rank in range(3) for b in step_batches(rows, plan, 0, rank=rank, world_size=3)]
    assert len(three) == 3
    for name in ("tokens", "row_tokens", "row_pairs"):
        assert sum(sums_of(batch)[name] for batch in three) == sums_of(alone)[name] > 0


def test_given_tokens_move_no_drift() -> None:
    def sums(rows: list[ScoredRow]) -> dict[str, float]:
        return sums_of(collate(rows, window_tokens=64, given=(False, True)))

    own, given = sums([row_of(0, 5)]), sums([row_of(1, 5)])
    assert given["loss"] == own["loss"] == given["given_loss"] > 0
    assert given["tokens"] == given["given_tokens"] == 5
    assert own["given_tokens"] == 0
    both = {name: own[name] + given[name] for name in own}
    assert means(both)["policy_drift"] == means(own)["policy_drift"] > 0
    assert means(both)["reverse_kl"] == means(own)["reverse_kl"]
    assert means(both)["given_loss"] == means(own)["loss"]
    assert "given_loss" not in means(own)
    assert DriftSums().tokens == means(given)["policy_drift"] == 0


def test_a_chat_template_without_the_students_terminator_is_refused(tmp_path: Path) -> None:
    setting = problems(tmp_path, count=8)
    (tmp_path / "chat.jinja").write_text(CHAT.replace("<eos>", "|"))
    chat = f"prompts.template={{kind: chat, file: {tmp_path / 'chat.jinja'}}}"
    shared = (*SHORT, setting, chat, "rollouts.given_share=0.5")
    with pytest.raises(UserError, match="with no terminator of the student"):
        open_setup(small_config(tmp_path, *shared))
    (tmp_path / "chat.jinja").write_text(CHAT)
    setup = open_setup(small_config(tmp_path, *shared))
    given, own = (cache.rollouts.artifact.recipe for cache in next(rounds(setup)).caches)
    batch = given_batch(prompts_of(setup.store, given), given)
    assert len(batch) == 4
    assert not set(batch.prompt_id) & set(prompts_of(setup.store, own)["prompt_id"].to_pylist())
    assert batch.finish_reason == ("length",) * 4
    longer = Recipe(
        kind="rollouts", settings={**given.settings, "window_tokens": 500}, inputs=given.inputs
    )
    whole = given_batch(prompts_of(setup.store, given), longer)
    assert whole.finish_reason == ("stop",) * 4
    assert all(ids[-1] in setup.vocabulary.stop_ids for ids in whole.completion_ids)


def test_what_is_left_out_of_the_teachers_rows_is_read_with_the_students_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    class Heard(RolloutFilter):
        def __init__(self, scores: Recipe, folder: Path) -> None:
            folders.append(folder)
            super().__init__(scores, folder)

    monkeypatch.setattr("stages.score.RolloutFilter", Heard)
    settings = ("rollouts.given_share=1", "rollouts.given_by=teacher", "train.objective={kind: ce}")
    config = small_config(tmp_path, *SHORT, "rounds=1", *settings, "rollouts.keep={min_tokens: 1}")
    run(config, RunFolder(tmp_path / "run"), Silent())
    assert [each.name for each in folders] == [STUDENT.name]


def test_a_replay_reads_given_rows_that_each_policy_scored(tmp_path: Path) -> None:
    own = ("rollouts.given_share=0.5", f"teacher.path={STUDENT}", "teacher.follows_student=yes")
    view = r'teacher.view="{solution}\n{prompt}"'
    settings = (*SHORT, problems(tmp_path), *own, view)
    run(small_config(tmp_path, *settings), RunFolder(tmp_path / "run"), Silent())
    replay = small_config(tmp_path, *settings, f"replay.run={tmp_path / 'run'}")
    found = replayed_caches(open_setup(replay))
    assert found is not None
    assert [[cache.is_given for cache in caches] for caches in found] == [[True, False]] * 2
