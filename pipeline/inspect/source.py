"""The scored rollouts of one round of a run, found by name; nothing is written."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.policy import tokenizer_digest
from opd_stream.store.reader import ScoredRow, ScoredRows
from opd_stream.store.store import Store
from opd_stream.tokens import quoted
from pipeline.records import RoundPlanRecord
from pipeline.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCache:
    """Units of one scores artifact that a round trains on."""

    number: int  # among the round's caches
    rollouts: Artifact
    scores: Artifact
    units: tuple[int, ...]
    policy_version: int  # of the oldest tokens in it

    def rows(self, units: Sequence[int] | None = None) -> ScoredRows:
        """Its rows, or those of some units."""
        chosen = self.units if units is None else units
        return ScoredRows([(self.rollouts, self.scores)], units=[chosen])

    @property
    def has_ranks(self) -> bool:
        """Whether candidates are the teacher's best, and not drawn from it."""
        return self.scores.recipe.settings["codec"]["kind"] != "sampled"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSource:
    """What a round trains on, as far as an eye wants to see it."""

    run: Path
    config: Config
    store: Store
    plan: RoundPlanRecord
    caches: tuple[RoundCache, ...]

    @property
    def round_index(self) -> int:
        """Number of the round, from 0."""
        return self.plan.round_index

    def answers(self, cache: RoundCache) -> dict[str, str | None]:
        """Reference answers by prompt id; empty for imported rows."""
        fingerprint = cache.rollouts.recipe.inputs.get("prompts")
        if fingerprint is None:
            return {}
        table = self.store.by_fingerprint("prompts", fingerprint).read_unit(0)
        ids, answers = table["prompt_id"].to_pylist(), table["answer"].to_pylist()
        return dict(zip(ids, answers, strict=True))

    def tokenizer_folder(self) -> Path:
        """A folder with the tokenizer of the rollouts: the student's, or that of a policy.

        Raises:
            UserError: there is none, or another one.
        """
        prompts = self.caches[0].rollouts.recipe.inputs.get("prompts")
        expected = None
        if prompts is not None:
            recipe = self.store.by_fingerprint("prompts", prompts).recipe
            expected = recipe.inputs["tokenizer"]
        student = self.config.student.path
        if student.is_dir() and expected in (None, tokenizer_digest(student)):
            return student
        for recipe in self.store.recipes("policies"):
            policy = self.store.policy(recipe)
            if policy.is_complete() and policy.manifest().tokenizer_sha256 == expected:
                return policy.folder("texts")
        found = "has another one" if student.is_dir() else "does not exist"
        raise UserError(
            f"the tokenizer of the rollouts (digest {str(expected)[:12]}) is missing: {student} "
            f"{found}, and no policy of the store has it; give it with --set student.path=FOLDER"
        )


def open_round(folder: RunFolder, config: Config, round_index: int) -> RoundSource:
    """The caches of a round, as its plan names them.

    Raises:
        UserError: the round is not planned, or its scores are not complete.
    """
    plan, store = folder.plan(round_index), Store(config.store)
    caches: list[RoundCache] = []
    for number, named in enumerate(plan.caches):
        pair: list[Artifact] = []
        for kind in ("rollouts", "scores"):
            artifact = store.by_fingerprint(kind, getattr(named, kind))
            if not artifact.is_complete():
                raise UserError(
                    f"{artifact.name} of round {round_index} is not complete; continue the run, "
                    "then look again"
                )
            pair.append(artifact)
        caches.append(
            RoundCache(
                number=number,
                rollouts=pair[0],
                scores=pair[1],
                units=tuple(pair[1].units() if named.units is None else named.units),
                policy_version=named.policy_version,
            )
        )
    return RoundSource(run=folder.path, config=config, store=store, plan=plan, caches=tuple(caches))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedRow:
    """A rollout of a round, and where it was found."""

    cache: RoundCache
    row: ScoredRow
    others: tuple[int, ...] = ()  # further caches of the round with a rollout of this name


def find(source: RoundSource, prompt_id: str, sample: int, cache: int | None) -> LocatedRow:
    """The rollout of a prompt: of the newest cache that has it, or of the one that is named.

    Raises:
        UserError: there is none, the teacher refused it, or a shard is damaged.
    """
    if cache is not None and cache not in range(len(source.caches)):
        raise UserError(
            f"--cache is {cache}; round {source.round_index} trains on caches 0 to "
            f"{len(source.caches) - 1}; choose one of them or leave it out"
        )
    names: dict[str, set[int]] = {}
    places: list[tuple[RoundCache, int, int]] = []
    with whole_shards():
        for part in reversed(source.caches):
            if cache not in (None, part.number):
                continue
            for unit in part.units:
                table = part.rollouts.read_unit(unit)
                keys = zip(
                    table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True
                )
                for row, (found_id, found_sample) in enumerate(keys):
                    names.setdefault(found_id, set()).add(found_sample)
                    if (found_id, found_sample) == (prompt_id, sample):
                        places.append((part, unit, row))
        if not places:
            raise UserError(_missing(source, prompt_id, sample, names))
        part, unit, row = places[0]
        return LocatedRow(
            cache=part,
            row=_scored(part, unit, row),
            others=tuple(other.number for other, _, _ in places[1:]),
        )


@contextmanager
def whole_shards() -> Iterator[None]:
    """Tell a damaged shard in one line."""
    try:
        yield
    except DamagedUnit as damaged:
        raise UserError(f"{damaged}; continue the run, which makes that unit again") from damaged


def _scored(cache: RoundCache, unit: int, row: int) -> ScoredRow:
    record = cache.scores.commit_record(unit)
    if record is None:
        raise DamagedUnit(cache.scores, unit, "its commit record is missing")
    if row in record.skipped_rows:
        reason = cache.scores.read_unit(unit)["refused"][row].as_py()
        why = "no token of it may train"
        if reason is not None:
            why = f"the teacher refused it: {quoted(reason)}"
        raise UserError(
            f"row {row} of unit {unit} of {cache.scores.name} is left out of training ({why}); "
            "choose another rollout"
        )
    before = sum(skipped < row for skipped in record.skipped_rows)
    return cache.rows([unit])[row - before]


def _missing(source: RoundSource, prompt_id: str, sample: int, names: dict[str, set[int]]) -> str:
    where = f"round {source.round_index} of {source.run}"
    if prompt_id in names:
        samples = ", ".join(map(str, sorted(names[prompt_id])))
        return f"{where} has no sample {sample} of prompt {prompt_id!r}; it has samples {samples}"
    near = difflib.get_close_matches(prompt_id, names, n=1) or sorted(names) or ["none"]
    return (
        f"{where} has no rollout of prompt {prompt_id!r}; it has {len(names)} prompts, such as "
        f"{near[0]!r}; `--worst 10` lists some of them"
    )
