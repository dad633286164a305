"""The runs of a folder: which there are, how they differ, what each reached and cost."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from pipeline.records import RunSummary
    from pipeline.tables import ResultTable

State = Literal["finished", "running", "stopped", "damaged"]
Order = Literal["age", "figure", "tokens", "seconds", "run"]

_SIGNS = ("run.json", "rounds", "metrics.jsonl", "lease.json")  # one of them beside config.json
_WORK = ("config.json", "metrics.jsonl", "summary.json")  # written while a run is worked on
_DEPTH = 2  # folders below the one that is asked about
_VALUE = 24  # characters of a setting in a table


def run_folders(root: Path) -> list[Path]:
    """Folders of runs, `root` itself and those below it, the one that was worked on last first."""
    places = [root.glob("/".join([*["*"] * depth, "config.json"])) for depth in range(_DEPTH + 1)]
    found = {path.parent for each in places for path in each}
    runs = [each for each in found if any((each / name).exists() for name in _SIGNS)]
    return sorted(runs, key=lambda run: (-worked_at(run), str(run)))


def worked_at(run: Path) -> float:
    """When a run was worked on last, in seconds since the epoch; 0: never."""
    files = [run / name for name in _WORK]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOverview:
    """One run in a list; None stands for what is not known."""

    run: str  # its folder
    state: State
    age_seconds: float  # since it was worked on
    rounds: int | None = None  # that are complete
    rounds_planned: int | None = None
    figure: str | None = None  # of the last evaluation: pass@1, or reverse_kl in nats a token
    value: float | None = None
    teacher_scored_tokens: int | None = None
    generated_tokens: int | None = None
    trained_tokens: int | None = None
    seconds: float | None = None  # in which a stage was at work
    flops: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of its config, by dotted name
    problem: str | None = None  # why it is damaged


def overview(run: Path, now: float) -> RunOverview:
    """What a run's folder says; one that cannot be read is damaged."""
    from opd_stream.errors import UserError
    from opd_stream.store.sealed import read_json, unsealed
    from pipeline.lease import holder
    from pipeline.run_folder import CONFIG, RunFolder

    age, config = max(0.0, now - worked_at(run)), run / CONFIG
    try:
        settings = dict(_flat(unsealed(read_json(config), config, CONFIG)))
        summary = RunFolder(run).summary()
    except (UserError, OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        return RunOverview(run=str(run), state="damaged", age_seconds=age, problem=problem)
    is_finished = summary is not None and summary.finished
    state: State = "finished" if is_finished else "stopped"
    return RunOverview(
        run=str(run),
        state="running" if holder(run) is not None else state,
        age_seconds=age,
        rounds=len([*run.glob("rounds/*/report.json")]),
        rounds_planned=settings.get("rounds"),
        settings=settings,
        **({} if summary is None else _numbers(summary)),
    )


def _numbers(summary: "RunSummary") -> dict[str, Any]:
    """Rounds, the last figure, and what was spent."""
    figure = value = None
    if summary.evaluations:
        last = summary.evaluations[-1]
        if last.pass_at_1 is not None:
            figure, value = "pass@1", last.pass_at_1
        elif last.distances:
            texts = next(iter(last.distances.values())).texts
            figure, value = "reverse_kl", texts["samples"].reverse_kl
    seconds, flops, tokens = summary.seconds, summary.flops, summary.tokens
    return {
        "figure": figure,
        "value": value,
        "teacher_scored_tokens": tokens.teacher_scored,
        "generated_tokens": tokens.generated,
        "trained_tokens": tokens.trained,
        "seconds": seconds.generate + seconds.score + seconds.train + seconds.evaluate,
        "flops": flops.generate + flops.score + flops.train,
    }


def list_runs(root: Path, wanted: Iterable[str], order: Order) -> list[RunOverview]:
    """The runs of a folder, filtered and sorted.

    Args:
        root: a run, or a folder with runs.
        wanted: FIELD=VALUE of a config field by its dotted name, or state=STATE; all must hold.
        order: age: the latest first; figure: the best first; tokens (the teacher's), seconds: the
            least first; run: by name.

    Raises:
        UserError: a filter is none, or names a field that no run has.
    """
    found = [overview(run, time.time()) for run in run_folders(root)]
    for filter_ in wanted:
        found = _filtered(found, filter_)
    keys: dict[Order, Callable[[RunOverview], Any]] = {
        "age": lambda each: each.age_seconds,
        "figure": _distance_from_best,
        "tokens": lambda each: _known_first(each.teacher_scored_tokens),
        "seconds": lambda each: _known_first(each.seconds),
        "run": lambda each: each.run,
    }
    return sorted(found, key=keys[order])


def _known_first(value: float | None) -> float:
    return float("inf") if value is None else value


def _distance_from_best(run: RunOverview) -> float:
    """Small for a good figure: a high share of right answers, or a small divergence."""
    if run.value is None:
        return float("inf")
    return 1 - run.value if run.figure == "pass@1" else run.value


def _filtered(found: list[RunOverview], wanted: str) -> list[RunOverview]:
    from opd_stream.errors import UserError, shortened
    from opd_stream.yaml_text import parse_yaml

    name, equals, text = wanted.partition("=")
    if not equals:
        raise UserError(f"{shortened(wanted)} has no '='; expected FIELD=VALUE or state=STATE")
    if name == "state":
        if text not in get_args(State):
            known = ", ".join(get_args(State))
            raise UserError(f"state is {shortened(text)}; expected one of {known}")
        return [each for each in found if each.state == text]
    if found and not any(name in each.settings for each in found):
        raise UserError(
            f"no run here has the setting {shortened(name)}; expected the dotted name of a config "
            "field, such as train.learning_rate, or state"
        )
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    return [
        each for each in found if name in each.settings and each.settings[name] in (value, text)
    ]


def _flat(section: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a config by their dotted names; parts of a list have a number if there are more."""
    for name, value in section.items():
        parts = value if isinstance(value, list) and any(isinstance(p, dict) for p in value) else ()
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}.")
        elif len(parts) == 1:
            yield from _flat(parts[0], f"{before}{name}.")
        elif parts:
            yield from _flat({f"{name}.{number}": p for number, p in enumerate(parts)}, before)
        else:
            yield f"{before}{name}", value


def differing_settings(runs: Sequence[RunOverview]) -> list[str]:
    """The dotted names of the settings in which runs differ, placement left out."""
    from opd_stream.config import PLACEMENT
    from pipeline.run_folder import is_below

    sound = [each.settings for each in runs if each.state != "damaged"]
    names = dict.fromkeys(name for each in sound for name in each)
    return [
        name
        for name in names
        if not is_below(name, PLACEMENT)
        and any(not _is_same(each.get(name), sound[0].get(name)) for each in sound)
    ]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values of a setting mean the same; a path may be written in two ways."""
    texts = (one, other)
    if one == other or not all(isinstance(each, str) and "/" in each for each in texts):
        return one == other
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()


def short_names(names: Sequence[str]) -> dict[str, str]:
    """For each dotted name its shortest end that no other has, of two parts where there are."""
    ends: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[-count:]) for count in range(min(2, len(parts)), len(parts) + 1)]
        others = [each for each in names if each != name]
        ends[name] = next(
            (t for t in tails if not any(o == t or o.endswith(f".{t}") for o in others)), name
        )
    return ends


def settings_text(run: RunOverview, names: Sequence[str]) -> str:
    """The settings of a run among those in which runs differ."""
    ends = short_names(names)
    said: list[str] = []
    for name in names:
        if (value := run.settings.get(name)) not in (None, [], {}):
            text = str(value)
            long = f"…{text[-_VALUE:]}" if "/" in text else f"{text[:_VALUE]}…"
            said.append(f"{ends[name]}={text if len(text) <= _VALUE else long}")
    return " ".join(said)


COLUMNS = ("run", "state", "rounds", "figure", "teacher\ntokens", "seconds", "age")
DROPS = ("seconds", "rounds", "age", "state")


def runs_table(runs: Sequence[RunOverview]) -> "ResultTable":
    """The runs, a row each; how they differ stands below the table."""
    from pipeline.console import age_text
    from pipeline.tables import result_table

    table = result_table(COLUMNS, left=("run", "state"), drops=DROPS, folds=("run",))
    for each in runs:
        figure = "" if each.value is None else f"{each.figure} {each.value:.3f}"
        done = "" if each.rounds is None else f"{each.rounds} of {each.rounds_planned}"
        tokens, seconds = each.teacher_scored_tokens, each.seconds
        table.add_row(
            each.run,
            each.state,
            done,
            figure.replace("reverse_kl", "KL"),
            "" if tokens is None else f"{tokens:,}",
            "" if seconds is None else f"{seconds:,.0f}",
            age_text(each.age_seconds),
        )
    return table


def runs_lines(runs: Sequence[RunOverview]) -> Iterator[str]:
    """Below the table: how the runs differ, and what is wrong with those that are damaged."""
    names = differing_settings(runs)
    if names:
        yield "settings that differ:"
    for each in runs:
        if names and each.state != "damaged":
            yield f"  {each.run}: {settings_text(each, names)}"
    for each in runs:
        if each.problem is not None:
            yield f"damaged: {each.problem}"
