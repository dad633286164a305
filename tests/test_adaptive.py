"""The adaptive window: its decision on made-up gradients, and its audit on real ones."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from opd_stream.errors import UserError
from opd_stream.objectives import Bucket, Objective, SampledPg
from opd_stream.store import open_scores
from opd_stream.windows import FixedWindow, choose_window, sketch
from pipeline.run_folder import RunFolder
from stages.audit import audited_parameters, segment_sketches
from stages.step import Silent
from stages.student_model import load_student
from stages.train_data import BatchPlan, step_batches
from tests.conftest import MODELS, SmallRuns, reports_of, run, small_config

CANDIDATES = (64, 128)


def unit(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("beyond", "cosine", "admissible"), [(0.9, 0.743, True), (1.1, 0.673, False)]
)
def test_orthogonal_segments_are_admissible_up_to_equal_length(
    beyond: float, cosine: float, admissible: bool
) -> None:
    decision = choose_window([unit(1, 0), unit(0, beyond)], (64,))
    assert decision.cosines[0] == pytest.approx(cosine, abs=1e-3)
    assert decision.fell_back is not admissible
    assert f"64: {decision.cosines[0]:.3f}" in decision.reason


def test_the_shortest_admissible_candidate_wins_and_scale_does_not_matter() -> None:
    parallel = [unit(1, 2), unit(2, 4), unit(3, 6)]
    assert choose_window(parallel, CANDIDATES).window_tokens == 64
    late = [unit(0.1, 0), unit(0, 1), unit(0, 0.2)]
    one, other = (choose_window([scale * s for s in late], CANDIDATES) for scale in (1.0, 1e-9))
    assert one.window_tokens == other.window_tokens == 128
    assert one.cosines == pytest.approx(other.cosines)


def test_hysteresis_moves_one_candidate_and_smoothing_remembers() -> None:
    candidates, parallel = (16, 32, 64, 128), [unit(1, 0)] * 5
    assert choose_window(parallel, candidates).window_tokens == 16
    assert choose_window(parallel, candidates, current=128).window_tokens == 64
    smooth = choose_window(parallel, candidates, earlier=(-1.0, 0.5, 1.0, 1.0), smoothing=0.5)
    assert smooth.cosines == pytest.approx((0.0, 0.75, 1.0, 1.0))
    assert smooth.window_tokens == 32


def test_a_sketch_keeps_cosines() -> None:
    torch.manual_seed(0)
    one = torch.randn(400_000)
    other = 0.7 * one + 0.7 * torch.randn(400_000)
    true = torch.cosine_similarity(one, other, dim=0)
    found = torch.cosine_similarity(sketch([one]), sketch([other]), dim=0)
    assert found.item() == pytest.approx(true.item(), abs=0.01)


@pytest.mark.parametrize("objective", [SampledPg(), Bucket(direction="reverse")])
def test_segments_add_up_to_the_gradient_of_the_whole(
    small_runs: SmallRuns, objective: Objective
) -> None:
    (scores,) = (small_runs("rounds=1", "evaluation=null") / "store" / "scores").iterdir()
    rows = open_scores(scores)
    plan = BatchPlan(
        rows_per_step=8,
        tokens_per_microbatch=10**6,
        seed=0,
        first_step=0,
        window=FixedWindow(tokens=48),
    )
    (batch,) = step_batches([rows[n] for n in range(6)], plan, 0)
    folder = MODELS / "ledger-student"
    student = load_student(folder, lora=None, initial=folder, gradient_checkpointing=False).eval()
    whole = student(batch, (objective,), merge_terminators=True, limit=None).loss
    parameters = audited_parameters(student, layers=1)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(whole, parameters)])
    segments = segment_sketches(student, batch, (10, 20), parameters, objectives=(objective,))
    assert len(segments) == 3
    if len(expected) == len(segments[0]):
        torch.testing.assert_close(sum(segments), expected, rtol=1e-3, atol=1e-6)
    else:
        torch.testing.assert_close(sum(segments), sketch([expected]), rtol=1e-3, atol=1e-6)


ADAPTIVE = (
    "rollouts.window={kind: adaptive, candidates: [8, 16, 32], max_window_tokens: 64, start: 16, "
    "probe_rows: 4, probe_share: 0.5, metric: adam}"
)


def test_a_run_takes_the_windows_its_audits_decide(tmp_path: Path) -> None:
    summary = run(
        small_config(tmp_path, "rounds=3", "evaluation=null", ADAPTIVE),
        RunFolder(tmp_path / "run"),
        Silent(),
    )
    reports = [
        json.loads((tmp_path / "run" / "rounds" / f"{n:04d}" / "report.json").read_text())
        for n in range(3)
    ]
    assert reports[0]["window_tokens"] == 16
    for now, following in pairwise(reports):
        decision = now["window_decision"]
        assert decision["window_tokens"] == following["window_tokens"]
        assert decision["probe_rows"] == 4
        assert len(decision["cosines"]) == 3
        replayed = [
            c for c, v in zip((8, 16, 32), decision["cosines"], strict=True) if v >= 2**-0.5
        ]
        assert decision["window_tokens"] == (replayed or [32])[0]  # from the report alone
        assert now["tokens"]["probed"] > 4 * now["window_tokens"]
        assert now["tokens"]["generated"] > now["tokens"]["trained"] / 2
    assert reports[2]["window_decision"] is None  # nothing follows that it could decide
    assert reports[2]["tokens"]["probed"] == 0
    again = run(
        small_config(tmp_path, "rounds=3", "evaluation=null", ADAPTIVE),
        RunFolder(tmp_path / "again"),
        Silent(),
    )
    assert again["policies"] == summary["policies"]
    assert again["tokens"]["generated"] == 0


def test_units_kept_from_a_longer_window_train_at_the_decided_one(tmp_path: Path) -> None:
    """Every candidate passes so low a threshold: 8 tokens are decided after a round at 32."""
    window = (
        "rollouts.window={kind: adaptive, candidates: [8, 16], max_window_tokens: 64, start: 32, "
        "probe_rows: 4, probe_share: 1, threshold: 0.001}"
    )
    kept = ("staleness.max_policies=9", "staleness.policy_drift=9", "train.learning_rate=1e-5")
    directory = RunFolder(tmp_path / "run")
    run(small_config(tmp_path, "evaluation=null", window, *kept), directory, Silent())
    first, second = reports_of(directory)
    assert first["window_decision"]["window_tokens"] == 8
    assert [cache["origin"] for cache in second["caches"]] == ["kept"]
    assert (first["window_tokens"], second["window_tokens"]) == (32, 8)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [step["window_tokens"] for step in steps] == [32] * 4 + [8] * 4
    recipes = [
        Path(report["policy"]["folder"]).parent / "recipe.json" for report in (first, second)
    ]
    settings = [json.loads(path.read_text())["settings"] for path in recipes]
    assert [each.get("window_tokens") for each in settings] == [None, 8]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sampled_pg", "bucket"])
def test_an_audit_can_read_the_objective_that_trains(tmp_path: Path, objective: str) -> None:
    found: dict[str, list[float]] = {}
    for audited in ("sampled", "trained"):
        settings = (
            "rollouts.window={kind: adaptive, candidates: [8, 16, 32], max_window_tokens: 64, "
            f"start: 16, objective: {audited}}}"
        )
        choice = f"train.objective={{kind: {objective}}}"
        config = small_config(tmp_path, "rounds=2", "evaluation=null", settings, choice)
        run(config, RunFolder(tmp_path / audited), Silent())
        report = json.loads((tmp_path / audited / "rounds" / "0000" / "report.json").read_text())
        found[audited] = report["window_decision"]["cosines"]
    if objective == "sampled_pg":  # the same gradient
        assert found["trained"] == pytest.approx(found["sampled"], abs=1e-4)
    else:
        assert found["trained"] != pytest.approx(found["sampled"], abs=1e-2)


def test_a_probe_has_no_draws_for_objective_mc(tmp_path: Path) -> None:
    window = "rollouts.window={kind: adaptive, candidates: [8], max_window_tokens: 64, objective: "
    mc = ("train.objective={kind: mc}", "rollouts.extra_draws=3")
    small_config(tmp_path, window + "sampled}", *mc)
    with pytest.raises(UserError, match="further draws probes do not have"):
        small_config(tmp_path, window + "trained}", *mc)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("candidates: [16, 8]", "expected ascending windows"),
        ("candidates: [16, 64]", "not below max_window_tokens 64"),
    ],
)
def test_candidates_that_contradict_each_other_are_one_line(
    tmp_path: Path, window: str, message: str
) -> None:
    settings = f"rollouts.window={{kind: adaptive, max_window_tokens: 64, {window}}}"
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, settings)


def test_a_probe_longer_than_the_context_is_one_line(tmp_path: Path) -> None:
    settings = "rollouts.window={kind: adaptive, candidates: [8], max_window_tokens: 100000}"
    with pytest.raises(UserError, match="lower the window"):
        run(small_config(tmp_path, settings), RunFolder(tmp_path / "run"), Silent())
