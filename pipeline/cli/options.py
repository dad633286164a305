"""The command line itself, what several commands ask for, and how they open a run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from opd_stream.config import Config
    from pipeline.run_directory import RunDirectory

app = typer.Typer(
    help="On-policy distillation of language models from a cache of teacher scores.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a config field.")
]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run. Default: runs/NAME of config.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
RoundNumber = Annotated[int, typer.Option("--round", help="Number of the round, from 0.")]


def open_run(
    config: Path, overrides: list[str] | None, run_dir: Path | None
) -> "tuple[Config, RunDirectory]":
    """Config and folder of a run."""
    from opd_stream.config_file import load_config
    from pipeline.run_directory import RunDirectory

    settings = load_config(config, overrides or [])
    return settings, RunDirectory(run_dir or Path("runs") / config.stem)


def console() -> "Console":
    """A terminal as wide as it is, or a page of a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)
