"""Commands that do work: the whole run, one stage of a round, one evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.options import ConfigFile, Overrides, Panel, RunDir, command, console, open_run
from pipeline.console import TerminalProgress, echo, print_lines
from pipeline.tables import result_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from opd_stream.config import Config
    from pipeline.records import (
        Answers,
        Passes,
        RoundReport,
        RunSummary,
        StageNumbers,
        TokenNumbers,
    )
    from pipeline.run_folder import RunFolder

FIGURES = ("pass@1", "pass@8")
DISTANCES = ("KL own\nsamples", "KL teacher's\ntext", "top-1\nagreement")
WORK = (
    *("tokens\ngenerated", "teacher\nscored", "\ntrained"),
    *("seconds\ngenerate", "\nscore", "\ntrain", "\nevaluate", "\npolicy_drift"),
)
DROPS = (  # where it is narrow, the first one first
    *("\nevaluate", "\ntrain", "\nscore", "seconds\ngenerate", "policy\nversion", "\ntrained"),
    *("tokens\ngenerated", "window", *DISTANCES[1:], FIGURES[1], "\npolicy_drift"),
)


@command(Panel.RUN, "fetch my.yaml", "tutorial.md", name="fetch")
def fetch_models(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fetch the hub models of a config and convert its GGUF files; a run does it, too."""
    from opd_stream.config_file import load_config
    from pipeline.setup import fetch_checkpoints

    settings = load_config(config, overrides or [])
    fetch_checkpoints(settings)
    for model in (settings.student, settings.teacher):
        if model is not None:
            echo(f"{model.path}: {model.folder}")


@command(Panel.RUN, "run my.yaml rounds=2 --run-dir runs/two", "tutorial.md")
def run(config: ConfigFile, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Run the whole loop; run it again to continue."""
    from pipeline.run import run as run_rounds

    settings, folder = open_run(config, overrides, run_dir)
    with TerminalProgress() as progress:
        before = folder.sound_summary()
        summary = run_rounds(settings, folder, progress)
    page = console()
    if before is not None and before.finished and before.policies == summary.policies:
        page.print("everything is in the store already; nothing to do", highlight=False)
    print_run(folder.reports(), summary, str(folder.path), console=page)


RoundIndex = Annotated[int, typer.Option("--round", help="Number of the round, from 0.")]
Follow = Annotated[
    bool, typer.Option("--follow", help="Wait for what other machines have not published yet.")
]


@command(Panel.RUN, "generate my.yaml --round 0 --follow", "deploy.md")
def generate(
    config: ConfigFile,
    round_index: RoundIndex,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    follow: Follow = False,
    by: Annotated[
        Literal["student", "teacher"],
        typer.Option("--by", help="Who samples: the teacher writes those of rollouts.given_by."),
    ] = "student",
) -> None:
    """Sample the rollouts of one round that the student writes, or the teacher."""
    _run_stage("generate", open_run(config, overrides, run_dir), round_index, follow, by)


def _run_stage(
    stage: Literal["generate", "score", "train"],
    opened: "tuple[Config, RunFolder]",
    round_index: int,
    follow: bool,
    by: Literal["student", "teacher"] = "student",
) -> None:
    from pipeline.single_stage import run_stage

    run, folder = opened
    with TerminalProgress() as progress:
        line = run_stage(
            stage,
            run,
            folder,
            round_index=round_index,
            progress=progress,
            follow=follow,
            author=by,
        )
    echo(line)


def _add_stage(stage: Literal["score", "train"], description: str) -> None:
    """Add the command of one stage; both take the same options."""

    example = f"{stage} my.yaml --round 0 --follow"

    @command(Panel.RUN, example, "deploy.md", name=stage)
    def of_stage(
        config: ConfigFile,
        round_index: RoundIndex,
        overrides: Overrides = None,
        run_dir: RunDir = None,
        follow: Follow = False,
    ) -> None:
        _run_stage(stage, open_run(config, overrides, run_dir), round_index, follow)

    of_stage.__doc__ = description


_add_stage("score", "Score the rollouts of one round with the teacher.")
_add_stage("train", "Train on the scores of one round.")


@command(Panel.RUN, "evaluate my.yaml --policy-version 0", "evaluation.md")
def evaluate(
    config: ConfigFile,
    policy_version: Annotated[
        int | None,
        typer.Option(help="0: the initial student, R + 1: the policy after round R."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="Any Hugging Face folder, hub model or GGUF file instead."),
    ] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write for compare.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="File to write the answers and verdicts to, as JSON lines."),
    ] = None,
    round_index: Annotated[int | None, typer.Option("--round", hidden=True)] = None,
) -> None:
    """Evaluate a policy; with another judge or k nothing is sampled again."""
    from opd_stream.errors import UserError
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
            answers=answers,
        )
    echo(*lines.split("\n"))


def print_run(
    reports: "Sequence[RoundReport]", summary: "RunSummary", folder: str, *, console: "Console"
) -> None:
    """Print a table of the rounds, totals, and where the run lies."""
    compares = any(each.distances for each in summary.evaluations)
    judges = any(each.passes for each in summary.evaluations) or not compares
    figures = [*(FIGURES if judges else ()), *(DISTANCES if compares else ())]
    columns = ("round", "window", "policy\nversion", *figures, *WORK)
    table = result_table(columns, drops=DROPS)
    table.collapse_padding = True  # the widest of the tables

    def figures_of(evaluation: "Answers | None") -> list[str]:
        passes = _passes(evaluation) if judges else ()
        return [*passes, *(_distances(evaluation) if compares else ())]

    first = next((each for each in summary.evaluations if each.round == 0), None)
    if first is not None:
        later = sum(report.evaluation.seconds for report in reports if report.evaluation)
        seconds = f"{max(0.0, summary.seconds.evaluate - later):.1f}"
        table.add_row("start", "", "0", *figures_of(first), *[""] * 6, seconds)
    for report in reports:
        evaluation = report.evaluation
        table.add_row(
            str(report.round),
            str(report.window_tokens),
            str(report.round + 1),
            *figures_of(evaluation),
            *_work(report.tokens, report.seconds),
            "" if evaluation is None else f"{evaluation.seconds:.1f}",
            f"{report.policy_drift:.4f}",
        )
    table.add_section()
    work = _work(summary.tokens, summary.seconds)
    table.add_row("all", *[""] * (2 + len(figures)), *work, f"{summary.seconds.evaluate:.1f}", "")
    console.print(table)
    print_lines(console, (*_lines(summary), f"run: {folder}"))


def _lines(summary: "RunSummary") -> "Iterator[str]":
    reused, seconds = summary.reused, summary.seconds
    yield f"teacher-scored tokens: {summary.tokens.teacher_scored:,}"
    yield f"reused: {reused.rollout_units} rollout units, {reused.score_units} score units"
    yield (
        f"wall clock: {seconds.wall:.0f} s, of which {seconds.other:.0f} s neither sampling, "
        "scoring, training nor evaluation"
    )
    last = summary.evaluations[-1] if summary.evaluations else None
    if last is not None and (last.distances or len(last.benchmarks) > 1):
        from pipeline.evaluation import figure_lines

        yield from figure_lines(last)
    for name, each in summary.teachers.items():
        gaps = [f"{gap:.4f}" for gap in each.reverse_kl if gap is not None]
        kl = f", reverse KL {' '.join(gaps)}" if gaps else ""
        yield f"teacher {name}: {each.teacher_scored:,} tokens scored, {each.rows:,} rows{kl}"
    if summary.refused_rows:
        yield f"rows refused by the teacher (not finite): {summary.refused_rows}"
    if summary.dropped_rows:
        from opd_stream.filters import dropped_text

        yield dropped_text(summary.dropped_rows)
    yield f"final policy: {summary.final_policy}"


def _work(tokens: "TokenNumbers", seconds: "StageNumbers") -> list[str]:
    counts = (tokens.generated, tokens.teacher_scored, tokens.trained)
    times = (seconds.generate, seconds.score, seconds.train)
    return [*(f"{each:,}" for each in counts), *(f"{each:.1f}" for each in times)]


def _passes(evaluation: "Passes | None") -> tuple[str, str]:
    if evaluation is None or evaluation.pass_at_1 is None:
        return "", ""
    first = f"{evaluation.pass_at_1:.3f}±{evaluation.standard_error:.3f}"
    return first, f"{evaluation.passes['pass@8']:.3f}" if "pass@8" in evaluation.passes else ""


def _distances(evaluation: "Answers | None") -> tuple[str, str, str]:
    """Reverse KL on own samples, forward KL on the teacher's text, and agreement there.

    Of several sets of prompts the first.
    """
    if evaluation is None or not evaluation.distances:
        return "", "", ""
    texts = next(iter(evaluation.distances.values())).texts
    own, teachers = texts["samples"], texts["teacher_text"]
    return f"{own.reverse_kl:.3f}", f"{teachers.forward_kl:.3f}", f"{teachers.agreement:.3f}"
