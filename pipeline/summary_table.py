"""What `run` prints at its end: a table of the rounds, totals, and where the run lies."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.evaluation import figure_lines
from pipeline.records import Passes, RoundReport, RunSummary, TokenNumbers

COLUMNS = (
    *("round", "window", "policy\nversion", "pass@1", "pass@8"),
    *("tokens\ngenerated", "teacher\nscored", "\ntrained"),
    *("seconds\ngenerate", "\nscore", "\ntrain", "\nevaluate", "\npolicy_drift"),
)


def print_run(
    reports: Sequence[RoundReport], summary: RunSummary, folder: str, *, console: Console
) -> None:
    """Print rounds, totals and where the run lies."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    first = next((each for each in summary.evaluations if each.round == 0), None)
    if first is not None:
        later = sum(report.evaluation.seconds for report in reports if report.evaluation)
        seconds = f"{summary.seconds.evaluate - later:.1f}"
        table.add_row("start", "", "0", *_passes(first), *[""] * 6, seconds)
    for report in reports:
        evaluation, seconds = report.evaluation, report.seconds
        table.add_row(
            str(report.round),
            str(report.window_tokens),
            str(report.round + 1),
            *_passes(evaluation),
            *_tokens(report.tokens),
            *(f"{each:.1f}" for each in (seconds.generate, seconds.score, seconds.train)),
            "" if evaluation is None else f"{evaluation.seconds:.1f}",
            f"{report.policy_drift:.4f}",
        )
    table.add_section()
    total = summary.seconds
    seconds = (total.generate, total.score, total.train, total.evaluate)
    tokens = _tokens(summary.tokens)
    table.add_row("all", *[""] * 4, *tokens, *(f"{each:.1f}" for each in seconds), "")
    console.print(table)
    for line in (*_lines(summary), f"run: {folder}"):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(summary: RunSummary) -> Iterator[str]:
    reused, seconds = summary.reused, summary.seconds
    yield f"teacher-scored tokens: {summary.tokens.teacher_scored:,}"
    yield f"reused: {reused.rollout_units} rollout units, {reused.score_units} score units"
    yield (
        f"wall clock: {seconds.wall:.0f} s, of which {seconds.other:.0f} s neither sampling, "
        "scoring, training nor evaluation"
    )
    if summary.evaluations and len(summary.evaluations[-1].benchmarks) > 1:
        yield from figure_lines(summary.evaluations[-1])
    if summary.refused_rows:
        yield f"rows refused by the teacher (not finite): {summary.refused_rows}"
    yield f"final policy: {summary.final_policy}"


def _tokens(tokens: TokenNumbers) -> list[str]:
    return [f"{each:,}" for each in (tokens.generated, tokens.teacher_scored, tokens.trained)]


def _passes(evaluation: Passes | None) -> tuple[str, str]:
    if evaluation is None:
        return "", ""
    first = f"{evaluation.pass_at_1:.3f}±{evaluation.standard_error:.3f}"
    return first, f"{evaluation.passes['pass@8']:.3f}" if "pass@8" in evaluation.passes else ""
