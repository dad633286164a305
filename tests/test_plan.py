"""What `opd-stream plan` says before a run, against what the run then measures."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.forecast import forecast
from pipeline.forecast.amounts import Forecast
from pipeline.rounds import run
from pipeline.run_directory import RunDirectory
from stages.progress import Silent
from tests.conftest import small_config

ADAPTIVE = "rollouts.window={kind: adaptive, candidates: [16, 32], max_window_tokens: 48}"
LINEAR = "rollouts.window={kind: linear, h0: 24, delta: 8, every: 2, max_window_tokens: 64}"
CASES: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "adaptive": (ADAPTIVE, "evaluation=null"),
    "linear, kept units": (LINEAR, "staleness.max_policies=2", "evaluation=null"),
    "compact": ("scores.codec={kind: compact, mass: 0.99}", "evaluation=null", "rounds=1"),
    "sampled": (
        "scores.codec={kind: sampled, draws: 20}",
        "train.objective={kind: drawn_forward}",
        "evaluation=null",
        "rounds=1",
    ),
    "draws": ("rollouts.extra_draws=2", "train.objective={kind: mc}", "rounds=1"),
}
LINES = "no line"


def plan(folder: Path, *overrides: str, name: str = "run") -> Forecast:
    return forecast(small_config(folder, *overrides), RunDirectory(folder / name))


@pytest.fixture(scope="module", params=CASES, ids=str)
def planned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A plan before a run, the run's summary, and the plan after it."""
    folder, overrides = tmp_path_factory.mktemp("planned"), CASES[request.param]
    before = plan(folder, *overrides)
    found = {"case": request.param, "folder": folder, "before": before.as_json()}
    assert sorted(path.name for path in folder.iterdir()) == ["small.yaml"]  # nothing is written
    found["summary"] = run(small_config(folder, *overrides), RunDirectory(folder / "run"), Silent())
    found["after"] = plan(folder, *overrides).as_json()
    return found


def test_a_plan_after_the_run_agrees_with_what_was_measured(planned: dict[str, Any]) -> None:
    summary, total = planned["summary"], planned["after"]["total"]
    for name, tokens in summary["tokens"].items():
        assert total["tokens"][name] == tokens, name
    for name, flops in summary["flops"].items():
        assert total["flops"][name] == pytest.approx(flops, rel=1e-6), name
    assert total["cache_bytes"] == summary["cache_bytes"]
    left = planned["after"]["left"]
    assert not any([*left["tokens"].values(), *left["flops"].values(), left["cache_bytes"]])
    assert {stage["basis"] for stage in stages(planned["after"])} == {"measured"}
    assert [place["needed"] for place in planned["after"]["disk"]] == [0]


def test_a_plan_before_the_run_is_an_upper_bound(planned: dict[str, Any]) -> None:
    summary, total = planned["summary"], planned["before"]["total"]
    for name, tokens in summary["tokens"].items():
        assert total["tokens"][name] >= tokens > 0, name
    for name, flops in summary["flops"].items():
        assert total["flops"][name] >= flops > 0, name
    assert total["cache_bytes"] >= summary["cache_bytes"]
    assert planned["before"]["total"] == planned["before"]["left"]
    assert {stage["basis"] for stage in stages(planned["before"])} == {"full window"}
    written = sum(f.stat().st_size for f in (planned["folder"] / "store").rglob("*") if f.is_file())
    (place,) = planned["before"]["disk"]
    assert written <= place["needed"] <= 2.5 * written


def test_where_nothing_ends_early_the_plan_is_the_run(planned: dict[str, Any]) -> None:
    if planned["case"] != "fixed":
        pytest.skip("only where every row fills its window and every epoch is trained")
    summary, total = planned["summary"], planned["before"]["total"]
    for name, tokens in summary["tokens"].items():
        assert total["tokens"][name] == pytest.approx(tokens, rel=0.05), name
    for name, flops in summary["flops"].items():
        assert total["flops"][name] == pytest.approx(flops, rel=0.05), name


def stages(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage for here in found["rounds"] for stage in here["stages"]]
