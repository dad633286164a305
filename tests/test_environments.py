"""Rollouts of several turns: an environment answers, and only the student's tokens count."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.engines.fake_engine import FakeEngine
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.environments import Asked, Environment, environment_recipe, open_environment
from opd_stream.errors import UserError
from opd_stream.filters import Keep, dropped_rows
from opd_stream.messages import turns_text
from opd_stream.rendering import ChatTemplate
from opd_stream.store import Store, open_scores
from opd_stream.store.shards import PROMPTS, id_lists, prompts_batch, rollouts_batch
from opd_stream.store.verification import damages
from opd_stream.types import RolloutBatch, last_turn
from opd_stream.weighting import own_tokens
from pipeline.inspect.command import open_reader
from pipeline.inspect.view import LocatedRow
from pipeline.run_folder import RunFolder
from stages.filtering import chosen_rows
from stages.step import Silent
from stages.trajectories import Trajectories, prompt_of, trajectories_recipe
from tests.conftest import Command, SmallRuns, reports_of, run, small_config
from tests.test_trajectories import CHATML, STUDENT, THINKING, student_tokenizer

EOS = 1


# Environments as a user writes them; each is named by its import path.


def talk(messages: list[dict[str, Any]], reference: str | None, *, say: str = "GO ON") -> Any:
    """Always goes on, with what it was told and how many turns there were."""
    return [{"role": "user", "content": f"{say} {len(messages)}"}]


def mutate(messages: list[dict[str, Any]], reference: str | None) -> Any:
    messages[-1]["content"] = "SOMETHING ELSE"
    return [{"role": "tool", "content": "DONE"}]


def stop(messages: list[dict[str, Any]], reference: str | None) -> Any:
    return None


def fail(messages: list[dict[str, Any]], reference: str | None) -> Any:
    raise ValueError("no\nsuch tool")


def leave(messages: list[dict[str, Any]], reference: str | None) -> Any:
    raise SystemExit(3)


def hang(messages: list[dict[str, Any]], reference: str | None) -> Any:
    threading.Event().wait()


def nonsense(messages: list[dict[str, Any]], reference: str | None, value: Any = 3) -> Any:
    return value


def of(kind: str, **settings: Any) -> Environment:
    return Environment.model_validate({"kind": f"tests.test_environments:{kind}", **settings})


def trajectories(environment: Environment, template: str = CHATML) -> Trajectories:
    recipe = trajectories_recipe(environment, ChatTemplate())
    return Trajectories(
        recipe, stop_ids=(EOS,), tokenizer=student_tokenizer(template), placed=environment
    )


def prompts(names: Sequence[str]) -> pa.Table:
    tokenizer = student_tokenizer()
    turns = [[{"role": "user", "content": f"HELLO {name}"}] for name in names]
    ids = [
        tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False)
        for each in turns
    ]
    texts = [f"HELLO {name}" for name in names]
    columns = [
        pa.array(names, pa.string()),
        id_lists([np.array(each, np.int64) for each in ids]),
        pa.array(texts, pa.string()),
        pa.array(["7"] * len(names), pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=PROMPTS)


ENGINES = {
    "fake": lambda: FakeEngine(STUDENT, vocab_size=606),
    "transformers": lambda: TransformersEngine(STUDENT, dtype="float32", batch_rows=4),
}
SETTINGS = SamplingSettings(window_tokens=120, stop_ids=(EOS,), seed=5, vocabulary=606)


class Stopping(FakeEngine):
    """Ends a turn after a few tokens."""

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._logprobs_VV[:, EOS] = np.log(0.3)
        rest = np.delete(np.arange(self._vocab_size), EOS)
        norm = np.logaddexp.reduce(self._logprobs_VV[:, rest], axis=1, keepdims=True)
        self._logprobs_VV[:, rest] += np.log(0.7) - norm


def stopping() -> Stopping:
    return Stopping(STUDENT, vocab_size=606)


def sampled(
    environment: Environment,
    names: Sequence[str] = ("a", "b", "c"),
    engine: Any = None,
    **changes: Any,
) -> RolloutBatch:
    return trajectories(environment).sample(
        engine or stopping(), prompts(names), replace(SETTINGS, **changes), samples_per_prompt=2
    )


def turns_in(batch: RolloutBatch, row: int) -> list[tuple[bool, list[int]]]:
    """Stretches of a row: whether the student wrote it, and its ids."""
    own, ids = batch.own_tokens(row), batch.completion_ids[row]
    ends = [*(np.flatnonzero(own[1:] != own[:-1]) + 1).tolist(), len(ids)]
    starts = [0, *ends[:-1]]
    return [(bool(own[a]), ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def test_turns_of_others_are_the_templates_and_the_students_stay_as_drawn() -> None:
    tokenizer, batch = student_tokenizer(), sampled(of("talk", max_turns=4))
    assert batch.loss_mask is not None
    for row in range(len(batch)):
        parts = turns_in(batch, row)
        assert [is_own for is_own, _ in parts] == [n % 2 == 0 for n in range(len(parts))]
        said = 2
        for is_own, ids in parts:
            if is_own:
                continue
            text = f"\n<bos>user\nGO ON {said}<eos>\n<bos>assistant\n"
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
            said += 2
        for _, ids in parts[:-1:2]:
            assert ids[-1] == EOS
            assert EOS not in ids[:-1]
        own = batch.own_tokens(row)
        assert (batch.behavior_logprobs[row][~own] == 0).all()
        assert (batch.behavior_logprobs[row][own] < 0).all()
        assert own[-1]


def test_a_trajectory_is_a_function_of_its_own_row_alone() -> None:
    whole, alone = sampled(of("talk")), sampled(of("talk"), ["b"])
    same = chosen_rows(whole, [2, 3])
    for name in ("completion_ids", "behavior_logprobs", "loss_mask"):
        for one, other in zip(getattr(same, name), getattr(alone, name), strict=True):
            np.testing.assert_array_equal(one, other)
    assert same.finish_reason == alone.finish_reason


def test_window_and_turns_are_limits() -> None:
    for window, most in ((60, 8), (120, 2), (400, 3), (14, 8)):
        batch = sampled(of("talk", max_turns=most), window_tokens=window)
        for row in range(len(batch)):
            own = [ids for is_own, ids in turns_in(batch, row) if is_own]
            assert len(own) <= most
            assert len(batch.completion_ids[row]) <= window
            is_whole = len(own) == most and own[-1][-1] == EOS
            assert batch.finish_reason[row] == ("stop" if is_whole else "length")


def test_a_longer_window_goes_on_from_the_same_turns() -> None:
    short, long = (sampled(of("talk"), window_tokens=window) for window in (60, 90))
    for row in range(len(short)):
        length = len(short.completion_ids[row])
        np.testing.assert_array_equal(short.completion_ids[row], long.completion_ids[row][:length])


def test_an_environment_that_ends_leaves_one_turn() -> None:
    batch = sampled(of("stop"))
    plain = stopping().sample(prompts_batch(prompts("abc")), SETTINGS, samples_per_prompt=2)
    for row in range(len(batch)):
        np.testing.assert_array_equal(batch.completion_ids[row], plain.completion_ids[row])
        assert batch.own_tokens(row).all()
    assert batch.finish_reason == plain.finish_reason


def test_an_environment_cannot_change_what_was_said() -> None:
    asked = Asked("a", 0, 1, [{"role": "assistant", "content": "a"}], None)
    (found,) = open_environment(of("mutate")).answers([asked])
    assert found == ({"role": "tool", "content": "DONE"},)
    assert asked.messages[-1]["content"] == "a"


def test_calls_at_once_answer_in_order() -> None:
    asked = [
        Asked(str(n), 0, 1, [{"role": "assistant", "content": "a"}] * n, None) for n in range(1, 8)
    ]
    one, many = (open_environment(of("talk", at_once=n)).answers(asked) for n in (1, 3))
    assert one == many


@pytest.mark.parametrize("name", ENGINES)
def test_what_the_student_drew_has_the_log_probability_that_scoring_gives(name: str) -> None:
    engine = ENGINES[name]()
    batch = sampled(of("talk", max_turns=3), engine=engine, window_tokens=200, student_top_k=3)
    scored = engine.score(batch, ScoringSettings(top_k=2))
    for row in range(len(batch)):
        own = batch.own_tokens(row)
        np.testing.assert_allclose(
            batch.behavior_logprobs[row][own], scored.teacher_logprobs[row][own], atol=2e-4
        )
        assert batch.student_top_ids is not None
        assert batch.student_top_ids[row].shape == (len(own), 3)


def test_the_last_turn_is_what_is_judged() -> None:
    batch = sampled(of("talk"))
    for row in range(len(batch)):
        assert batch.answer_ids(row).tolist() == turns_in(batch, row)[-1][1]
    assert last_turn(np.zeros(3, np.bool_)) == slice(0, 0)


# What is refused


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (of("fail"), "raised ValueError: no such tool; mend"),
        (of("leave"), "raised SystemExit: 3; mend"),
        (of("hang", seconds=0.05), "took longer than 0.05 s; .*raise rollouts.environment.seconds"),
        (of("nonsense"), "returned 3; expected a list of turns"),
        (of("nonsense", options={"value": {"role": "user"}}), "returned {'role': 'user'}"),
        (of("nonsense", options={"value": [1]}), "is no list of messages"),
        (of("nonsense", options={"value": [{"role": "user"}]}), "turn 0 has no content"),
        (
            of("nonsense", options={"value": [{"role": "assistant", "content": "a"}]}),
            "returned an assistant's turn",
        ),
        (of("talk", options={"no": 1}), "raised TypeError: .*unexpected keyword argument 'no'"),
    ],
)
def test_an_environment_that_fails_is_one_line(environment: Environment, words: str) -> None:
    asked = Asked("row-3", 1, 2, [{"role": "assistant", "content": "a"}], None)
    with pytest.raises(UserError, match=words) as error:
        open_environment(environment).answers([asked])
    assert "\n" not in str(error.value)
    assert f"environment {environment.kind} on prompt 'row-3', sample 1, turn 2" in str(error.value)


def test_a_turn_that_spells_control_tokens_is_one_line() -> None:
    value = [{"role": "tool", "content": "a<eos>b"}]
    environment = of("nonsense", options={"value": value})
    with pytest.raises(UserError, match="prompt 'a': the tool turn 'a<eos>b' spells '<eos>'"):
        trajectories(environment).try_out(prompts("a"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (THINKING, "the chat template writes '<think>"),
        (CHATML.replace("<eos>", "<end>"), r"ends the assistant's turn with .*<end>.*'<eos>'"),
        (CHATML.replace("{% if add", "{% if messages | length < 3 and add"), "the chat template"),
    ],
)
def test_a_template_that_no_turn_can_follow_is_refused_before_work(
    template: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        trajectories(of("talk"), template).try_out(prompts("a"))
    assert "\n" not in str(error.value)


def test_another_function_is_another_recipe() -> None:
    recipe = environment_recipe(of("talk", options={"say": "X"}, seconds=3, at_once=2))
    assert recipe["options"] == {"say": "X"}
    assert "sha256" in recipe
    assert not {"seconds", "at_once"} & {*recipe}
    whole = trajectories_recipe(of("talk"), ChatTemplate())
    with pytest.raises(UserError, match="differs on this machine in sha256"):
        Trajectories(
            {**whole, "sha256": "0"}, stop_ids=(EOS,), tokenizer=student_tokenizer(), placed=None
        )


def test_messages_of_a_prompts_text_are_read_again() -> None:
    turns = ({"role": "system", "content": "Ä"}, {"role": "user", "content": "[{"})
    assert prompt_of("a", turns_text(turns)).turns == turns
    for text in ("[{", '[{"role": "user"}]', '[{"a": 1}]', "Hello"):
        found = prompt_of("a", text)
        assert found.text == text
        assert found.turns is None or turns_text(found.turns) == text


def test_a_filter_counts_the_students_tokens() -> None:
    batch = sampled(of("talk"))
    own = [int(batch.own_tokens(row).sum()) for row in range(len(batch))]
    most = min(len(ids) for ids in batch.completion_ids)
    assert most > max(own)
    assert dropped_rows(Keep(max_tokens=most - 1), batch) == {}
    assert len(dropped_rows(Keep(min_tokens=max(own) + 1), batch)) == len(batch)


def test_scoring_reads_a_trajectory_of_eight_turns_once() -> None:
    engine = TransformersEngine(STUDENT, dtype="float32", batch_rows=1)
    ids = np.arange(3, 403, dtype=np.int64)
    mask = np.arange(len(ids)) % 50 < 30  # eight turns of the student
    batch = RolloutBatch(
        prompt_id=("a",),
        sample_index=np.zeros(1, np.int32),
        prompt_ids=(ids[:10],),
        completion_ids=(ids,),
        behavior_logprobs=(np.zeros(len(ids), np.float32),),
        finish_reason=("stop",),
        loss_mask=(mask,),
    )
    read: list[int] = []
    model: Any = engine._model
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[:2].numel()))
    engine.score(batch, ScoringSettings(top_k=2))
    assert sum(read) <= 1.1 * (10 + len(ids))


# Whole runs: the student writes lines, and a newline ends its turn

TEMPLATE = f"{{kind: chat, file: {Path(__file__).parent / 'lines.jinja'}, control_tokens: allow}}"
TALKING = (
    f"prompts.template={TEMPLATE}",
    f"evaluation.prompts.template={TEMPLATE}",
    "evaluation.max_new_tokens=60",
    'rollouts.stop_tokens=["\\n"]',
    "rollouts.window.tokens=90",
    "rollouts.environment={kind: 'tests.test_environments:talk', max_turns: 3}",
    "rounds=1",
)


@pytest.fixture
def talked(small_runs: SmallRuns) -> Path:
    """The folder of a finished run of trajectories: to read."""
    return small_runs(*TALKING)


def units_of(store: Store) -> list[tuple[Any, RolloutBatch]]:
    """Commit records of all rollouts, each with its batch."""
    artifacts = [store.artifact(recipe) for recipe in store.recipes("rollouts")]
    return [
        (commit, rollouts_batch(artifact.read_unit(unit)))
        for artifact in artifacts
        for unit, commit in artifact.commits().items()
    ]


def test_a_run_counts_the_students_tokens(talked: Path) -> None:
    store, several = Store(talked / "store"), 0
    for commit, batch in units_of(store):
        assert batch.loss_mask is not None
        own = sum(int(mask.sum()) for mask in batch.loss_mask)
        assert commit.counts["completion_tokens"] == own
        assert commit.counts["context_tokens"] == batch.completion_tokens - own
        whole = batch.completion_tokens + sum(map(len, batch.prompt_ids))
        assert commit.counts["tokens"] == whole
        several += sum(len(turns_in(batch, row)) > 1 for row in range(len(batch)))
    assert several > 4
    (report,) = reports_of(RunFolder(talked / "run"))
    (scores,) = [store.artifact(recipe) for recipe in store.recipes("scores")]
    rows = open_scores(talked / "store" / scores.name)
    own = sum(int(own_tokens(rows[number]).sum()) for number in range(len(rows)))
    assert report["tokens"]["generated"] == report["tokens"]["teacher_scored"] == own
    assert report["tokens"]["trained"] == own * len(report["epochs"])
    assert not list(damages(store, deep=True))


def test_commands_show_what_others_said(talked: Path, opd_stream: Command, tmp_path: Path) -> None:
    store = Store(talked / "store")
    scores = next(iter(store.recipes("scores")))
    rollouts = store.by_fingerprint("rollouts", scores.inputs["rollouts"])
    name = store.artifact(scores).name
    for each in (rollouts.name, name):
        assert "of others between" in opd_stream("cache", "show", str(store.root), each)[1]
    opd_stream("cache", "export", str(store.root), name, str(tmp_path / "out"))
    found = pq.read_table(tmp_path / "out")["loss_mask"].to_pylist()
    batches = [rollouts_batch(rollouts.read_unit(unit)) for unit in rollouts.units()]
    assert found == [mask.tolist() for batch in batches for mask in batch.loss_mask or ()]
    assert opd_stream("inspect", str(talked / "run"), "--worst", "8")[0] == 0
    code, _, error = opd_stream("cache", "residual", str(store.root), name)
    assert code == 2
    assert "is of trajectories" in error


def test_tokens_of_others_have_no_student_in_inspect(talked: Path) -> None:
    folder = RunFolder(talked / "run")
    reader = open_reader(folder, folder.config(), 0, "reverse_kl")
    (cache,) = reader.caches
    rows = cache.rows()
    row = next(rows[n] for n in range(len(rows)) if not own_tokens(rows[n]).all())
    view = reader.view(LocatedRow(cache=cache, row=row), "reverse_kl")
    place = int(np.argmin(own_tokens(row)))
    assert view.student_probability(place) is None
    assert view.student_probability(0) is not None
    assert view.values[place] == 0
    assert not view.trains[place]


def flaky(messages: list[dict[str, Any]], reference: str | None, *, path: str) -> Any:
    """Fails on half of the prompts while a file is there."""
    if Path(path).exists() and len(messages) > 2:
        raise OSError("the tool is away")
    return talk(messages, reference)


def test_a_run_that_an_environment_ended_goes_on_at_the_last_unit(tmp_path: Path) -> None:
    away = tmp_path / "away"
    kind = f"{{kind: 'tests.test_environments:flaky', max_turns: 3, options: {{path: {away}}}}}"
    settings = [*TALKING, f"rollouts.environment={kind}", "evaluation=null", "held_out_prompts=0"]
    settings = [each for each in settings if not each.startswith("evaluation.")]
    config = small_config(tmp_path, *settings, "prompts_per_unit=2")
    away.touch()
    with pytest.raises(UserError, match=r"raised OSError: the tool is away") as error:
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert "flaky on prompt 'ledger-11-" in str(error.value)
    away.unlink()
    before = [commit.made_at for commit, _ in units_of(Store(tmp_path / "store"))]
    run(config, RunFolder(tmp_path / "run"), Silent())
    after = [commit.made_at for commit, _ in units_of(Store(tmp_path / "store"))]
    assert len(after) == 4
    assert {*before} <= {*after}


@pytest.mark.slow
def test_the_distance_to_the_teacher_is_that_of_the_students_tokens(tmp_path: Path) -> None:
    settings = [each for each in TALKING if not each.startswith("evaluation.")]
    few = [
        "evaluation=null",
        "held_out_prompts=4",
        "prompts_per_unit=8",
        "scores.codec={kind: hidden}",
    ]
    config = small_config(tmp_path, *settings, *few)
    run(config, RunFolder(tmp_path / "run"), Silent())
    store = Store(tmp_path / "store")
    for recipe in store.recipes("distances"):
        rollouts = store.by_fingerprint("rollouts", recipe.inputs["rollouts"])
        assert "environment" in rollouts.recipe.settings
        for unit, commit in store.artifact(recipe).commits().items():
            batch = rollouts_batch(rollouts.read_unit(unit))
            table = store.artifact(recipe).read_unit(unit)
            lengths = table["reverse_kl"].combine_chunks().value_lengths().to_pylist()
            own = [int(batch.own_tokens(row).sum()) for row in range(len(batch))]
            assert lengths == own
            assert commit.counts["completion_tokens"] == sum(own)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("prompts.template={kind: raw}", "prompts.template.kind is raw"),
        ("evaluation.prompts.template={kind: raw}", "evaluation.prompts.template.kind is raw"),
        ("rollouts.extra_draws=2", "rollouts.extra_draws is set with rollouts.environment"),
        (
            "rollouts.window={kind: adaptive, candidates: [8], max_window_tokens: 64}",
            "rollouts.window.kind=adaptive is set",
        ),
        ("scores.alignment={kind: bytes}", "scores.alignment is set with rollouts.environment"),
        ("rollouts.environment={kind: talk}", "expected calculator, or the import path"),
        ("rollouts.environment.max_turns=0", "max_turns"),
    ],
)
def test_what_cannot_be_with_an_environment_is_one_line(
    tmp_path: Path, change: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        small_config(tmp_path, *TALKING, change)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("no_such:thing", "environment function no_such:thing cannot be imported"),
        ("tests.test_environments:STUDENT", "expected a function of messages and reference"),
        ("tests.test_environments:fail", "fail on prompt 'ledger-.* raised ValueError"),
    ],
)
def test_an_environment_is_tried_before_work(tmp_path: Path, environment: str, words: str) -> None:
    config = small_config(
        tmp_path, *TALKING, f"rollouts.environment={{kind: '{environment}', seconds: 5}}"
    )
    with pytest.raises(UserError, match=words):
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert not list(Store(tmp_path / "store").recipes("rollouts"))
