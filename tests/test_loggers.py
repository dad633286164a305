"""Loggers beside a run's files: what they are told, and what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.loggers.logger import Logger as FabricLogger

from opd_stream.errors import UserError
from opd_stream.loggers import Logger
from pipeline.logged import RunLog
from pipeline.run_folder import RunFolder
from stages.loggers import check_loggers, log_texts, open_loggers
from stages.step import Silent
from tests.conftest import run, small_config


class Lines(FabricLogger):
    """Writes what it is told to a file; of a run's facts it takes the folder and the tags."""

    def __init__(self, save_dir: Path, tags: tuple[str, ...] = (), level: int = 0) -> None:
        if level < 0:
            raise ConnectionError("no such level")
        self._path, self.tags, self.level = save_dir / "lines.jsonl", tags, level

    name = "lines"
    version = "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._tell({"step": step, **metrics})

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._tell(params)

    def _tell(self, told: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(told) + "\n")


OWN = "tests.test_loggers:Lines"


def test_a_logger_by_import_path_is_told_everything(tmp_path: Path) -> None:
    chosen = f"train.loggers=[{{kind: '{OWN}', tags: [a]}}]"
    folder = RunFolder(tmp_path / "run")
    config = small_config(tmp_path, chosen, "rounds=1", "evaluation.every_rounds=1")
    run(config, folder, Silent())
    text = (tmp_path / "run" / "lines.jsonl").read_text()
    told = [json.loads(line) for line in text.splitlines()]
    assert told[0]["rounds"] == 1
    assert told[0]["run_id"] == folder.made_by().id
    (report,) = folder.reports()
    steps = [line["step"] for line in told if "loss" in line]
    assert steps == list(range(report.steps))
    (round_,) = [line for line in told if "round/loss" in line]
    assert round_["step"] == report.steps
    assert round_["round/tokens_teacher_scored"] == report.tokens.teacher_scored
    evaluations = [line["step"] for line in told if "evaluation/ledger/pass@1" in line]
    assert evaluations == [0, report.steps]
    assert report.epochs[0].reason in told[-1]["decisions/round_0"]
    run(config, folder, Silent())
    assert (tmp_path / "run" / "lines.jsonl").read_text() == text  # nothing new, nothing told


def test_the_class_gets_what_it_has_arguments_for(tmp_path: Path) -> None:
    chosen = Logger(kind=OWN, tags=("a", "b"), options={"level": 3})
    (opened,) = open_loggers([chosen], tmp_path, "id")
    assert isinstance(opened, Lines)
    assert (opened.tags, opened.level) == (("a", "b"), 3)
    with pytest.raises(UserError, match="takes no project"):
        open_loggers([Logger(kind=OWN, project="p")], tmp_path, "id")
    with pytest.raises(UserError, match=r"cannot be opened \(ConnectionError: no such level\)"):
        open_loggers([Logger(kind=OWN, options={"level": -1})], tmp_path, "id")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("no.such:Thing", {}, "logger no.such:Thing cannot be imported"),
        ("json:JSONDecoder", {}, "expected a class of lightning.fabric.loggers.Logger"),
        ("mlflow", {"tracking_uri": "databricks"}, "no DATABRICKS_TOKEN"),
        ("trackio", {"space_id": "me/space"}, "no token of the hub"),
    ],
)
def test_what_would_fail_after_paid_work_is_refused_before(
    kind: str, options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DATABRICKS_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=said):
        check_loggers([Logger(kind=kind, options=options)])


def test_a_logger_that_cannot_be_opened_ends_the_run_before_any_work(tmp_path: Path) -> None:
    chosen = f"train.loggers=[{{kind: '{OWN}', options: {{level: -1}}}}]"
    with pytest.raises(UserError, match="cannot be opened"):
        run(small_config(tmp_path, chosen), RunFolder(tmp_path / "run"), Silent())
    assert not (tmp_path / "store" / "rollouts").exists()


class Silents(Lines):
    """Has no place for settings, and does not take numbers."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise ConnectionError("no\nanswer")

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


def test_what_a_logger_raises_is_one_line(tmp_path: Path) -> None:
    config = small_config(tmp_path, "train.loggers=['tests.test_loggers:Silents']")
    log = RunLog(config, tmp_path, "id")
    log.config()
    with pytest.raises(UserError, match=r"cannot be told \(.*:Silents: ConnectionError: no answer"):
        log.figures({"loss": 1.0}, 0)


def test_sentences_are_text_where_a_logger_has_text() -> None:
    told: list[tuple[str, str, int]] = []

    class Writer:
        def add_text(self, name: str, text: str, step: int) -> None:
            told.append((name, text, step))

    class Texts:
        experiment = Writer()

    log_texts([Texts()], {"decisions/round_0": "train on"}, 7)
    assert told == [("decisions/round_0", "train on", 7)]


def test_mlflow_continues_the_run_of_the_same_id(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    options = {"tracking_uri": f"sqlite:///{tmp_path}/runs.db"}
    chosen = Logger(kind="mlflow", project="p", tags=("x",), options=options)
    for step in range(2):
        (opened,) = open_loggers([chosen], tmp_path / "run", "id")
        opened.log_metrics({"loss": 1.0}, step)
        opened.finalize("success")
    runs = mlflow.MlflowClient(options["tracking_uri"]).search_runs(["1"])
    assert [each.data.tags["x"] for each in runs] == ["true"]
