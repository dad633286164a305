"""Two policies on the same problems or prompts with the same seeds: `opd-stream compare`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def compare(left: str, right: str, bootstrap: Bootstrap) -> Iterator[str]:
    """The lines of a paired comparison: right less left, with an interval.

    Raises:
        UserError: a side has no evaluation, or the two are not of the same problems and seeds.
    """
    sides = (_open_side(left), _open_side(right))
    names = [name for name in sides[0].artifacts if name in sides[1].artifacts]
    compared = [name for name in sides[0].distances if name in sides[1].distances]
    if not names and not compared:
        raise UserError(
            f"{left} has the benchmarks {', '.join(sides[0].names)} and {right} has "
            f"{', '.join(sides[1].names)}; expected one in common; use one config"
        )
    pairs = [_pair(name, *sides) for name in names]
    measured = [_distance_pair(name, *sides) for name in compared]
    yield f"A: {left}   B: {right}"
    interval = f"{100 * bootstrap.confidence:g}% interval of B - A"
    if pairs:
        yield _ROW.format("benchmark", "problems", "figure", "A", "B", "B - A", interval)
    for name, pair in zip(names, pairs, strict=True):
        ks = default_ks(pair[0].samples)
        found = differences([pair[0]], [pair[1]], ks, confidence=bootstrap.confidence)
        yield from _rows(name, len(pair[0].correct), found)
    if len(pairs) > 1:
        ks = default_ks(min(a.samples for a, _ in pairs))
        lefts, rights = [a for a, _ in pairs], [b for _, b in pairs]
        found = differences(lefts, rights, ks, confidence=bootstrap.confidence)
        yield from _rows(f"mean of {len(pairs)}", sum(len(a.correct) for a, _ in pairs), found)
    if measured:
        yield _DISTANCE.format("distance", "prompts", "figure", "A", "B", "B - A", interval)
    for name, (a, b) in zip(compared, measured, strict=True):
        for text, said in TEXT_NAMES.items():
            found = distance_differences(a.sums[text], b.sums[text], bootstrap)
            figures = {FIGURE_NAMES[figure]: each for figure, each in found.items()}
            yield from _rows(f"{name}, {said}", len(a.sums[text]), figures, _DISTANCE)
    for side, other in (sides, sides[::-1]):
        only = [name for name in side.names if name not in other.names]
        if only:
            yield f"only {side.name} has {', '.join(only)}"


def _rows(name: str, problems: int, found: dict[str, Difference], row: str = _ROW) -> Iterator[str]:
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
