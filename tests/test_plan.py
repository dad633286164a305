"""What `opd-stream plan` says before a run, against what the run then measures."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from opd_stream.config.sections import Lora
from opd_stream.costs import TokenCounts, counts_of, forward_flops, shape_of
from opd_stream.errors import UserError
from opd_stream.prompts import prompts_table
from opd_stream.store.codecs import Codec, CompactCodec, ExactCodec, SampledCodec, encode_scores
from opd_stream.store.shards import shard_bytes
from opd_stream.store.store import Store
from pipeline.cli import app
from pipeline.estimate import estimate
from pipeline.estimate.prompts import FastTokenizer
from pipeline.estimate.reading import read_inputs
from pipeline.estimate.result import BreakEven, Estimate
from pipeline.estimate.sizes import (
    PromptLengths,
    completions_of,
    expected_counts,
    policy_sizes,
    scores_sizes,
)
from pipeline.run_folder import RunFolder
from stages.checkpoints import weight_shapes
from stages.step import Silent
from tests.conftest import MODELS, SmallRuns, loaded_by, run, small_config, summary_of
from tests.test_codecs import random_scores, rollouts_of

ADAPTIVE = "rollouts.window={kind: adaptive, candidates: [16, 32], max_window_tokens: 48}"
LINEAR = "rollouts.window={kind: linear, h0: 24, delta: 8, every: 2, max_window_tokens: 64}"
CASES: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "adaptive": (ADAPTIVE, "evaluation=null"),
    "linear, kept units, compact": (
        LINEAR,
        "staleness.max_policies=2",
        "scores.codec={kind: compact, mass: 0.99}",
        "evaluation=null",
    ),
}


def plan(folder: Path, *overrides: str, name: str = "run") -> Estimate:
    return estimate(small_config(folder, *overrides), RunFolder(folder / name))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name == "adaptive" else []) for name in CASES
    ],
    ids=str,
)
def planned(
    request: pytest.FixtureRequest,
    small_runs: SmallRuns,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A plan before a run, the run's summary, and the plan after it."""
    folder, overrides = tmp_path_factory.mktemp("planned"), CASES[request.param]
    before = plan(folder, *overrides)
    found = {"case": request.param, "folder": folder, "before": before.as_json()}
    assert sorted(path.name for path in folder.iterdir()) == ["small.yaml"]  # nothing is written
    small_runs.copy(folder, *overrides)
    found["summary"] = summary_of(RunFolder(folder / "run"))
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
    # A kept unit trains on the prompts of the round before, which may be longer than those planned.
    slack = 1.05 if "kept" in planned["case"] else 1.0
    for name, flops in summary["flops"].items():
        assert total["flops"][name] * slack >= flops > 0, name
    assert total["cache_bytes"] >= summary["cache_bytes"]
    assert planned["before"]["total"] == planned["before"]["left"]
    assert {stage["basis"] for stage in stages(planned["before"])} == {"full window"}
    written = sum(f.stat().st_size for f in (planned["folder"] / "store").rglob("*") if f.is_file())
    (place,) = planned["before"]["disk"]
    checkpoints = (
        2
        * policy_sizes(MODELS / "ledger-student", small_config(planned["folder"]).train).checkpoint
    )  # removed by now
    assert written <= place["needed"] <= 1.5 * (written + checkpoints)


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


@pytest.fixture(scope="module")
def finished(small_runs: SmallRuns) -> Path:
    return small_runs("evaluation=null")


def test_half_a_run_is_counted_and_the_rest_follows_from_it(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    folder, settings = tmp_path / "copy", ("evaluation=null",)
    whole = json.loads((folder / "run" / "summary.json").read_text())
    store = Store(str(folder / "store"))
    second = whole["caches"][1][0]
    store.by_fingerprint("scores", second["scores"]).invalidate(1)
    for policy in store.folders("policies"):
        manifest = json.loads((policy / "manifest.json").read_text())
        if "optimizer" in manifest["inputs"]:
            (policy / "manifest.json").unlink()
    found = plan(folder, *settings).as_json()
    (generate, score, train) = found["rounds"][1]["stages"]
    assert [stage["store"] for stage in (generate, score, train)] == [
        "2 of 2 units",
        "1 of 2 units",
        "0 of 1 policy",
    ]
    assert (generate["basis"], score["basis"], train["basis"]) == (
        "measured",
        "estimated",
        "estimated",
    )
    assert 0 < score["left"]["tokens"] < score["tokens"]
    assert score["left"]["bytes"] > 0
    for name, tokens in whole["tokens"].items():
        assert found["total"]["tokens"][name] == pytest.approx(tokens, rel=0.05), name
    for name, flops in whole["flops"].items():
        assert found["total"]["flops"][name] == pytest.approx(flops, rel=0.05), name
    assert found["total"]["cache_bytes"] == pytest.approx(whole["cache_bytes"], rel=0.05)
    assert found["left"]["flops"]["generate"] == 0


def test_another_setting_finds_what_it_shares(finished: Path, tmp_path: Path) -> None:
    found = plan(finished, "evaluation=null", "train.learning_rate=2e-3", name="other").as_json()
    assert [stage["basis"] for stage in stages(found)] == [
        *("measured", "measured", "estimated"),  # the first round's rollouts are every run's
        *("estimated", "estimated", "estimated"),
    ]
    shorter = "rollouts.window={kind: fixed, tokens: 40}"
    expected = plan(finished, "evaluation=null", "rounds=1", shorter, name="shorter")
    assert {stage.basis for stage in expected.rounds[0].steps} == {"estimated"}
    shutil.copytree(finished / "store", tmp_path / "store")
    config = small_config(tmp_path, "evaluation=null", "rounds=1", shorter)
    measured = run(config, RunFolder(tmp_path / "run"), Silent())
    for name, tokens in measured["tokens"].items():
        assert expected.as_json()["total"]["tokens"][name] == pytest.approx(tokens, rel=0.05)
    assert expected.as_json()["total"]["cache_bytes"] == pytest.approx(
        measured["cache_bytes"],
        rel=0.1,  # of shards of four rows, whose heads are much of them
    )
    replay = (f"replay.run={finished / 'run'}", "train.objective={kind: lsm}", "evaluation=null")
    replayed = plan(finished, *replay, name="replay").as_json()
    assert [stage["stage"] for stage in stages(replayed)] == ["train", "train"]
    whole = json.loads((finished / "run" / "summary.json").read_text())
    assert replayed["left"]["tokens"]["trained"] == whole["tokens"]["trained"]
    assert replayed["break_even"] is None
    assert replayed["logits"] is None


lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@settings(max_examples=60)
@given(lengths_of_rows, st.integers(1, 60), st.integers(1, 300), st.integers(1, 300))
def test_measured_completions_bound_those_of_any_window(
    ends: list[int], prompt: int, measured_at: int, window: int
) -> None:
    """`ends`: where each rollout would end if no window cut it."""
    under = np.minimum(ends, measured_at)
    rows = under + prompt
    counts = {
        "rows": float(len(ends)),
        "tokens": float(rows.sum()),
        "completion_tokens": float(under.sum()),
        "pairs": float((rows * (rows + 1) / 2).sum()),
        "length_rows": float((np.array(ends) > measured_at).sum()),
    }
    prompts = PromptLengths(mean=prompt, mean_square=prompt**2)
    measured = completions_of(measured_at, counts)
    same = expected_counts(len(ends), measured_at, prompts, measured)
    assert same.completion_tokens == pytest.approx(counts["completion_tokens"])
    assert same.pairs == pytest.approx(counts["pairs"])
    other = expected_counts(len(ends), window, prompts, measured)
    assert other.completion_tokens >= np.minimum(ends, window).sum() - 1e-6
    full = expected_counts(len(ends), window, prompts, None)
    assert other.completion_tokens <= full.completion_tokens + 1e-6
    assert other.pairs <= full.pairs + 1e-6


def test_what_break_even_means() -> None:
    two_epochs = BreakEven(cache_flops=10, live_flops=20, train_flops=30)
    assert (two_epochs.runs, two_epochs.replays) == (0.5, 0)
    stopped_early = BreakEven(cache_flops=10, live_flops=4, train_flops=6)
    assert (stopped_early.runs, stopped_early.replays) == (2.5, 2)  # three runs in all
    assert stopped_early.cache_share_after_replays["3"] == pytest.approx(10 / 34)
    assert BreakEven(cache_flops=10, live_flops=0, train_flops=6).replays is None


@pytest.mark.parametrize(
    ("codec", "settings"),
    [
        (ExactCodec(), "{kind: exact}"),
        (ExactCodec(dtype="float32"), "{kind: exact, dtype: float32}"),
        (CompactCodec(), "{kind: compact}"),
        (SampledCodec(draws=8), "{kind: sampled, draws: 8}"),
    ],
)
def test_an_unmeasured_shard_is_no_larger_than_planned(
    codec: Codec, settings: str, tmp_path: Path
) -> None:
    objective = "{kind: drawn_forward}" if "sampled" in settings else "{kind: bucket}"
    config = small_config(
        tmp_path, f"scores.codec={settings}", "scores.top_k=8", f"train.objective={objective}"
    )
    lengths = [90, 1, 40, 77] * 20
    scores = random_scores(lengths, top_k=8, vocabulary=50_000, forced=2, seed=0)
    if isinstance(codec, SampledCodec):
        even = tuple(np.full_like(top, -np.log(8)) for top in scores.teacher_top_logprobs)
        scores = replace(scores, teacher_top_logprobs=even)
    size = len(shard_bytes(encode_scores(codec, scores, rollouts_of(scores))[0])[0])
    counts = TokenCounts(tokens=sum(lengths), completion_tokens=sum(lengths), pairs=0)
    planned = scores_sizes(config, forced=2, vocabulary=50_000, width=64).bytes(
        counts, len(lengths), 1
    )
    assert size <= planned <= 5 * size + 800_000


def test_adapters_and_weights_are_counted_from_the_checkpoint(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = MODELS / "ledger-student"
    for targets in ("all-linear", ("q_proj", "down_proj"), r".*\.[kv]_proj"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        weights = sum(parameter.numel() for parameter in model.parameters())
        named = targets if isinstance(targets, str) else list(targets)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=named))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        train = small_config(tmp_path).train
        lora = Lora(rank=4, targets=targets)
        sizes = policy_sizes(folder, train.model_copy(update={"lora": lora}))
        assert sizes.checkpoint == 12 * trained
        assert sizes.state == 8 * trained
        assert sizes.policy == pytest.approx(4 * weights + 4 * trained, abs=40_000)


@pytest.mark.parametrize("template", ["{prompt}\n", "Q: {prompt}\nA:"])
def test_prompts_are_tokenised_as_the_run_does(template: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"prompts.template={{kind: raw, text: {json.dumps(template)}}}")
    folder = config.student.path
    from transformers import AutoTokenizer

    fast = FastTokenizer.of(folder)
    assert prompts_table(config.prompts, fast).equals(
        prompts_table(config.prompts, AutoTokenizer.from_pretrained(folder))
    )


CHATML = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>{% endfor %}<bos>assistant\n"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def chatty(folder: Path, template: str) -> str:
    """The student with a chat template, as an override."""
    shutil.copytree(MODELS / "ledger-student", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template})
    )
    return f"student.path={folder}"


CHAT = "prompts.template={kind: chat, system: Be brief.}"


def test_chat_prompts_are_measured_before_a_run_as_the_run_makes_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = small_config(tmp_path, chatty(tmp_path / "student", CHATML), CHAT)
    found = read_inputs(config)
    table = prompts_table(config.prompts, AutoTokenizer.from_pretrained(config.student.path))
    assert found.prompts.tokens.tolist() == list(map(len, table["prompt_ids"].to_pylist()))
    assert not any("max_prompt_tokens" in note for note in found.notes)
    assert not list((tmp_path / "store").glob("prompts/*"))


@pytest.mark.parametrize(
    ("rows", "settings", "line"),
    [
        ([{"prompt": "a"}], (CHAT,), "does not take prompt 'row-0': no system"),
        ([{"prompt": "a"}], ("prompts.template={kind: chat}",), "leaves out the user turn 'a'"),
        ([{"prompt": "a"}, {"question": "b"}], (), r":2 has no field 'prompt'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], (), "is a list of messages and"),
        ([{"prompt": "a " * 90}], ("prompts.max_prompt_tokens=20",), "the limit is 20"),
        ([{"prompt": "a"}], ("rollouts.prompts_per_round=2",), "is 2 but there are 1 prompts"),
        (
            [{"prompt": "a", "answer": "none"}],
            ("prompts.answer_field=answer", "rollouts.keep={judge: {kind: final_number}}"),
            "none of 1 prompts has a reference answer that judge final_number can read",
        ),
        (
            [{"prompt": "a", "completion": None}],
            ("prompts.completion_field=completion", "rollouts.given_share=1"),
            "asks for 1 given rollouts a round, and 0 of the 1 prompts of round 0 have",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "c"}],
            ("prompts.completion_field=completion", "rollouts.given_share=1"),
            "rows.jsonl:2 has no field 'completion'; it has prompt; set completion_field, or write",
        ),
        ([{"prompt": "a"}], ("teacher.template={kind: chat}",), "^teacher.template: template.kind"),
        (
            [{"prompt": "a"}],
            ("teacher.template={kind: raw, text: '" + "late " * 3000 + "{prompt}'}",),
            "the teacher reads 2048",
        ),
    ],
)
def test_what_a_run_refuses_of_prompts_the_plan_refuses_in_the_same_line(
    rows: list[Any], settings: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config(
        tmp_path,
        chatty(tmp_path / "student", NO_SYSTEM),
        "evaluation=null",
        "rollouts.prompts_per_round=1",
        f"prompts={{kind: jsonl, path: {path}}}",
        *settings,
    )
    with pytest.raises(UserError, match=line) as planned:
        estimate(config, RunFolder(tmp_path / "run"))
    with pytest.raises(UserError) as refused:
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert str(planned.value) == str(refused.value)


@pytest.mark.parametrize("kind", ["jsonl", "datasets"])
def test_a_large_source_is_looked_at_and_measured_at_its_beginning(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.estimate.prompts.MOST_PROMPTS", 10)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a " * n}) + "\n" for n in range(1, 31)))
    place = f"path: {path}" if kind == "jsonl" else f"path: json, data_files: {path}"
    settings = f"prompts={{kind: {kind}, {place}, max_prompt_tokens: 9, long_prompts: skip}}"
    found = read_inputs(small_config(tmp_path, settings, "evaluation=null"))
    assert (found.prompts.is_whole, found.prompts.rows) == (False, 30 if kind == "jsonl" else None)
    assert found.prompts.tokens.max() <= 9
    assert any("prompts: measured and checked on the first 10 rows" in n for n in found.notes)
    assert any("rows are left out: longer than" in note for note in found.notes)


def test_a_teacher_with_a_longer_prompt_costs_more_and_the_student_does_not(tmp_path: Path) -> None:
    longer = "teacher.template={kind: raw, text: '" + "late " * 50 + "{prompt}'}"
    plain, other = (
        plan(tmp_path, "rounds=1", "evaluation=null", *more).rounds[0] for more in ((), (longer,))
    )
    flops = {(p.kind.name, t): p.left.flops for t, r in enumerate((plain, other)) for p in r.steps}
    assert flops["generate", 0] == flops["generate", 1]
    assert flops["score", 1] > 1.3 * flops["score", 0]
    (found,) = (step for step in other.steps if step.kind.name == "score")
    lengths = read_inputs(small_config(tmp_path, "evaluation=null", longer)).teacher_prompts
    counts = [
        counts_of(prompt_tokens=int(n), completion_tokens=48) for n in lengths[None].lengths.tokens
    ]
    folder = MODELS / "ledger-teacher"
    shape = shape_of(json.loads((folder / "config.json").read_text()), weight_shapes(folder))
    mean = sum(forward_flops(shape, each) for each in counts) / len(counts)
    assert found.left.flops == pytest.approx(found.left.rows * mean, rel=0.02)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "plan", *arguments]


def test_the_command_answers_at_once_and_without_torch(finished: Path) -> None:
    small_config(finished, "evaluation=null")
    settings = ["--set", "evaluation=null", "--run-dir", str(finished / "run")]
    said, loaded, seconds = loaded_by("plan", str(finished / "small.yaml"), *settings)
    assert loaded == set()
    assert seconds < 2
    assert "2 of 2 units" in said
    assert "teacher-scored tokens: 0 to come" in said


def test_json_is_the_plan_and_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_config(tmp_path)
    arguments = ["plan", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    told = CliRunner().invoke(app, [*arguments, "--json"])
    assert told.exit_code == 0
    assert json.loads(told.stdout) == plan(tmp_path).as_json()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    full = CliRunner().invoke(app, arguments)
    assert full.exit_code == 1
    (warning,) = [line for line in full.stdout.splitlines() if line.startswith("warning: ")]
    assert "does not have the room" in warning
    assert "1.0 MB free" in warning


def test_what_the_run_would_refuse_is_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a run with other settings"):
        plan(finished, "evaluation=null", "seed=4")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    cases = {
        "rollouts.prompts_per_round=64": "there are 32 prompts",
        "prompts.max_prompt_tokens=3": "the limit is 3",
        "scores.forced_tokens=[nonsense]": "no token of",
        "scores.top_k=1000": "the teacher has 606 tokens",
        f"store={tmp_path / 'file'}": "is a file; expected a folder",
        f"student.path={tmp_path / 'empty'}": "is no checkpoint",
        f"replay.run={tmp_path / 'empty'}": "has no summary.json",
    }
    for override, expected in cases.items():
        with pytest.raises(UserError, match=expected) as refused:
            plan(tmp_path, override)
        assert "\n" not in str(refused.value)
    said = subprocess.run(
        command(str(tmp_path / "small.yaml"), "--set", "rounds=none"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, len(said.stderr.splitlines())) == (2, 1)


def test_a_window_that_does_not_fit_the_context_is_refused_as_by_run(tmp_path: Path) -> None:
    window, directory = "rollouts.window={kind: fixed, tokens: 4000}", tmp_path / "run"
    with pytest.raises(UserError, match="the student reads 2048; lower the window") as planned:
        plan(tmp_path, window)
    with pytest.raises(UserError) as refused:
        run(small_config(tmp_path, window), RunFolder(directory), Silent())
    assert str(refused.value) == str(planned.value)
    assert not directory.exists()


def test_large_weights_are_not_read_and_nothing_is_claimed_for_them(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.estimate.reading.MOST_BYTES", 1_000)
    known = plan(finished, "evaluation=null")
    assert known.sum(left=True).flops == 0  # the run remembered their digests
    monkeypatch.setattr(
        "opd_stream.store.policy._remembered", lambda path, cache, reads: cache / "none"
    )
    unknown = plan(finished, "evaluation=null")
    assert unknown.sum(left=True) == unknown.sum()
    assert sum("too large to read" in note for note in unknown.notes) == 2
