"""The table a run ends with."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.evaluation import figure_lines
from pipeline.records import Passes, RoundReport, RunSummary

COLUMNS = (
    "round",
    "window",
    "policy\nversion",
    "pass@1",
    "pass@8",
    "tokens\ngenerated",
    "teacher\nscored",
    "\ntrained",
    "seconds\ngenerate",
    "\nscore",
    "\ntrain",
    "\nevaluate",
    "\npolicy_drift",
)


def print_run(
    reports: Sequence[RoundReport], summary: RunSummary, folder: str, *, console: Console
) -> None:
    """Print rounds, totals and where the run lies."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    evaluations = {entry.round: entry for entry in summary.evaluations}
    if 0 in evaluations:
        later = sum(report.evaluation.seconds for report in reports if report.evaluation)
        first = f"{summary.seconds.evaluate - later:.1f}"
        table.add_row("start", "", "0", *_passes(evaluations[0]), *[""] * 6, first)
    for report in reports:
        evaluation = report.evaluation
        tokens, seconds = report.tokens, report.seconds
        table.add_row(
            str(report.round),
            str(report.window_tokens),
            str(report.round + 1),
            *_passes(evaluation),
            f"{tokens.generated:,}",
            f"{tokens.teacher_scored:,}",
            f"{tokens.trained:,}",
            *(f"{getattr(seconds, stage):.1f}" for stage in ("generate", "score", "train")),
            "" if evaluation is None else f"{evaluation.seconds:.1f}",
            f"{report.policy_drift:.4f}",
        )
    tokens, seconds = summary.tokens, summary.seconds
    table.add_section()
    table.add_row(
        "all",
        "",
        "",
        "",
        "",
        f"{tokens.generated:,}",
        f"{tokens.teacher_scored:,}",
        f"{tokens.trained:,}",
        *(f"{getattr(seconds, stage):.1f}" for stage in ("generate", "score", "train", "evaluate")),
        "",
    )
    console.print(table)
    reused = summary.reused
    lines = [
        f"teacher-scored tokens: {tokens.teacher_scored:,}",
        f"reused: {reused.rollout_units} rollout units, {reused.score_units} score units",
        f"wall clock: {seconds.wall:.0f} s, of which {seconds.other:.0f} s neither sampling, "
        "scoring, training nor evaluation",
    ]
    if summary.evaluations and len(summary.evaluations[-1].benchmarks) > 1:
        lines += figure_lines(summary.evaluations[-1])
    if summary.refused_rows:
        lines.append(f"rows refused by the teacher (not finite): {summary.refused_rows}")
    lines.append(f"final policy: {summary.final_policy}")
    lines.append(f"run: {folder}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _passes(evaluation: Passes | None) -> tuple[str, str]:
    if evaluation is None:
        return "", ""
    first = f"{evaluation.pass_at_1:.3f}±{evaluation.standard_error:.3f}"
    return first, f"{evaluation.passes['pass@8']:.3f}" if "pass@8" in evaluation.passes else ""
