"""Ctrl-C and SIGTERM, and one process in a run's folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd_stream.errors import UserError
from pipeline.lease import STALE_SECONDS, LeaseRecord, is_held, lease
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import SmallRuns, rewrite, run, small_config

LINE = "opd-stream: interrupted; the same command resumes\n"
WAITS = "time.sleep(600)"
IS_BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # where no exception is raised
IS_TAKEN = "signal.signal(number, lambda *_: sys.exit(7)), time.sleep(600)"  # by a library
HIDES = "os.dup2(os.open(os.devnull, os.O_WRONLY), 2), time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", [WAITS, IS_BUSY, IS_TAKEN, HIDES])
def test_a_signal_ends_a_command_and_its_children_in_one_line(number: int, work: str) -> None:
    code = (
        "import hashlib, os, signal, subprocess, sys, time\n"
        "import pipeline.cli as cli\n"
        f"number = {int(number)}\n"
        "def work():\n"
        "    child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "    print(child.pid, flush=True)\n"
        f"    {work}\n"
        "cli.main = work\n"
        "cli.start()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    if work in (IS_TAKEN, HIDES):  # done before the signal comes
        path = Path(f"/proc/{process.pid}/wchan")
        while not path.exists() or "nanosleep" not in path.read_text():
            time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate()[1]
    assert (process.returncode, said) == (128 + number, LINE)
    while Path(f"/proc/{child}").exists():  # until it was waited for
        time.sleep(0.05)


def holder(place: str = "here", started: str = "5") -> LeaseRecord:
    return LeaseRecord(host="a", process=os.getpid(), place=place, started=started, token="t")


def test_a_lease_is_held_by_a_process_that_runs_or_was_seen() -> None:
    assert not is_held(holder(), 0.0, "here")  # another process has its number now
    assert is_held(holder("there"), STALE_SECONDS - 1, "here")
    assert not is_held(holder("there"), STALE_SECONDS + 1, "here")


def test_the_second_process_in_a_run_folder_is_refused_and_writes_nothing(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    small_runs.copy(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with lease(tmp_path / "run"):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*--run-dir"):
            run(small_config(tmp_path), RunFolder(tmp_path / "run"), Silent())
        (tmp_path / "run" / "lease.json").rename(tmp_path / "taken")
        assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
        (tmp_path / "taken").rename(tmp_path / "run" / "lease.json")
    assert not (tmp_path / "run" / "lease.json").exists()


PLACES: dict[str, dict[str, str]] = {"own": {}, "far": {"place": "another host"}, "unknown": {}}


@pytest.mark.parametrize("place", PLACES)
def test_the_lease_of_a_killed_process_is_taken_over(place: str, tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with lease(tmp_path):
        data = path.read_bytes()
    killed = subprocess.Popen(["true"])
    killed.wait()
    path.write_bytes(data)
    rewrite(path, process=killed.pid, token="killed", **PLACES[place])
    if place == "unknown":
        path.write_bytes(data[:40])
    if place != "own":
        with (
            pytest.raises(UserError, match=r"in use by .* seen there 0 s ago"),
            lease(tmp_path),
        ):
            pass
    old = time.time() - STALE_SECONDS - 5
    os.utime(path, (old, old))
    with lease(tmp_path):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
