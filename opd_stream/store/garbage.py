"""What a store no longer needs, and what is kept for good: `cache gc`, `cache pin`."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from opd_stream.errors import UserError
from opd_stream.store.files import (
    inside,
    is_remote,
    is_there,
    json_files,
    real,
    remove_file,
    remove_tree,
    stale_temporaries,
)
from opd_stream.store.inventory import files_below, named
from opd_stream.store.policy import PolicyArtifact, PolicyManifest
from opd_stream.store.recipe import KINDS, RecipeRecord
from opd_stream.store.sealed import Sealed, load_record, publish_record
from opd_stream.store.store import RunRecord, Store

GRACE_SECONDS = 24 * 3600.0  # whatever is younger may still be in the making
RUN_SECONDS = 30 * 24 * 3600.0  # a run that nobody went on with for so long may be gone


class Pin(Sealed):
    """`pins/NAME.json`: an artifact that stays."""

    NAMED_BY: ClassVar[int] = 2
    format_version: Literal[1] = 1
    name: str


def pin(store: Store, text: str) -> str:
    """Keep an artifact, and what it was made from, whatever the runs do; returns its name.

    Raises:
        UserError: the store has none of this name (`inventory.named`).
    """
    name = named(store, text)
    publish_record(_pin_path(store, name), Pin(name=name))
    return name


def unpin(store: Store, text: str) -> str:
    """Take a pin away; returns the artifact's name.

    Raises:
        UserError: nothing of this name is pinned.
    """
    name = named(store, text, among=sorted(_pinned(store)), what="pin")
    _pin_path(store, name).unlink()
    return name


def _pinned(store: Store) -> set[str]:
    return {load_record(Pin, path).name for path in json_files(store.root / "pins")}


def _pin_path(store: Store, name: str) -> Path:
    return store.root / "pins" / f"{name.replace('/', '-')}.json"


def gone_runs(store: Store, *, run_seconds: float = RUN_SECONDS) -> list[RunRecord]:
    """Runs whose folder this machine cannot see and that nobody went on with for a long time.

    A folder that is away alone says nothing: the run may be at work on another machine, or in a
    container. Every command of a run refreshes its record.
    """
    runs = store.runs().items()
    return [record for path, record in runs if is_gone(path, record, run_seconds)]


def is_gone(path: Path, record: RunRecord, run_seconds: float) -> bool:
    """Whether the run of a record is one of `gone_runs`."""
    is_old = time.time() - path.stat().st_mtime > run_seconds
    return is_old and not Path(record.folder).exists()


def garbage(
    store: Store,
    *,
    grace_seconds: float = GRACE_SECONDS,
    run_seconds: float = RUN_SECONDS,
    warn: Callable[[str], None] | None = None,
) -> list[Path]:
    """Folders of artifacts that no run and no pin reaches, unpublished checkpoints, and files that
    killed writers left.

    What is younger than the grace time is never garbage: somebody may be making it. Nor is what a
    link leads to.

    Args:
        store: to look at.
        grace_seconds: the grace time.
        run_seconds: see `gone_runs`.
        warn: told what is left alone because it cannot be read.

    Raises:
        UserError: something that is kept cannot be read, so what it was made from is unknown.
    """
    recipes, unreadable = _read_recipes(store)
    gone = {record.id for record in gone_runs(store, run_seconds=run_seconds)}
    known, pinned = store.runs().values(), _pinned(store)
    _check_records(store, recipes, has_runs=bool(known), pinned=pinned)
    kept = {name for run in known if run.id not in gone for name in run.artifacts} | pinned
    needed = _needed(store, recipes, kept)
    inputs = {each[:16] for name in needed for each in recipes[name].inputs.values()}
    for name, reason in unreadable.items():
        if name in kept or name.partition("/")[2] in inputs:
            raise UserError(
                f"{name} is kept, and what it was made from is unknown ({reason}); nothing is "
                "removed; continue the run that made it, or unpin it"
            )
        if warn is not None:
            warn(f"left {store.root / name}: {reason}")
    now = time.time()
    found = [
        store.root / name
        for name in recipes
        if name not in needed and now - _youngest(store.root / name) > grace_seconds
    ]
    for name in needed:
        if name.startswith("policies/") and not is_remote(store.root):
            found += _unpublished(store.root / name, now - grace_seconds)
    inner = stale_temporaries(store.root, (*KINDS, "runs", "pins"), before=now - grace_seconds)
    return found + [path for path in inner if not any(path.is_relative_to(each) for each in found)]


def _check_records(
    store: Store, recipes: Mapping[str, RecipeRecord], *, has_runs: bool, pinned: Collection[str]
) -> None:
    """Refuse a store that lost what says what is kept.

    Raises:
        UserError: runs made artifacts, and none has a record; or a pinned artifact is away.
    """
    is_made = any("imported" not in record.settings for record in recipes.values())
    if is_made and not has_runs and not pinned:
        raise UserError(
            f"{store.root} holds what runs made, and its folder runs has no record of one, so that "
            "everything would go; nothing is removed; call the runs again, which write them, or "
            "pin what is to stay"
        )
    for name in sorted(pinned):
        if name not in recipes and not (store.root / name).exists():
            raise UserError(
                f"{name} is pinned and not there, so what it was made from is unknown; nothing is "
                "removed; restore it, or unpin it"
            )


def remove_garbage(path: Path) -> None:
    """Remove one of the paths of `garbage`.

    Raises:
        OSError: it cannot be removed; what is left of it is no artifact.
    """
    if path.suffix == ".tmp":
        path.unlink(missing_ok=True)
        return
    remove_file(path / "manifest.json")  # from here on it does not exist
    for part in path.iterdir():  # recipe.json last: while units are there, it says how many
        if part.is_dir() and not part.is_symlink():
            remove_tree(part)
    remove_tree(path)


def _read_recipes(store: Store) -> tuple[dict[str, RecipeRecord], dict[str, str]]:
    """The recipes of all artifacts by name, and why others cannot be read."""
    recipes: dict[str, RecipeRecord] = {}
    unreadable: dict[str, str] = {}
    for kind in (*KINDS, "runs", "pins"):
        if is_there(store.root / kind) and not (store.root / kind).is_dir():
            raise UserError(
                f"{store.root / kind} is no folder; expected the one that runs wrote to, without "
                "which nothing is removed; restore it"
            )
    for name in [f"{kind}/{folder.name}" for kind in KINDS for folder in store.folders(kind)]:
        folder = store.root / name
        try:
            if not is_remote(store.root) and real(folder) != real(store.root) / name:
                unreadable[name] = "a link"
                continue
            if not (folder / "recipe.json").exists():
                unreadable[name] = "it has no recipe.json"
                continue
            recipes[name] = load_record(RecipeRecord, folder / "recipe.json")
            if name.startswith("policies/") and (folder / "manifest.json").exists():
                load_record(PolicyManifest, folder / "manifest.json")
        except (OSError, UserError) as error:
            recipes.pop(name, None)
            unreadable[name] = " ".join(str(error).split())
    return recipes, unreadable


def old_states(store: Store, latest: PolicyArtifact, *, keep: int) -> list[PolicyArtifact]:
    """The policies before the last ones of a run that still have files of training state.

    The oldest comes first, so that what a kill leaves is found by the next call.

    Args:
        store: of the run.
        latest: policy of the last complete round.
        keep: policies, the latest one included, whose state stays.
    """
    chain = [latest]
    while (before := chain[-1].recipe.inputs.get("optimizer")) is not None:
        policy = store.policy_by_fingerprint(before)
        if not policy.is_complete() or (len(chain) > keep and not chain[-1].has_state()):
            break
        chain.append(policy)
    return [policy for policy in reversed(chain[keep:]) if policy.holds_state()]


def drop_states(
    store: Store, policies: Sequence[PolicyArtifact], *, made_by: Collection[str]
) -> list[str]:
    """Drop the training state of policies of a run; returns their names.

    The state of a policy stays that is pinned, that another run made, or that another run trains on
    from; `made_by` are the ids of the run.
    """
    others = [run for run in store.runs().values() if run.id not in made_by]
    pinned = _pinned(store)
    dropped: list[str] = []
    for policy in policies:
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
            paths = (store.root / name / "recipe.json" for name in later)
            recipes = (load_record(RecipeRecord, path) for path in paths)
            if all(recipe.inputs.get("optimizer") != policy.fingerprint for recipe in recipes):
                return True
    return False


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
        if attempt.name != published and not attempt.is_symlink() and _youngest(attempt) < before
    ]


def _youngest(folder: Path) -> float:
    return max((path.stat().st_mtime for path in files_below(folder)), default=0.0)
