"""The commands. Heavy imports happen inside them, so that help answers at once."""

import sys
from typing import Annotated

import typer

from pipeline.cli import looking, running
from pipeline.cli.caching import cache
from pipeline.cli.options import app
from pipeline.log import LOG, Level, is_json, set_up, tell_error

__all__ = ["app", "looking", "main", "running"]

app.add_typer(cache, name="cache")


@app.callback()
def options(
    log_level: Annotated[Level, typer.Option(help="From which level on to speak.")] = Level.INFO,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="One JSON object a line on stderr, no bars.")
    ] = False,
) -> None:
    """On-policy distillation of language models from a cache of teacher scores."""
    set_up(log_level, as_json=log_json)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    from opd_stream.errors import UserError

    try:
        app()
    except UserError as error:
        tell_error(str(error))
        sys.exit(2)
    except Exception as error:
        if _is_damage(error):
            tell_error(f"{error}; continue the run that made it: that unit alone is made again")
            sys.exit(2)
        if not is_json():
            raise
        LOG.exception("a defect of opd-stream")
        sys.exit(1)


def _is_damage(error: Exception) -> bool:
    from opd_stream.store.artifact import DamagedUnit

    return isinstance(error, DamagedUnit)
