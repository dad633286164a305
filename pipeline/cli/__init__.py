"""The commands. Heavy imports happen inside them, so that help answers at once."""

import errno
import sys
from typing import Any

import typer

from pipeline import interrupts
from pipeline.cli import run_commands, share_commands, start_commands, view_commands
from pipeline.cli.cache_commands import cache
from pipeline.cli.options import ORDER, Panel, app, command_name
from pipeline.console import LOG, Level, is_json, print_error, set_up

__all__ = [
    "app",
    "main",
    "run_commands",
    "share_commands",
    "start",
    "start_commands",
    "view_commands",
]

_UsageError: Any = typer.BadParameter.__mro__[1]  # of click, which typer brings along

app.add_typer(cache, name="cache", rich_help_panel=Panel.STORE)
app.registered_commands.sort(key=lambda each: ORDER.index(command_name(each)))


def start() -> None:
    """Run the command line in a process of its own, which signals may end."""
    interrupts.listen()
    try:
        main()
    except BaseException:
        if interrupts.is_interrupted():
            interrupts.leave()
        raise


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    from opd_stream.errors import UserError, shortened

    try:
        code = app(prog_name="opd-stream", standalone_mode=False)
    except _UsageError as error:
        if "--log-json" in sys.argv:  # no option has been read yet
            set_up(Level.INFO, as_json=True)
        if text := " ".join(error.format_message().split()):  # else the help has been printed
            command = "opd-stream" if error.ctx is None else error.ctx.command_path
            print_error(f"{text.removesuffix('.')}; see {command} --help")
        sys.exit(2)
    except UserError as error:
        print_error(*map(str, error.args))
        sys.exit(2)
    except Exception as error:
        from opd_stream.store.artifact import DamagedUnit

        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            print_error(
                f"{shortened(str(error.filename))}: {error.strerror}; expected a path that the "
                "file system takes; name another one"
            )
            sys.exit(2)
        if isinstance(error, DamagedUnit):
            print_error(
                f"{error}; `opd-stream cache verify STORE --repair` takes it out; then continue "
                "the run that made it: only that unit is made again"
            )
            sys.exit(2)
        if not is_json():
            raise
        LOG.exception("a defect of opd-stream")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
