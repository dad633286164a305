"""Whole runs on a cache of codec hidden: resumed, replayed, refused."""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from opd_stream.engines.base import HiddenEngine
from opd_stream.errors import UserError
from opd_stream.store import open_scores
from opd_stream.store.artifact import DamagedUnit
from opd_stream.store.codecs.hidden import basis_of, basis_table, states_of
from opd_stream.store.recipe import Recipe
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch
from pipeline.run_folder import RunFolder
from stages.recipes import basis_recipe
from stages.step import Silent
from stages.teacher_states import _states_on_prompts
from stages.train_job import TrainJob
from tests.conftest import Command, SmallRuns, run, small_config
from tests.test_resume import attempt, fingerprints

HIDDEN = ("scores.codec={kind: hidden}", "rounds=1")
KILLS = 3


def scores_of(folder: Path) -> str:
    """The first scores artifact of a run."""
    return str(next((folder / "store" / "scores").iterdir()))


def test_a_run_trains_on_hidden_states(small_runs: SmallRuns) -> None:
    folder = small_runs(*HIDDEN)
    rows = open_scores(scores_of(folder))
    row = rows[0]
    assert row.teacher_states is not None
    states = states_of([row.teacher_states])[0]
    assert states.shape == (len(row.completion_ids), row.teacher_states.width)
    assert len(list((folder / "store" / "heads").iterdir())) == 1
    assert len(list((folder / "store" / "bases").iterdir())) == 1


@pytest.mark.parametrize(("width", "fitted"), [(2, 2048), (600, 2400)])
def test_a_basis_of_a_wide_teacher_is_fitted_on_more_states(width: int, fitted: int) -> None:
    read: list[int] = []

    def hidden(texts: RolloutBatch) -> SimpleNamespace:
        states = [np.zeros((len(ids), width), np.float32) for ids in texts.completion_ids]
        read.append(sum(map(len, states)))
        return SimpleNamespace(states=states)

    head = SimpleNamespace(weight_VH=torch.zeros(5, width))
    engine = cast(HiddenEngine, SimpleNamespace(hidden=hidden, head=lambda: head))
    prompts = [np.full(100, number) for number in range(40)]
    recipe = basis_recipe(Recipe(kind="heads", settings={}, inputs={}), "prompts")
    assert len(_states_on_prompts(engine, prompts, recipe)) == fitted
    assert len(_states_on_prompts(engine, prompts[:3], recipe)) == 300
    assert read[0] < fitted + 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_killed_run_ends_in_the_same_weights(small_runs: SmallRuns, tmp_path: Path) -> None:
    expected, moments = fingerprints(small_runs(*HIDDEN)), random.Random(3)
    for _ in range(KILLS):
        attempt(tmp_path, *HIDDEN, signs=moments.randint(2, 8), delay=moments.uniform(0, 0.05))
    run(small_config(tmp_path, *HIDDEN), RunFolder(tmp_path / "run"), Silent())
    assert fingerprints(tmp_path) == expected


@pytest.mark.slow
def test_units_that_are_extended_and_kept_train_like_those_of_other_codecs(
    tmp_path: Path,
) -> None:
    """A window that grows, units that outlive their policy, probes, an audit."""
    config = small_config(
        tmp_path,
        *HIDDEN,
        "rounds=3",
        "rollouts.window={kind: adaptive, candidates: [8, 16], max_window_tokens: 24, start: 8, "
        "objective: trained}",
        "staleness.max_policies=2",
        "train.objective=[{kind: bucket}, {kind: hybrid, weight: 0.5}]",
    )
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    assert {cache["origin"] for caches in summary["caches"] for cache in caches} > {"fresh"}


@pytest.mark.parametrize(
    ("objective", "top_k"),
    [
        ("{kind: lsm}", "7"),
        pytest.param("{kind: skew, direction: forward}", "null", marks=pytest.mark.slow),
        pytest.param("{kind: sampled_pg}", "1", marks=pytest.mark.slow),
    ],
)
def test_a_cache_serves_an_objective_that_was_chosen_later(
    objective: str, top_k: str, small_runs: SmallRuns, tmp_path: Path
) -> None:
    folder = small_runs.copy(tmp_path / "made", *HIDDEN)
    scores = Path(scores_of(folder))
    config = small_config(
        folder,
        f"train.objective={objective}",
        f"train.top_k={top_k}",
        f"replay={{scores: [scores/{scores.name}]}}",
        "rounds=1",
        "teacher=null",
    )
    summary = run(config, RunFolder(tmp_path / "replayed"), Silent())
    assert summary["tokens"]["trained"] > 0


def test_hidden_states_and_candidates_do_not_train_in_one_round(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    folder = small_runs.copy(tmp_path / "made", *HIDDEN)
    names = [f"scores/{Path(scores_of(folder)).name}", run_of_candidates(folder)]
    store = Store(str(folder / "store"))
    found = [each.fingerprint for each in store.recipes("scores")]
    assert len(found) == len(names)
    job = SimpleNamespace(
        store=lambda: store,
        config=small_config(folder),
        caches=[SimpleNamespace(scores=fingerprint) for fingerprint in found],
    )
    with pytest.raises(UserError, match="train on them apart"):
        TrainJob.teacher(cast(TrainJob, job), torch.device("cpu"), vocabulary=9)


def run_of_candidates(folder: Path) -> str:
    """The name of scores of codec exact, made in the same store."""
    before = {path.name for path in (folder / "store" / "scores").iterdir()}
    config = small_config(folder, "rounds=1")
    run(config, RunFolder(folder / "exact"), Silent())
    after = {path.name for path in (folder / "store" / "scores").iterdir()}
    return f"scores/{min(after - before)}"


def test_more_candidates_than_tokens_are_refused(small_runs: SmallRuns, tmp_path: Path) -> None:
    folder = small_runs.copy(tmp_path / "made", *HIDDEN)
    scores = Path(scores_of(folder))
    config = small_config(
        folder,
        "train.top_k=5000",
        f"replay={{scores: [scores/{scores.name}]}}",
        "rounds=1",
        "teacher=null",
    )
    with pytest.raises(UserError, match=r"train\.top_k is 5000 but there are"):
        run(config, RunFolder(tmp_path / "replayed"), Silent())


def test_a_bound_that_cannot_be_held_stops_the_run_before_a_shard(tmp_path: Path) -> None:
    codec = "scores.codec={kind: hidden, max_kl: 0.01, max_kl_p99: 1.0e-9}"
    config = small_config(tmp_path, codec)
    with pytest.raises(UserError, match="hidden states cannot be stored: rounded, they cost"):
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert not list((tmp_path / "store" / "scores").rglob("*.arrow"))


def test_what_gives_no_hidden_states_is_refused_before_work(
    opd_stream: Command, tmp_path: Path
) -> None:
    for engine in ("vllm", "fake"):
        config = small_config(tmp_path, f"teacher.engine={engine}", "executor=ray", *HIDDEN)
        with pytest.raises(UserError, match=f"teacher.engine {engine} does not give"):
            run(config, RunFolder(tmp_path / "run"), Silent())
    assert not (tmp_path / "store" / "rollouts").exists()
    with pytest.raises(UserError, match="codec hidden, whose distributions are over"):
        small_config(tmp_path, "scores.alignment={kind: bytes}", *HIDDEN)
    with pytest.raises(UserError, match="gives the teacher's log-probability of every id"):
        small_config(tmp_path, "rollouts.student_top_k=4", *HIDDEN)


def test_a_cache_is_shown_exported_and_not_made_of_files(
    opd_stream: Command, small_runs: SmallRuns, tmp_path: Path
) -> None:
    folder = small_runs(*HIDDEN)
    store, name = str(folder / "store"), f"scores/{Path(scores_of(folder)).name}"
    code, said, _ = opd_stream("cache", "show", store, name)
    assert code == 0
    assert "state_kl_mean" in said
    assert "hidden states, which give the whole distribution" in said
    assert "retained_mass" not in said
    code, _, _ = opd_stream("cache", "export", store, name, str(tmp_path / "out"))
    assert code == 0
    code, _, said = opd_stream(
        "cache", "import", str(tmp_path / "new"), str(tmp_path / "out"), "--codec", "{kind: hidden}"
    )
    assert code == 2
    assert "files of scores do not hold" in said
    code, _, said = opd_stream("cache", "residual", store, name)
    assert code == 2
    assert "holds hidden states, which cannot be corrected" in said


def test_head_and_basis_stay_while_their_scores_do(small_runs: SmallRuns, tmp_path: Path) -> None:
    from opd_stream.store.garbage import garbage

    folder = small_runs.copy(tmp_path / "made", *HIDDEN)
    found = garbage(Store(str(folder / "store")), grace_seconds=-1)
    assert not [path for path in found if path.parent.name in ("heads", "bases")]


@pytest.mark.slow
def test_units_of_a_basis_that_was_made_again_are_scored_again(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    """Signs and order of axes are another library's choice: a basis is named by its numbers."""
    folder = small_runs.copy(tmp_path / "again", *HIDDEN)
    store = Store(folder / "store")
    (recipe,) = store.recipes("bases")
    artifact = store.by_fingerprint("bases", recipe.fingerprint)
    basis = basis_of(artifact.read_unit(0))
    artifact.invalidate(0)
    turned = replace(basis, inverse_HH=-basis.inverse_HH)
    artifact.commit(0, basis_table(turned), counts={"rows": 1})
    artifact.finish()
    name = scores_of(folder)
    rows = open_scores(name)
    with pytest.raises(DamagedUnit, match="a basis that was made again since"):
        rows[0]
    for policy in (folder / "store" / "policies").iterdir():
        shutil.rmtree(policy)
    run(small_config(folder, *HIDDEN), RunFolder(folder / "run2"), Silent())
    before, after = (
        states_of([row.teacher_states])[0]
        for row in (open_scores(scores_of(small_runs(*HIDDEN)))[0], open_scores(name)[0])
        if row.teacher_states is not None
    )
    assert abs(before - after).max() < 0.1 * before.std()
