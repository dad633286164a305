"""Tables and figures of the comparison, from the stored lines alone."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods_rows import ROWS, TASKS, Row
from opd_stream.tasks.pass_at_k import student_quantile

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "results-methods.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
ADAPTIVE_ROWS = ("ADWIN", "ADWIN, dense audit", "ADWIN, in-round audits")
WEEK_ROWS = ("full", "ESR 64", "ESR 128", "ESR 256", "TOPD 0.50", *ADAPTIVE_ROWS)
STAGES = ("generate", "score", "train")
QUANTILES = {3: 4.303, 4: 3.182, 5: 2.776}  # of so few values the series is not exact

Line = dict[str, Any]


def write(results: Path) -> None:
    """Put the tables between their marks in docs/results-methods.md, and draw the figures."""
    from benchmarks.methods_figures import draw

    lines = [json.loads(line) for line in results.open()]
    draw(lines, DOCS / "figures")
    text = "\n\n".join(_task(task, lines) for task in TASKS if _of(lines, task))
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def target_of(lines: list[Line], task: str) -> float:
    """The mean result of full rollouts, less one standard error."""
    full = [line for line in _of(lines, task) if line["row"] == "full"]
    return _mean(_final(full, "pass@1")) - standard_error_of_mean(full)


def standard_error_of_mean(lines: list[Line]) -> float:
    """Of the mean over seeds: each seed has problems of its own."""
    values = _final(lines, "pass@1")
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _against(lines: list[Line], full: dict[int, Line]) -> str:
    """The mean difference to full rollouts with the same seed, and half of its interval."""
    pairs = [(line, full[line["seed"]]) for line in lines if line["seed"] in full]
    found = [_final([own], "pass@1")[0] - _final([other], "pass@1")[0] for own, other in pairs]
    if not found or all(own is other for own, other in pairs):
        return ""
    return f"{_mean(found):+.3f}{half_interval(found)}"


def half_interval(values: list[float]) -> str:
    """Half of the 95 % interval of a mean over seeds, by Student's t; of three seeds or more."""
    count = len(values)
    if count < 3:
        return ""
    quantile = QUANTILES.get(count) or student_quantile(0.95, count - 1)
    return f" ± {quantile * statistics.stdev(values) / count**0.5:.3f}"


def spread(values: list[float]) -> str:
    """Mean over seeds, half of its 95 % interval (Student's t; of three seeds or more), range.

    Example:
        >>> spread([0.91, 0.94, 0.95])
        '0.933 ± 0.052 (0.910 to 0.950)'
    """
    mean = f"{_mean(values):.3f}{half_interval(values)}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})"


def cost_to(line: Line, target: float, cost: Callable[[Line], float]) -> float | None:
    """What a run had spent when its curve first reached the target; None: it never did.

    Between two evaluations the curve is a straight line.
    """
    spent = np.cumsum([0.0, *(cost(record) for record in line["rounds"])])
    before: tuple[float, float] | None = None
    for point in line["curve"]:
        here = (float(spent[point["rounds"]]), float(point["pass@1"]))
        if here[1] >= target:
            if before is None or here[1] == before[1]:
                return here[0]
            share = (target - before[1]) / (here[1] - before[1])
            return before[0] + max(0.0, share) * (here[0] - before[0])
        before = here
    return None


def flops(record: Line) -> float:
    """Operations of a round, probes with it."""
    return sum(record["flops"].values())


def cpu_seconds(record: Line) -> float:
    """CPU seconds of a round's three stages, probes and audits with them."""
    return sum(record["cpu_seconds"].values())


def _task(task: str, lines: list[Line]) -> str:
    own, target = _of(lines, task), target_of(lines, task)
    head = (
        f"### Task `{task}`\n\n"
        f"{TASKS[task].final_problems} held-out problems a seed, 8 samples each. `to target`: "
        f"median over seeds of what a run had spent when it reached {target:.3f}, the mean of full "
        "rollouts less one standard error, and how many seeds did. CPU seconds are those of "
        "generate, score and train; evaluation is not in them, probes, audits and searches are; "
        "operations are those of sampling, scoring and training, probes among them "
        "(the lines so far lack the second pass of `train.select` and `train.reference`).\n\n"
        f"![accuracy against cost](figures/methods-{task}.svg)\n\n"
    )
    rows = table(task, ROWS[task], lines)
    return head + "\n".join(rows) + "\n\n" + _weeks(own) + _windows(own)


def table(task: str, rows: Sequence[Row], lines: list[Line]) -> list[str]:
    """Rows of a task that have been measured, under the names of their groups."""
    target = target_of(lines, task)
    full = {line["seed"]: line for line in _of(lines, task) if line["row"] == "full"}
    found = [
        "| row | seeds | pass@1: mean, its 95 % interval, min to max | "
        "against full, seed by seed | pass@8 | "
        "tokens generated / scored / trained, k | TFLOP | CPU s: generate + score + train | "
        "TFLOP to target | CPU s to target | reached |",
        "|" + "---|" * 11,
    ]
    group = ""
    for row in rows:
        measured = [line for line in _of(lines, task) if row.is_of(line)]
        if not measured:
            continue
        if row.group != group:
            group = row.group
            found.append(f"| **{group}** |" + " |" * 10)
        found.append(_row(row.name, measured, target, full))
    return found


def _row(name: str, lines: list[Line], target: float, full: dict[int, Line]) -> str:
    ones, eights = _final(lines, "pass@1"), _final(lines, "pass@8")
    tokens = [
        _mean(sum(record["tokens"][kind] for record in line["rounds"]) for line in lines) / 1000
        for kind in ("generated", "teacher_scored", "trained")
    ]
    seconds = [
        _mean(sum(record["cpu_seconds"][stage] for record in line["rounds"]) for line in lines)
        for stage in STAGES
    ]
    operations = _mean(sum(map(flops, line["rounds"])) for line in lines) / 1e12
    costs = [
        [value for line in lines if (value := cost_to(line, target, cost)) is not None]
        for cost in (flops, cpu_seconds)
    ]
    return (
        f"| {name} | {len(lines)} | {spread(ones)} | {_against(lines, full)} | "
        f"{_mean(eights):.3f} | " + " / ".join(f"{value:.0f}" for value in tokens) + " | "
        f"{operations:.2f} | " + " + ".join(f"{value:.1f}" for value in seconds) + " | "
        f"{_median(costs[0], 1e12, 2)} | {_median(costs[1], 1, 1)} | "
        f"{len(costs[0])} of {len(lines)} |"
    )


def _weeks(lines: list[Line]) -> str:
    """Where on the long task solutions go wrong."""
    finals = [(line["row"], line["curve"][-1].get("right_by_week")) for line in lines]
    by_row = [
        (row, [value for name, value in finals if name == row and value]) for row in WEEK_ROWS
    ]
    found = [(row, values) for row, values in by_row if values]
    if not found:
        return ""
    weeks = len(found[0][1][0])
    table = [
        "Share of lines that calculate rightly from the total before them, by week:",
        "",
        "| row | " + " | ".join(f"week {week + 1}" for week in range(weeks)) + " |",
        "|" + "---|" * (weeks + 1),
    ]
    for row, values in found:
        means = [_mean(value[week] for value in values) for week in range(weeks)]
        table.append(f"| {row} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(table) + "\n\n"


def _windows(lines: list[Line]) -> str:
    """What the adaptive windows did, and what looking cost."""
    return "\n\n".join(filter(None, (_decided(lines, row) for row in ADAPTIVE_ROWS)))


def _decided(lines: list[Line], row: str) -> str:
    found = [line for line in lines if line["row"] == row]
    if not found:
        return ""
    share = [
        sum(record["audit_cpu_seconds"] for record in line["rounds"])
        / sum(map(cpu_seconds, line["rounds"]))
        for line in found
    ]
    windows = [[record["window_tokens"] for record in line["rounds"]] for line in found]
    text = "; ".join(" ".join(map(str, chosen)) for chosen in windows)
    return (
        f"Windows of {row}, a seed each: {text}. Probes and audits: {100 * _mean(share):.0f} % of "
        f"the CPU seconds (at most {100 * max(share):.0f} %)."
    )


def _of(lines: list[Line], task: str) -> list[Line]:
    return [line for line in lines if line["task"] == task]


def _final(lines: list[Line], name: str) -> list[float]:
    return [line["curve"][-1][name] for line in lines]


def _mean(values: Any) -> float:
    return statistics.mean(list(values))


def _median(values: Sequence[float], unit: float, digits: int) -> str:
    return f"{statistics.median(values) / unit:.{digits}f}" if values else "never"
