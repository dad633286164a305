"""What a store holds, whether it is whole, and what nobody needs any more."""

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_stream.errors import UserError
from opd_stream.store.artifact import Artifact, summed_counts
from opd_stream.store.codecs.fidelity import Fidelity
from opd_stream.store.files import (
    canonical_json,
    inside,
    is_remote,
    load_record,
    publish,
    read_json,
    remove_stale_temporaries,
    remove_tree,
)
from opd_stream.store.recipe import KINDS, RecipeRecord
from opd_stream.store.store import Store

SHARDED = ("prompts", "rollouts", "scores")
GRACE_SECONDS = 24 * 3600  # whatever is younger may still be in the making


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artifact's line in a listing."""

    name: str  # KIND/FINGERPRINT
    complete: bool
    units: str  # "8 of 8"; empty for artifacts without shards
    bytes: int
    rows: int
    tokens: int
    settings: dict[str, Any]


def entries(store: Store) -> Iterator[Entry]:
    """Every artifact that was started."""
    for kind in KINDS:
        for folder in store.folders(kind):
            if not (folder / "recipe.json").exists():
                continue
            name = f"{kind}/{folder.name}"
            complete = (folder / "manifest.json").exists()
            recipe = load_record(RecipeRecord, folder / "recipe.json").recipe
            units, counts, size = "", {}, 0
            if kind in SHARDED:
                artifact = Artifact(store.root, recipe)
                commits = artifact.commits()
                units, counts = (
                    f"{len(commits)} of {len(artifact.units())}",
                    summed_counts(commits.values()),
                )
                size = sum(commit.bytes for commit in commits.values())
            elif kind == "policies" and complete:
                size = bytes_below(folder)
            yield Entry(
                name=name,
                complete=complete,
                units=units,
                bytes=size,
                rows=int(counts.get("rows", 0)),
                tokens=int(counts.get("completion_tokens", 0)),
                settings=recipe.settings,
            )


def open_artifact(store: Store, name: str) -> Artifact:
    """A sharded artifact by its name, KIND/FINGERPRINT.

    Raises:
        UserError: the store has no such artifact, or it has no shards.
    """
    kind, slash, fingerprint = name.strip("/").partition("/")
    if not slash or kind not in SHARDED:
        raise UserError(
            f"{name!r} is no artifact with shards; expected KIND/FINGERPRINT with one of "
            f"{', '.join(SHARDED)}; `opd-stream cache ls` lists them"
        )
    return store.by_fingerprint(kind, fingerprint)


def fidelity_report(artifact: Artifact) -> dict[str, Any]:
    """What the codec kept and lost over the committed units of a scores artifact, and its size."""
    commits = artifact.commits().values()
    whole = sum((commit.fidelity for commit in commits if commit.fidelity), Fidelity())
    size = sum(commit.bytes for commit in commits)
    return {
        "codec": artifact.recipe.settings.get("codec"),
        "bytes": size,
        "bytes_per_token": size / max(1, whole.tokens),
        **whole.report(),
    }


def problems(store: Store) -> Iterator[str]:
    """One line for everything in the store that is not what was written."""
    for name in started(store):
        yield from problems_of(store, name)


def started(store: Store) -> list[str]:
    """The names of all artifacts that were started, KIND/FINGERPRINT."""
    return [
        f"{kind}/{folder.name}"
        for kind in KINDS
        for folder in store.folders(kind)
        if (folder / "recipe.json").exists()
    ]


def problems_of(store: Store, name: str) -> Iterator[str]:
    """The same as `problems` of one artifact."""
    folder, kind = store.root / name, name.partition("/")[0]
    try:
        recipe = load_record(RecipeRecord, folder / "recipe.json").recipe
        if recipe.fingerprint[:16] != folder.name:
            yield f"{name}: its recipe belongs to {recipe.fingerprint[:16]}"
        elif kind in SHARDED:
            yield from _damaged_units(Artifact(store.root, recipe))
        elif kind == "policies":
            policy = store.policy(recipe)
            reason = policy.damage(cache=store.digests) if policy.is_complete() else None
            if reason is not None:
                yield f"{name}: {reason}"
        elif (folder / "manifest.json").exists():
            read_json(folder / "manifest.json")
    except (UserError, KeyError, TypeError) as error:
        yield f"{name}: {' '.join(str(error).split())}"


def _damaged_units(artifact: Artifact) -> Iterator[str]:
    commits = artifact.commits()
    for unit in commits:
        if (reason := artifact.damage(unit)) is not None:
            yield f"{artifact.name}: unit {unit} is damaged: {reason}"
    if artifact.is_complete():
        listed = {record.unit: record.sha256 for record in artifact.manifest().units}
        for unit in artifact.units():
            there = commits[unit].sha256 if unit in commits else None
            if listed.get(unit) != there:
                yield f"{artifact.name}: unit {unit} is not the one its manifest lists"


def pin(store: Store, name: str) -> None:
    """Keep an artifact, and what it was made from, whatever the runs do."""
    if not (store.root / name / "recipe.json").exists():
        raise UserError(f"the store has no {name}; `opd-stream cache ls` lists what it has")
    publish(store.root / "pins" / f"{name.replace('/', '-')}.json", canonical_json({"name": name}))


def unpin(store: Store, name: str) -> None:
    """Take a pin away."""
    path = store.root / "pins" / f"{name.replace('/', '-')}.json"
    if not path.exists():
        raise UserError(f"{name} is not pinned")
    path.unlink()


def garbage(store: Store, *, grace_seconds: float = GRACE_SECONDS) -> list[Path]:
    """Folders of artifacts that no run and no pin reaches, and unpublished checkpoints.

    A run counts while its folder is there (as far as this machine can see it). What is younger than
    the grace time is never garbage: somebody may be making it.
    """
    recipes = {
        f"{kind}/{folder.name}": read_json(folder / "recipe.json")
        for kind in KINDS
        for folder in store.folders(kind)
        if (folder / "recipe.json").exists()
    }
    reached = _closure(store, recipes, {*_named_by_runs(store), *_pinned(store)})
    now = time.time()
    found = [
        store.root / name
        for name in recipes
        if name not in reached and now - _youngest(store.root / name) > grace_seconds
    ]
    for name in reached:
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


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _named_by_runs(store: Store) -> set[str]:
    named: set[str] = set()
    for path in _files(store.root / "runs"):
        record = read_json(path)
        gone = record["host"] == platform.node() and not Path(record["folder"]).exists()
        if not gone:
            named |= set(record["artifacts"])
    return named


def _pinned(store: Store) -> set[str]:
    return {read_json(path)["name"] for path in _files(store.root / "pins")}


def _closure(store: Store, recipes: dict[str, Any], named: set[str]) -> set[str]:
    """The named artifacts, what they were made from, and verdicts on what is kept."""
    by_fingerprint = {value["fingerprint"]: name for name, value in recipes.items()}
    by_identity = {
        read_json(manifest)["identity"]: name
        for name in recipes
        if name.startswith("policies/")
        and (manifest := store.root / name / "manifest.json").exists()
    }
    reached: set[str] = set()
    waiting = [name for name in named if name in recipes]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for fingerprint in recipes[name]["inputs"].values():
            source = by_fingerprint.get(fingerprint) or by_identity.get(fingerprint)
            if source is not None:
                waiting.append(source)
    for name, value in recipes.items():
        sources = {by_fingerprint.get(each) for each in value["inputs"].values()}
        if name.startswith("evaluations/") and sources <= reached:
            reached.add(name)
    return reached


def _unpublished(folder: Path, before: float) -> list[Path]:
    """Attempts that lost or were cut short."""
    manifest = folder / "manifest.json"
    published = read_json(manifest)["folder"] if manifest.exists() else None
    if published is not None:
        inside(folder, published)
    return [
        attempt
        for attempt in folder.glob("attempt-*")
        if attempt.name != published and _youngest(attempt) < before
    ]


def _youngest(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=0.0)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=str) if folder.exists() else []
