"""The rows of the comparison, from `benchmarks/rows/*.yaml` and files of others (docs/bench.md)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from opd_stream.errors import UserError
from opd_stream.section import Section, is_object
from opd_stream.tasks import ledger
from opd_stream.yaml_text import parse_yaml

FOLDER = Path(__file__).parent
HELD_OUT = 900_001  # problems of seed s are those of HELD_OUT + s; no tuning has seen them
TUNING = 4242
PUBLIC_PROMPTS = 512  # of a public cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of the comparison.

    Example:
        >>> TASKS["routine"].full_tokens
        864
    """

    full_tokens: int
    rounds: int
    curve_rounds: tuple[int, ...]  # after which the policy is evaluated, beside the last
    final_problems: int
    curve_problems: int = 48
    curve_samples: int = 2
    final_samples: int = 8


class Row(Section):
    """One line of a table: what it changes in the config of its task.

    Example:
        >>> ROWS["routine"][0].name
        'full'
    """

    name: str = Field(min_length=1)
    group: str = "others"
    settings: dict[str, Any] = Field(default={}, description="as of --set: {field.subfield: value}")
    seeds: int = Field(default=3, ge=1)
    replay: bool = Field(default=False, description="train on the public cache; no teacher runs")

    @property
    def has_curve(self) -> bool:
        """Whether policies before the last are evaluated."""
        return self.group in ("windows", "extrapolation") or self.name == "SFT"

    @property
    def overrides(self) -> list[str]:
        """The settings as of `--set`."""
        return [f"{name}={json.dumps(value)}" for name, value in self.settings.items()]

    def is_of(self, line: dict[str, Any]) -> bool:
        """Whether a stored line was measured with this row's settings."""
        is_named = (line["row"], line.get("replay", False)) == (self.name, self.replay)
        return is_named and settings_of(line["overrides"]) == self.settings


class RowFile(Section):
    """A file of rows."""

    task: ledger.Task
    rows: tuple[Row, ...]
    shared: tuple[dict[str, Any], ...] = Field(default=(), description="what YAML anchors name")


TASKS: dict[str, Task] = {
    "ledger": Task(full_tokens=208, rounds=8, curve_rounds=(1, 2, 3, 4, 6), final_problems=96),
    "routine": Task(full_tokens=864, rounds=8, curve_rounds=(1, 2, 3, 4, 6), final_problems=64),
    "programs": Task(full_tokens=80, rounds=8, curve_rounds=(1, 2, 4), final_problems=48),
}


def settings_of(overrides: list[str]) -> dict[str, Any]:
    """What `a.b=c` texts set.

    Example:
        >>> settings_of(["rounds=2", "train.objective={kind: lsm}"])
        {'rounds': 2, 'train.objective': {'kind': 'lsm'}}
    """
    pairs = (text.partition("=") for text in overrides)
    return {name: _number(parse_yaml(value)) for name, _, value in pairs}


def read_rows(path: Path) -> RowFile:
    """A file of rows.

    Raises:
        UserError: it is none, or two rows have one name.
    """
    try:
        raw = parse_yaml(path.read_text())
        if not is_object(raw):
            raise ValueError("expected a mapping with task and rows")
        found = RowFile.model_validate(raw)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is no file of rows: {problem}; docs/bench.md has one") from error
    names = [row.name for row in found.rows]
    if len(names) > len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has two rows {twice!r}; expected one; rename the other")
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-6 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _own_rows() -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {task: [] for task in TASKS}
    for path in sorted((FOLDER / "rows").glob("*.yaml")):
        file = read_rows(path)
        found[file.task] += file.rows
    return found


ROWS = _own_rows()
