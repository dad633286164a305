"""One tiny run of every method's config, held bit for bit to what it gave before.

`tests/golden.json` has, for every config, the fingerprints of all recipes, the digests of all
policies, token counts and decisions. What follows from the code alone is compared on every machine;
weights are compared on machines like the one that recorded them: kernels round differently
elsewhere.
A change that is meant to change a recipe or a result records the file again:

    python -m tests.test_methods             # all cases
    python -m tests.test_methods bounded     # these alone
"""

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from opd_stream.config import Config
from opd_stream.config_file import load_config
from opd_stream.store.store import Store
from pipeline.rounds import rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from stages.step import Silent
from tests.conftest import run

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
TINY = (
    "train.warmup_steps=0",
    "executor=local",
    "evaluation=null",
    "prompts.count=16",
    "rollouts.prompts_per_round=8",
    "scores.top_k=4",
    "train.rows_per_step=4",
)
SHORT = {  # windows of a few tokens for methods whose window is the point
    "rollouts.window.tokens": 24,
    "rollouts.window.max_window_tokens": 24,
    "rollouts.window.h0": 8,
    "rollouts.window.delta": 4,
    "rollouts.window.candidates": [8, 16],
    "rollouts.window.start": 8,
}
MORE = {  # what no method's config has: name -> (config, settings)
    "lora": ("quickstart.yaml", ("train.lora={rank: 4}",)),
    "bf16": ("quickstart.yaml", ("train.precision=bf16-mixed",)),
    "gradient_checkpointing": ("quickstart.yaml", ("train.gradient_checkpointing=true",)),
    "compact": ("quickstart.yaml", ("scores.codec={kind: compact}",)),
    "sampled": (
        "quickstart.yaml",
        ("scores.codec={kind: sampled, draws: 8}", "train.objective={kind: sampled_pg}"),
    ),
    "ahead": ("quickstart.yaml", ("rollouts.ahead=true", "rounds=3")),
    "refresh_windows": (
        "methods/refresh.yaml",
        ("rollouts.window={kind: linear, h0: 8, delta: 8, every: 4, max_window_tokens: 24}",),
    ),
}
CASES = {path.stem: (f"methods/{path.name}", ()) for path in METHODS} | MORE
QUICK = ("adwin", "ahead", "effopd", "esr", "hybrid", "lora", "refresh_windows", "sampled")


def machine() -> str:
    """What decides how floating-point sums round."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    return f"{versions}, {model}, {torch.backends.cpu.get_cpu_capability()}"


def tiny_config(name: str, folder: Path) -> Config:
    """The config of a case, shrunk to a few seconds."""
    path, more = CASES[name]
    plain = load_config(ROOT / "configs" / path, list(more))
    names = set(type(plain.rollouts.window).model_fields)
    short = [f"{field}={value}" for field, value in SHORT.items() if field.split(".")[-1] in names]
    given = any(setting.startswith("rounds=") for setting in more)
    rounds = [] if given else [f"rounds={min(2, plain.rounds)}"]
    settings = [*TINY, *more, *short, *rounds, f"store={folder / 'store'}"]
    return load_config(ROOT / "configs" / path, settings)


def record_of(config: Config, summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a run did, as far as it must not change."""
    recipes: dict[str, list[str]] = {}
    store = Store(config.store)
    for kind in ("prompts", "rollouts", "scores", "policies"):
        recipes[kind] = sorted(recipe.fingerprint for recipe in store.recipes(kind))
    rounds: list[dict[str, Any]] = []
    for path in sorted((folder / "rounds").glob("*/report.json")):
        report = json.loads(path.read_text())
        window = report["window_decision"]
        rounds.append(
            {
                "window_tokens": report["window_tokens"],
                "steps": report["steps"],
                "tokens": report["tokens"],
                "epochs": [epoch["action"] for epoch in report["epochs"]],
                "units": [unit["action"] for unit in report["unit_decisions"]],
                "window_decision": None if window is None else window["window_tokens"],
                "extrapolations": [done["kept"] for done in report["extrapolations"]],
                "policy": report["policy"]["weights_sha256"],
            }
        )
    first = json.loads((folder / "rounds" / "0000" / "plan.json").read_text())
    return {
        "first_round": {
            "policy": first["policy"],
            "caches": [[cache["rollouts"], cache["scores"]] for cache in first["caches"]],
        },
        "recipes": recipes,
        "rounds": rounds,
    }


@pytest.mark.parametrize("name", CASES)
def test_a_method_begins_as_it_began_before(name: str, tmp_path: Path) -> None:
    """The names of its first artifacts, which follow from the config and the code alone."""
    here = next(rounds(open_setup(tiny_config(name, tmp_path))))
    caches = [
        [cache.rollouts.artifact.fingerprint, cache.scores.artifact.fingerprint]
        for cache in here.caches
    ]
    for recorded in json.loads(GOLDEN.read_text()).values():
        assert recorded[name]["first_round"]["policy"] == here.policy.fingerprint
        assert recorded[name]["first_round"]["caches"] == caches


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES],
)
def test_a_method_gives_what_it_gave_before(name: str, tmp_path: Path) -> None:
    config = tiny_config(name, tmp_path)
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    assert summary["finished"]
    assert summary["steps"] >= 2 * config.rounds
    weights = [policy["weights_sha256"] for policy in summary["policies"]]
    assert len(set(weights)) == config.rounds + 1
    found = record_of(config, summary, tmp_path / "run")
    golden = json.loads(GOLDEN.read_text())
    recorded = golden[machine()] if machine() in golden else next(iter(golden.values()))
    assert found["first_round"] == recorded[name]["first_round"]
    if machine() not in golden:
        pytest.skip(f"weights were recorded on {', '.join(golden)}; this is {machine()}")
    assert {key: found[key] for key in recorded[name]} == recorded[name]


def test_every_method_is_on_its_page() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    assert len(METHODS) >= 10
    for path in METHODS:
        assert f"`{path.name}`" in page


def main() -> None:
    """Record what cases give on this machine: those named on the command line, or all."""
    torch.set_num_threads(1)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    found: dict[str, Any] = {}
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = tiny_config(name, Path(folder))
            summary = run(config, RunFolder(Path(folder) / "run"), Silent())
            found[name] = record_of(config, summary, Path(folder) / "run")
            print(name, summary["steps"], "steps", flush=True)
    for before in golden.values():  # what no machine changes; the rest is known there alone
        for name, record in found.items():
            first = {"first_round": record["first_round"]}
            if before.get(name, {}).get("first_round") != first["first_round"]:
                before[name] = {**before.get(name, {}), **first}
                before[name].pop("recipes", None)
    golden[machine()] = {**golden.get(machine(), {}), **found}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
