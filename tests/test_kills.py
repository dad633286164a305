"""Every method's config, killed at random moments, local and on Ray, ends in the same weights."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import run
from tests.test_methods import METHODS, ROOT, tiny_config
from tests.test_resume import Telling, attempt, fingerprints, stage_after

LOCAL_KILLS, RAY_KILLS = 5, 3  # of each method; 112 in all
ATTEMPTS = 40  # a run that ends before it is killed is begun anew


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("method", [path.stem for path in METHODS])
def test_a_method_killed_anywhere_ends_in_the_same_weights(method: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(tiny_config(method, whole), RunFolder(whole / "run"), Silent())
    expected = fingerprints(whole)
    moments = random.Random(method)
    for executor, kills in (("local", LOCAL_KILLS), ("ray", RAY_KILLS)):
        killed, number = 0, 0
        for _ in range(ATTEMPTS):
            folder = tmp_path / f"{executor}-{number}"
            signs, delay = moments.randint(1, 8), moments.uniform(0, 0.05)
            if executor == "ray":
                stage = _attempt_on_ray(method, folder, signs, delay)
            else:
                config = tiny_config(method, folder)
                stage = attempt(config, folder, signs=signs, delay=delay)
            killed += stage is not None
            if stage is None or killed == kills:
                if stage is not None:
                    _finish(method, folder, executor)
                assert fingerprints(folder) == expected, (executor, number)
                number += 1
            if killed == kills:
                break
        assert killed == kills


def _attempt_on_ray(method: str, folder: Path, signs: int, delay: float) -> str | None:
    """As `attempt`, in a process that starts Ray."""
    child = _start(method, folder, "ray")
    assert child.stdout is not None
    stage = stage_after(child.stdout, signs, delay)
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(child.pid, signal.SIGKILL)
    child.stdout.close()
    status = child.wait()
    assert status in (0, -signal.SIGKILL), "the run itself failed"
    return None if status == 0 else stage


def _finish(method: str, folder: Path, executor: str) -> None:
    child = _start(method, folder, executor)
    child.communicate()
    assert child.returncode == 0


def _start(method: str, folder: Path, executor: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, which prints its stages."""
    command = [sys.executable, "-m", "tests.test_kills", method, str(folder), executor]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def main(method: str, folder: str, executor: str) -> None:
    """Run a method's tiny config and print the name of the stage at every sign of progress."""
    config = tiny_config(method, Path(folder)).model_copy(update={"executor": executor})
    run(config, RunFolder(Path(folder) / "run"), Telling(sys.stdout.fileno()))


if __name__ == "__main__":
    main(*sys.argv[1:])
