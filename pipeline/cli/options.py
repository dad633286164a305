"""The command line application, options that several commands share, and how a run is opened."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.console import Level, set_up

if TYPE_CHECKING:
    from rich.console import Console

    from opd_stream.config import Config
    from pipeline.run_folder import RunFolder

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a config field.")
]


def _folder(text: str | Path) -> Path:
    """A folder that the command line names."""
    from opd_stream.errors import UserError, shortened
    from opd_stream.section import path_flaw

    if (flaw := path_flaw(str(text))) is not None:
        raise UserError(f"the folder of the run is {shortened(text)}; {flaw}; name a folder")
    return Path(text)


RunDir = Annotated[
    str | None, typer.Option("--run-dir", help="Folder of the run. Default: runs/NAME of config.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]


@app.callback()
def options(
    log_level: Annotated[Level, typer.Option(help="Lowest level to print.")] = Level.INFO,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="One JSON object a line on stderr, no bars.")
    ] = False,
) -> None:
    """On-policy distillation of language models from a cache of teacher scores."""
    set_up(log_level, as_json=log_json)


def open_run(
    config: Path, overrides: list[str] | None, run_dir: str | None
) -> "tuple[Config, RunFolder]":
    """Config and folder of a run that a config file describes."""
    from opd_stream.config_file import load_config
    from pipeline.run_folder import RunFolder

    settings = load_config(config, overrides or [])
    return settings, RunFolder(Path("runs") / config.stem if run_dir is None else _folder(run_dir))


def open_folder(run_dir: Path, overrides: list[str] | None) -> "tuple[Config, RunFolder]":
    """Config and folder of a run that exists."""
    from opd_stream.config_file import override_config

    folder = folder_of_run(run_dir)
    return override_config(folder.config(), overrides or []), folder


def folder_of_run(run_dir: Path) -> "RunFolder":
    """The folder of a run, whether it exists or not."""
    from pipeline.run_folder import RunFolder

    return RunFolder(_folder(run_dir))


def console() -> "Console":
    """A console for results: as wide as the terminal, or 140 columns in a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)
