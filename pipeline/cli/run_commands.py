"""Commands that do work: the whole run, one stage of a round, one evaluation."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.options import ConfigFile, Overrides, RunDir, app, console, open_run


@app.command()
def run(config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Run the whole loop; run it again to continue."""
    from pipeline.console import TerminalProgress
    from pipeline.run import run as run_rounds
    from pipeline.summary_table import print_run

    settings, folder = open_run(config, overrides, run_dir)
    with TerminalProgress() as progress:
        before = folder.summary()
        summary = run_rounds(settings, folder, progress)
    page = console()
    if before is not None and before.finished and before.policies == summary.policies:
        page.print("everything is in the store already; nothing to do", highlight=False)
    print_run(folder.reports(), summary, str(folder.path), console=page)


def _add_stage(stage: Literal["generate", "score", "train"], description: str) -> None:
    """Add the command of one stage; all stages take the same options."""

    @app.command(stage, help=description)
    def command(
        config: ConfigFile,
        round_index: Annotated[int, typer.Option("--round", help="Number of the round, from 0.")],
        overrides: Overrides = None,
        run_dir: RunDir = None,
        follow: Annotated[
            bool,
            typer.Option("--follow", help="Wait for what other machines have not published yet."),
        ] = False,
    ) -> None:
        from pipeline.console import TerminalProgress
        from pipeline.single_stage import run_stage

        run, folder = open_run(config, overrides, run_dir)
        with TerminalProgress() as progress:
            line = run_stage(
                stage, run, folder, round_index=round_index, progress=progress, follow=follow
            )
        typer.echo(line)


_add_stage("generate", "Sample the student's rollouts of one round.")
_add_stage("score", "Score the rollouts of one round with the teacher.")
_add_stage("train", "Train on the scores of one round.")


@app.command()
def evaluate(
    config: ConfigFile,
    policy_version: Annotated[
        int | None,
        typer.Option(help="0: the initial student, R + 1: the policy after round R."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Any Hugging Face folder instead.")
    ] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write for compare.")] = None,
    round_index: Annotated[int | None, typer.Option("--round", hidden=True)] = None,
) -> None:
    """Evaluate a policy; with another judge or k nothing is sampled again."""
    from opd_stream.errors import UserError
    from pipeline.console import TerminalProgress
    from pipeline.single_stage import run_evaluation

    if round_index is not None:
        raise UserError(
            f"evaluate was given --round {round_index}; expected --policy-version: 0 is the "
            f"initial student, {round_index + 1} the policy after round {round_index}"
        )
    settings, folder = open_run(config, overrides, run_dir)
    with TerminalProgress() as progress:
        lines = run_evaluation(
            settings,
            folder,
            policy_version=policy_version,
            policy=policy,
            progress=progress,
            out=out,
        )
    typer.echo(lines)
