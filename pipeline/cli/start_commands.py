"""Commands to begin with: the embedded job, and a config of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import RUNS, Overrides, Panel, RunDir, command
from pipeline.cli.run_commands import run
from pipeline.console import echo


def _known_templates(incomplete: str) -> list[str]:
    from opd_stream.config_templates import template_names

    return [name for name in template_names() if name.startswith(incomplete)]


@command(Panel.RUN, "quickstart", "tutorial.md")
def quickstart(overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Distil the embedded teacher into the embedded student: a minute or two on two cores."""
    from opd_stream.embedded import embedded

    run(embedded("quickstart.yaml"), overrides, run_dir)


@command(Panel.RUN, "init my.yaml --template topd", "tutorial.md")
def init(
    file: Annotated[
        Path | None, typer.Argument(help="New file. Default: my.yaml, or TEMPLATE.yaml.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            help="quickstart, qwen-gsm8k, replay, two-machines, or a published method such as topd "
            "(docs/methods.md).",
            autocompletion=_known_templates,
        ),
    ] = "quickstart",
) -> None:
    """Write a config to begin with; each of its fields says what it means."""
    from opd_stream.config_templates import QUICKSTART, template_text
    from opd_stream.errors import UserError, shortened
    from opd_stream.store.files import publish

    if file is None:
        file = Path("my.yaml" if template == QUICKSTART else f"{Path(template).name}.yaml")
    if not str(file).isprintable():  # it stands in comments, and in the commands that are printed
        raise UserError(
            f"the file is {shortened(file)}; expected a name of printable characters; name another"
        )
    text = template_text(template, str(file))
    if file.exists():
        raise UserError(f"{file} exists; expected a new file; name another one, or move it away")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no folder; expected one for {file.name}; make it")
    publish(file, text.encode())
    echo(f"wrote {file}; opd-stream plan {file} says what it costs, opd-stream run {file} runs it")
    if template == "replay" and not (RUNS / "my").is_dir():
        echo("it replays the run of my.yaml: opd-stream init, then opd-stream run my.yaml, first")
