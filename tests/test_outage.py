"""The store goes away in the middle of a run: waited for, or one line and nothing lost."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto", reason="pip install 'opd-stream[dev]' brings the S3 server")

from opd_stream.errors import UserError
from opd_stream.store.files import place
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import run, small_config
from tests.s3_outage import Door
from tests.test_object_store import served, use_server
from tests.test_ray import ray_command, summary_of

BUCKET = "bucket"
FAKES = (
    "rounds=1",
    "rollouts.prompts_per_round=4",
    "rollouts.window.tokens=16",
    "staleness.max_epochs=1",
    "evaluation=null",
    "student.engine=fake",
    "teacher.engine=fake",
    "prompts_per_unit=2",
)


def policies(folder: Path, *settings: str, progress: Silent | None = None) -> Any:
    """Of a run in a folder, begun or continued."""
    directory = RunFolder(folder / "run")
    run(small_config(folder, *FAKES, *settings), directory, progress or Silent())
    return summary_of(folder)["policies"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The policies of a run that nothing happened to."""
    return policies(tmp_path_factory.mktemp("disk"))


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """In front of a server with one bucket."""
    with served() as port, Door(port) as opened:
        use_server(opened.port, tmp_path, monkeypatch)
        remote: Any = place(f"s3://{BUCKET}")
        remote.fs.mkdir(BUCKET)
        opened.shut()
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_line",
    [
        f"PUT /{BUCKET}/store/scores/",
        f"HEAD /{BUCKET}/store/policies/",
        f"PUT /{BUCKET}/store/policies/",
    ],
)
def test_an_outage_is_waited_for_or_ends_in_a_line_and_loses_nothing(
    request_line: str, door: Door, tmp_path: Path, expected: Any
) -> None:
    store = f"store=s3://{BUCKET}/store"
    door.open_again(shut_at=request_line)
    with pytest.raises(
        UserError, match=r"^cannot reach s3://bucket/store/\S+: no answer for \d+ s [^\n]*$"
    ):
        policies(tmp_path, store, "store_seconds=1")
    door.open_again(shut_at=request_line)
    with door.opening_after(2):
        assert policies(tmp_path, store, "store_seconds=1000") == expected
    assert door.shuts == 3


class At(Silent):
    """Does something once, when a stage first reports."""

    def __init__(self, stage: str, action: Callable[[], object]) -> None:
        self._stage, self._action, self.is_done = stage, action, False

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        if stage == self._stage and count and not self.is_done:
            self.is_done = True
            self._action()


@pytest.mark.parametrize(
    "stage",
    ["score", *(pytest.param(name, marks=pytest.mark.slow) for name in ("generate", "train"))],
)
def test_a_folder_that_goes_away_is_not_made_again_elsewhere(
    stage: str, tmp_path: Path, expected: Any
) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    progress = At(stage, lambda: store.rename(elsewhere))
    with pytest.raises(UserError, match="is not there: no such folder"):
        policies(tmp_path, progress=progress)
    assert progress.is_done
    assert not store.exists()
    elsewhere.rename(store)
    assert policies(tmp_path) == expected


@pytest.mark.slow
def test_a_minute_without_the_store_costs_a_run_on_ray_a_minute(
    door: Door, tmp_path: Path, expected: Any
) -> None:
    command = ray_command(tmp_path, *FAKES, f"store=s3://{BUCKET}/store")
    door.open_again(shut_at=f"PUT /{BUCKET}/store/scores/")
    found = subprocess.run(
        [*command, "--set", "store_seconds=5"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    assert "opd-stream: cannot reach s3://bucket/store" in found.stderr.splitlines()[-1]
    door.open_again(shut_at=f"PUT /{BUCKET}/store/rollouts/")
    with door.opening_after(60):
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert door.shuts == 3
    assert summary_of(tmp_path)["policies"] == expected
