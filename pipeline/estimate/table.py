"""The table of a plan."""

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from pipeline.estimate.values import BreakEven, Estimate, StepCost

COLUMNS = (
    "round",
    "stage",
    "window",
    "prompts",
    "rows",
    "tokens",
    "cache",
    "FLOPs",
    "in the store",
    "left\ntokens",
    "\nFLOPs",
    "basis",
)
TEXT = ("stage", "in the store", "basis")


def print_plan(found: Estimate, *, console: Console) -> None:
    """Print rounds, totals, disks, memory, break-even, assumptions and warnings."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in COLUMNS:
        side = "left" if name in TEXT else "right"
        table.add_column(name, justify=side, no_wrap=True, vertical="bottom")
    for each in found.rounds:
        label = "start" if each.index < 0 else str(each.index)
        for step in each.steps:
            table.add_row(label, *_cells(step))
            label = ""
    table.add_section()
    total, left = found.total(), found.total(left=True)
    sums = [decimal(round(total.bytes)), flops_text(total.flops), "", "", flops_text(left.flops)]
    table.add_row("all", *[""] * 5, *sums, "")
    console.print(table)
    for line in plan_lines(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def plan_lines(found: Estimate) -> list[str]:
    """What stands below the table."""
    left = found.total("score", left=True)
    lines = [f"teacher-scored tokens: {round(left.tokens):,} to come"]
    for place in found.disks:
        free = "its free space is not known here"
        if place.free is not None:
            free = f"{decimal(place.free)} free"
        parts = ", ".join(f"{name} {decimal(size)}" for name, size in place.parts.items() if size)
        what = f"{decimal(place.needed)} more" + (f" ({parts})" if parts else "")
        lines.append(f"disk: {what} in {place.path}, {free}")
    if found.logits is not None:
        logits = found.logits
        lines.append(
            f"logits while scoring: {logits.rows:,} rows of {logits.vocabulary:,} at a time, "
            f"{decimal(logits.bytes)} (bound {decimal(logits.bound)}, {logits.what})"
        )
    if found.break_even is not None:
        lines += _break_even_lines(found.break_even)
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"warning: {warning}" for warning in found.warnings]
    return lines


def flops_text(flops: float) -> str:
    """Operations with three figures, such as 1.53e+12."""
    return f"{flops:.2e}" if flops else "0"


def _cells(step: StepCost) -> list[str]:
    total, left = step.total, step.left
    return [
        step.kind.name,
        str(step.window_tokens),
        f"{step.prompts:,}",
        f"{round(total.rows):,}",
        f"{round(total.tokens):,}",
        decimal(round(total.bytes)) if round(total.bytes) else "",
        flops_text(total.flops),
        step.store,
        f"{round(left.tokens):,}",
        flops_text(left.flops),
        step.basis,
    ]


def _break_even_lines(found: BreakEven) -> list[str]:
    if found.runs is None or found.replays is None:
        return []
    when = "the first run pays for it"
    if found.replays:
        when = f"it is paid for after {found.replays} replays"
    shares = ", ".join(f"{found.cache_share(n):.0%} after {n}" for n in (0, 1, 3, 10))
    return [
        f"break-even: the cache costs {flops_text(found.cache_flops)} FLOPs to generate and score; "
        f"a live teacher beside every step would cost {flops_text(found.live_flops)} a run, so "
        f"{when} ({found.runs:.2f} runs)",
        f"of all FLOPs the cache is {shares} replays",
    ]
