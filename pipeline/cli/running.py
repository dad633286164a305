"""Commands that work: the whole run, one stage of a round, one evaluation."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import ConfigFile, Overrides, RoundNumber, RunDir, app, console, open_run

Follow = Annotated[
    bool, typer.Option("--follow", help="Wait for what other machines have not published yet.")
]


@app.command()
def run(config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Run the whole loop; run it again to continue."""
    from pipeline.progress import TerminalProgress
    from pipeline.rounds import run as run_rounds
    from pipeline.table import print_run

    settings, directory = open_run(config, overrides, run_dir)
    with TerminalProgress() as progress:
        before = directory.summary()
        summary = run_rounds(settings, directory, progress)
    page = console()
    if before.get("finished") and before["policies"] == summary["policies"]:
        page.print("everything is in the store already; nothing to do", highlight=False)
    print_run(directory.reports(), summary, str(directory.path), console=page)


@app.command()
def generate(
    config: ConfigFile,
    round_index: RoundNumber,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    follow: Follow = False,
) -> None:
    """Sample the student's rollouts of one round."""
    _stage("generate", config, overrides, run_dir, round_index, follow=follow)


@app.command()
def score(
    config: ConfigFile,
    round_index: RoundNumber,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    follow: Follow = False,
) -> None:
    """Score the rollouts of one round with the teacher."""
    _stage("score", config, overrides, run_dir, round_index, follow=follow)


@app.command()
def train(
    config: ConfigFile,
    round_index: RoundNumber,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    follow: Follow = False,
) -> None:
    """Train on the scores of one round."""
    _stage("train", config, overrides, run_dir, round_index, follow=follow)


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
    from pipeline.progress import TerminalProgress
    from pipeline.stage_commands import run_evaluation

    if round_index is not None:
        raise UserError(
            f"evaluate was given --round {round_index}; expected --policy-version: 0 is the "
            f"initial student, {round_index + 1} the policy after round {round_index}"
        )
    settings, directory = open_run(config, overrides, run_dir)
    with TerminalProgress() as progress:
        lines = run_evaluation(
            settings,
            directory,
            policy_version=policy_version,
            policy=policy,
            progress=progress,
            out=out,
        )
    typer.echo(lines)


def _stage(
    stage: str,
    config: Path,
    overrides: list[str] | None,
    run_dir: Path | None,
    round_index: int,
    *,
    follow: bool = False,
) -> None:
    from pipeline.progress import TerminalProgress
    from pipeline.stage_commands import run_stage

    settings, directory = open_run(config, overrides, run_dir)
    with TerminalProgress() as progress:
        line = run_stage(
            stage, settings, directory, round_index=round_index, progress=progress, follow=follow
        )
    typer.echo(line)
