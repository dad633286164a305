"""The lines of a run: metrics.jsonl as it trains, metrics.csv after each round."""

import csv
import io
import json
from pathlib import Path

from opd_stream.store.files import publish


def forget_metrics_from(metrics: Path, step: int) -> None:
    """Remove the lines of steps that will be done again."""
    if not metrics.exists():
        return
    kept = [
        line
        for line in metrics.read_text().splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] < step
    ]
    publish(metrics, "".join(kept).encode())


def write_csv(metrics: Path) -> None:
    """The same lines as a table beside them."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    publish(metrics.with_suffix(".csv"), text.getvalue().encode())
