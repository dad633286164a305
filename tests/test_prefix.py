"""Rollouts that begin with tokens of others."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from opd_stream.engines.base import SamplingSettings
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.prompts import prompts_table
from opd_stream.sources import EmbeddedPrompts
from opd_stream.store.reader import open_scores
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import COMPLETIONS, prompts_batch
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.tasks.ledger import make_problems
from pipeline.run_folder import RunFolder
from stages.given import begun_batch, continued
from stages.step import Silent
from tests.conftest import MODELS, reports_of, run, small_config

STUDENT = MODELS / "ledger-student"
SOURCE = EmbeddedPrompts(kind="ledger", count=3, seed=7, solutions=True)


def recipe(**settings: object) -> Recipe:
    plain = {"seed": 5, "stop_ids": [0], "samples_per_prompt": 2, "prefix_tokens": 9}
    return Recipe(kind="rollouts", settings={**plain, **settings}, inputs={})


def test_worked_solutions_are_completions_of_embedded_prompts() -> None:
    tokenizer = open_tokenizer(STUDENT)
    table = prompts_table(SOURCE, tokenizer)
    texts = [[tokenizer.decode(ids) for ids in each] for each in table[COMPLETIONS].to_pylist()]
    assert texts == [[p.solution] for p in make_problems(count=3, seed=7)]
    assert COMPLETIONS not in prompts_table(without_solutions(), tokenizer).column_names


def without_solutions() -> EmbeddedPrompts:
    return SOURCE.model_copy(update={"solutions": False})


def test_a_beginning_that_the_student_would_have_written_changes_no_token() -> None:
    """The law of `Engine.extend`: what is continued is what would have been sampled."""
    engine = TransformersEngine(STUDENT, dtype="float32", batch_rows=4)
    prompts = prompts_table(SOURCE, open_tokenizer(STUDENT))
    settings = SamplingSettings(window_tokens=24, seed=5, stop_ids=(0,), student_top_k=3)
    own = engine.sample(prompts_batch(prompts), settings, samples_per_prompt=1)
    assert own.student_top_ids is not None
    said = pa.array(
        [[ids[:9].tolist()] for ids in own.completion_ids], pa.list_(pa.list_(pa.uint32()))
    )
    place = prompts.column_names.index(COMPLETIONS)
    told = prompts.set_column(place, COMPLETIONS, said)
    begun = begun_batch(told, recipe(samples_per_prompt=1, student_top_k=3))
    found = continued(engine, begun, settings)
    assert found.loss_mask is not None
    assert found.student_top_ids is not None
    for row in range(3):
        assert found.completion_ids[row].tolist() == own.completion_ids[row].tolist()
        assert found.loss_mask[row].tolist() == [place >= 9 for place in range(24)]
        new = slice(9, None)
        np.testing.assert_allclose(
            found.behavior_logprobs[row][new], own.behavior_logprobs[row][new], atol=1e-5
        )
        assert np.array_equal(found.student_top_ids[row][new], own.student_top_ids[row][new])


def test_a_beginning_ends_before_a_terminator_and_is_missing_where_none_is_given() -> None:
    table = pa.table(
        {
            "prompt_id": ["a", "b"],
            "prompt_ids": pa.array([[4, 5], [6]], pa.list_(pa.uint32())),
            COMPLETIONS: pa.array([[[7, 8, 0, 9]], []], pa.list_(pa.list_(pa.uint32()))),
        }
    )
    begun = begun_batch(table, recipe())
    assert [ids.tolist() for ids in begun.completion_ids] == [[7, 8], [7, 8], [], []]
    assert begun.sample_index.tolist() == [0, 1, 0, 1]
    assert set(begun.finish_reason) == {"length"}


def test_beginnings_are_read_and_never_trained(tmp_path: Path) -> None:
    settings = (
        "rounds=1",
        "evaluation=null",
        "prompts.solutions=true",
        "rollouts.prefix_tokens=12",
    )
    config = small_config(tmp_path, *settings, "rollouts.samples_per_prompt=2")
    run(config, RunFolder(tmp_path / "run"), Silent())
    (report,) = reports_of(RunFolder(tmp_path / "run"))
    (scores,) = Store(config.store).recipes("scores")
    rows = open_scores(f"{config.store}/scores/{scores.fingerprint}")
    solutions = {p.problem_id: p.solution for p in make_problems(count=32, seed=11)}
    tokenizer = open_tokenizer(STUDENT)
    own = 0
    for row in (rows[n] for n in range(len(rows))):
        assert row.loss_mask is not None
        assert row.loss_mask.tolist() == [n >= 12 for n in range(len(row.completion_ids))]
        assert solutions[row.prompt_id].startswith(tokenizer.decode(row.completion_ids[:12]))
        own += int(row.loss_mask.sum())
    assert len(rows) == 16
    assert report["tokens"]["generated"] == own
    assert report["tokens"]["trained"] == own * report["steps"] // 4


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("prompts.solutions=false",), "the prompts name no completion"),
        (("rollouts.prefix_tokens=48",), "window of step 0 has 48 tokens"),
        (("rollouts.extra_draws=2",), "rollouts.extra_draws, which are lost"),
        (
            ("rollouts.window={kind: adaptive, candidates: [32], max_window_tokens: 48}",),
            "window adaptive, whose probes",
        ),
        (("rollouts.keep={judge: {kind: ledger}}",), "a judge of rollouts"),
    ],
)
def test_what_beginnings_cannot_be_together_with(
    settings: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    plain = ("prompts.solutions=true", "rollouts.prefix_tokens=12")
    with pytest.raises(UserError, match=line):
        small_config(tmp_path, *plain, *settings)
