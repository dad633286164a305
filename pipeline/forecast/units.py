"""Shards of rollouts and scores: what is committed, and what is expected of the rest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from opd_stream.costs import ModelShape, TokenCounts, forward_flops
from opd_stream.store.artifact import Artifact, Commit, summed_counts
from pipeline.forecast.amounts import Amount, Basis, Stage, StageName
from pipeline.forecast.sizes import ShardSizes, measured_sizes

Expected = Callable[[float], TokenCounts]  # rows -> counts


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRows:
    """The rows of a unit of rollouts; their counts are measured where it is committed."""

    unit: int
    rows: float
    counts: TokenCounts
    commit: Commit | None
    stored: TokenCounts | None = None  # where more is stored than is computed: whole rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What of an artifact is there and what is left."""

    done: Amount
    left: Amount
    units: int
    units_done: int

    @property
    def store(self) -> str:
        """As the table says it."""
        return f"{self.units_done} of {self.units} units"


def commits_of(artifact: Artifact | None) -> dict[int, Commit]:
    """Unit -> commit record; from the manifest, one file, where the artifact is complete."""
    return {} if artifact is None else artifact.listed_commits()


def counts_in(commits: Iterable[Commit]) -> TokenCounts:
    """The tokens of commit records; 0 where they were not counted (imported rows)."""
    return token_counts(summed_counts(commits))


def token_counts(counts: Mapping[str, float]) -> TokenCounts:
    """The part of counts that costs follow from."""
    return TokenCounts(
        tokens=counts.get("tokens", 0.0),
        completion_tokens=counts.get("completion_tokens", 0.0),
        pairs=counts.get("pairs", 0.0),
    )


def unit_rows(
    artifact: Artifact | None,
    commits: Mapping[int, Commit],
    expected: Expected,
    *,
    prompts: int,
    prompts_per_unit: int,
    samples: int,
) -> list[UnitRows]:
    """The units of rollouts, in the layout of a started artifact or in that of the config."""
    if artifact is not None and artifact.is_started():
        sizes = {unit: len(artifact.unit_rows(unit)) for unit in artifact.units()}
    else:
        starts = range(0, prompts, prompts_per_unit)
        sizes = {unit: min(prompts_per_unit, prompts - start) for unit, start in enumerate(starts)}
    found: list[UnitRows] = []
    for unit, size in sizes.items():
        commit, rows = commits.get(unit), size * samples
        counts = expected(rows) if commit is None else counts_in([commit])
        found.append(UnitRows(unit=unit, rows=rows, counts=counts, commit=commit))
    return found


def work_on(
    units: list[UnitRows], commits: Mapping[int, Commit], shape: ModelShape, sizes: ShardSizes
) -> Work:
    """A forward pass over every row of the units: of those in `commits` it is done."""
    done, left = Amount(), Amount()
    for unit in units:
        commit = commits.get(unit.unit)
        if commit is None:
            left += Amount(
                rows=unit.rows,
                tokens=unit.counts.completion_tokens,
                bytes=sizes.bytes(unit.stored or unit.counts, unit.rows, 1),
                flops=forward_flops(shape, unit.counts),
            )
        else:
            counts = counts_in([commit])
            done += Amount(
                rows=commit.counts.get("rows", unit.rows),
                tokens=counts.completion_tokens,
                bytes=commit.bytes,
                flops=forward_flops(shape, counts) if counts.pairs else 0.0,
            )
    return Work(done=done, left=left, units=len(units), units_done=len(commits))


def sizes_of(commits: Mapping[int, Commit], otherwise: ShardSizes) -> ShardSizes:
    """The size of shards as it was measured, if any was: schema and footer, and record batches."""
    tokens = sum(commit.counts.get("completion_tokens", 0.0) for commit in commits.values())
    if not tokens:
        return otherwise
    batches = sum(part.length for commit in commits.values() for part in commit.parts[1:])
    whole = sum(commit.bytes for commit in commits.values())
    return measured_sizes(batches / tokens, (whole - batches) / len(commits))


def stage_of(
    name: StageName, work: Work, *, window_tokens: int, prompts: int, is_measured: bool
) -> Stage:
    """A stage of shards; `is_measured`: what is left is estimated from measured completions."""
    basis: Basis = "estimated" if is_measured else "full window"
    return Stage(
        name=name,
        window_tokens=window_tokens,
        prompts=prompts,
        done=work.done,
        left=work.left,
        store=work.store,
        basis="measured" if work.units_done == work.units else basis,
        units_left=work.units - work.units_done,
    )
