"""The figures of the comparison: accuracy against cost, and against teacher tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.methods_rows import ROWS, TASKS

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "opd-stream"  # the same file from the same numbers
import matplotlib.pyplot as plt  # noqa: E402  # pyright: ignore[reportMissingImports]

SHOWN = (
    *("full", "TOPD 0.25", "TOPD 0.50", "POPD", "prefix schedule", "ADWIN", "ADWIN, dense audit"),
    *("EffOPD", "SFT"),
)

Line = dict[str, Any]


def draw(lines: list[Line], folder: Path) -> None:
    """One figure a task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        own = [line for line in lines if line["task"] == task]
        if own:
            _figure(task, own, folder / f"methods-{task}.svg")
    _reuse_figure(lines, folder / "teacher-tokens.svg")


def _reuse_figure(lines: list[Line], path: Path) -> None:
    """Of each task: accuracy against teacher tokens, where a cache is read once or more often."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, task in zip(axes, ("ledger", "routine"), strict=True):
        own = [line for line in lines if line["task"] == task]
        for objective, color in (("bucket", "tab:blue"), ("sampled_pg", "tab:orange")):
            _reuse_curve(axis, task, objective, own, color)
        axis.set_xlim(left=0)
        axis.set_xlabel("thousand tokens scored by the teacher")
        axis.set_title(f"task {task}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("pass@1, held-out problems")
    axes[0].set_ylim(0, 1.1)
    axes[0].legend(title="objective", loc="lower right", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _reuse_curve(axis: Any, task: str, objective: str, lines: list[Line], color: str) -> None:
    """Means over seeds with their range; all points have the same number of optimizer steps."""
    once = {"bucket": "full"}.get(objective, objective) if task == "routine" else f"{objective} x1"
    rows = {1: once, **{epochs: f"{objective} x{epochs}" for epochs in (4, 8, 10)}}
    found = {n: [line for line in lines if line["row"] == row] for n, row in rows.items()}
    found = {n: own for n, own in found.items() if own}
    spent = [np.mean([_scored(line) for line in own]) / 1000 for own in found.values()]
    finals = [[line["curve"][-1]["pass@1"] for line in own] for own in found.values()]
    mean = np.array([np.mean(values) for values in finals])
    bars = np.abs(np.array([(min(values), max(values)) for values in finals]).T - mean)
    axis.errorbar(spent, mean, yerr=bars, marker="o", color=color, label=objective)
    axis.margins(x=0.12)
    for epochs, tokens, height in zip(found, spent, mean, strict=True):
        label = f"{epochs} epoch" + "s" * (epochs > 1)
        shift = (4, 7) if objective == "bucket" else (4, -14)
        beside = {"xytext": shift, "textcoords": "offset points", "ha": "center"}
        axis.annotate(label, (tokens, height), fontsize=8, **beside)


def _scored(line: Line) -> int:
    """Tokens that the teacher scored in a run."""
    return sum(record["tokens"]["teacher_scored"] for record in line["rounds"])


def _figure(task: str, lines: list[Line], path: Path) -> None:
    from benchmarks.methods_tables import cpu_seconds, flops

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    sides: list[tuple[str, Callable[[Line], float], float]] = [
        ("TFLOP of generate, score and train", flops, 1e12),
        ("CPU seconds of the same", cpu_seconds, 1.0),
    ]
    names = [row.name for row in ROWS[task] if _is_shown(row.name)]
    colors = dict(zip(names, plt.colormaps["tab20"](np.linspace(0, 1, len(names))), strict=True))
    for axis, (label, cost, unit) in zip(axes, sides, strict=True):
        for name in names:
            own = [line for line in lines if line["row"] == name]
            if own:
                _curve(axis, name, own, cost, unit, colors[name])
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("pass@1, held-out problems")
    axes[0].set_ylim(0, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _is_shown(name: str) -> bool:
    return name in SHOWN or name.startswith("ESR")


def _curve(
    axis: Any, name: str, lines: list[Line], cost: Callable[[Line], float], unit: float, color: Any
) -> None:
    """Means over seeds, with the range as a bar."""
    rounds = [point["rounds"] for point in lines[0]["curve"]]
    spent = np.array(
        [
            np.cumsum([0.0, *(cost(record) for record in line["rounds"])])[rounds] / unit
            for line in lines
        ]
    ).mean(0)
    values = np.array([[point["pass@1"] for point in line["curve"]] for line in lines])
    mean = values.mean(0)
    bars = np.stack([mean - values.min(0), values.max(0) - mean])
    axis.errorbar(
        spent, mean, yerr=bars, label=name, color=color, marker="o", ms=3, lw=1.2, elinewidth=0.5
    )
