"""The files of examples/deploy: as far as one machine without their services can tell."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from opd_stream.config import Config
from opd_stream.config_file import make_config
from tests.conftest import SMALL_RUN
from tests.test_snippets import check_opd_stream

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
CONSTRAINTS = (ROOT / "constraints.txt").read_text().split()


def section(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    properties = {**required, **optional}
    known = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**known, "required": list(required)}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
TEMPLATE = section({"spec": {"type": "object"}}, metadata={"type": "object"})
# Of the reference of KubeRay's ray.io/v1: those fields that a manifest here may have.
RAY_JOB = section(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": section({"name": TEXT}),
        "spec": section(
            {
                "entrypoint": TEXT,
                "rayClusterSpec": section(
                    {
                        "rayVersion": TEXT,
                        "headGroupSpec": section({"rayStartParams": TEXTS, "template": TEMPLATE}),
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": section(
                                {"groupName": TEXT, "rayStartParams": TEXTS, "template": TEMPLATE},
                                replicas=COUNT,
                                minReplicas=COUNT,
                                maxReplicas=COUNT,
                            ),
                        },
                    }
                ),
            },
            shutdownAfterJobFinishes={"type": "boolean"},
            ttlSecondsAfterFinished=COUNT,
        ),
    }
)
# Of SkyPilot's schema of a task: the same.
SKY_TASK = section(
    {"name": TEXT, "run": TEXT},
    resources=section(
        {}, accelerators=TEXT, use_spot={"type": "boolean"}, disk_size={"type": "integer"}
    ),
    file_mounts=TEXTS,
    setup=TEXT,
    envs=TEXTS,
)


def commands(text: str) -> list[list[str]]:
    """The calls of opd-stream in a text, of a variable its name."""
    found = re.findall(r"(?:^|\s|/)opd-stream ([a-z-]+ .*)", text, re.MULTILINE)
    return [line.replace('"', "").split(" || ")[0].split() for line in found]


def test_the_manifest_of_kuberay_is_one_and_its_config_fits_its_nodes() -> None:
    config_map, job = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    Draft202012Validator(RAY_JOB).validate(job)
    spec = job["spec"]["rayClusterSpec"]
    assert f"ray=={spec['rayVersion']}" in CONSTRAINTS
    config = make_config(yaml.safe_load(config_map["data"]["my.yaml"]))
    workers = {each["rayStartParams"]["labels"]: each for each in spec["workerGroupSpecs"]}
    for pool in (config.pools.student, config.pools.teacher):
        group = workers[f"pool={pool.labels['pool']}"]
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) * group["replicas"] >= pool.gpus * pool.workers
        volumes = {each["name"] for each in group["template"]["spec"]["volumes"]}
        assert {each["name"] for each in container["volumeMounts"]} == volumes
    ((command, path, *rest),) = commands(job["spec"]["entrypoint"])
    assert path == "/config/my.yaml"
    check_opd_stream([command, path, *rest])
    assert config.store.startswith("/shared/")  # every node reaches it


def test_the_task_of_skypilot_is_one_and_takes_files_that_there_are() -> None:
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    Draft202012Validator(SKY_TASK).validate(task)
    for source in task["file_mounts"].values():
        assert (ROOT / source).exists() or f"-rf {source}\n" in (ROOT / "Makefile").read_text()
    assert len(commands(task["run"])) == 2
    for arguments in commands(task["run"]):
        check_opd_stream(arguments)
    check_extras(task["setup"])


def check_extras(text: str) -> None:
    """Every extra that is installed is one of the project."""
    (extras,) = re.findall(r"opd-stream\[([a-z0-9,]+)\]", text)
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras.split(","))


def test_the_image_copies_files_that_there_are_and_runs_the_program() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    check_extras(text)
    (copied,) = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    for source in copied.split():
        assert (ROOT / source).exists() or source == "dist/*.whl"  # `make dist` makes it
    assert 'ENTRYPOINT ["opd-stream"]' in text
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)
    (version,) = re.findall(r"^FROM python:(\d\.\d+)", text, re.MULTILINE)
    assert f"Python :: {version}" in (ROOT / "pyproject.toml").read_text()


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program that comes first on the path."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / "bin" / name).chmod(0o755)


SRUN = """# what follows its options, which ends with it
while [[ "$1" == --* ]]; do shift; done
set -m
"$@" &
trap "kill -TERM -- -$!" TERM
wait $!"""


def run_slurm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(DEPLOY / "slurm.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )


def test_the_script_for_slurm_calls_the_stages_of_each_round(tmp_path: Path) -> None:
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "opd-stream", 'echo "$*" >> called')
    done = run_slurm(tmp_path, "my.yaml", "2")
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    student = [
        f"{stage} my.yaml --round {round_} --follow --run-dir runs/my"
        for round_ in (0, 1)
        for stage in ("generate", "train")
    ]
    teacher = [f"score my.yaml --round {n} --follow --run-dir runs/my-teacher" for n in (0, 1)]
    assert [line for line in called if line in student] == student
    assert [line for line in called if line in teacher] == teacher
    assert called[-1] == "evaluate my.yaml --policy-version 2 --run-dir runs/my"
    assert len(called) == 7
    for line in called:
        check_opd_stream(line.split())


def test_the_script_for_slurm_ends_when_a_stage_fails(tmp_path: Path) -> None:
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "opd-stream", '[ "$1" != score ] || exit 2\n[ "$1" = score ] || sleep 600')
    assert run_slurm(tmp_path, "my.yaml", "1").returncode == 2
    assert run_slurm(tmp_path).returncode == 1


def test_training_on_one_device_takes_no_part_in_a_job_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from stages.learner import open_fabric

    stand_in(tmp_path, "srun", SRUN)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name, value in (("NTASKS", "2"), ("PROCID", "1"), ("JOB_NAME", "opd-stream")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    config = SimpleNamespace(
        pools=None, train=SimpleNamespace(precision="32-true", loggers=(), threads=1)
    )
    job: Any = SimpleNamespace(config=config, metrics=str(tmp_path / "m.jsonl"), made_by="run")
    fabric = open_fabric(job)
    assert (fabric.world_size, fabric.global_rank) == (1, 0)
    assert not [each for each in recwarn if "srun" in str(each.message)]


@pytest.mark.slow
def test_the_script_for_slurm_makes_a_run(tmp_path: Path) -> None:
    import sys

    fake = {"student": {"engine": "fake"}, "teacher": {"engine": "fake"}}
    config = {**SMALL_RUN, "executor": "local", "store": "store"}
    for role, more in fake.items():
        config[role] = {**config[role], **more}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "opd-stream", f'exec {sys.executable} -m opd_stream "$@"')
    rounds = Config.model_validate(config).rounds
    done = run_slurm(tmp_path, "my.yaml", str(rounds))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "my" / "summary.json").exists()
