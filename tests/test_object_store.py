"""A store in S3: a whole run, faults, races, and the same bytes as on a disk."""

import contextlib
import http.server
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto", reason="pip install 'opd-stream[dev]' brings the S3 server")

import fsspec
import s3fs
from upath import UPath

from opd_stream.errors import UserError
from opd_stream.store import open_scores
from opd_stream.store.files import place, publish, publish_new, verified_bytes
from opd_stream.store.s3 import RetryingS3
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from pipeline.single_stage import run_stage
from pipeline.status import StatusReader
from stages.step import Silent
from tests.conftest import Command, SmallRuns, run, small_config

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=[pytest.param("healthy", marks=pytest.mark.slow), "faulty"])
def server(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server, which fails now and then or never."""
    with served(40 if request.param == "faulty" else 0) as port:
        yield port


@pytest.fixture
def bucket(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address in a fresh bucket."""
    use_server(server, tmp_path, monkeypatch)
    name = f"bucket-{tmp_path.name.replace('_', '-')}"[:60].rstrip("-").lower()
    remote: Any = place(f"s3://{name}")
    remote.fs.mkdir(name)
    return f"s3://{name}/some/store"


@contextlib.contextmanager
def served(fault_every: int = 0) -> Iterator[int]:
    """The port of a running server."""
    port = free_port()
    environment = os.environ | {"S3_FAULT_EVERY": str(fault_every)}
    command = [sys.executable, "-m", "tests.s3_server", str(port)]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield port
        finally:
            server.kill()


def use_server(port: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on s3:// is what listens at a port."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OPD_STREAM_CACHE": str(folder / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    RetryingS3.clear_instance_cache()  # it remembers the last server


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [("rounds=1", "evaluation=null"), pytest.param((), marks=pytest.mark.slow)],
    ids=["one round", "two"],
)
def test_a_run_in_s3_ends_where_one_on_a_disk_does(
    settings: tuple[str, ...],
    bucket: str,
    small_runs: SmallRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished_run = small_runs(*settings)
    config = small_config(tmp_path, *settings, f"store={bucket}")
    run(config, RunFolder(tmp_path / "s3"), Silent())
    disk, remote = summary_of(finished_run / "run"), summary_of(tmp_path / "s3")
    for key in ("policies", "caches", "tokens"):
        assert disk[key] == remote[key]
    again = RunFolder(tmp_path / "again")
    run(config, again, Silent())
    assert summary_of(again.path)["tokens"]["teacher_scored"] == 0
    assert summary_of(again.path)["policies"] == disk["policies"]
    caches = disk["caches"][0][0]
    near = open_scores(finished_run / "store" / "scores" / caches["scores"][:16])
    far = open_scores(f"{bucket}/scores/{caches['scores'][:16]}")
    assert len(near) == len(far) > 0
    for here, there in zip(near.epoch(seed=1, epoch=0), far.epoch(seed=1, epoch=0), strict=True):
        assert here.prompt_id == there.prompt_id
        assert (here.teacher_top_ids == there.teacher_top_ids).all()
        assert (here.teacher_top_logprobs == there.teacher_top_logprobs).all()
    monkeypatch.setenv("OPD_STREAM_CACHE", str(tmp_path / "elsewhere"))
    status = StatusReader(open_setup(config), RunFolder(tmp_path / "nothing")).read()
    assert status.is_finished
    assert all(pace.tokens_per_second for each in status.rounds for pace in each.stages.values())
    assert not list((tmp_path / "elsewhere").rglob("*.safetensors"))  # no policy was fetched


def test_a_unit_costs_so_many_requests_and_is_never_listed_alone(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    ask: Any = RetryingS3._call_s3

    async def counted(fs: RetryingS3, method: str, *arguments: Any, **fields: Any) -> Any:
        asked.append((method, str(fields.get("Key") or fields.get("Prefix"))))
        return await ask(fs, method, *arguments, **fields)

    monkeypatch.setattr(RetryingS3, "_call_s3", counted)
    fakes = ("student.engine=fake", "teacher.engine=fake", "evaluation=null", "prompts_per_unit=1")
    config = small_config(tmp_path, *fakes, f"store={bucket}")
    for stage, requests in (
        ("generate", {"put_object": 2, "get_object": 2}),
        ("score", {"put_object": 2, "get_object": 4}),
    ):
        asked.clear()
        run_stage(stage, config, RunFolder(tmp_path / "run"), round_index=0, progress=Silent())
        units = re.compile(r"/(rollouts|scores)/\w+/units/\d{5}[.-]")
        of_units = Counter(method for method, key in asked if units.search(key))
        assert of_units.pop("get_object") <= 8 * (requests.pop("get_object") + 1)  # torn answers
        assert of_units == {method: 8 * count for method, count in requests.items()}
        of_prompts = [key for _, key in asked if "/prompts/" in key and key.endswith(".arrow")]
        assert len(of_prompts) < 8  # the shard, not a part of it for each unit


def test_of_many_writers_of_one_object_the_first_wins(bucket: str) -> None:
    path = place(f"{bucket}/race.json")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: publish_new(path, b"%d" % n), range(16)))
    assert won.count(True) == 1
    assert path.read_bytes() == b"%d" % won.index(True)


def test_a_damaged_object_is_named_and_a_torn_answer_is_asked_for_again(bucket: str) -> None:
    path = place(f"{bucket}/units/00000.arrow")
    publish(path, b"x" * 1000)
    with pytest.raises(ValueError, match="the commit record says"):
        verified_bytes(path, "0" * 64)
    from opd_stream.store.files import sha256

    for start in range(0, 400, 10):
        assert verified_bytes(path, sha256(b"x" * 50), (start, 50)) == b"x" * 50


def test_a_store_that_never_answered_is_one_line_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    RetryingS3.clear_instance_cache()
    with pytest.raises(UserError, match="cannot reach s3://nobody/store"):
        open_setup(small_config(tmp_path, "store=s3://nobody/store", "store_seconds=3600"))


def test_other_code_keeps_its_own_s3(bucket: str) -> None:
    publish(place(f"{bucket}/shard"), b"ours")
    own = fsspec.filesystem("s3")
    assert type(own) is s3fs.S3FileSystem
    assert own.cat_file(f"{bucket}/shard") == b"ours"
    assert type(UPath(bucket).fs) is s3fs.S3FileSystem
    store: Any = place(bucket) / "units"
    copies = (store, store.parent, pickle.loads(pickle.dumps(store)))
    for path in (*copies, *store.parent.iterdir()):
        assert type(path.fs) is RetryingS3


class Forbidding(http.server.BaseHTTPRequestHandler):
    """Answers every request as S3 answers a credential that is not valid any more."""

    def _answer(self) -> None:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key id</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


COMMANDS = [
    *(f"cache {each} STORE" for each in ("ls", "verify", "gc")),
    *(f"cache {each} STORE scores/3f" for each in ("show", "pin", "unpin")),
    "run CONFIG --run-dir RUN",
    "evaluate CONFIG --policy-version 0 --run-dir RUN",
    *(f"{each} CONFIG --round 0 --run-dir RUN" for each in ("generate", "score", "train")),
    "plan CONFIG",
]


@pytest.mark.parametrize("answer", ["no bucket", "403"])
def test_a_store_that_refuses_is_one_line_in_every_command(
    answer: str,
    server: int,
    small_runs: SmallRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opd_stream: Command,
) -> None:
    forbidding = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
    threading.Thread(target=forbidding.serve_forever, daemon=True).start()
    port = server if answer == "no bucket" else forbidding.server_address[1]
    use_server(int(port), tmp_path, monkeypatch)
    store = "s3://nowhere/store"
    small_config(tmp_path)
    config = tmp_path / "small.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "store"), store))
    run_folder = tmp_path / "run"
    wrong: list[str] = []
    for command in COMMANDS:
        words = {"STORE": store, "CONFIG": str(config), "RUN": str(run_folder)}
        code, out, error = opd_stream(*(words.get(word, word) for word in command.split()))
        if code != 2 or error.count("\n") != 1 or "s3://nowhere" not in error:
            wrong.append(f"{command}: {code} {out} {error}")
    forbidding.shutdown()
    assert "\n".join(wrong) == ""
