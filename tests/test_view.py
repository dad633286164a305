"""A teacher that reads more than the student: a view of the row, and the policy of each round."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_stream.errors import UserError
from opd_stream.prompts import prompts_table, rendered_prompts
from opd_stream.rendering import ChatTemplate, Rendering
from opd_stream.sources import FilePrompts, read_rows, shown
from opd_stream.store.reader import ScoredRows
from pipeline.caches import Cache
from pipeline.estimate import estimate
from pipeline.rounds import named_checkpoint, rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import Setup, open_setup
from stages.prompts import prompt_ids_of
from stages.step import Silent
from tests.conftest import MODELS, SmallRuns, run, small_config
from tests.tiny_tokenizers import byte_level, random_teacher

STUDENT = MODELS / "ledger-student"
VIEW = r'teacher.view="{solution}\n{prompt}"'
OWN = (f"teacher.path={STUDENT}", VIEW, "teacher.follows_student=yes", "evaluation=null")


def rows_file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def seen(view: str, path: Path, **settings: Any) -> list[str]:
    """What a teacher reads of each row, before a template."""
    source = FilePrompts(kind="jsonl", path=path, **settings)
    found = [shown(view, source, prompt, row) for prompt, row in read_rows(source)]
    return [prompt.text if prompt.turns is None else str(prompt.turns) for prompt in found]


def caches(config_folder: Path, *overrides: str) -> tuple[Setup, list[Cache]]:
    setup = open_setup(small_config(config_folder, *overrides), make=False)
    found = rounds(setup, opened=named_checkpoint)
    return setup, [cache for each in found for cache in each.caches]


def test_a_view_reaches_the_teacher_and_never_the_student(tmp_path: Path) -> None:
    with_view, without = (
        open_setup(small_config(tmp_path, VIEW)),
        open_setup(small_config(tmp_path)),
    )
    assert with_view.prompts.fingerprint == without.prompts.fingerprint
    assert (
        with_view.prompts.read_unit(0)["prompt_ids"] == without.prompts.read_unit(0)["prompt_ids"]
    )
    assert with_view.teacher_prompts is not None
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    for students, teachers in zip(
        with_view.prompts.read_unit(0).to_pylist(),
        with_view.teacher_prompts.read_unit(0).to_pylist(),
        strict=True,
    ):
        own, read = (tokenizer.decode(each["prompt_ids"][1:]) for each in (students, teachers))
        assert "Answer:" not in own
        assert read.endswith(f"Answer: {students['answer']}\n{own}")
    ours, theirs = (next(rounds(setup)).caches[0] for setup in (with_view, without))
    assert ours.rollouts.artifact.fingerprint == theirs.rollouts.artifact.fingerprint
    assert ours.scores.artifact.fingerprint != theirs.scores.artifact.fingerprint


def test_a_view_shows_fields_of_the_row(tmp_path: Path) -> None:
    row = {"prompt": "2 + 3?", "gold": ["5", "five"], "by": {"hand": "2+3=5"}, "told": "{prompt}"}
    path = rows_file(tmp_path, row)
    assert seen("{by.hand} {told} {prompt}", path) == ["2+3=5 {prompt} 2 + 3?"]
    assert seen("{answer}", path, answer_field="gold") == ["5\nfive"]
    assert seen("{{{prompt}}} {{prompt}}", path) == ["{2 + 3?} {prompt}"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = rows_file(
        tmp_path, {"messages": [*turns, {"role": "user", "content": "c"}], "hint": "h"}
    )
    (text,) = seen("{hint}: {prompt}", path)
    assert "'a'" in text
    assert "'h: c'" in text


@pytest.mark.parametrize(
    ("view", "row", "said"),
    [
        ("{hint} {prompt}", {"prompt": "p"}, "rows.jsonl:1 has no field 'hint'; it has prompt"),
        ("{hint}", {"prompt": "p", "hint": None}, "rows.jsonl:1: field 'hint' is null"),
        ("{hint}", {"messages": [{"role": "system", "content": "s"}], "hint": "h"}, "no user's"),
    ],
)
def test_a_row_that_a_view_cannot_show_is_named(
    tmp_path: Path, view: str, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        seen(view, rows_file(tmp_path, row))


def test_what_a_view_lacks_is_one_line_before_any_work(tmp_path: Path) -> None:
    config = small_config(tmp_path, 'teacher.view="{hint} {prompt}"')
    line = "^teacher.view: problem ledger-11-0 has no field 'hint'; it has problem_id, question"
    with pytest.raises(UserError, match=line):
        open_setup(config)
    with pytest.raises(UserError, match=line):
        estimate(config, RunFolder(tmp_path / "run"))
    with pytest.raises(UserError, match=r"teacher\.view.*expected text with a field in it"):
        small_config(tmp_path, "teacher.view=Think.")
    with pytest.raises(UserError, match=r"teacher\.view.*name of a field, found '\{answer'"):
        small_config(tmp_path, 'teacher.view="{prompt} {answer"')
    with pytest.raises(UserError, match=r"a prompt has \d{4} tokens .*; the teacher reads"):
        open_setup(small_config(tmp_path, f'teacher.view="{"late " * 2000}{{prompt}}"'))


def test_control_tokens_of_a_view_are_refused(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"prompt": "p", "hint": "so <eos>"})
    source = FilePrompts(kind="jsonl", path=path)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    prompts = prompts_table(source, tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    for control, said in (("skip", "the view of 1 prompts spells"), ("refuse", "'<eos>'")):
        template = ChatTemplate(kind="chat", control_tokens=control)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"^teacher.view: .*{said}"):
            rendered_prompts(
                source, Rendering(template=template, view="{prompt} {hint}"), tokenizer, prompts
            )


def test_a_teacher_with_another_tokenizer_has_a_view_too(tmp_path: Path) -> None:
    other = random_teacher(tmp_path / "teacher", byte_level(400), stop="<eos>")
    settings = (VIEW, f"teacher.path={other}", "scores.alignment={kind: bytes}")
    setup = open_setup(small_config(tmp_path, *settings))
    assert setup.alignment is not None
    assert setup.teacher_prompts is not None
    assert setup.alignment.inputs["prompts"] == setup.teacher_prompts.fingerprint


def test_a_teacher_that_follows_the_student_is_the_policy_that_wrote_the_rollouts(
    small_runs: SmallRuns,
) -> None:
    folder = small_runs(*OWN)
    setup, found = caches(folder, *OWN)
    assert len(found) == 2
    for cache in found:
        recipe, author = cache.scores.shards.recipe, cache.rollouts.model
        assert author is not None
        assert recipe.inputs["teacher"] == cache.rollouts.shards.recipe.inputs["student"]
        model = AutoModelForCausalLM.from_pretrained(author.folder, dtype=torch.float32).eval()
        row = ScoredRows([(cache.rollouts.shards, cache.scores.shards)])[0]
        prompt = prompt_ids_of(setup.store, recipe.inputs["prompts"])[row.prompt_id].tolist()
        tokens = torch.tensor([[*prompt, *row.completion_ids.tolist()]])
        with torch.inference_mode():
            logprobs_TV = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        plain_T = logprobs_TV.gather(1, tokens[0, len(prompt) :, None])[:, 0].numpy()
        np.testing.assert_allclose(row.teacher_logprobs, plain_T, atol=2e-5)
    assert len({cache.scores.shards.recipe.inputs["teacher"] for cache in found}) == 2


def test_such_a_run_is_resumed_and_replayed(small_runs: SmallRuns, tmp_path: Path) -> None:
    folder = small_runs.copy(tmp_path / "copy", *OWN)
    _, found = caches(folder, *OWN)
    before = found[1].scores.shards.read_unit(0)
    found[1].scores.shards.invalidate(0)
    summary = run(small_config(folder, *OWN), RunFolder(folder / "run"), Silent())
    assert found[1].scores.shards.read_unit(0) == before
    for teacher in (OWN[:3], ("teacher=null",)):
        replay = (*teacher, OWN[3], f"replay.run={folder / 'run'}")
        again = run(small_config(folder, *replay), RunFolder(folder / str(len(teacher))), Silent())
        assert again["policies"] == summary["policies"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("teacher.follows_student=yes", VIEW), "which is not student.path"),
        (OWN[:1] + OWN[2:], "would read what the student reads"),
        ((*OWN[:3], "evaluation.kind=distance", "evaluation.judge=null"), "another teacher each"),
    ],
)
def test_what_a_following_teacher_cannot_be(
    tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        small_config(tmp_path, *settings)
