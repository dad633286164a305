"""Training on several devices of one machine: one process each, through torch's own launcher.

The processes are fresh interpreters that know nothing but the job, so neither the command that was
called nor Ray runs twice. The first one reports in JSON lines, which become this process's bars,
errors and all else goes to
training.log in the run's folder.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from stages.progress import Progress
from stages.train_job import TrainJob

MARK = "opd-stream: "  # begins a line of the first process that is meant for this one


def launch(job: TrainJob, progress: Progress) -> None:
    """Run `stages.train_worker` on as many processes as the config has devices.

    Raises:
        UserError: a process said so, or died (with its last lines).
        DamagedUnit: a process found one.
    """
    scratch = Path(job.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "job.json"
    path.write_text(job.as_json())
    logs = tempfile.TemporaryDirectory()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={job.config.pools.trainer.devices}",
        f"--log-dir={logs.name}",  # its own choice would be left behind, one a round
        "--module",
        "stages.train_worker",
        str(path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.config.train.threads)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    log = Path(job.metrics).with_name("training.log")
    last = ""
    problem: Exception | None = None
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                problem = _heard(json.loads(line.removeprefix(MARK)), job, progress) or problem
                continue
            with log.open("a") as file:
                file.write(line)
            if line.startswith("[rank"):  # the end of a traceback
                last = " ".join(line.split()[1:])
    finally:
        process.terminate() if process.poll() is None else None
        process.wait()
        logs.cleanup()
    if problem is not None:
        raise problem
    if process.returncode:
        raise UserError(
            f"training stopped with exit code {process.returncode}; the policy of the round before "
            f"is intact; all it said is in {log}; at the end: {last[:300]}"
        )


def _heard(message: dict[str, object], job: TrainJob, progress: Progress) -> Exception | None:
    """Act on a message of the first process; an error is returned, to be raised at the end."""
    match message:
        case {"start": str(stage), "total": int(total), "done": int(done)}:
            progress.start(stage, total, done)
        case {"advance": str(stage), "count": int(count), "tokens": int(tokens), **facts}:
            progress.advance(stage, count, tokens, **cast(dict[str, float], facts))
        case {"say": str(line)}:
            progress.say(line)
        case {"warn": str(line)}:
            progress.warn(line)
        case {"error": str(text)}:
            return UserError(text)
        case {"damaged": str(kind), "unit": int(unit), **found}:
            known = "rollouts" if kind == "rollouts" else "scores"
            artifact = job.store().by_fingerprint(known, str(found["fingerprint"]))
            return DamagedUnit(artifact, unit, str(found["reason"]))
        case _:
            raise ValueError(f"unknown message {message}")
    return None
