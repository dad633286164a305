"""The adaptive window: its decision on made-up gradients, and its audit on real ones."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_stream.batches import Batch, collate
from opd_stream.config.sections import Lora
from opd_stream.errors import UserError
from opd_stream.objectives import Bucket, Objective, SampledPg
from opd_stream.store import open_scores
from opd_stream.windows import FixedWindow, choose_window, fewest_groups, prefix_cosines, sketch
from pipeline.run_folder import RunFolder
from stages.audit import Probes, parameter_groups, segment_sketches
from stages.step import Silent
from stages.student_model import StudentModel, load_student
from stages.train_data import BatchPlan, step_batches
from tests.conftest import MODELS, SmallRuns, reports_of, run, small_config
from tests.test_guards import row

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


def student_and_batch(small_runs: SmallRuns) -> tuple[StudentModel, Batch]:
    """The embedded student, and six rows of a cache."""
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
    return student, batch


@pytest.mark.parametrize("objective", [SampledPg(), Bucket(direction="reverse")])
def test_segments_add_up_to_the_gradient_of_the_whole(
    small_runs: SmallRuns, objective: Objective
) -> None:
    student, batch = student_and_batch(small_runs)
    for layers in (None, 1):  # of all parameters the head is one, too
        groups = parameter_groups(student, layers=layers)
        assert len(groups) == (1 if layers else 4)
        if layers is None:
            assert sum(map(len, groups)) == len(list(student.parameters()))
        whole = student(batch, (objective,), merge_terminators=True, limit=None).loss
        flat = [parameter for group in groups for parameter in group]
        gradients = iter(torch.autograd.grad(whole, flat))
        segments = segment_sketches(student, batch, (10, 20), groups, objectives=(objective,))
        assert len(segments) == 3
        for number, group in enumerate(groups):
            expected = sketch([next(gradients) for _ in group])
            found = torch.stack([parts[number] for parts in segments]).sum(0)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_the_last_layers_that_stand_for_all_parameters() -> None:
    """Both candidates' cosines are 0.707 of all, 1 of the first group, 0.714 of the first two."""
    parts = [[unit(1, 0), unit(0, 0), unit(0, 0)], [unit(0, 0), unit(0, 0.98), unit(0, 0.2)]]
    count, gap = fewest_groups(parts)
    assert count == 2
    assert gap == pytest.approx(0.007, abs=1e-3)
    assert fewest_groups(parts, within=0.001) == (3, 0.0)
    assert fewest_groups(parts, within=0.5)[0] == 1


def test_chosen_layers_have_the_cosines_of_all_parameters(small_runs: SmallRuns) -> None:
    student, batch = student_and_batch(small_runs)
    objective, candidates = (Bucket(direction="reverse"),), (4, 10, 20)
    groups = parameter_groups(student, layers=None)
    parts = segment_sketches(student, batch, candidates, groups, objectives=objective)
    exact = [
        torch.cat([g.flatten() for g in gradients])
        for gradients in _exact_segments(student, batch, candidates, objective)
    ]
    expected = prefix_cosines(exact)
    assert prefix_cosines([torch.cat(each) for each in parts]) == pytest.approx(expected, abs=0.02)
    count, gap = fewest_groups(parts)
    assert gap <= 0.05
    if count < len(groups):
        few = parameter_groups(student, layers=count)
        parts = segment_sketches(student, batch, candidates, few, objectives=objective)
        assert prefix_cosines([one for (one,) in parts]) == pytest.approx(expected, abs=0.07)


def _exact_segments(
    student: StudentModel,
    batch: Batch,
    candidates: tuple[int, ...],
    objectives: tuple[Objective, ...],
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The gradients of all parameters, as a training step of the segment alone has them."""
    for low, high in pairwise((0, *candidates, 10**6)):
        inside_N = (batch.positions_N >= low) & (batch.positions_N < high)
        own = replace(batch, weights_N=batch.weights_N * inside_N)
        loss = student(own, objectives, merge_terminators=True, limit=None).loss
        yield torch.autograd.grad(loss, list(student.parameters()))


ADAPTIVE = (
    "rollouts.window={kind: adaptive, candidates: [8, 16, 32], max_window_tokens: 64, start: 16, "
    "probe_rows: 4, probe_share: 0.5, metric: adam, audit_steps: 3}"
)
PLAIN = ("rounds=3", "evaluation=null", "train.learning_rate=1e-3")


def test_a_run_takes_the_windows_its_audits_decide(tmp_path: Path) -> None:
    config = small_config(tmp_path, *PLAIN, ADAPTIVE)
    directory = RunFolder(tmp_path / "run")
    summary = run(config, directory, Silent())
    reports = reports_of(directory)
    assert reports[0]["window_tokens"] == 16
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for now, following in zip(reports, [*reports[1:], None], strict=True):
        audits = now["window_audits"]
        ends = [0, 3] if following is None else [0, 3, 4]  # nothing follows the last step
        assert [audit["steps"] for audit in audits] == ends
        for audit in audits:
            assert audit["probe_rows"] == 4
            assert (audit["layers"], audit["layer_gap"]) == (
                reports[0]["window_audits"][0]["layers"],
                reports[0]["window_audits"][0]["layer_gap"],
            )
            found = zip((8, 16, 32), audit["cosines"], strict=True)
            admissible = [c for c, v in found if v >= 2**-0.5]
            assert audit["window_tokens"] == (admissible or [64])[0]  # from the report alone
        steps = [line for line in lines if line["round"] == now["round"]]
        assert [line["decision_age"] for line in steps] == [0, 1, 2, 0]
        assert now["decision_age"] == 2
        first, second = (min(audit["window_tokens"], now["window_tokens"]) for audit in audits[:2])
        assert [line["window_tokens"] for line in steps] == [first] * 3 + [second]
        assert now["tokens"]["probed"] > 4 * now["window_tokens"] or now["window_tokens"] == 64
        if following is not None:
            assert now["window_decision"] == audits[-1]
            assert following["window_tokens"] == audits[-1]["window_tokens"]
    assert reports[2]["window_decision"] is None
    again = run(config, RunFolder(tmp_path / "again"), Silent())
    assert again["policies"] == summary["policies"]
    assert again["tokens"]["generated"] == 0


class Stops(Silent):
    """Fails at the given step of training."""

    def __init__(self, step: int) -> None:
        self._left = step

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        self._left -= bool(count and stage == "train")
        if not self._left:
            raise ConnectionError("stopped")


def test_a_run_stopped_within_an_epoch_takes_the_same_windows(tmp_path: Path) -> None:
    settings = (*PLAIN, "rounds=2", ADAPTIVE, "train.checkpoint_steps=2")
    whole = run(small_config(tmp_path / "a", *settings), RunFolder(tmp_path / "a/run"), Silent())
    config, directory = small_config(tmp_path / "b", *settings), RunFolder(tmp_path / "b" / "run")
    for step in (3, 4):  # behind a checkpoint, and of the next call behind an audit
        with pytest.raises(ConnectionError):
            run(config, directory, Stops(step))
    assert run(config, directory, Silent())["policies"] == whole["policies"]
    one, other = reports_of(RunFolder(tmp_path / "a/run")), reports_of(directory)
    for field in ("window_tokens", "decision_age"):
        assert [report[field] for report in one] == [report[field] for report in other]
    decided = [
        [{k: v for k, v in audit.items() if "seconds" not in k} for audit in each["window_audits"]]
        for each in (*one, *other)
    ]
    assert decided[:2] == decided[2:]


def test_where_no_rollout_was_cut_finished_ones_are_audited(tmp_path: Path) -> None:
    window = (
        "rollouts.window={kind: adaptive, candidates: [8, 16], max_window_tokens: 208, start: 208, "
        "audit_steps: 2, threshold: 0.001}"
    )
    directory = RunFolder(tmp_path / "run")
    run(small_config(tmp_path, "rounds=2", "evaluation=null", window), directory, Silent())
    first, second = reports_of(directory)
    assert first["window_audits"][0]["probe_rows"] >= 2
    assert first["window_audits"][0]["steps"] == 0
    assert second["window_tokens"] == 8  # full rollouts are left again


def test_units_kept_from_a_longer_window_train_at_the_decided_one(tmp_path: Path) -> None:
    """Every candidate passes so low a threshold: 8 tokens are decided after a round at 32."""
    window = (
        "rollouts.window={kind: adaptive, candidates: [8, 16], max_window_tokens: 64, start: 32, "
        "probe_rows: 4, probe_share: 1, threshold: 0.001, audit_steps: null, "
        "objective: sampled, layers: 2}"
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
            f"start: 16, audit_steps: null, objective: {audited}}}"
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


def test_finished_rollouts_beside_probes_lose_their_draws() -> None:
    rows: Any = [row(0, tokens=6, stop=9, draws=2), row(1, tokens=5)]
    read = Probes(places=[(rows, 0), (rows, 1)]).read()
    assert collate(read, window_tokens=9).draws is None


def test_layers_without_adapters_are_no_last_layers() -> None:
    folder = MODELS / "ledger-student"
    lora = Lora(rank=2, targets=r".*layers\.0\..*q_proj")
    student = load_student(folder, lora=lora, initial=folder, gradient_checkpointing=False)
    assert [len(group) for group in parameter_groups(student, layers=None)] == [2]
    (group,) = parameter_groups(student, layers=1)
    assert len(group) == 2


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("candidates: [16, 8]", "expected ascending windows"),
        ("candidates: [16, 64]", "not below max_window_tokens 64"),
        ("candidates: [16], every_rounds: 2", "set audit_steps=null"),
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
