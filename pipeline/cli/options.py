"""The command line application, options that several commands share, and how a run is opened."""

import re
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from opd_stream import __version__
from pipeline.console import Level, set_up

if TYPE_CHECKING:
    from rich.console import Console

    from opd_stream.config import Config
    from pipeline.run_folder import RunFolder

PAGES = "https://github.com/opd-stream/opd-stream/blob/main/docs"
RUNS = Path("runs")  # where a run lies unless --run-dir names another place
STORE = "store"  # where artifacts lie unless a config says otherwise
_SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)


ORDER = (  # in the help
    *("quickstart", "init", "plan", "doctor", "fetch", "run"),
    *("generate", "score", "train", "evaluate"),
    *("runs", "status", "inspect", "compare", "report", "chat", "schema", "export"),
)


_SETTING_OPTIONS = {"overrides": "--set", "wanted": "--where"}  # of a parameter's name


class Panel(StrEnum):
    """Where a command stands in the help."""

    RUN = "Run: before, and while models work"
    LOOK = "Look: reads, changes nothing"
    STORE = "Store: teacher work, kept and shared"


class Command(TyperCommand):
    """A command whose settings need no --set, and whose RUN or STORE may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; what is left out is the latest run, or the store of the folder."""
        for each in self.params:
            if (option := _SETTING_OPTIONS.get(str(each.name))) is not None:
                args = self._with_option(args, option)
        try:
            return super().parse_args(ctx, [*args])
        except typer.BadParameter as error:
            first = next(each for each in self.params if each.param_type_name == "argument")
            found = _LEFT_OUT.get(str(first.metavar))
            has_place = any(Path(each).is_dir() for each in args)
            if type(error).__name__ != "MissingParameter" or found is None or has_place:
                raise
        return super().parse_args(ctx, [found(), *args])

    def _with_option(self, args: list[str], option: str) -> list[str]:
        """The same with an option in front of each FIELD=VALUE that stands alone."""
        takes_value = {
            name
            for each in self.params
            if each.param_type_name == "option" and not getattr(each, "is_flag", False)
            for name in each.opts
        }
        end = args.index("--") if "--" in args else len(args)  # behind it nothing is an option
        found, behind = list[str](), list[str]()
        for at, (before, word) in enumerate(zip(["", *args], args, strict=False)):
            is_alone = before not in takes_value and _SETTING.fullmatch(word) is not None
            if is_alone and not Path(word).exists():
                found += [option, word]
            else:
                (found if at < end else behind).append(word)
        return [*found, *behind]


def latest_run() -> str:
    """The folder of the run that was worked on last.

    Raises:
        UserError: there is none.
    """
    from opd_stream.errors import UserError
    from pipeline.runs import run_folders

    if not (found := run_folders(RUNS)):
        raise UserError(
            f"no run is named, and there is none below {RUNS}; expected RUN; name its folder"
        )
    return str(found[0])


def default_store() -> str:
    """The store of this folder, or that of its latest run.

    Raises:
        UserError: there is neither.
    """
    from opd_stream.errors import UserError
    from pipeline.runs import run_folders

    if Path(STORE).is_dir():
        return STORE
    if not (found := run_folders(RUNS)):
        raise UserError(
            f"no store is named, and there is neither {STORE} nor a run below {RUNS}; expected "
            "STORE; name its folder"
        )
    return folder_of_run(found[0]).config().store


_LEFT_OUT: dict[str, Callable[[], str]] = {"RUN": latest_run, "STORE": default_store}


def command(
    panel: Panel, example: str, page: str, *, name: str | None = None, to: typer.Typer | None = None
) -> Any:
    """Declare a command, with a line that works and the page that says more in its help.

    Args:
        panel: of the help.
        example: the arguments of the line.
        page: file of `docs`.
        name: of the command; None: that of the function.
        to: the group that it belongs to; None: the program itself.
    """
    words = "opd-stream" if to is None else "opd-stream cache"
    return (app if to is None else to).command(
        name,
        cls=Command,
        rich_help_panel=None if to is not None else panel,
        epilog=f"Example: {words} {example}\n\nMore: {PAGES}/{page}",
    )


def command_name(declared: Any) -> str:
    """The name of a command that was declared."""
    return str(declared.name or declared.callback.__name__)


def _known_runs(incomplete: str) -> list[str]:
    """Runs of this folder, for a shell that completes a word."""
    from pipeline.runs import run_folders

    return [str(each) for each in run_folders(RUNS) if str(each).startswith(incomplete)]


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Begin: opd-stream quickstart, or opd-stream init\n\nMore: {PAGES}/README.md",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Override a config field, by its dotted name; FIELD=VALUE alone does the same.",
    ),
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
RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Folder of the run. Default: the latest below runs.",
        default_factory=latest_run,
        show_default=False,
        autocompletion=_known_runs,
    ),
]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"opd-stream {__version__}")
        raise typer.Exit


@app.callback()
def options(
    log_level: Annotated[Level, typer.Option(help="Lowest level to print.")] = Level.INFO,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="One JSON object a line on stderr, no bars.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
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
    return settings, RunFolder(RUNS / config.stem if run_dir is None else _folder(run_dir))


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
    """A console for results: as wide as the terminal, or wide in a pipe."""
    from rich.console import Console

    from pipeline.tables import PIPE_COLUMNS

    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
