"""What a store holds, whether it is whole, and what nobody needs any more."""

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opd_stream.errors import UserError
from opd_stream.outcome import Coverage
from opd_stream.section import Record
from opd_stream.store.artifact import Artifact, summed_counts
from opd_stream.store.codecs.fidelity import Fidelity
from opd_stream.store.files import (
    inside,
    is_remote,
    json_files,
    load_record,
    publish,
    read_json,
    record_bytes,
    remove_stale_temporaries,
    remove_tree,
)
from opd_stream.store.policy import PolicyArtifact, PolicyManifest
from opd_stream.store.recipe import KINDS, RecipeRecord
from opd_stream.store.store import RunRecord, Store

SHARDED = ("prompts", "rollouts", "scores", "heads", "bases", "hidden", "distances")
GRACE_SECONDS = 24 * 3600.0  # whatever is younger may still be in the making
RUN_SECONDS = 30 * 24 * 3600.0  # a run that nobody went on with for so long may be gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artifact in a listing."""

    name: str  # KIND/FINGERPRINT
    is_complete: bool
    units: tuple[int, int] | None  # committed, and all; None: it has no shards
    bytes: int
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something in the store that is not what was written."""

    artifact: str  # KIND/FINGERPRINT
    unit: int | None  # None: not one of its shards
    reason: str

    def __str__(self) -> str:
        unit = "" if self.unit is None else f"unit {self.unit} is damaged: "
        return f"{self.artifact}: {unit}{self.reason}"


class Pin(Record):
    """`pins/NAME.json`: an artifact that stays."""

    format_version: Literal[1] = 1
    name: str


def started(store: Store) -> list[str]:
    """The names of all artifacts that were started, KIND/FINGERPRINT."""
    return [
        f"{kind}/{folder.name}"
        for kind in KINDS
        for folder in store.folders(kind)
        if (folder / "recipe.json").exists()
    ]


def entries(store: Store) -> Iterator[Entry]:
    """Every artifact that was started."""
    for name in started(store):
        folder, kind = store.root / name, name.partition("/")[0]
        is_complete = (folder / "manifest.json").exists()
        units, size, counts = None, 0, dict[str, float]()
        if kind in SHARDED:
            artifact = Artifact(store.root, _recipe(folder).recipe)
            commits = artifact.commits()
            units, counts = (len(commits), len(artifact.units())), summed_counts(commits.values())
            size = sum(commit.bytes for commit in commits.values())
        elif kind == "policies" and is_complete:
            size = bytes_below(folder)
        yield Entry(
            name=name,
            is_complete=is_complete,
            units=units,
            bytes=size,
            rows=int(counts.get("rows", 0)),
            tokens=int(counts.get("completion_tokens", 0)),
        )


def open_artifact(store: Store, name: str) -> Artifact:
    """A sharded artifact by its name, KIND/FINGERPRINT.

    Raises:
        UserError: the store has no such artifact, or it has no shards.
    """
    kind, slash, fingerprint = name.strip("/").partition("/")
    for sharded in SHARDED:
        if slash and kind == sharded:
            return store.by_fingerprint(sharded, fingerprint)
    raise UserError(
        f"{name!r} is no artifact with shards; expected KIND/FINGERPRINT with one of "
        f"{', '.join(SHARDED)}; `opd-stream cache ls` lists them"
    )


def fidelity_report(artifact: Artifact) -> dict[str, float | None]:
    """The size of a scores artifact, and what its codec kept and lost in the committed units."""
    commits = artifact.commits().values()
    whole = sum((commit.fidelity for commit in commits if commit.fidelity), Fidelity())
    size = sum(commit.bytes for commit in commits)
    return {"bytes": size, "bytes_per_token": size / max(1, whole.tokens), **whole.report()}


def coverage_of(store: Store, scores: Artifact) -> Coverage | None:
    """What the candidates of scores were found to see when a policy trained on them.

    Of several policies the one that trained on the fewest caches beside them; None: none did.
    """
    found: list[tuple[int, Coverage]] = []
    for folder in store.folders("policies"):
        path = folder / "manifest.json"
        if not path.exists() or scores.fingerprint not in path.read_text():
            continue
        manifest = load_record(PolicyManifest, path)
        if manifest.outcome.start.coverage is not None:
            found.append((len(manifest.recipe.inputs), manifest.outcome.start.coverage))
    return min(found, key=lambda each: each[0], default=(0, None))[1]


def damages(store: Store) -> Iterator[Damage]:
    """Everything in the store that is not what was written."""
    for name in started(store):
        yield from damages_of(store, name)


def damages_of(store: Store, name: str) -> Iterator[Damage]:
    """The same of one artifact."""
    folder, kind = store.root / name, name.partition("/")[0]
    reason: str | None = None
    try:
        recipe = _recipe(folder).recipe
        if recipe.fingerprint[:16] != folder.name:
            reason = f"its recipe belongs to {recipe.fingerprint[:16]}"
        elif kind in SHARDED:
            yield from _damaged_units(Artifact(store.root, recipe))
        elif kind == "policies":
            policy = store.policy(recipe)
            reason = policy.damage(cache=store.digests) if policy.is_complete() else None
        elif (folder / "manifest.json").exists():
            read_json(folder / "manifest.json")
    except UserError as error:
        reason = " ".join(str(error).split())
    if reason is not None:
        yield Damage(artifact=name, unit=None, reason=reason)


def _damaged_units(artifact: Artifact) -> Iterator[Damage]:
    commits = artifact.commits()
    for unit in commits:
        if (reason := artifact.damage(unit)) is not None:
            yield Damage(artifact=artifact.name, unit=unit, reason=reason)
    if artifact.is_complete():
        listed = {record.unit: record.sha256 for record in artifact.manifest().units}
        for unit in artifact.units():
            committed = commits[unit].sha256 if unit in commits else None
            if listed.get(unit) != committed:
                reason = f"unit {unit} is not the one its manifest lists"
                yield Damage(artifact=artifact.name, unit=None, reason=reason)


def pin(store: Store, name: str) -> None:
    """Keep an artifact, and what it was made from, whatever the runs do."""
    if not (store.root / name / "recipe.json").exists():
        raise UserError(f"the store has no {name}; `opd-stream cache ls` lists what it has")
    publish(_pin_path(store, name), record_bytes(Pin(name=name)))


def unpin(store: Store, name: str) -> None:
    """Take a pin away."""
    if not _pin_path(store, name).exists():
        raise UserError(f"{name} is not pinned")
    _pin_path(store, name).unlink()


def _pin_path(store: Store, name: str) -> Path:
    return store.root / "pins" / f"{name.replace('/', '-')}.json"


def gone_runs(store: Store, *, run_seconds: float = RUN_SECONDS) -> list[RunRecord]:
    """Runs whose folder this machine cannot see and that nobody went on with for a long time.

    A folder that is away alone says nothing: the run may be at work on another machine, or in a
    container. Every command of a run refreshes its record.
    """
    now = time.time()
    return [
        record
        for path, record in store.runs().items()
        if now - path.stat().st_mtime > run_seconds and not Path(record.folder).exists()
    ]


def garbage(
    store: Store, *, grace_seconds: float = GRACE_SECONDS, run_seconds: float = RUN_SECONDS
) -> list[Path]:
    """Folders of artifacts that no run and no pin reaches, and unpublished checkpoints.

    What is younger than the grace time is never garbage: somebody may be making it.
    """
    recipes = {name: _recipe(store.root / name) for name in started(store)}
    gone = {record.id for record in gone_runs(store, run_seconds=run_seconds)}
    named = {name for run in store.runs().values() if run.id not in gone for name in run.artifacts}
    pinned = {load_record(Pin, path).name for path in json_files(store.root / "pins")}
    needed = _needed(store, recipes, named | pinned)
    now = time.time()
    found = [
        store.root / name
        for name in recipes
        if name not in needed and now - _youngest(store.root / name) > grace_seconds
    ]
    for name in needed:
        if name.startswith("policies/") and not is_remote(store.root):
            found += _unpublished(store.root / name, now - grace_seconds)
    return found


def collect_garbage(store: Store, found: list[Path], *, grace_seconds: float) -> None:
    """Remove folders from `garbage`, and temporary files that killed writers left."""
    for folder in found:
        (folder / "manifest.json").unlink(missing_ok=True)  # from here on it does not exist
        for part in folder.iterdir():  # recipe.json last: while units are there, it says how many
            if part.is_dir():
                remove_tree(part)
        remove_tree(folder)
    if not is_remote(store.root) and store.root.exists():
        remove_stale_temporaries(store.root, older_than_seconds=grace_seconds, now=time.time())


def drop_states(
    store: Store, latest: PolicyArtifact, *, keep: int, made_by: Collection[str]
) -> list[str]:
    """Drop the training state of all but the last policies of a run; returns their names.

    The state of a policy stays that is pinned, that another run made, or that another run trains on
    from. The oldest goes first, so that what a kill leaves is found by the next call.

    Args:
        store: of the run.
        latest: policy of the last complete round.
        keep: policies, the latest one included, whose state stays.
        made_by: ids of the run.
    """
    chain = [latest]
    while (before := chain[-1].recipe.inputs.get("optimizer")) is not None:
        policy = store.policy_by_fingerprint(before)
        if not policy.is_complete() or (len(chain) > keep and not chain[-1].has_state()):
            break
        chain.append(policy)
    others = [run for run in store.runs().values() if run.id not in made_by]
    pinned = {load_record(Pin, path).name for path in json_files(store.root / "pins")}
    dropped: list[str] = []
    for policy in reversed(chain[keep:]):
        is_ours = policy.manifest().outcome.made_by in made_by
        if is_ours and policy.name not in pinned and not _is_last_of_any(store, policy, others):
            dropped += [policy.name] if policy.has_state() else []
            policy.drop_state()
    return dropped


def _is_last_of_any(store: Store, policy: PolicyArtifact, runs: Iterable[RunRecord]) -> bool:
    """Whether a run has the policy, and no complete one that was trained on from it."""
    for run in runs:
        if policy.name in run.artifacts:
            names = [name for name in run.artifacts if name.startswith("policies/")]
            later = [name for name in names if (store.root / name / "manifest.json").exists()]
            recipes = (_recipe(store.root / name) for name in later)
            if all(recipe.inputs.get("optimizer") != policy.fingerprint for recipe in recipes):
                return True
    return False


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _recipe(folder: Path) -> RecipeRecord:
    return load_record(RecipeRecord, folder / "recipe.json")


def _needed(store: Store, recipes: dict[str, RecipeRecord], named: Iterable[str]) -> set[str]:
    """The named artifacts, what they were made from, and verdicts on what is kept."""
    makers = {record.fingerprint: name for name, record in recipes.items()}
    for name in recipes:
        manifest = store.root / name / "manifest.json"
        if name.startswith("policies/") and manifest.exists():
            makers.setdefault(load_record(PolicyManifest, manifest).identity, name)
    needed: set[str] = set()
    waiting = [name for name in named if name in recipes]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            inputs = recipes[name].inputs.values()
            waiting += [makers[each] for each in inputs if each in makers]
    for name, record in recipes.items():
        sources = {makers.get(each) for each in record.inputs.values()}
        if name.startswith("evaluations/") and sources <= needed:
            needed.add(name)
    return needed


def _unpublished(folder: Path, before: float) -> list[Path]:
    """Attempts that lost or were cut short."""
    manifest = folder / "manifest.json"
    published = load_record(PolicyManifest, manifest).folder if manifest.exists() else None
    if published is not None:
        inside(folder, published)
    return [
        attempt
        for attempt in folder.glob("attempt-*")
        if attempt.name != published and _youngest(attempt) < before
    ]


def _youngest(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=0.0)
