"""A teacher with its own rendering of the prompts: other prompt ids, scores of the same tokens."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_stream.errors import UserError
from opd_stream.store.reader import ScoredRow, ScoredRows
from pipeline.caches import Cache
from pipeline.doctor import inputs
from pipeline.doctor.subject import Subject
from pipeline.doctor.trial import cached_scores
from pipeline.inspect.command import open_reader
from pipeline.inspect.view import LocatedRow
from pipeline.rounds import named_checkpoint, rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import Setup, open_setup
from stages.prompts import prompt_ids_of
from stages.step import Silent
from tests.conftest import MODELS, run, small_config
from tests.tiny_tokenizers import byte_level, random_teacher

TEACHER = MODELS / "ledger-teacher"
SAME = 'teacher.template={kind: raw, text: "{prompt}\\n", bos: always}'
OTHER = 'teacher.template={kind: raw, text: "Anna knows it.\\n{prompt}\\n", bos: always}'
GROWING = (
    "evaluation=null",
    "staleness.max_policies=2",
    "staleness.max_epochs=1",
    "train.learning_rate=1e-4",
    "rollouts.window={kind: linear, h0: 16, delta: 16, every: 2, max_window_tokens: 32}",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, the second of which continues the rollouts of the first."""
    folder = tmp_path_factory.mktemp("finished")
    run(small_config(folder, *GROWING, OTHER), RunFolder(folder / "run"), Silent())
    return folder


def caches(folder: Path, *overrides: str) -> tuple[Setup, list[Cache]]:
    setup = open_setup(small_config(folder, *overrides), make=False)
    found = rounds(setup, opened=named_checkpoint)
    return setup, [cache for each in found for cache in each.caches]


def rows_of(cache: Cache) -> list[ScoredRow]:
    rows = ScoredRows([(cache.rollouts.shards, cache.scores.shards)])
    return [rows[number] for number in range(len(rows))]


def test_scores_are_those_of_a_plain_pass_over_the_teachers_prompt(finished: Path) -> None:
    setup, found = caches(finished, *GROWING, OTHER)
    assert [cache.origin for cache in found] == ["fresh", "extended"]
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    for cache in found:
        ids = prompt_ids_of(setup.store, cache.scores.shards.recipe.inputs["prompts"])
        for row in rows_of(cache):
            prompt = ids[row.prompt_id].tolist()
            read = tokenizer.decode(prompt, skip_special_tokens=True)
            assert read.startswith("Anna knows it.\n")
            assert read.endswith(tokenizer.decode(row.prompt_ids, skip_special_tokens=True))
            tokens = torch.tensor([[*prompt, *row.completion_ids.tolist()]])
            with torch.inference_mode():
                logprobs_TV = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            plain_T = logprobs_TV.gather(1, tokens[0, len(prompt) :, None])[:, 0].numpy()
            np.testing.assert_allclose(row.teacher_logprobs, plain_T, atol=2e-5)


def test_both_renderings_are_in_the_cache_and_rollouts_do_not_depend_on_the_teachers(
    finished: Path, tmp_path: Path
) -> None:
    setup, with_own = caches(finished, *GROWING, OTHER)
    assert setup.teacher_prompts is not None
    assert setup.teacher_prompts.recipe.inputs["prompts"] == setup.prompts.fingerprint
    assert (
        setup.teacher_prompts.read_unit(0)["prompt_id"] == (setup.prompts.read_unit(0)["prompt_id"])
    )
    without = next(rounds(open_setup(small_config(tmp_path, *GROWING), make=False))).caches[0]
    assert without.rollouts.artifact.fingerprint == with_own[0].rollouts.artifact.fingerprint
    assert "prompts" not in without.scores.shards.recipe.inputs


def test_a_teacher_with_the_students_template_has_the_same_scores(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "store", tmp_path / "store")  # its rollouts are found
    tables: list[Any] = []
    for place, template in enumerate((SAME, "teacher.template=null")):
        config = small_config(tmp_path, *GROWING, "rounds=1", template)
        run(config, RunFolder(tmp_path / f"run-{place}"), Silent())
        _, found = caches(tmp_path, *GROWING, "rounds=1", template)
        scores = found[0].scores.shards
        tables.append([scores.read_unit(unit) for unit in scores.units()])
        assert ("prompts" in scores.recipe.inputs) == (place == 0)
    assert all(one.equals(other) for one, other in zip(*tables, strict=True))


def test_a_lost_shard_of_an_extension_is_scored_again_to_the_same_bytes(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    _, found = caches(tmp_path, *GROWING, OTHER)
    before = [cache.scores.shards.read_unit(0) for cache in found]
    for cache in found:
        cache.scores.shards.invalidate(0)
    for policy in (tmp_path / "store" / "policies").iterdir():
        shutil.rmtree(policy)
    shutil.rmtree(tmp_path / "run")
    run(small_config(tmp_path, *GROWING, OTHER), RunFolder(tmp_path / "again"), Silent())
    _, found = caches(tmp_path, *GROWING, OTHER)
    assert [cache.scores.shards.read_unit(0) for cache in found] == before


def test_a_replay_trains_on_such_scores(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "store", tmp_path / "store")
    replay = (*GROWING[:1], "rounds=1", f"replay.run={finished / 'run'}", OTHER)
    run(small_config(tmp_path, *replay), RunFolder(tmp_path / "replayed"), Silent())
    assert (tmp_path / "replayed" / "summary.json").exists()


def test_doctor_scores_them_again_alike_and_inspect_shows_what_the_teacher_read(
    finished: Path,
) -> None:
    subject = Subject(config=small_config(finished, *GROWING, OTHER), quick=False)
    (compared,) = cached_scores.look(subject)
    assert compared.level == "ok", compared.found
    said = [finding.found for finding in inputs.prompts.look(subject)]
    assert any(line.startswith("teacher.template: ") for line in said)
    config = small_config(finished, *GROWING, OTHER)
    reader = open_reader(RunFolder(finished / "run"), config, 1, "reverse_kl")
    cache = reader.caches[0]
    view = reader.view(LocatedRow(cache=cache, row=cache.rows()[0]), "reverse_kl")
    assert view.teacher_prompt is not None
    assert view.teacher_prompt.removeprefix("<bos>Anna knows it.\n") == (
        view.prompt.removeprefix("<bos>")
    )


def test_a_teachers_prompt_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    text = "It is late. " * 400
    template = f"teacher.template={{kind: raw, text: '{text}{{prompt}}'}}"
    with pytest.raises(UserError, match=r"a prompt has \d{4} tokens .*; the teacher reads"):
        open_setup(small_config(tmp_path, template))


def test_a_template_that_refuses_names_the_teachers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^teacher\.template: template\.kind is chat but the tok"):
        open_setup(small_config(tmp_path, "teacher.template={kind: chat}"))
    with pytest.raises(UserError, match="control_tokens is skip, but the teacher reads every"):
        small_config(tmp_path, "teacher.template={kind: chat, control_tokens: skip}")


def test_a_teacher_with_another_tokenizer_has_its_own_rendering_too(tmp_path: Path) -> None:
    other = random_teacher(tmp_path / "teacher", byte_level(400), stop="<eos>")
    settings = (OTHER, f"teacher.path={other}", "scores.alignment={kind: bytes}")
    setup = open_setup(small_config(tmp_path, *settings))
    assert setup.alignment is not None
    assert setup.teacher_prompts is not None
    assert setup.alignment.inputs["prompts"] == setup.teacher_prompts.fingerprint
    ids = setup.teacher_prompts.read_unit(0)["prompt_ids"][0].as_py()
    assert "Anna knows it." in AutoTokenizer.from_pretrained(other).decode(ids)
