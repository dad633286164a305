"""Policies on the same problems or prompts with the same seeds: `opd-stream compare`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_stream.errors import UserError
from opd_stream.store.artifact import EvaluationManifest
from opd_stream.store.recipe import Kind, Recipe, differing_fields
from opd_stream.store.sealed import load_record
from opd_stream.store.store import Store
from opd_stream.tasks.distance import (
    FIGURE_NAMES,
    TEXT_NAMES,
    Bootstrap,
    DistanceManifest,
    DistanceResult,
    distance_differences,
)
from opd_stream.tasks.pass_at_k import Counts, Difference, default_ks, differences
from pipeline.records import Answers, EvaluationFile
from pipeline.run_folder import RunFolder

if TYPE_CHECKING:
    from pipeline.tables import ResultTable

_PLACES = "expected RUN, RUN@POLICY_VERSION (0: the initial student) or a file of evaluate --out"
_OWN = ("engine", "dtype", "stop_ids")  # of a policy; everything else has to be the same
_ROW = "{:16} {:>9} {:>8} {:>8} {:>8} {:>8}   {}"
_DISTANCE = "{:28} {:>7} {:>13} {:>8} {:>8} {:>8}   {}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One policy's evaluation, wherever it was found."""

    name: str  # as the user wrote it
    store: Store
    artifacts: dict[str, str]  # benchmark -> evaluations/FINGERPRINT
    distances: dict[str, str]  # held-out prompts -> the same

    @property
    def names(self) -> list[str]:
        """All that it was evaluated on."""
        return [*self.artifacts, *self.distances]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What two policies differ by on one set of problems or held-out prompts."""

    name: str
    problems: int
    figures: dict[str, Difference]
    is_distance: bool = False


def compare(left: str, right: str, bootstrap: Bootstrap) -> Iterator[str]:
    """The lines of a paired comparison: right less left, with an interval.

    Raises:
        UserError: a side has no evaluation, or the two are not of the same problems and seeds.
    """
    sides = (_open_side(left), _open_side(right))
    found = _compared(*sides, bootstrap)
    yield f"A: {left}   B: {right}"
    interval = f"{100 * bootstrap.confidence:g}% interval of B - A"
    parts = (False, _ROW, ("benchmark", "problems")), (True, _DISTANCE, ("distance", "prompts"))
    for is_distance, row, names in parts:
        those = [each for each in found if each.is_distance is is_distance]
        if those:
            yield row.format(*names, "figure", "A", "B", "B - A", interval)
        for each in those:
            yield from _rows(each.name, each.problems, each.figures, row)
    yield from _only(*sides)


def compare_many(
    first: str, others: Sequence[str], bootstrap: Bootstrap
) -> "tuple[ResultTable, list[str]]":
    """Each of several policies beside the first: a table, and lines on what one side lacks.

    Raises:
        UserError: as `compare`, of any pair.
    """
    from pipeline.tables import result_table

    left, rights = _open_side(first), [_open_side(each) for each in others]
    found = [_compared(left, right, bootstrap) for right in rights]
    interval = f"{100 * bootstrap.confidence:g}% interval"
    columns = ("benchmark", "problems", "figure", "policy", "value", "less the first", interval)
    table = result_table(
        columns,
        left=("benchmark", "figure", "policy"),
        drops=("problems", "less the first", interval),
        folds=("benchmark", "policy"),
    )
    for name, figure in dict.fromkeys(
        (each.name, figure) for pair in found for each in pair for figure in each.figures
    ):
        start = [name, "", figure, first]
        for right, pair in zip(rights, found, strict=True):
            each = next((one for one in pair if one.name == name), None)
            if each is None or (difference := each.figures.get(figure)) is None:
                continue
            low, high = difference.interval
            if start:
                start[1] = f"{each.problems:,}"
                table.add_row(*start, f"{difference.left:.3f}", "", "")
                start = []
            numbers = (f"{difference.right:.3f}", f"{difference.difference:+.3f}")
            table.add_row("", "", "", right.name, *numbers, f"[{low:+.3f}, {high:+.3f}]")
    return table, [line for right in rights for line in _only(left, right)]


def _compared(left: Side, right: Side, bootstrap: Bootstrap) -> list[Compared]:
    """Benchmarks, their mean where there are several, and distances that both sides have."""
    names = [name for name in left.artifacts if name in right.artifacts]
    measured = [name for name in left.distances if name in right.distances]
    if not names and not measured:
        raise UserError(
            f"{left.name} has the benchmarks {', '.join(left.names)} and {right.name} has "
            f"{', '.join(right.names)}; expected one in common; use one config"
        )
    pairs = [_pair(name, left, right) for name in names]
    distances = [_distance_pair(name, left, right) for name in measured]  # refused before any line
    found: list[Compared] = []
    for name, (a, b) in zip(names, pairs, strict=True):
        figures = differences([a], [b], default_ks(a.samples), confidence=bootstrap.confidence)
        found.append(Compared(name=name, problems=len(a.correct), figures=figures))
    if len(pairs) > 1:
        ks = default_ks(min(a.samples for a, _ in pairs))
        lefts, rights = [a for a, _ in pairs], [b for _, b in pairs]
        figures = differences(lefts, rights, ks, confidence=bootstrap.confidence)
        problems = sum(len(a.correct) for a in lefts)
        found.append(Compared(name=f"mean of {len(pairs)}", problems=problems, figures=figures))
    for name, (one, other) in zip(measured, distances, strict=True):
        for text, said in TEXT_NAMES.items():
            gaps = distance_differences(one.sums[text], other.sums[text], bootstrap)
            found.append(
                Compared(
                    name=f"{name}, {said}",
                    problems=len(one.sums[text]),
                    figures={FIGURE_NAMES[figure]: each for figure, each in gaps.items()},
                    is_distance=True,
                )
            )
    return found


def _only(left: Side, right: Side) -> Iterator[str]:
    """What one of two sides alone was evaluated on."""
    for side, other in ((left, right), (right, left)):
        only = [name for name in side.names if name not in other.names]
        if only:
            yield f"only {side.name} has {', '.join(only)}"


def _rows(name: str, problems: int, found: dict[str, Difference], row: str) -> Iterator[str]:
    for number, (figure, each) in enumerate(found.items()):
        low, high = each.interval
        yield row.format(
            "" if number else name,
            "" if number else f"{problems:,}",
            figure,
            f"{each.left:.3f}",
            f"{each.right:.3f}",
            f"{each.difference:+.3f}",
            f"[{low:+.3f}, {high:+.3f}]",
        )


def _open_side(place: str) -> Side:
    """Find what the user means by RUN, RUN@POLICY_VERSION or a file."""
    if Path(place).is_file():
        found = load_record(EvaluationFile, Path(place))
        return _side(place, Store(found.store), found)
    folder, at, number = place.rpartition("@") if not Path(place).is_dir() else (place, "", "")
    if at and not number.isdecimal():
        raise UserError(f"{place} names the policy version {number!r}; {_PLACES}; give a number")
    directory = RunFolder(Path(folder if at else place))
    if not directory.path.is_dir():
        raise UserError(f"{directory.path} does not exist; {_PLACES}; check the path")
    store = Store(directory.config().store)
    summary = directory.summary()
    evaluations = () if summary is None else summary.evaluations
    if summary is not None and not at and evaluations and not summary.finished:
        done, planned = summary.rounds, summary.rounds_planned
        lacks = ", not all evaluated" if done == planned else ""
        raise UserError(
            f"{place} is not finished ({done} of {planned} rounds{lacks}); "
            f"{_PLACES}; finish it, or name an evaluated policy version (such as {place}@0)"
        )
    if at:
        evaluations = tuple(e for e in evaluations if e.round == int(number))
    if not evaluations:
        raise UserError(
            f"{place} has no evaluation{f' of policy version {number}' if at else ''}; {_PLACES}; "
            "run it with an evaluation section, or use evaluate --out"
        )
    return _side(place, store, evaluations[-1])


def _side(name: str, store: Store, found: Answers) -> Side:
    return Side(
        name=name,
        store=store,
        artifacts={key: each.artifact for key, each in found.benchmarks.items() if each.artifact},
        distances={key: each.artifact for key, each in found.distances.items()},
    )


def _pair(name: str, left: Side, right: Side) -> tuple[Counts, Counts]:
    """Both policies' counts on a benchmark."""
    (a, asked_a), (b, asked_b) = _read(name, left), _read(name, right)
    _check_same(name, left, right, asked_a, asked_b)
    if set(a.correct) != set(b.correct):
        raise UserError(
            f"{name} has {len(a.correct)} problems in {left.name} and {len(b.correct)} in "
            f"{right.name}, not the same ones; expected the same; evaluate both with one config"
        )
    return a, b


def _check_same(
    name: str, left: Side, right: Side, asked_a: dict[str, Any], asked_b: dict[str, Any]
) -> None:
    other = differing_fields(asked_a, asked_b)
    if other:
        fields = "; ".join(f"{field}: {old!r} and {new!r}" for field, (old, new) in other.items())
        raise UserError(
            f"{name} of {left.name} and of {right.name} differ in {fields}; expected the same "
            "problems, seeds and judge; evaluate both with one config"
        )


def _distance_pair(name: str, left: Side, right: Side) -> tuple[DistanceResult, DistanceResult]:
    """Both policies' distances to one teacher."""
    (a, asked_a), (b, asked_b) = _read_distance(name, left), _read_distance(name, right)
    _check_same(name, left, right, asked_a, asked_b)
    for text, said in TEXT_NAMES.items():
        if set(a.sums[text]) != set(b.sums[text]):
            raise UserError(
                f"{name} has {len(a.sums[text])} prompts on {said} in {left.name} and "
                f"{len(b.sums[text])} in {right.name}, not the same ones; expected the same; "
                "evaluate both with one config"
            )
    return a, b


def _read_distance(name: str, side: Side) -> tuple[DistanceResult, dict[str, Any]]:
    """Distances of one side, and everything that the other side has to share."""
    fingerprint = side.distances[name].removeprefix("evaluations/")
    figures = side.store.by_fingerprint("evaluations", fingerprint)
    if not figures.is_complete():
        raise UserError(f"{figures.name} of {side.name} is not complete; evaluate again")
    result = load_record(DistanceManifest, figures.folder / "manifest.json").result
    samples = side.store.by_fingerprint("distances", figures.recipe.inputs["samples"]).recipe
    rollouts, hidden = _input(side, samples, "rollouts"), _input(side, samples, "hidden")
    sampling = {field: v for field, v in rollouts.settings.items() if field not in _OWN}
    return result, {
        "prompts": _input(side, rollouts, "prompts").settings,
        "sampling": sampling,
        "teacher": {"identity": hidden.inputs["teacher"], **hidden.settings},
    }


def _read(name: str, side: Side) -> tuple[Counts, dict[str, Any]]:
    """Counts of one side, and everything that the other side has to share."""
    fingerprint = side.artifacts[name].removeprefix("evaluations/")
    verdicts = side.store.by_fingerprint("evaluations", fingerprint)
    if not verdicts.is_complete():
        raise UserError(f"{verdicts.name} of {side.name} is not complete; evaluate again")
    result = load_record(EvaluationManifest, verdicts.folder / "manifest.json").result
    rollouts = _input(side, verdicts.recipe, "rollouts")
    prompts = _input(side, rollouts, "prompts")
    sampling = {field: v for field, v in rollouts.settings.items() if field not in _OWN}
    asked = {
        "prompts": prompts.settings,
        "judge": verdicts.recipe.settings["judge"],
        "sampling": {**sampling, "samples_per_prompt": result.samples},
    }
    return Counts(correct=result.correct, samples=result.samples), asked


def _input(side: Side, recipe: Recipe, kind: Kind) -> Recipe:
    return side.store.by_fingerprint(kind, recipe.inputs[kind]).recipe
