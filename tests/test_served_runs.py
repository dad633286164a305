"""Runs whose teacher is served by a stand-in server, killed and resumed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_stream.engines import open_engine, server_client
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact
from opd_stream.store.reader import ScoredRows
from opd_stream.store.served import ServedTeacher
from opd_stream.store.store import Store
from opd_stream.store.verification import Surroundings, damages, examine
from pipeline.doctor.served import served as served_check
from pipeline.doctor.subject import Subject
from pipeline.estimate import estimate
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from stages.step import Silent
from tests.conftest import MODELS, Command, SmallRuns, reports_of, run, small_config
from tests.teacher_server import NAME, TeacherServer, seeded_faults

TEACHER = MODELS / "ledger-teacher"
VOCAB = 606
SMALL = (
    "rounds=1",
    "evaluation=null",
    "held_out_prompts=0",
    "rollouts.window.tokens=12",
    "rollouts.prompts_per_round=4",
    "prompts_per_unit=1",
    "staleness.max_epochs=1",
    "scores.codec={kind: exact, dtype: float32}",
)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a served teacher needs of its files: no weights."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    folder.mkdir()
    for path in TEACHER.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    engine = open_engine(engine="transformers", folder=TEACHER, dtype="float32", batch_rows=8)
    with TeacherServer(engine, VOCAB) as server:
        yield server


def served(server: TeacherServer, files: Path, **changes: Any) -> list[str]:
    options = {"url": server.url, "model": NAME, "concurrency": 2, **changes}
    return [
        f"teacher.path={files}",
        "teacher.engine=server",
        f"teacher.server={json.dumps(options)}",
    ]


def scores_of(folder: Path) -> tuple[Artifact, ScoredRows]:
    (report,) = reports_of(RunFolder(folder / "run"))
    store = Store(folder / "store")
    scores = store.by_fingerprint("scores", report["caches"][0]["scores"])
    return scores, ScoredRows([(store.scored_rollouts(scores), scores)])


@pytest.mark.parametrize("forced", [pytest.param("exact", marks=pytest.mark.slow), "tail"])
def test_a_served_teacher_gives_the_scores_of_the_same_in_this_process(
    forced: str, server: TeacherServer, files: Path, tmp_path: Path, small_runs: SmallRuns
) -> None:
    live = small_runs(*SMALL)
    config = small_config(tmp_path, *SMALL, *served(server, files, forced=forced))
    run(config, RunFolder(tmp_path / "run"), Silent())
    (_, expected), (scores, found) = scores_of(live), scores_of(tmp_path)
    assert len(found) == len(expected) == 4
    for mine, other in zip(found, expected, strict=True):
        assert mine.completion_ids.tolist() == other.completion_ids.tolist()
        assert (mine.teacher_top_ids == other.teacher_top_ids).all()
        for name in ("teacher_logprobs", "teacher_top_logprobs"):
            np.testing.assert_allclose(getattr(mine, name), getattr(other, name), atol=2e-4)
        tails = (np.exp(row.teacher_tail_logprobs) for row in (mine, other))
        np.testing.assert_allclose(*tails, atol=5e-6)  # 1 less a sum of float32
        known = np.isfinite(mine.teacher_forced_logprobs)
        assert known.all() or forced == "tail"
        assert mine.forced_in_tail == (forced == "tail")
        np.testing.assert_allclose(
            mine.teacher_forced_logprobs[known], other.teacher_forced_logprobs[known], atol=2e-4
        )
    noises = [commit.fidelity.teacher_noise for commit in scores.commits().values()]
    assert noises == [0.0] * 4
    assert scores.recipe.settings.get("forced") == (None if forced == "exact" else "tail")
    store = Store(tmp_path / "store")
    assert not list(damages(store))
    (record,) = (tmp_path / "store" / "teachers").iterdir()
    assert NAME in record.read_text()
    scored = f"scores/{scores.fingerprint[:16]}"
    assert not examine(store, scored, Surroundings.of(store))
    record.unlink()
    (lost,) = examine(store, scored, Surroundings.of(store))
    assert "no record in teachers is of its teacher" in lost.reason
    assert not lost.is_damage


def test_a_run_that_was_ended_scores_no_unit_twice_and_ends_with_the_same_scores(
    server: TeacherServer, files: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path / "whole", *SMALL, *served(server, files, forced="tail"))
    run(config, RunFolder(tmp_path / "whole" / "run"), Silent())
    whole, _ = scores_of(tmp_path / "whole")
    asked, server.requests = server.requests, 0
    server.fault = lambda number: "503" if number > asked * 3 // 4 else None
    config = small_config(
        tmp_path / "ended", *SMALL, *served(server, files, forced="tail", tries=1)
    )
    server.scored.clear()
    with pytest.raises(UserError, match="could be used in 1 tries"):
        run(config, RunFolder(tmp_path / "ended" / "run"), Silent())
    server.fault = lambda number: None
    committed = len(list((tmp_path / "ended").glob("store/scores/*/units/*.json")))
    assert 1 <= committed <= 3
    run(config, RunFolder(tmp_path / "ended" / "run"), Silent())
    ended, _ = scores_of(tmp_path / "ended")
    assert ended.fingerprint == whole.fingerprint
    digests = [[c.sha256 for c in each.commits().values()] for each in (whole, ended)]
    assert digests[0] == digests[1]
    texts = {
        tuple(row.prompt_ids) + tuple(row.completion_ids)
        for row in scores_of(tmp_path / "ended")[1]
    }
    again = [server.scored[text] for text in texts]
    assert sum(times > 1 for times in again) <= 1  # of the unit in flight


def test_a_finished_run_asks_no_server(server: TeacherServer, files: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, *SMALL, *served(server, files, forced="tail"))
    run(config, RunFolder(tmp_path / "run"), Silent())
    asked = server.requests
    run(config, RunFolder(tmp_path / "run"), Silent())
    replayed = [f"replay.run={tmp_path / 'run'}", "train.learning_rate=1e-4"]
    replay = small_config(tmp_path, *SMALL, *served(server, files, forced="tail"), *replayed)
    run(replay, RunFolder(tmp_path / "replay"), Silent())
    assert server.requests == asked
    elsewhere = small_config(tmp_path, *SMALL, *served(server, files, revision="b"), *replayed)
    assert open_setup(elsewhere).replayed_teacher is None
    assert open_setup(replay).replayed_teacher is not None


def test_another_model_behind_the_address_enters_no_cache(
    server: TeacherServer, files: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path, *SMALL, *served(server, files, forced="tail"))
    open_setup(config)
    server.engine.load(MODELS / "ledger-student")
    with pytest.raises(UserError, match="another model answers"):
        run(config, RunFolder(tmp_path / "run"), Silent())
    assert not list(tmp_path.glob("store/scores/*/units/*"))
    assert not list(tmp_path.glob("store/rollouts/*/units/*"))  # refused before paid work


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "http://127.0.0.1:9", "tries": 1}, "look at the server"),
        ({"model": "another"}, f"it serves {NAME}"),
        ({"key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY, which is not set"),
    ],
)
def test_what_is_wrong_with_a_server_is_one_line(
    changes: dict[str, Any],
    words: str,
    server: TeacherServer,
    files: Path,
    tmp_path: Path,
    opd_stream: Command,
) -> None:
    small_config(tmp_path)
    sets = [
        word for each in (*SMALL, *served(server, files, **changes)) for word in ("--set", each)
    ]
    code, _, said = opd_stream(
        "run", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run"), *sets
    )
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("opd-stream:")]
    assert words in line
    assert not list(tmp_path.glob("store/rollouts/*"))


def test_a_record_of_a_teacher_is_of_its_file(
    server: TeacherServer, files: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path, *SMALL, *served(server, files, forced="tail"))
    open_setup(config)
    (path,) = (tmp_path / "store" / "teachers").iterdir()
    path.write_text(path.read_text().replace('"noise":0.0', '"noise":9.0'))
    with pytest.raises(UserError, match="is damaged: its digest is that of another content"):
        open_setup(config)
    assert any(finding.name == "teachers" for finding in damages(Store(tmp_path / "store")))
    assert ServedTeacher.model_fields["noise"].is_required()


def test_plan_asks_no_server_and_the_doctor_says_what_it_gives(
    server: TeacherServer, files: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path, *SMALL, *served(server, files, forced="tail"))
    planned = estimate(config, RunFolder(tmp_path / "run"))
    assert planned.logits is None  # they are the server's
    assert server.requests == 0
    contact, rate = served_check.look(Subject(config, quick=False))
    assert contact.level == "ok"
    assert f"{server.url} as {NAME!r} gives the top 4 of each token" in contact.found
    assert "not known to the store yet" in contact.found
    assert "tokens a second, 16 at once" in rate.found or "tokens a second, 2 at once" in rate.found
    server.most_logprobs = 3
    with pytest.raises(UserError, match="greater than max allowed: 3"):
        list(served_check.look(Subject(config, quick=False)))
    assert not (tmp_path / "store" / "teachers").exists()


@pytest.mark.slow
def test_a_thousand_faults_lose_nothing_and_score_nothing_twice_but_a_unit(
    server: TeacherServer, files: Path, tmp_path: Path
) -> None:
    more = ("rollouts.prompts_per_round=64", "prompts.count=64", "rollouts.samples_per_prompt=8")
    more = (*SMALL, *more, "prompts_per_unit=4")
    config = small_config(tmp_path / "plain", *more, *served(server, files, forced="tail"))
    run(config, RunFolder(tmp_path / "plain" / "run"), Silent())
    plain, _ = scores_of(tmp_path / "plain")
    server.scored.clear()
    server.fault = seeded_faults(7, 0.7, most=1000)
    config = small_config(
        tmp_path / "faults", *more, *served(server, files, forced="tail", tries=100)
    )
    run(config, RunFolder(tmp_path / "faults" / "run"), Silent())
    assert sum(server.faults.values()) == 1000
    faulty, rows = scores_of(tmp_path / "faults")
    assert faulty.fingerprint == plain.fingerprint
    digests = [[c.sha256 for c in each.commits().values()] for each in (plain, faulty)]
    assert digests[0] == digests[1]
    assert len(rows) == 512


@pytest.mark.slow
def test_a_served_teacher_of_workers_on_ray(
    server: TeacherServer, files: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path, *SMALL, *served(server, files, forced="tail"), "executor=ray")
    run(config, RunFolder(tmp_path / "run"), Silent())
    scores, rows = scores_of(tmp_path)
    assert len(rows) == 4
    assert len(scores.commits()) == 4
