"""A small run that every pipeline test can afford: two rounds over eight prompts."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import yaml
from filelock import FileLock
from hypothesis import settings

from opd_stream.config import Config
from opd_stream.config_file import load_config
from opd_stream.store.sealed import sealed
from pipeline.cli import main
from pipeline.run import run as run_pipeline
from pipeline.run_folder import RunFolder
from stages.step import Progress, Silent

MODELS = Path(__file__).parent.parent / "configs" / "models"

SMALL_RUN: dict[str, Any] = {
    "seed": 3,
    "rounds": 2,
    "student": {"path": str(MODELS / "ledger-student")},
    "teacher": {"path": str(MODELS / "ledger-teacher")},
    "prompts": {"kind": "ledger", "count": 32, "seed": 11},
    "rollouts": {"prompts_per_round": 8, "window": {"kind": "fixed", "tokens": 48}},
    "scores": {"top_k": 4},
    "train": {
        "objective": {"kind": "bucket"},
        "learning_rate": 1e-3,
        "rows_per_step": 4,
        "tokens_per_microbatch": 400,
        "checkpoint_steps": 1,
    },
    "staleness": {"max_epochs": 2},
    "evaluation": {
        "prompts": {"kind": "ledger", "count": 4, "seed": 12},
        "judge": {"kind": "ledger"},
        "samples_per_prompt": 2,
        "max_new_tokens": 16,
    },
    "executor": "local",
    "prompts_per_unit": 4,
}


settings.register_profile("any-load", deadline=None)  # an example may take as long as it does
settings.load_profile("any-load")

# Ray's own limits on starts and answers, which 20 busy processes beside the tests would reach.
for name in (
    "gcs_server_port_wait_time_s",
    "gcs_server_request_timeout_seconds",
    "gcs_rpc_server_connect_timeout_s",
    "py_gcs_connect_timeout_s",
    "worker_register_timeout_seconds",
):
    os.environ.setdefault(f"RAY_{name}", "1000")
for name in ("agent_register_timeout_ms", "health_check_timeout_ms"):
    os.environ.setdefault(f"RAY_{name}", "1000000")

START = "from opd_stream.launcher import main; main()"  # what the console script does


def clash(folder: Path) -> dict[str, str]:
    """Give a folder modules named as our packages; returns an environment that finds them first."""
    (folder / "stages.py").write_text("raise RuntimeError('this is the stages of a user')\n")
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "__init__.py").write_text("raise RuntimeError('and the pipeline')\n")
    path = os.pathsep.join([str(folder), str(Path(__file__).parent.parent)])
    return {**os.environ, "PYTHONPATH": path}


LONGEST = ("test_ray", "test_training", "test_object_store", "test_resume")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors on a shared machine are fastest on one thread, and the same every time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_disks() -> Iterator[None]:
    """No test takes the power away, so none has to wait until a disk has kept its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def embedded_models_are_checked_once() -> Iterator[None]:
    """What is compared when a model is loaded stays so for files that no test writes to."""
    from opd_stream.engines import transformers_engine
    from stages import student_model

    def once(check: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
        done = set[tuple[Path, Any]]()

        def checked(model: Any, folder: Path) -> None:
            if (folder, model.dtype) not in done:
                check(model, folder)
            if MODELS in Path(folder).parents:
                done.add((folder, model.dtype))

        return checked

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (transformers_engine, "check_engine"),
            (student_model, "check_training"),
        ):
            patch.setattr(module, name, once(getattr(module, name)))
        yield


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def opd_stream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls `opd-stream` with words, in this process: exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opd-stream", *words])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


class SmallRuns:
    """Finished small runs, each trained once in a session, whichever worker asks first.

    A run's folder holds `run`, `store` and `small.yaml`. It is for reading: what a test has
    written to it fails the session. `copy` makes one to write to.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(exist_ok=True)
        self._found: dict[Path, dict[str, int]] = {}

    def __call__(self, *overrides: str) -> Path:
        """The small run with overrides."""
        folder = self._root / hashlib.sha256(repr(overrides).encode()).hexdigest()[:16]
        if folder not in self._found:
            with FileLock(f"{folder}.lock"):
                if not (folder / "run" / "summary.json").exists():
                    run(small_config(folder, *overrides), RunFolder(folder / "run"), Silent())
            self._found[folder] = _files(folder)
        return folder

    def copy(self, folder: Path, *overrides: str) -> Path:
        """The same in a folder of one's own, as if it had been made there."""
        shutil.copytree(self(*overrides), folder, dirs_exist_ok=True)
        moved = {"store": folder / "store"}, [folder / "run" / "config.json"]
        known = {"folder": folder / "run"}, (folder / "store" / "runs").iterdir()
        for fields, paths in (moved, known):
            for path in paths:
                rewrite(path, **{k: str(v) for k, v in fields.items()})
        small_config(folder)
        return folder

    def check(self) -> None:
        """Refuse what was written to a run that others read."""
        for folder, files in self._found.items():
            now = _files(folder)
            written = [path for path in {*files, *now} if files.get(path) != now.get(path)]
            assert not written, f"a test wrote to a run that it shares, copy it: {written}"


def rewrite(path: Path, **fields: Any) -> None:
    """Change fields of a record as its writer would have written them."""
    value = json.loads(path.read_text()) | fields
    name = value.pop("record")
    value.pop("digest")
    path.write_text(json.dumps(sealed(value, name)))


def _files(folder: Path) -> dict[str, int]:
    """The files of a finished run, and a checksum of what is in each."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "digests"]
    return {str(path): crc32(path.read_bytes()) for path in files}


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRuns]:
    """Finished runs of the small config with overrides, to read or to copy."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    found = SmallRuns(root / "small-runs")
    yield found
    found.check()


@pytest.fixture(scope="session")
def finished_run(small_runs: SmallRuns) -> Path:
    """The folder of the small run, finished: to read, not to write to."""
    return small_runs()


@pytest.fixture
def copied_run(small_runs: SmallRuns, tmp_path: Path) -> Path:
    """A finished small run of one's own, to change or damage."""
    return small_runs.copy(tmp_path / "copy")


def small_config(folder: Path, *overrides: str) -> Config:
    """The small run with its store in `folder`, and overrides as on the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL_RUN, "store": str(folder / "store")}))
    return load_config(path, list(overrides))


def run(config: Config, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """`pipeline.run.run`, with the summary as other programs read it."""
    return run_pipeline(config, folder, progress).as_json()


def reports_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The reports of a run's finished rounds, as other programs read them."""
    return [report.as_json() for report in folder.reports()]


def summary_of(folder: RunFolder) -> dict[str, Any]:
    """The summary of a run, as other programs read it."""
    summary = folder.summary()
    assert summary is not None
    return summary.as_json()


def loaded_by(*arguments: str) -> tuple[str, set[str], float]:
    """What a command prints, the heavy libraries it loads, and the CPU seconds of its process."""
    code = (
        "import json, sys, time, pipeline.cli as cli\n"
        "try: cli.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'ray', 'lightning', 'datasets', 'pandas'}\n"
        "    print(json.dumps([sorted(heavy & set(sys.modules)), time.process_time()]))"
    )
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    *said, last = found.stdout.splitlines()
    loaded, seconds = json.loads(last)
    return "\n".join(said), set(loaded), seconds
