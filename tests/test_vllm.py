"""vLLM for real, where it is installed (`make test-vllm`); reading its output, everywhere."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_stream.engines import open_engine
from opd_stream.engines.base import Engine, SamplingSettings, ScoringSettings, VllmOptions
from opd_stream.engines.vllm_scores import (
    asked_ids,
    left_out,
    scores_of_asked,
    scores_of_whole,
    whole_distribution,
)
from opd_stream.errors import UserError
from opd_stream.store.reader import ScoredRows
from opd_stream.store.store import Store
from opd_stream.tasks.ledger import make_problems, prompt_text
from opd_stream.types import PromptBatch, RolloutBatch
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import MODELS, reports_of, run, small_config

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed; make test-vllm installs it"
)
SMALL = VllmOptions(kv_cache_bytes=1 << 26, max_context=512, compiled=False)
STUDENT, TEACHER = MODELS / "ledger-student", MODELS / "ledger-teacher"
STOPS = (1,)


@dataclass
class Flat:
    """vLLM's flat list of log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]
    start_indices: list[int]
    end_indices: list[int]


@dataclass
class Output:
    """vLLM's output of a prompt, as far as it is read."""

    prompt_logprobs: Flat
    prompt_token_id_logprobs: np.ndarray


def test_asked_ids_and_whole_distributions_are_read_to_the_same_scores() -> None:
    random = np.random.default_rng(0)
    vocab, prompt, tokens, top_k, forced = 11, 3, 4, 3, (2, 7)
    logits = random.normal(size=(tokens, vocab))
    logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    ids = random.integers(0, vocab, prompt + tokens).astype(np.int32)
    row = RolloutBatch(
        prompt_id=("p",),
        sample_index=np.zeros(1, np.int32),
        prompt_ids=(ids[:prompt],),
        completion_ids=(ids[prompt:],),
        behavior_logprobs=(np.zeros(tokens, np.float32),),
        finish_reason=("length",),
    )
    asked = asked_ids(row, 0, forced)
    whole = scores_of_whole(
        whole_distribution(flat_of(logprobs, ids[prompt:], vocab, before=prompt), tokens, vocab),
        asked,
        top_k=top_k,
        forced=len(forced),
    )
    part = scores_of_asked(
        Output(
            flat_of(logprobs, ids[prompt:], top_k, before=prompt),
            np.take_along_axis(logprobs, asked, axis=1),
        ),
        tokens,
        top_k=top_k,
        forced=len(forced),
        limit=None,
        vocabulary=logprobs.shape[1],
    )
    for name, values in whole._asdict().items():
        np.testing.assert_allclose(getattr(part, name), values, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(whole.asked[:, 0], logprobs[np.arange(tokens), ids[prompt:]])
    np.testing.assert_allclose(whole.forced, logprobs[:, list(forced)])


def test_ids_without_a_token_are_left_out_by_the_shortest_list() -> None:
    assert left_out(None, 100, by_bias_only=True) == {}
    assert left_out(98, 100, by_bias_only=True) == {"logit_bias": {98: -np.inf, 99: -np.inf}}
    assert left_out(2, 2000, by_bias_only=False) == {"allowed_token_ids": [0, 1]}
    with pytest.raises(UserError, match="logits for 2000 ids, of which 2 may be drawn"):
        left_out(2, 2000, by_bias_only=True)


def flat_of(logprobs_TV: np.ndarray, ids_T: np.ndarray, top_k: int, *, before: int) -> Flat:
    """An empty first position, then the token itself and its top K for every other one."""
    flat = Flat([], [], [0], [0])
    vocab = logprobs_TV.shape[1]
    rows = [np.log(np.full(vocab, 1 / vocab))] * (before - 1) + list(logprobs_TV)
    tokens = [0] * (before - 1) + ids_T.tolist()
    for row, token in zip(rows, tokens, strict=True):
        order = np.argsort(-row, kind="stable")[:top_k]
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids += [token, *order.tolist()]
        flat.logprobs += [float(row[token]), *(float(row[i]) for i in order)]
        flat.end_indices.append(len(flat.token_ids))
    return flat


def prompts_of(count: int) -> PromptBatch:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STUDENT, local_files_only=True)
    problems = make_problems(count=count, seed=5)
    return PromptBatch(
        prompt_id=tuple(problem.problem_id for problem in problems),
        prompt_ids=tuple(
            np.array([tokenizer.bos_token_id, *tokenizer.encode(prompt_text(problem))], np.int32)
            for problem in problems
        ),
    )


@pytest.fixture(scope="module")
def student() -> Engine:
    return open_engine(engine="vllm", folder=STUDENT, dtype="float32", batch_rows=8, vllm=SMALL)


def sample(engine: Engine, prompts: PromptBatch, **changes: Any) -> RolloutBatch:
    rows = {
        name: changes.pop(name) for name in ("samples_per_prompt", "extra_draws") if name in changes
    }
    settings: dict[str, Any] = {"window_tokens": 200, "seed": 3, "stop_ids": STOPS, **changes}
    return engine.sample(prompts, SamplingSettings(**settings), **{"samples_per_prompt": 2, **rows})


@needs_vllm
def test_vllm_and_transformers_agree_on_the_same_ids(student: Engine) -> None:
    rollouts = sample(student, prompts_of(6))
    reference = open_engine(engine="transformers", folder=STUDENT, dtype="float32", batch_rows=8)
    mine, other = (
        engine.score(rollouts, ScoringSettings(top_k=8, forced_ids=STOPS))
        for engine in (student, reference)
    )
    for row in range(len(rollouts)):
        np.testing.assert_allclose(
            mine.teacher_logprobs[row], other.teacher_logprobs[row], atol=2e-3
        )
        np.testing.assert_allclose(
            mine.teacher_forced_logprobs[row],
            other.teacher_forced_logprobs[row],
            atol=5e-3,
            rtol=1e-3,
        )
        same = (mine.teacher_top_ids[row] == other.teacher_top_ids[row]).mean()
        assert same > 0.98
        np.testing.assert_allclose(
            rollouts.behavior_logprobs[row], other.teacher_logprobs[row], atol=2e-3
        )


@needs_vllm
def test_greedy_rollouts_are_those_of_transformers(student: Engine) -> None:
    reference = open_engine(engine="transformers", folder=STUDENT, dtype="float32", batch_rows=8)
    settings: dict[str, Any] = {"temperature": 0.0, "samples_per_prompt": 1}
    mine, other = (sample(engine, prompts_of(8), **settings) for engine in (student, reference))
    same = [
        a.tolist() == b.tolist()
        for a, b in zip(mine.completion_ids, other.completion_ids, strict=True)
    ]
    assert sum(same) >= 7  # a tie in float32 may fall either way


@needs_vllm
def test_extending_keeps_what_was_there(student: Engine) -> None:
    short = sample(student, prompts_of(4), window_tokens=20)
    long = student.extend(short, SamplingSettings(window_tokens=60, seed=3, stop_ids=STOPS))
    scores = student.score(long, ScoringSettings(top_k=1, forced_ids=()))
    for row, ids in enumerate(long.completion_ids):
        assert ids[:20].tolist() == short.completion_ids[row].tolist()
        assert len(ids) > 20 or short.finish_reason[row] == "stop"
        np.testing.assert_allclose(
            long.behavior_logprobs[row], scores.teacher_logprobs[row], atol=2e-3
        )


@needs_vllm
def test_new_weights_meet_no_old_cache(student: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the reset of the prefix cache, keys of the old weights would be read."""
    prompts = prompts_of(1)
    long_prompt = PromptBatch(
        prompt_id=("long",), prompt_ids=(np.concatenate([prompts.prompt_ids[0]] * 4),)
    )
    reference = open_engine(engine="transformers", folder=TEACHER, dtype="float32", batch_rows=8)

    def error_of_the_teacher() -> float:
        """Of the first token's log-probability, when its weights come after the student's."""
        student.load(TEACHER)
        found = sample(student, long_prompt, window_tokens=1)
        expected = reference.score(found, ScoringSettings(top_k=1, forced_ids=())).teacher_logprobs
        return max(
            float(np.abs(a - b).max())
            for a, b in zip(found.behavior_logprobs, expected, strict=True)
        )

    student.load(STUDENT)
    sample(student, long_prompt, window_tokens=1)
    assert error_of_the_teacher() < 5e-3
    student.load(STUDENT)
    sample(student, long_prompt, window_tokens=1)
    monkeypatch.setattr(type(student), "_reset_prefix_cache", lambda self: None)
    assert error_of_the_teacher() > 5e-2
    monkeypatch.undo()
    student.load(STUDENT)


@needs_vllm
def test_weights_that_were_not_asked_for_are_noticed(student: Any) -> None:
    student._llm.llm_engine.set_weight_version("another")
    with pytest.raises(RuntimeError, match="sampled with weights"):
        sample(student, prompts_of(1), window_tokens=4)
    student.load(STUDENT)


@needs_vllm
def test_what_vllm_cannot_serve_is_refused(
    student: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(1)
    with pytest.raises(UserError, match="which engine vllm cannot draw"):
        sample(student, prompts, extra_draws=1)
    with pytest.raises(UserError, match="needs draws from the teacher"):
        student.score(
            sample(student, prompts, window_tokens=4),
            ScoringSettings(top_k=1, draws=4),
        )
    with pytest.raises(UserError, match="the model reads 512; lower the window"):
        sample(student, prompts, window_tokens=500)
    monkeypatch.setattr("opd_stream.engines.vllm_engine.MAX_WHOLE_VOCABULARY", 100)
    with pytest.raises(UserError, match=r"use teacher\.engine=transformers"):
        student.score(
            sample(student, prompts, window_tokens=4), ScoringSettings(top_k=1, forced_ids=STOPS)
        )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a vLLM server that runs the teacher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {"--model": TEACHER, "--served-model-name": "ledger", "--dtype": "float32"}
    words |= {"--max-logprobs": -1, "--max-model-len": 512, "--host": "127.0.0.1", "--port": port}
    small = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(word) for pair in words.items() for word in pair]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, env={**os.environ, **small}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait()


@needs_vllm
@pytest.mark.parametrize("forced", ["exact", "tail"])
def test_a_round_with_a_teacher_that_vllm_serves(forced: str, served: str, tmp_path: Path) -> None:
    """Its scores are those of the same teacher in this process."""
    options = f"{{url: '{served}', model: ledger, forced: {forced}}}"
    teachers = {
        "served": ["teacher.engine=server", f"teacher.server={options}"],
        "live": ["teacher.engine=transformers"],
    }
    found: dict[str, ScoredRows] = {}
    for name, overrides in teachers.items():
        more = ("rounds=1", "evaluation=null", "scores.codec={kind: exact, dtype: float32}")
        config = small_config(tmp_path / name, *more, *overrides)
        run(config, RunFolder(tmp_path / name / "run"), Silent())
        (report,) = reports_of(RunFolder(tmp_path / name / "run"))
        store = Store(config.store)
        scores = store.by_fingerprint("scores", report["caches"][0]["scores"])
        found[name] = ScoredRows([(store.scored_rollouts(scores), scores)])
    assert len(found["served"]) == len(found["live"]) == 8
    for mine, other in zip(found["served"], found["live"], strict=True):
        assert mine.completion_ids.tolist() == other.completion_ids.tolist()
        np.testing.assert_allclose(mine.teacher_logprobs, other.teacher_logprobs, atol=2e-3)
        probable = other.teacher_top_logprobs > -7
        np.testing.assert_allclose(
            mine.teacher_top_logprobs[probable], other.teacher_top_logprobs[probable], atol=2e-3
        )
        known = np.isfinite(mine.teacher_forced_logprobs)
        assert known.all() == (forced == "exact")
        np.testing.assert_allclose(
            mine.teacher_forced_logprobs[known], other.teacher_forced_logprobs[known], atol=1e-2
        )


@needs_vllm
def test_two_rounds_with_vllm_as_student_and_teacher(tmp_path: Path) -> None:
    env = "{OMP_WAIT_POLICY: PASSIVE, VLLM_CPU_KVCACHE_SPACE: '1'}"
    vllm = "{kv_cache_bytes: 67108864, max_context: 512, compiled: false}"
    config = small_config(
        tmp_path,
        "executor=ray",
        "student.engine=vllm",
        "teacher.engine=vllm",
        f"student.vllm={vllm}",
        f"teacher.vllm={vllm}",
        f"pools.student.env={env}",
        f"pools.teacher.env={env}",
        "evaluation=null",
    )
    summary = run(config, RunFolder(tmp_path / "run"), Silent())
    assert summary["finished"]
    reports = reports_of(RunFolder(tmp_path / "run"))
    assert all(report["sampler_gap"] < 2e-3 for report in reports)  # the new weights, each round
    assert reports[0]["policy"]["weights_sha256"] != reports[1]["policy"]["weights_sha256"]
