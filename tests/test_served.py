"""Teachers that are served: the same scores as in this process, whatever the network does."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as few_examples
from hypothesis import strategies as st

from opd_stream.engines import open_engine, server_client
from opd_stream.engines.base import ScoringSettings
from opd_stream.engines.server_client import BrokenAnswer, ServerClient, ServerOptions
from opd_stream.engines.server_engine import ServerEngine, probe_ids
from opd_stream.engines.server_forms import Completions, Question, Sglang, _entries, _scan_entries
from opd_stream.errors import UserError
from opd_stream.store.served import served_identity, served_teacher
from opd_stream.store.store import Store
from opd_stream.types import RolloutBatch, ScoreBatch
from tests.conftest import MODELS
from tests.teacher_server import NAME, TeacherServer, fake_teacher, seeded_faults

VOCAB, STOPS = 97, (5, 6, 90)
TEACHER, STUDENT = MODELS / "ledger-teacher", MODELS / "ledger-student"
APIS = ("completions", "vllm", "sglang")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of engine fake: a config and a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(
        f'{{"model_type": "qwen3", "vocab_size": {VOCAB}, "eos_token_id": 1}}'
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TEACHER / name).read_bytes())
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[TeacherServer]:
    with fake_teacher(folder) as server:
        yield server


def options_of(server: TeacherServer, **changes: Any) -> ServerOptions:
    fields = {"url": server.url, "model": NAME, "concurrency": 4, **changes}
    return ServerOptions.model_validate(fields)


def rollouts_of(rows: int, *, own: int = 0, draws: int = 0, seed: int = 0) -> RolloutBatch:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, rows)

    def ids(*shape: int) -> np.ndarray:
        return random.integers(0, VOCAB, shape).astype(np.int32)

    def distinct(tokens: int, count: int) -> np.ndarray:
        return np.array([random.permutation(VOCAB)[:count] for _ in range(tokens)], np.int32)

    return RolloutBatch(
        prompt_id=tuple(f"p{row}" for row in range(rows)),
        sample_index=np.zeros(rows, np.int32),
        prompt_ids=tuple(ids(3) for _ in range(rows)),
        completion_ids=tuple(ids(length) for length in lengths),
        behavior_logprobs=tuple(np.zeros(length, np.float32) for length in lengths),
        finish_reason=("length",) * rows,
        candidate_ids=tuple(ids(length, draws) for length in lengths) if draws else None,
        student_top_ids=tuple(distinct(length, own) for length in lengths) if own else None,
    )


def live(folder: Path, rollouts: RolloutBatch, settings: ScoringSettings) -> ScoreBatch:
    engine = open_engine(engine="fake", folder=folder, dtype="float32", batch_rows=8)
    return engine.score(rollouts, settings)


def assert_same(mine: ScoreBatch, other: ScoreBatch, *, atol: float = 2e-5) -> None:
    for name in (
        "teacher_logprobs",
        "teacher_top_ids",
        "teacher_top_logprobs",
        "teacher_tail_logprobs",
        "teacher_forced_logprobs",
        "candidate_teacher_logprobs",
    ):
        left, right = getattr(mine, name), getattr(other, name)
        assert (left is None) == (right is None), name
        for a, b in zip(left or (), right or (), strict=True):
            np.testing.assert_allclose(a, b, atol=atol, err_msg=name)


@pytest.mark.parametrize("api", APIS)
def test_scores_are_those_of_the_engine_behind_the_server(
    api: str, folder: Path, server: TeacherServer
) -> None:
    rollouts = rollouts_of(5, own=3, draws=2)
    settings = ScoringSettings(top_k=8, forced_ids=STOPS)
    engine = ServerEngine(folder, options_of(server, api=api))
    engine.check(settings, own_ids=True)
    assert_same(engine.score(rollouts, settings), live(folder, rollouts, settings))


def test_ids_from_a_limit_on_are_no_candidates(folder: Path, server: TeacherServer) -> None:
    rollouts = rollouts_of(3)
    settings = ScoringSettings(top_k=20, forced_ids=STOPS, vocabulary=93)
    for api in APIS:
        found = ServerEngine(folder, options_of(server, api=api)).score(rollouts, settings)
        assert max(ids.max() for ids in found.teacher_top_ids) < 93
        mass = np.exp(found.teacher_top_logprobs[0]).sum(1) + np.exp(found.teacher_tail_logprobs[0])
        np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_forced_ids_outside_the_candidates_are_marked_where_the_tail_holds_them(
    folder: Path, server: TeacherServer
) -> None:
    rollouts, settings = rollouts_of(6), ScoringSettings(top_k=8, forced_ids=STOPS)
    found = ServerEngine(folder, options_of(server, forced="tail")).score(rollouts, settings)
    exact = live(folder, rollouts, settings)
    assert_same(replace(found, teacher_forced_logprobs=exact.teacher_forced_logprobs), exact)
    told = 0
    for row, ids in enumerate(rollouts.completion_ids):
        known = (found.teacher_top_ids[row][:, :, None] == np.array(STOPS)).any(1)
        known |= ids[:, None] == np.array(STOPS)
        forced = found.teacher_forced_logprobs[row]
        assert (np.isneginf(forced) == ~known).all()
        np.testing.assert_allclose(
            forced[known], exact.teacher_forced_logprobs[row][known], atol=2e-5
        )
        told += int(known.sum())
    assert told  # some are candidates


def test_what_a_form_cannot_be_asked_for_is_refused_before_a_request(
    folder: Path, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd_stream.engines.server_engine.MAX_WHOLE_VOCABULARY", 10)
    engine = ServerEngine(folder, options_of(server))
    settings = ScoringSettings(top_k=8, forced_ids=STOPS)
    with pytest.raises(UserError, match=r"set teacher\.server\.forced=tail"):
        engine.check(settings, own_ids=False)
    with pytest.raises(UserError, match=r"leave out rollouts\.student_top_k"):
        engine.score(rollouts_of(1, own=2), settings)
    with pytest.raises(UserError, match="use codec compact or exact"):
        engine.score(rollouts_of(1), replace(settings, draws=4))
    with pytest.raises(UserError, match="the vocabulary has 97 tokens"):
        engine.check(replace(settings, top_k=98), own_ids=False)
    for call in (engine.sample, engine.extend):
        with pytest.raises(UserError, match="only scores"):
            call(rollouts_of(1), settings)  # type: ignore[arg-type]
    assert not server.requests


def test_faults_of_the_network_change_nothing(folder: Path) -> None:
    rollouts, settings = rollouts_of(24), ScoringSettings(top_k=8, forced_ids=STOPS)
    with fake_teacher(folder, fault=seeded_faults(1, 0.5)) as server:
        found = ServerEngine(folder, options_of(server, tries=60)).score(rollouts, settings)
    assert_same(found, live(folder, rollouts, settings))
    assert len(server.faults) > 4
    assert set(server.scored.values()) == {1}  # nothing is scored twice


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("429", "429 Too Many Requests: busy"),
        ("503", "503 Service Unavailable: busy"),
        ("reset", "RemoteDisconnected"),
        ("broken", "no JSON"),
        ("cut", "IncompleteRead"),
        ("short", "positions"),
        ("other_ids", "other ids than were sent"),
    ],
)
def test_after_the_last_try_one_line_says_what_happened(
    fault: str, words: str, folder: Path
) -> None:
    with fake_teacher(folder, fault=lambda number: fault) as server:
        engine = ServerEngine(folder, options_of(server, tries=3))
        with pytest.raises(UserError) as caught:
            engine.score(rollouts_of(1), ScoringSettings(top_k=4))
    line = str(caught.value)
    assert f"{server.url}/v1/completions could be used in 3 tries" in line
    assert words in line
    assert "\n" not in line
    assert server.requests == 3


def test_what_will_not_be_otherwise_later_is_told_at_once(
    folder: Path, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ScoringSettings(top_k=8, forced_ids=STOPS)

    def refused(**changes: Any) -> str:
        before = server.requests
        with pytest.raises(UserError) as caught:
            ServerEngine(folder, options_of(server, **changes)).check(settings, own_ids=False)
        assert server.requests <= before + 1
        return str(caught.value)

    assert "does not have model 'another'" in refused(model="another")
    assert f"it serves {NAME}" in refused(model="another")
    server.most_logprobs = 20
    assert "greater than max allowed: 20" in refused()
    server.key = "sk-secret"
    assert "no key was sent" in refused()
    assert "SECRET_KEY, which is not set" in refused(key_env="SECRET_KEY")
    monkeypatch.setenv("SECRET_KEY", "sk-wrong")
    line = refused(key_env="SECRET_KEY")
    assert "Bearer KEY" in line
    assert "sk-wrong" not in line
    monkeypatch.setenv("SECRET_KEY", "sk wrong\n")
    assert "sk wrong" not in refused(key_env="SECRET_KEY")
    monkeypatch.setenv("SECRET_KEY", "sk-secret")
    server.most_logprobs = VOCAB
    engine = ServerEngine(folder, options_of(server, key_env="SECRET_KEY"))
    engine.check(settings, own_ids=False)


def test_an_endpoint_without_log_probabilities_of_prompts_is_named() -> None:
    asked = Question(ids_L=np.arange(4), first=1, top_k=2)
    answer = b'{"choices": [{"text": "x", "prompt_logprobs": null}]}'
    with pytest.raises(UserError, match="answers /v1/completions without prompt_logprobs"):
        Completions("m").read(answer, asked)
    with pytest.raises(UserError, match="without input_token_logprobs"):
        Sglang("m").read(b'{"text": "x", "meta_info": {}}', asked)


def test_a_server_that_is_not_there_is_named(folder: Path) -> None:
    options = ServerOptions(url="http://127.0.0.1:9", model="m", tries=2)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1/completions .*ConnectionRefused"):
        ServerEngine(folder, options).probe()


@few_examples(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_scanning_and_parsing_an_answer_are_the_same(seed: int) -> None:
    random = np.random.default_rng(seed)
    texts = ['":{"logprob":-1,', "\\", "}},{", "漢", '"5":{"logprob":-9.5,"rank":1}', ""]
    positions: list[Any] = [None]
    for _ in range(random.integers(1, 6)):
        ids = random.permutation(200_000)[: random.integers(1, 9)].tolist()
        scale = 10.0 ** random.integers(-9, 3)
        positions.append(
            {
                str(number): {
                    "logprob": float(-random.random() * scale),
                    "rank": 1,
                    "decoded_token": texts[random.integers(len(texts))],
                }
                for number in ids
            }
        )
    answer = {"choices": [{"text": "{", "prompt_logprobs": positions}], "id": "a"}
    data = json.dumps(answer, separators=(",", ":"), ensure_ascii=bool(seed % 2)).encode()
    scanned, parsed = _scan_entries(data), _entries(data, "/v1/completions")
    assert scanned is not None
    for left, right in zip(scanned, parsed, strict=True):
        np.testing.assert_array_equal(left, right)
    spaced = json.dumps(answer).encode()
    assert _scan_entries(spaced) is None
    np.testing.assert_array_equal(_entries(spaced, "")[1], parsed[1])


def test_an_answer_without_spaces_and_one_with_them_are_read_alike(
    folder: Path, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, settings = rollouts_of(4, own=2), ScoringSettings(top_k=8, forced_ids=STOPS)
    for api in APIS:
        engine = ServerEngine(folder, options_of(server, api=api))
        found = engine.score(rollouts, settings)
        with monkeypatch.context() as patch:
            patch.setattr("tests.teacher_server._json", lambda value: _spaced(value))
            assert_same(engine.score(rollouts, settings), found, atol=0)


def _spaced(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def test_a_row_whose_log_probabilities_are_no_numbers_is_refused_alone(
    folder: Path, server: TeacherServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, settings = rollouts_of(3), ScoringSettings(top_k=8)
    bad = tuple(np.concatenate([rollouts.prompt_ids[1], rollouts.completion_ids[1]]).tolist())
    dense = TeacherServer.dense

    def broken(self: TeacherServer, ids: list[int]) -> np.ndarray:
        found = dense(self, ids)
        return np.full_like(found, np.nan) if tuple(ids) == bad else found

    monkeypatch.setattr(TeacherServer, "dense", broken)
    found = ServerEngine(folder, options_of(server, forced="tail")).score(rollouts, settings)
    assert set(found.refused) == {1}


def test_first_contact_names_a_teacher_and_later_ones_have_to_agree(
    folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    with fake_teacher(folder, noise=0.005) as server:
        options = options_of(server)
        assert served_identity(store, folder, options).weights_sha256 == "unread"
        first = served_identity(store, folder, options, first_contact=lambda engine: None)
        asked = server.requests
        again = served_identity(store, folder, options, first_contact=pytest.fail)
        assert (first, asked) == (again, server.requests)  # it is not asked again
        known = served_teacher(store, folder, options)
        assert known is not None
        assert 0.001 < known.noise < 0.02
        engine = ServerEngine(folder, options, expected=known.expected)
        engine.score(rollouts_of(3), ScoringSettings(top_k=8))
        assert engine.noise == known.noise
        other = options_of(server, revision="fp8")
        assert served_teacher(store, folder, other) is None


@pytest.mark.parametrize("change", ["weights", "precision", "permuted"])
def test_another_model_is_found_before_its_scores_are_returned(
    change: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    with fake_teacher(folder) as server:
        options = options_of(server)
        served_identity(store, folder, options, first_contact=lambda engine: None)
        known = served_teacher(store, folder, options)
        assert known is not None
        engine = ServerEngine(folder, options, expected=known.expected)
        rollouts, settings = rollouts_of(4), ScoringSettings(top_k=8)
        engine.score(rollouts, settings)
        dense, random = TeacherServer.dense, np.random.default_rng(0)
        order = random.permutation(VOCAB)

        def changed(self: TeacherServer, ids: list[int]) -> np.ndarray:
            if change == "permuted":
                return dense(self, ids)[:, order]
            found = dense(self, ids)
            return np.round(found * 8) / 8 if change == "precision" else found[::-1]

        monkeypatch.setattr(TeacherServer, "dense", changed)
        for ask in (
            lambda: engine.score(rollouts, settings),
            lambda: engine.check(settings, own_ids=False),
        ):
            with pytest.raises(UserError, match=r"another model answers at .* in the mean"):
                ask()


def test_servers_that_run_different_models_are_no_teacher(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, turns = TeacherServer.dense, itertools.count()

    def of_two(self: TeacherServer, ids: list[int]) -> np.ndarray:
        return dense(self, ids) - (0.5 if next(turns) % 2 else 0.0)

    monkeypatch.setattr(TeacherServer, "dense", of_two)
    store = Store(tmp_path / "store")
    with fake_teacher(folder) as server, pytest.raises(UserError, match="run different models"):
        served_identity(store, folder, options_of(server), first_contact=lambda engine: None)
    assert not (tmp_path / "store" / "teachers").exists()


def test_the_probe_is_spread_over_a_vocabulary() -> None:
    for vocabulary in (97, 606, 49_152, 151_936):
        ids = probe_ids(vocabulary)
        assert ids.min() >= 0
        assert ids.max() < vocabulary
        assert len(set(ids.tolist())) > 40


def test_a_pause_that_the_server_asks_for_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    with fake_teacher(folder, fault=lambda number: "429" if number == 1 else None) as server:
        client = ServerClient(options_of(server))
        monkeypatch.setattr(client._stopped, "wait", lambda pause: waited.append(pause))
        asked = Question(ids_L=np.arange(5), first=1, top_k=4)
        form = Completions(NAME)
        client.ask(form.path, form.question(asked), read=lambda data: data, most_bytes=2**20)
    assert waited == [0.0]


def test_an_answer_that_never_ends_is_not_kept() -> None:
    with pytest.raises(BrokenAnswer, match="2 of 3 tokens"):
        Completions("m").read(
            b'{"choices":[{"prompt_logprobs":[null,{"1":{"logprob":-1,"rank":1}}]}]}',
            Question(ids_L=np.arange(3), first=1, top_k=1),
        )
