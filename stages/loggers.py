"""Loggers beside a run's own files: which library each is, and what it takes to open one."""

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger as FabricLogger
from lightning.fabric.utilities.rank_zero import rank_zero_only

from opd_stream.errors import UserError
from opd_stream.loggers import Logger
from opd_stream.section import import_path

PROJECT = "opd-stream"
RUN_TAG = "opd_stream.run"  # by which a run of mlflow is found again


def check_loggers(loggers: Sequence[Logger]) -> None:
    """Refuse loggers without credentials, or without a class, before any work.

    Raises:
        UserError: says what is missing.
    """
    for logger in loggers:
        if logger.kind == "wandb":
            _check_wandb()
        elif logger.kind == "mlflow":
            _check_mlflow(logger)
        elif logger.kind == "trackio":
            _check_trackio(logger)
        elif not logger.is_named:
            _own_class(logger)


def open_loggers(loggers: Sequence[Logger], folder: Path, run_id: str) -> list[FabricLogger]:
    """Open the loggers of a run, or join what they have of it.

    Args:
        loggers: of `train.loggers`.
        folder: of the run, whose name is the run's.
        run_id: its id.

    Raises:
        UserError: one cannot be opened.
    """
    for library in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(library).setLevel(logging.ERROR)  # the run says what there is to say
    return [_opened(logger, folder, run_id) for logger in loggers]


def log_settings(logger: FabricLogger, settings: Mapping[str, Any]) -> None:
    """Tell settings of the run; some loggers, as Fabric's CSVLogger, have no place for them."""
    with suppress(NotImplementedError):
        logger.log_hyperparams(dict(settings))


@contextmanager
def telling(loggers: Sequence[Logger]) -> Iterator[None]:
    """Tell loggers in here.

    Raises:
        UserError: one raises, whatever it raises.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a library, a server or a class of the user's
        names = ", ".join(logger.kind for logger in loggers)
        raise UserError(
            f"a logger cannot be told ({names}: {_reason(error)}); check train.loggers, the "
            "network and the credentials, or leave it out; the same command resumes the run"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def log_texts(loggers: Sequence[Any], texts: Mapping[str, str], step: int) -> None:
    """Tell sentences: as text where a logger has that, and as settings of the run elsewhere."""
    for logger in loggers:
        add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
        if add_text is None:
            log_settings(logger, texts)
            continue
        for name, text in texts.items():
            add_text(name, text, step)


def _opened(logger: Logger, folder: Path, run_id: str) -> FabricLogger:
    try:
        opened = _open(logger, folder, run_id)
        _ = getattr(opened, "experiment", None)  # connects
    except UserError:
        raise
    except Exception as error:  # whatever a library or a class of the user's raises
        raise UserError(
            f"logger {logger.kind} cannot be opened ({_reason(error)}); check train.loggers, the "
            "network and the credentials, or leave it out"
        ) from error
    return opened


def _open(logger: Logger, folder: Path, run_id: str) -> FabricLogger:
    project, options = logger.project or PROJECT, dict(logger.options)
    if logger.kind == "tensorboard":
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(folder, **{"name": "tensorboard", "version": "", **options})  # pyright: ignore[reportArgumentType]
    if logger.kind == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        own = {"name": folder.name, "save_dir": folder, "id": run_id, "project": project}
        return WandbLogger(**{**own, "tags": [*logger.tags], **options})  # pyright: ignore[reportArgumentType]
    if logger.kind == "mlflow":
        return _mlflow(logger, folder, run_id)
    if logger.kind == "trackio":
        return TrackioLogger(
            {"project": project, "name": f"{folder.name}-{run_id[:8]}", **options}, logger.tags
        )
    return _own(logger, folder, run_id)


def _mlflow(logger: Logger, folder: Path, run_id: str) -> FabricLogger:
    """A run of mlflow, found again by a tag with the run's id."""
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    own: dict[str, Any] = {
        "experiment_name": logger.project or PROJECT,
        "run_name": folder.name,
        "tracking_uri": os.environ.get("MLFLOW_TRACKING_URI"),
        "save_dir": str(folder / "mlruns"),
        **logger.options,
    }
    client = MlflowClient(own["tracking_uri"] or f"file:{own['save_dir']}")
    experiment = client.get_experiment_by_name(own["experiment_name"])
    if experiment is not None:
        known = client.search_runs([experiment.experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'")
        own |= {"run_id": known[0].info.run_id} if known else {}
    tags = {RUN_TAG: run_id, **dict.fromkeys(logger.tags, "true")}
    return MLFlowLogger(**own, tags=tags)


class TrackioLogger(FabricLogger):
    """Tells trackio; a run of the same name is continued."""

    def __init__(self, settings: dict[str, Any], tags: Sequence[str]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio: Any = trackio
        self._run: Any = trackio.init(
            **{"resume": "allow", "embed": False, **settings},
            config={"tags": [*tags]} if tags else None,
        )

    @property
    def name(self) -> str:
        """Of the logger."""
        return "trackio"

    @property
    def version(self) -> str:
        """The run's name in trackio."""
        return str(self._run.name)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Tell numbers at a step."""
        self._trackio.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Tell settings of the run."""
        self._run.config.update(params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left."""
        self._run.finish()


def _own(logger: Logger, folder: Path, run_id: str) -> FabricLogger:
    """A logger by import path, told of the run what its arguments name."""
    found = _own_class(logger)
    names = inspect.signature(found).parameters
    known = {
        "save_dir": folder,
        "root_dir": folder,
        "name": folder.name,
        "version": run_id,
        "id": run_id,
        "project": logger.project,
        "tags": logger.tags or None,
    }
    asked = {"project": logger.project, "tags": logger.tags}
    unknown = [name for name, value in asked.items() if value and name not in names]
    if unknown:
        raise UserError(
            f"logger {logger.kind} takes no {' and no '.join(unknown)}; give it in options under "
            "the name that its class has for it"
        )
    own = {name: value for name, value in known.items() if name in names and value is not None}
    return found(**{**own, **logger.options})


def _own_class(logger: Logger) -> Any:
    def is_logger(value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, FabricLogger)

    expected = "a class of lightning.fabric.loggers.Logger"
    return import_path(logger.kind, "logger", is_logger, expected)


def _check_wandb() -> None:
    """Refuse wandb without credentials, which would be asked for after paid work."""
    offline = ("offline", "disabled", "dryrun")
    known = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in offline
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not known and not (netrc.is_file() and "wandb" in netrc.read_text(errors="replace")):
        raise UserError(
            "train.loggers names wandb, and there are no credentials (no WANDB_API_KEY, nothing in "
            f"{netrc}); call `wandb login`, set WANDB_MODE=offline, or leave it out"
        )


def _check_mlflow(logger: Logger) -> None:
    uri = str(logger.options.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or "")
    has_file = Path("~/.databrickscfg").expanduser().is_file()
    if uri.startswith("databricks") and not os.environ.get("DATABRICKS_TOKEN") and not has_file:
        raise UserError(
            f"train.loggers names mlflow at {uri}, and there are no credentials (no "
            "DATABRICKS_TOKEN, no ~/.databrickscfg); set them, or leave it out"
        )


def _check_trackio(logger: Logger) -> None:
    from huggingface_hub import get_token

    if logger.options.get("space_id") and get_token() is None:
        raise UserError(
            "train.loggers names trackio with a space_id, and there is no token of the hub; call "
            "`hf auth login`, set HF_TOKEN, or leave space_id out"
        )
