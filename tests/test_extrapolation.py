"""Laws of the extrapolation, on toy weights and in small runs."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from opd_stream.config.sections import Extrapolation
from opd_stream.drift import DriftSums, drift_sums
from opd_stream.errors import UserError
from opd_stream.extrapolation import (
    Score,
    is_better,
    is_due,
    moved_parameters,
    search,
)
from opd_stream.windows import FixedWindow
from pipeline.run_folder import RunFolder
from stages import extrapolate, train_data
from stages.answers import Answers
from stages.extrapolate import Extrapolator, held_out
from stages.learner import Learner
from stages.step import Silent
from stages.train_data import BatchPlan
from tests.conftest import reports_of, run, small_config


def test_searches_follow_powers_of_two() -> None:
    assert [step for step in range(70) if is_due(step)] == [1, 2, 4, 8, 16, 32, 64]


def quadratic(weight: torch.Tensor, target: torch.Tensor) -> Score:
    return Score(kl=-((weight - target) ** 2).sum().item())


@pytest.mark.parametrize(("best", "kept"), [(1.0, 0), (2.9, 1), (5.2, 2), (40.0, 5)])
def test_only_descent_is_accepted_on_a_quadratic(best: float, kept: int) -> None:
    """From base 0 at 1 the candidates are 3, 5, 7, 9, 11; the nearest to the best one wins."""
    weight = torch.nn.Parameter(torch.ones(3))
    target = torch.full((3,), best)
    outcome = search(
        [weight],
        [torch.zeros(3)],
        lambda: quadratic(weight, target),
        step=4,
        settings=Extrapolation(),
    )
    assert outcome.kept == kept
    assert weight.tolist() == pytest.approx([1 + 2 * kept] * 3)
    assert len(outcome.scores) == min(kept + 2, 6)


def test_the_factor_recursion_of_the_official_code_is_a_constant_step() -> None:
    """Its factor f becomes f / (1 + f) on the grown difference: 3, 5, 7, 9, 11 times the start."""
    point, factor = 1.0, 2.0
    for k in range(1, 6):
        point, factor = point + factor * point, factor / (1 + factor)
        assert point == pytest.approx(1 + 2 * k)


def test_a_rejected_search_leaves_every_bit() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, 50) * 1e-3)
    before = weight.detach().clone()
    outcome = search(
        [weight], [torch.randn(50, 50)], lambda: Score(reward=0.5), step=2, settings=Extrapolation()
    )
    assert outcome.kept == 0
    assert torch.equal(weight, before)


def test_acceptance_is_strict_or_may_stay_equal_and_two_signals_must_agree() -> None:
    same = Score(reward=0.5)
    assert not is_better(same, same, "strict")
    assert is_better(same, same, "equal")
    best = Score(reward=0.5, kl=-1.0)
    assert is_better(Score(reward=0.5, kl=-0.9), best, "strict")
    assert not is_better(Score(reward=0.6, kl=-1.1), best, "strict")
    assert not is_better(Score(reward=0.4, kl=-0.1), best, "equal")


@pytest.mark.parametrize("acceptance", ["strict", "equal"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_worse_than_any_other(
    acceptance: Literal["strict", "equal"], value: float
) -> None:
    fine, lost = Score(reward=0.5, kl=-9.0), Score(reward=0.6, kl=value)
    assert not is_better(lost, fine, acceptance)
    assert not is_better(lost, lost, acceptance)
    assert is_better(fine, replace(lost, reward=0.5), acceptance)
    weight = torch.nn.Parameter(torch.ones(3))
    points = iter([fine, lost, fine])
    settings = Extrapolation(acceptance=acceptance)
    outcome = search([weight], [torch.zeros(3)], lambda: next(points), step=1, settings=settings)
    assert (outcome.kept, weight.tolist()) == (0, [1.0] * 3)


@pytest.mark.parametrize("acceptance", ["strict", pytest.param("equal", marks=pytest.mark.slow)])
def test_a_round_with_a_score_that_is_not_finite_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acceptance: str
) -> None:
    """The cached objective of every point but the first is NaN."""
    found = Extrapolator._score
    calls: list[int] = []

    def score(self: Extrapolator, step: int) -> Score:
        calls.append(step)
        kept = found(self, step)
        return kept if calls.count(step) == 1 else replace(kept, kl=math.nan)

    monkeypatch.setattr(Extrapolator, "_score", score)
    (report,) = jumped(tmp_path, f"acceptance: {acceptance}, prompts: 0")
    assert [entry["kept"] for entry in report["extrapolations"]] == [0, 0]
    for entry in report["extrapolations"]:
        first, second = (each["kl"] for each in entry["scores"])
        assert first < 0
        assert second is None


def test_a_jump_to_where_nothing_is_finite_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward cannot see it: all answers may be as wrong as before."""
    lost = replace(shifted(0.1), k3=math.nan)
    monkeypatch.setattr(extrapolate, "drift_of", lambda _: lost)
    (report,) = jumped(tmp_path, "candidates: 2, prompts: 0")
    entries = report["extrapolations"]
    assert [(entry["kept"], entry["policy_drift"]) for entry in entries] == [(0, None)] * 2


def test_a_point_beyond_the_drift_bound_is_not_kept_however_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second candidate's drift passes it; the first one stays."""
    every_candidate_is_better(monkeypatch)
    drifts = iter([0.0, 0.1, 0.3, 0.0, 0.3])
    monkeypatch.setattr(extrapolate, "drift_of", lambda _: shifted(next(drifts)))
    bounds = ("staleness.policy_drift=0.01", "staleness.distance_share=0")
    (report,) = jumped(tmp_path, "candidates: 5, prompts: 0", *bounds)
    first, second = report["extrapolations"]
    assert (first["kept"], second["kept"]) == (1, 0)
    assert first["policy_drift"] == pytest.approx(shifted(0.1).policy_drift)
    assert [len(entry["scores"]) for entry in (first, second)] == [3, 2]
    assert report["steps"] == 2


def test_a_jump_after_which_more_answers_are_cut_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_candidate_is_better(monkeypatch)
    shares = iter([0.31, 0.25, 0.29, 0.25])
    monkeypatch.setattr(Answers, "cut_share", lambda *_: next(shares))
    (report,) = jumped(tmp_path, "candidates: 1, prompts: 16")
    first, second = report["extrapolations"]
    assert (first["kept"], first["undone"], first["policy_drift"]) == (0, 1, None)
    assert first["length_shares"] == [0.25, 0.31]
    assert (second["kept"], second.get("undone", 0)) == (1, 0)


def test_prompts_that_tell_about_a_jump_are_random_and_others_in_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_candidate_is_better(monkeypatch)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        Answers, "cut_share", lambda self, _: asked.append(self.prompts.prompt_id) or 0.0
    )
    jumped(tmp_path, "candidates: 1, prompts: 4", "rounds=2")
    first, later = asked[0], asked[-1]
    assert len(first) == len(set(first)) == 4
    assert list(first) != [f"ledger-{n}" for n in range(4)]
    assert set(asked) == {first, later}
    assert first != later


def test_rows_that_score_points_are_whole_prompts_that_do_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, scored = set[str](), set[str]()
    collated = train_data.collate

    def seen(rows: Any, **rest: Any) -> Any:
        names = {row.prompt_id for row in rows}
        (scored if not torch.is_grad_enabled() else trained).update(names)
        return collated(rows, **rest)

    monkeypatch.setattr(train_data, "collate", seen)
    found = Extrapolator._score

    def score(self: Extrapolator, step: int) -> Score:
        with torch.no_grad():
            return found(self, step)

    monkeypatch.setattr(Extrapolator, "_score", score)
    asked = ("rollouts.samples_per_prompt=2", "staleness.max_epochs=2")
    (report,) = jumped(tmp_path, "candidates: 1, prompts: 0", *asked)
    assert (len(scored), len(trained)) == (1, 7)
    assert not scored & trained
    assert (report["rows"], report["held_out_rows"]) == (16, 2)
    assert report["steps"] == 2 * 4


def test_a_prompt_that_scores_points_trains_under_no_teacher() -> None:
    """Two teachers score 8 prompts, and a third one the last 4."""

    class Rows(dict[int, Any]):
        def positions_by_unit(self) -> dict[tuple[int, int], list[int]]:
            return {(0, 0): [*range(8)], (1, 0): [*range(8, 16)], (2, 0): [*range(16, 20)]}

    names = [*range(8), *range(8), *range(4, 8)]
    rows: Any = Rows({n: SimpleNamespace(prompt_id=str(name)) for n, name in enumerate(names)})
    for seed in range(8):
        plan = BatchPlan(
            rows_per_step=1,
            tokens_per_microbatch=9,
            seed=seed,
            first_step=0,
            window=FixedWindow(tokens=9),
            staleness=(0, 0, 0),
        )
        found = held_out(rows, plan, Extrapolation(rows=2))
        chosen = {names[n] for n in found}
        assert found == {n for n, name in enumerate(names) if name in chosen}
        assert len(chosen) == 1


def test_the_score_is_the_kl_over_candidates_and_tail_whatever_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step two objectives have one student, and so one score."""
    monkeypatch.setattr(extrapolate, "is_due", lambda step: step == 1)
    monkeypatch.setattr(Learner, "step", lambda self: self.optimizer.zero_grad())
    found = [
        jumped(tmp_path / kind, "candidates: 1, prompts: 0", f"train.objective={{kind: {kind}}}")
        for kind in ("bucket", "sampled_pg", "lsm")
    ]
    first, *others = (reports[0]["extrapolations"][0]["scores"][0]["kl"] for reports in found)
    assert first < -0.01
    assert others == pytest.approx([first] * 2, rel=1e-6)


def test_drift_after_a_jump_is_computed_as_the_floor_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the trainer's precision: the drift of a jump is that of the same weights and rows."""
    seen: list[bool] = []
    drift, sums = extrapolate.drift_of, Learner.sums

    def looked(self: Learner, *asked: Any) -> dict[str, float]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return sums(self, *asked)

    def drift_of(found: dict[str, float]) -> DriftSums:
        assert seen[-1]
        return drift(found)

    monkeypatch.setattr(Learner, "sums", looked)
    monkeypatch.setattr(extrapolate, "drift_of", drift_of)
    (report,) = jumped(tmp_path, "candidates: 2, prompts: 0", "train.precision=bf16-mixed")
    assert any(entry["kept"] for entry in report["extrapolations"])


@pytest.mark.parametrize("is_old", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_jumps_no_longer_destroy_a_student_whose_objective_is_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    """The value of `sampled_pg` rises all the way to where nothing is answered rightly.

    With it as the score, without bounds, the KL to the teacher goes from 0.3 to 4 nats a token and
    pass@1 from 0.38 to 0. The same run with the score that takes its place keeps its student.
    """
    found, values = Extrapolator._score, list[tuple[float, float]]()

    def score(self: Extrapolator, step: int) -> Score:
        rows = [self._plan.used(self._rows[place]) for place in range(8)]
        sums = self._learner.sums(train_data.step_batches(rows, self._plan, step))
        own, ours = -sums["loss"] / sums["tokens"], found(self, step)
        assert ours.kl is not None
        values.append((own, ours.kl))
        return Score(kl=own) if is_old else ours

    monkeypatch.setattr(Extrapolator, "_score", score)
    config = small_config(
        tmp_path,
        *("rounds=1", "staleness.max_epochs=1", "train.objective={kind: sampled_pg}"),
        *(
            "rollouts.prompts_per_round=16",
            "rollouts.window.tokens=208",
            "train.learning_rate=4e-3",
        ),
        *("evaluation.prompts.count=16", "evaluation.max_new_tokens=208"),
        f"train.extrapolation={{prompts: {0 if is_old else 16}}}",
        "train.tokens_per_microbatch=4000",
    )
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    (report,) = reports_of(RunFolder(tmp_path / "run"))
    before, after = (each["pass@1"] for each in summary["evaluations"])
    assert any(  # where the old score rises, and the new one falls
        own[0] < own[1] and ours[1] < ours[0] - 0.1
        for own, ours in (zip(*pair, strict=True) for pair in pairwise(values))
    )
    assert before > 0.3
    if is_old:
        assert [entry["kept"] for entry in report["extrapolations"]][-2:] == [5, 5]
        assert after == 0
    else:
        assert after > 0.1
        assert any(entry["kept"] for entry in report["extrapolations"])


def every_candidate_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    found, better = Extrapolator._score, iter(range(99))
    monkeypatch.setattr(
        Extrapolator, "_score", lambda *asked: replace(found(*asked), kl=float(next(better)))
    )


def shifted(shift: float) -> DriftSums:
    """Drift of tokens that moved by `shift` up and down."""
    return drift_sums(torch.tensor([shift, -shift]), torch.zeros(2))


def jumped(folder: Path, settings: str, *overrides: str) -> list[dict[str, Any]]:
    """The reports of a run of one round with two searches."""
    own = ("rounds=1", "evaluation=null", "staleness.policy_drift=10", "staleness.max_epochs=1")
    config = small_config(folder, *own, f"train.extrapolation={{rows: 4, {settings}}}", *overrides)
    run(config, RunFolder(folder / "run"), Silent())
    return reports_of(RunFolder(folder / "run"))


def test_norms_embeddings_and_heads_never_move_and_of_lora_one_factor() -> None:
    names = {
        "model.embed_tokens.weight": (4, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.self_attn.q_norm.weight": (4,),
        "model.layers.0.mlp.down_proj.weight": (4, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "lm_head.weight": (4, 4),
    }
    plain = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    assert list(moved_parameters(iter(plain.items()))) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ]
    names |= {
        "model.layers.0.self_attn.q_proj.bias": (4,),
        "model.layers.0.post_attention_layernorm.weight": (4,),
    }
    plain = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in names.items()}
    official = set(moved_parameters(iter(plain.items()), "official"))
    stay = {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"}
    assert official == set(names) - stay
    with pytest.raises(UserError, match="finds no matrix of attention or MLP among"):
        moved_parameters(iter([("model.embed_tokens.weight", plain["lm_head.weight"])]))
    for parameter in plain.values():
        parameter.requires_grad_(False)
    for factor in ("lora_A", "lora_B"):
        name = f"model.layers.0.self_attn.q_proj.{factor}.default.weight"
        plain[name] = torch.nn.Parameter(torch.zeros(2, 2))
    assert list(moved_parameters(iter(plain.items()))) == [
        "model.layers.0.self_attn.q_proj.lora_B.default.weight"
    ]
