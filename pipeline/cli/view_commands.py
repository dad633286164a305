"""Commands that only read: before a run, during it, and after it. They change nothing."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli.options import (
    RUNS,
    ConfigFile,
    Overrides,
    Panel,
    RunArgument,
    RunDir,
    command,
    console,
    latest_run,
    open_folder,
    open_run,
)
from pipeline.console import echo, print_lines


@command(Panel.RUN, "plan my.yaml", "plan.md")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Estimate a run's work and cost, and what the store has of it; exit code 1: disk too small."""
    from pipeline.estimate import estimate
    from pipeline.estimate.result import print_plan

    found = estimate(*open_run(config, overrides, run_dir))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        print_plan(found, console=console())
    if not found.fits:
        raise typer.Exit(1)


@command(Panel.RUN, "doctor my.yaml", "doctor.md")
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Load no model.")] = False,
) -> None:
    """Check whether a config can run here and is set up right; exit code 1 if not."""
    from opd_stream.config_file import load_config
    from pipeline.doctor.findings import Screen
    from pipeline.setup import fetch_checkpoints

    settings = load_config(config, overrides or [])
    if not quick:
        fetch_checkpoints(settings)
    with Screen(as_json=as_json) as screen:
        screen.begin("libraries")  # importing them takes seconds on a cold disk
        from pipeline.doctor.examination import examine

        report = examine(settings, quick=quick, screen=screen)
        screen.end(report)
    if not report.may_start:
        raise typer.Exit(1)


@command(Panel.LOOK, "runs train.objective.kind=bucket --sort figure", "status.md")
def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="With runs, or folders of runs.")
    ] = RUNS,
    wanted: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="FIELD=VALUE",
            help="Only runs with this setting, or with state=finished, running, stopped or "
            "damaged; FIELD=VALUE alone does the same.",
        ),
    ] = None,
    order: Annotated[
        Literal["age", "figure", "tokens", "seconds", "run"],
        typer.Option("--sort", help="The latest, the best, the cheapest first, or by name."),
    ] = "age",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List runs: state, figure, teacher tokens, seconds, age, and the settings that differ."""
    from dataclasses import asdict

    from opd_stream.errors import UserError
    from pipeline.runs import differing_settings, list_runs, runs_lines, runs_table

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one with runs; name another")
    found = list_runs(folder, wanted or (), order)
    if as_json:
        record = {"runs": [asdict(each) for each in found], "differ": differing_settings(found)}
        return typer.echo(json.dumps(record))
    if not found:
        return echo(f"no such run in {folder}")
    page = console()
    page.print(runs_table(found))
    print_lines(page, runs_lines(found))


@command(Panel.LOOK, "status runs/my --watch", "status.md")
def status(
    run_dir: RunArgument,
    overrides: Overrides = None,
    live: Annotated[
        bool, typer.Option("--watch", help="Update until the run is finished.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two updates.")] = 3.0,
    form: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show how far a run is, from the store; --set: what another setting would find there."""
    from pipeline.setup import open_to_look
    from pipeline.status_table import print_status

    config, folder = open_folder(run_dir, overrides)
    print_status(
        open_to_look(config),
        folder,
        as_json=form,
        every=every if live else None,
        is_own=not overrides,
    )


@command(Panel.LOOK, "inspect runs/my --worst 3", "inspect.md")
def inspect(
    run_dir: RunArgument,
    round_number: Annotated[
        int | None, typer.Option("--round", help="From 0. Default: the last finished.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="ID", help="Show a rollout of this prompt.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(help="Which of its rollouts, from 0. Default: 0.")
    ] = None,
    worst: Annotated[
        int | None, typer.Option(metavar="N", help="List the N rollouts with the largest mean.")
    ] = None,
    by: Annotated[
        str,
        typer.Option(help="reverse_kl, teacher_nll, entropy, logprob_gap, rank or tail_mass."),
    ] = "reverse_kl",
    html: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write a page, or a folder of them."),
    ] = None,
    cache_number: Annotated[
        int | None,
        typer.Option("--cache", help="Which of the round's caches. Default: the newest."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show a cached rollout with its teacher scores, or list the worst rollouts of a round."""
    from pipeline.inspect import command, terminal

    has_choice = sample is not None or cache_number is not None
    command.check_question(prompt, worst, html, has_choice)
    config, folder = open_folder(run_dir, overrides)
    round_index = folder.last_round() if round_number is None else round_number
    if prompt is None:
        assert worst is not None
        found = command.inspect_worst(folder, config, round_index=round_index, count=worst, by=by)
        others = command.left_out(folder, config, round_index=round_index, count=worst)
        if html is not None:
            from pipeline.inspect.page import write_pages

            return echo(write_pages([entry.view for entry in found], others, html))
        return terminal.print_worst(found, others, console=console())
    view = command.inspect_rollout(
        folder,
        config,
        round_index=round_index,
        prompt_id=prompt,
        sample=sample or 0,
        cache=cache_number,
        by=by,
    )
    if html is not None:
        from pipeline.inspect.page import write_page

        return echo(write_page(view, html))
    terminal.print_rollout(view, console=console())


@command(Panel.LOOK, "report runs/my runs/replay --out report.html", "report.md")
def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Folders of runs. Default: the latest.",
            default_factory=lambda: [latest_run()],
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="HTML file.")] = Path("report.html"),
    rollouts: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Also a folder of pages: N rollouts a round."),
    ] = 0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again until the runs are finished.")
    ] = False,
) -> None:
    """Show runs on one HTML page: accuracy, cost, drift, decisions, lineage."""
    from opd_stream.errors import UserError

    try:
        from pipeline.report.page import watch_report, write_report
    except ModuleNotFoundError as error:
        raise UserError(
            f"opd-stream report needs the library {error.name}, which is not installed; "
            "pip install 'opd-stream[report]'"
        ) from error
    if watch:
        return watch_report(run_dirs, out, rollouts=rollouts, say=echo)
    echo(write_report(run_dirs, out, rollouts=rollouts))


@command(Panel.LOOK, "compare runs/my@0 runs/my", "evaluation.md")
def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help="RUN, RUN@VERSION or evaluate's --out.")
    ],
    others: Annotated[list[str], typer.Argument(metavar="B", help="The same; one or several.")],
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap of distances.")] = 0,
) -> None:
    """Compare policies with the first on the same problems and seeds, with intervals."""
    from opd_stream.tasks.distance import Bootstrap
    from pipeline.comparison import compare as compare_policies
    from pipeline.comparison import compare_many

    bootstrap = Bootstrap(confidence=confidence, seed=seed)
    if len(others) > 1:
        table, lines = compare_many(first, others, bootstrap)
        console().print(table)
        return echo(*lines)
    for line in compare_policies(first, others[0], bootstrap):
        echo(line)


@command(Panel.LOOK, "schema --out opd-stream.schema.json", "config.md")
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="File to write. Default: show.")] = None,
) -> None:
    """JSON schema of a run's YAML file, for completion and checks in editors."""
    from opd_stream.config_file import json_schema
    from opd_stream.store.files import publish

    text = json.dumps(json_schema(), indent=2)
    if out is None:
        return typer.echo(text)
    publish(out, f"{text}\n".encode())


@command(Panel.LOOK, "chat runs/my", "python.md")
def chat(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="A run's folder, or any checkpoint.")
    ],
    policy_version: Annotated[
        int | None, typer.Option(help="Of a run: 0 is the initial student. Default: the last.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Answer this, and end.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Answers to each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
) -> None:
    """Talk to a policy, under the template of its run; one answer a line that is typed."""
    import sys

    from opd_stream.errors import UserError
    from pipeline.chat import open_writer

    writer = open_writer(
        policy, policy_version, max_new_tokens=max_new_tokens, temperature=temperature
    )
    for text in prompt or ():
        for answer in writer.answers([{"role": "user", "content": text}], samples, seed):
            typer.echo(answer)
    turns: list[dict[str, str]] = []
    while not prompt:
        typer.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(
                f"what was typed has the byte 0x{byte:02x}, which is no UTF-8; expected UTF-8 text"
            ) from error
        if not line:
            break
        if not (text := line.strip()):
            continue
        turns = [*turns * writer.keeps_turns, {"role": "user", "content": text}]
        found = writer.answers(turns, samples, seed)
        typer.echo("\n".join(found))
        turns.append({"role": "assistant", "content": found[0]})
        seed += 1
