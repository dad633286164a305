"""The commands. Heavy imports happen inside them, so that help answers at once."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.log import LOG, Level, is_json, set_up, tell_error

if TYPE_CHECKING:
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
cache = typer.Typer(help="Look at a store, verify it, free it, share it.", no_args_is_help=True)
app.add_typer(cache, name="cache")
StorePlace = Annotated[str, typer.Argument(metavar="STORE", help="Folder or s3://BUCKET/PATH.")]
ArtifactName = Annotated[str, typer.Argument(metavar="NAME", help="KIND/FINGERPRINT.")]
RoundNumber = Annotated[int, typer.Option("--round", help="Number of the round, from 0.")]
Follow = Annotated[
    bool, typer.Option("--follow", help="Wait for what other machines have not published yet.")
]


@app.callback()
def options(
    log_level: Annotated[Level, typer.Option(help="From which level on to speak.")] = Level.INFO,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="One JSON object a line on stderr, no bars.")
    ] = False,
) -> None:
    """On-policy distillation of language models from a cache of teacher scores."""
    set_up(log_level, as_json=log_json)


@app.command()
def run(config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Run the whole loop; run it again to continue."""
    from rich.console import Console

    from pipeline.progress import TerminalProgress
    from pipeline.rounds import run as run_rounds
    from pipeline.table import print_run

    settings, directory = _open(config, overrides, run_dir)
    with TerminalProgress() as progress:
        before = directory.summary()
        summary = run_rounds(settings, directory, progress)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if before.get("finished") and before["policies"] == summary["policies"]:
        console.print("everything is in the store already; nothing to do", highlight=False)
    print_run(directory.reports(), summary, str(directory.path), console=console)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What a run would do and cost, and what of it is there; exit code 1: a disk is too small."""
    import json

    from rich.console import Console

    from pipeline.forecast import forecast
    from pipeline.forecast.table import print_plan

    found = forecast(*_open(config, overrides, run_dir))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        print_plan(found, console=Console(width=None if sys.stdout.isatty() else 140))
    if not found.fits:
        raise typer.Exit(1)


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
    round_index: Annotated[
        int | None, typer.Option("--round", help="Round that made the policy; -1: the student.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Any Hugging Face folder instead.")
    ] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write for compare.")] = None,
) -> None:
    """Evaluate a policy; with another judge or k nothing is sampled again."""
    from pipeline.progress import TerminalProgress
    from pipeline.stage_commands import run_evaluation

    settings, directory = _open(config, overrides, run_dir)
    with TerminalProgress() as progress:
        lines = run_evaluation(
            settings,
            directory,
            round_index=round_index,
            policy=policy,
            progress=progress,
            out=out,
        )
    typer.echo(lines)


@app.command()
def compare(
    left: Annotated[str, typer.Argument(metavar="A", help="RUN, RUN@ROUND or evaluate's --out.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Compare two policies on the same problems and seeds, with intervals."""
    from opd_stream.tasks.bootstrap import Bootstrap
    from pipeline.comparison import compare as compare_policies

    for line in compare_policies(left, right, Bootstrap(confidence=confidence, seed=seed)):
        typer.echo(line)


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    overrides: Overrides = None,
    live: Annotated[bool, typer.Option("--watch", help="Stay until the run is finished.")] = False,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 3.0,
    form: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """How far a run is, by the store; --set asks what another setting would still find there."""
    from opd_stream.config_file import override_config
    from pipeline.run_directory import RunDirectory
    from pipeline.status import print_status

    directory = RunDirectory(run_dir)
    settings = override_config(directory.config(), overrides or [])
    print_status(settings, directory, as_json=form, every=every if live else None)


@app.command()
def inspect(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    round_index: RoundNumber,
    prompt: Annotated[str | None, typer.Option(metavar="ID", help="Show its rollout.")] = None,
    sample: Annotated[int | None, typer.Option(help="Which one, from 0. Default: 0.")] = None,
    worst: Annotated[
        int | None, typer.Option(metavar="N", help="List the N with the largest mean.")
    ] = None,
    by: Annotated[
        str,
        typer.Option(help="reverse_kl, teacher_nll, entropy, logprob_gap, rank or tail_mass."),
    ] = "reverse_kl",
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a page instead of showing it here.")
    ] = None,
    cache_number: Annotated[
        int | None, typer.Option("--cache", help="Of the round's caches. Default: the newest.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """A cached rollout seen with its teacher scores, or the worst of a round."""
    from rich.console import Console

    from opd_stream.config_file import override_config
    from pipeline.inspect import command, terminal
    from pipeline.run_directory import RunDirectory

    has_choice = sample is not None or cache_number is not None
    command.check_question(prompt, worst, html, has_choice)
    directory = RunDirectory(run_dir)
    config = override_config(directory.config(), overrides or [])
    console = Console(width=None if sys.stdout.isatty() else 140)
    if prompt is None:
        assert worst is not None
        found = command.inspect_worst(
            directory, config, round_index=round_index, count=worst, by=by
        )
        return terminal.print_worst(found, console=console)
    view = command.inspect_rollout(
        directory,
        config,
        round_index=round_index,
        prompt_id=prompt,
        sample=sample or 0,
        cache=cache_number,
        by=by,
    )
    if html is not None:
        return typer.echo(command.write_page(view, html))
    terminal.print_rollout(view, console=console)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", help="HTML file.")] = Path("report.html"),
) -> None:
    """Show runs on one HTML page: accuracy, cost, drift, decisions, lineage."""
    from pipeline.report import check_libraries

    check_libraries()
    from pipeline.report.page import write_report

    typer.echo(write_report(run_dirs, out))


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Load no model.")] = False,
) -> None:
    """Say whether a config can run here and is set up right; exit code 1 if not."""
    from opd_stream.config_file import load_config
    from pipeline.doctor import screen
    from pipeline.doctor.examination import examine

    report = examine(load_config(config, overrides or []), quick=quick)
    for line in [screen.as_json(report)] if as_json else screen.lines(report):
        typer.echo(line)
    if not report.may_start:
        raise typer.Exit(1)


@cache.command("ls")
def cache_ls(store: StorePlace) -> None:
    """List the artifacts of a store."""
    _lines("ls", store)


@cache.command("show")
def cache_show(store: StorePlace, name: ArtifactName) -> None:
    """Recipe, size and fidelity of an artifact."""
    _lines("show", store, name)


@cache.command("verify")
def cache_verify(store: StorePlace) -> None:
    """Read everything and say what is damaged; exit code 1 if anything is."""
    if not _lines("verify", store):
        raise typer.Exit(1)


@cache.command("gc")
def cache_gc(
    store: StorePlace,
    delete: Annotated[bool, typer.Option("--delete", help="Do it. Default: only say.")] = False,
    hours: Annotated[float, typer.Option(help="Leave what is younger.")] = 24.0,
) -> None:
    """Free what no run and no pin reaches."""
    _lines("gc", store, delete, hours)


@cache.command("pin")
def cache_pin(store: StorePlace, name: ArtifactName) -> None:
    """Keep an artifact whatever the runs do."""
    _lines("pin", store, name)


@cache.command("unpin")
def cache_unpin(store: StorePlace, name: ArtifactName) -> None:
    """Take a pin away."""
    _lines("unpin", store, name)


@cache.command("export")
def cache_export(
    store: StorePlace,
    name: ArtifactName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    form: Annotated[str, typer.Option(help="parquet or datasets.")] = "parquet",
) -> None:
    """Write a scores artifact with its rollouts for other programs."""
    _lines("export", store, name, out, form)


@cache.command("residual")
def cache_residual(store: StorePlace, name: ArtifactName) -> None:
    """Make scores without the teacher's style bias, from the cache alone (Lightning OPD 2.0)."""
    _lines("residual", store, name)


@cache.command("import")
def cache_import(
    store: StorePlace,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help=".jsonl, .jsonl.zst, .parquet")],
    codec: Annotated[str, typer.Option(help="As scores.codec in a config.")] = "{kind: exact}",
    stop_id: Annotated[
        list[int] | None,
        typer.Option(help="A terminator; in the order of teacher_forced_logprobs' columns."),
    ] = None,
) -> None:
    """Make artifacts of rollouts and scores that another program wrote."""
    _lines("import", store, source, codec, stop_id or [])


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    from opd_stream.errors import UserError

    try:
        app()
    except UserError as error:
        tell_error(str(error))
        sys.exit(2)
    except Exception:
        if not is_json():
            raise
        LOG.exception("a defect of opd-stream")
        sys.exit(1)


def _open(
    config: Path, overrides: list[str] | None, run_dir: Path | None
) -> "tuple[Config, RunDirectory]":
    from opd_stream.config_file import load_config
    from pipeline.run_directory import RunDirectory

    settings = load_config(config, overrides or [])
    return settings, RunDirectory(run_dir or Path("runs") / config.stem)


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

    settings, directory = _open(config, overrides, run_dir)
    with TerminalProgress() as progress:
        line = run_stage(
            stage, settings, directory, round_index=round_index, progress=progress, follow=follow
        )
    typer.echo(line)


def _lines(command: str, store: str, *arguments: object) -> bool:
    """Print what a cache command says; returns whether all is well."""
    from pipeline.cache_commands import COMMANDS, LONG
    from pipeline.progress import TerminalProgress

    all_is_well = True
    with TerminalProgress() as progress:
        told = {"progress": progress} if command in LONG else {}
        for line in COMMANDS[command](store, *arguments, **told):
            all_is_well = all_is_well and not line.startswith("damaged")
            progress.result(line)
    return all_is_well
