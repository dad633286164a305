"""A round is a list of steps: a new kind is listed in one place, and everything else sees it."""

from dataclasses import replace
from pathlib import Path

import pytest

from opd_stream.config import Config
from opd_stream.store.garbage import garbage
from opd_stream.store.policy import PolicyArtifact
from opd_stream.store.recipe import Recipe
from pipeline import rounds as rounds_module
from pipeline.estimate import estimate
from pipeline.rounds import Round, rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import Setup, open_setup
from pipeline.single_stage import run_stage
from pipeline.status import StatusReader
from stages.step import (
    EXTEND,
    GENERATE,
    PROBE,
    PROBE_SCORE,
    SCORE,
    TRAIN,
    Silent,
    Step,
    StepKind,
    of_stage,
    with_needs,
)
from tests.conftest import reports_of, run, small_config

WIDE = StepKind("wide score", "score")  # a second set of scores, with more candidates
SMALL = ("evaluation=null", "rounds=1", "rollouts.prompts_per_round=4", "prompts_per_unit=2")


def wide_score(setup: Setup, score: Step) -> Step:
    """The same teacher's scores of the same rollouts, twice as many candidates."""
    recipe = score.artifact.recipe
    settings = {**recipe.settings, "top_k": 2 * recipe.settings["top_k"]}
    wide = Recipe(kind="scores", settings=settings, inputs=recipe.inputs)
    return replace(score, kind=WIDE, artifact=setup.store.artifact(wide))


@pytest.fixture
def with_wide_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds have one more step, listed where the others are."""
    listed = rounds_module.round_steps

    def more(setup: Setup, *rest: object) -> tuple[Step, ...]:
        *before, train = listed(setup, *rest)  # pyright: ignore[reportArgumentType]
        (score,) = of_stage(before, "score")
        return (*before, wide_score(setup, score), train)

    monkeypatch.setattr(rounds_module, "round_steps", more)


def first(config: Config) -> Round:
    return next(rounds(open_setup(config)))


@pytest.mark.usefixtures("with_wide_scores")
def test_a_new_kind_of_step_is_made_reached_reported_and_shown(tmp_path: Path) -> None:
    config, folder = small_config(tmp_path, *SMALL), RunFolder(tmp_path / "run")
    run(config, folder, Silent())
    here = first(config)
    (wide,) = [step for step in here.steps if step.kind == WIDE]
    assert wide.is_complete()
    assert wide.shards.recipe.settings["top_k"] == 8
    assert {step.artifact.name for step in here.steps} == here.names()
    assert wide.artifact.name not in {item.name for item in garbage(open_setup(config).store)}
    (report,) = reports_of(folder)
    assert report["tokens"]["teacher_scored"] == 2 * report["tokens"]["generated"]
    (cost,) = estimate(config, folder).rounds
    assert [step.kind.name for step in cost.steps] == ["generate", "score", "wide score", "train"]
    (status,) = StatusReader(open_setup(config), folder).read().rounds
    assert (status.stages["score"].done, status.stages["score"].total) == (4, 4)


@pytest.mark.usefixtures("with_wide_scores")
def test_a_new_kind_of_step_is_made_by_the_command_of_its_stage(tmp_path: Path) -> None:
    config, folder = small_config(tmp_path, *SMALL), RunFolder(tmp_path / "run")
    run_stage("generate", config, folder, round_index=0, progress=Silent())
    assert not any(step.is_complete() for step in of_stage(first(config).steps, "score"))
    run_stage("score", config, folder, round_index=0, progress=Silent(), follow=True)
    assert all(step.is_complete() for step in of_stage(first(config).steps, "score"))
    run_stage("train", config, folder, round_index=0, progress=Silent())
    assert first(config).policy.is_complete()


def test_a_round_ends_with_its_training_which_needs_all_scores(tmp_path: Path) -> None:
    window = "rollouts.window={kind: adaptive, candidates: [8, 16], max_window_tokens: 24}"
    setup = open_setup(small_config(tmp_path, "evaluation=null", window))
    here = next(rounds(setup))
    assert [step.kind for step in here.steps] == [GENERATE, SCORE, PROBE, PROBE_SCORE, TRAIN]
    assert isinstance(here.steps[-1].artifact, PolicyArtifact)
    assert list(here.steps[-1].needs) == of_stage(here.steps, "score")
    assert list(with_needs([here.steps[-1]])) == list(here.steps)


def test_expected_rounds_have_the_steps_of_real_ones(tmp_path: Path) -> None:
    config = small_config(tmp_path, "evaluation=null", "rounds=3", "rollouts.ahead=true")
    expected = list(rounds(open_setup(config), expected=True))
    assert [here.is_expected for here in expected] == [False, True, True]
    assert [here.plan.first_step for here in expected] == [0, 4, 8]
    assert {tuple(step.kind for step in here.steps) for here in expected} == {
        (GENERATE, SCORE, TRAIN)
    }
    names = [step.artifact.name for here in expected for step in here.steps]
    assert len(set(names)) == len(names)
    assert not any(step.is_complete() for here in expected for step in here.steps)


def test_what_is_extended_comes_after_what_it_continues(tmp_path: Path) -> None:
    settings = (
        "evaluation=null",
        "rounds=2",
        "rollouts.window={kind: linear, h0: 8, delta: 8, every: 4, max_window_tokens: 24}",
        "staleness={max_epochs: 2, max_policies: 3, policy_drift: 9, "
        "effective_sample_fraction: 1e-9}",
    )
    config, folder = small_config(tmp_path, *settings), RunFolder(tmp_path / "run")
    run(config, folder, Silent())
    *_, last = rounds(open_setup(config))
    kinds = [step.kind for step in with_needs(last.steps)]
    assert kinds == [GENERATE, EXTEND, SCORE, SCORE, TRAIN]
    assert [step.is_new for step in with_needs(last.steps)] == [False, True, False, True, True]
