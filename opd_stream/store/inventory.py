"""What a store holds, whether it is whole, and what nobody needs any more."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_stream.errors import Unreachable, UserError
from opd_stream.outcome import Coverage
from opd_stream.store.artifact import Artifact, DamagedUnit, summed_counts
from opd_stream.store.codecs.fidelity import Fidelity
from opd_stream.store.files import json_files
from opd_stream.store.policy import PolicyManifest
from opd_stream.store.recipe import KINDS, RecipeRecord
from opd_stream.store.sealed import load_record
from opd_stream.store.store import RunRecord, Store

SHARDED = ("prompts", "rollouts", "scores", "heads", "bases", "hidden", "distances")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artifact in a listing."""

    name: str  # KIND/FINGERPRINT
    is_complete: bool
    units: tuple[int, int] | None  # committed, and all; None: it has no shards
    bytes: int
    rows: int
    tokens: int
    is_damaged: bool = False  # its records cannot be read; `cache verify` says which
    changed_at: float = 0.0  # when its manifest or recipe was written, seconds since the epoch
    runs: tuple[str, ...] = ()  # folders of those that reach it

    @property
    def kind(self) -> str:
        """Of artifact."""
        return self.name.partition("/")[0]

    @property
    def state(self) -> str:
        """Whether it is whole, as far as its records say."""
        return "damaged" if self.is_damaged else "complete" if self.is_complete else "partial"


def started(store: Store) -> list[str]:
    """The names of all artifacts that were started, KIND/FINGERPRINT."""
    return [
        f"{kind}/{folder.name}"
        for kind in KINDS
        for folder in store.folders(kind)
        if (folder / "recipe.json").exists()
    ]


def _reached(store: Store) -> dict[str, list[str]]:
    """Artifact -> folders of the runs that reach it, by the records that can be read."""
    found: dict[str, list[str]] = {}
    for path in json_files(store.root / "runs"):
        try:
            run = load_record(RunRecord, path)
        except Unreachable:
            raise
        except (UserError, OSError):
            continue  # `cache verify` names it
        for name in run.artifacts:
            found.setdefault(name, []).append(run.folder)
    return found


def entries(store: Store) -> Iterator[Entry]:
    """Every artifact that was started."""
    reached = _reached(store)
    for name in started(store):
        folder, kind = store.root / name, name.partition("/")[0]
        is_complete, is_damaged = (folder / "manifest.json").exists(), False
        units, size, counts = None, 0, dict[str, float]()
        try:
            if kind in SHARDED:
                artifact = Artifact(store.root, _recipe(folder).recipe)
                commits = artifact.listed_commits()
                units = (len(commits), len(artifact.units()))
                counts = summed_counts(commits.values())
                size = sum(commit.bytes for commit in commits.values())
            elif kind == "policies" and is_complete:
                size = bytes_below(folder)
        except Unreachable:
            raise
        except (UserError, DamagedUnit):
            is_damaged = True
        yield Entry(
            is_damaged=is_damaged,
            name=name,
            changed_at=(folder / ("manifest.json" if is_complete else "recipe.json"))
            .stat()
            .st_mtime,
            runs=tuple(sorted(reached.get(name, ()))),
            is_complete=is_complete,
            units=units,
            bytes=size,
            rows=int(counts.get("rows", 0)),
            tokens=int(counts.get("completion_tokens", 0)),
        )


def named(
    store: Store, text: str, *, among: Sequence[str] | None = None, what: str = "artifact"
) -> str:
    """The artifact that a text names: KIND/FINGERPRINT, the path of its folder, or a beginning.

    Args:
        store: to look in.
        text: the name; one of its beginnings is enough, with or without the kind.
        among: names; None: of all artifacts that were started.
        what: they are, for the error.

    Raises:
        UserError: none is meant, or several.

    Example:
        >>> named(store, "scores/3f0c")
        'scores/3f0c9a1b2d4e5f60'
    """
    path, root = str(Path(text.rstrip("/"))) if "://" not in text else text, str(store.root)
    for place in (root, str(Path(root).resolve())):
        path = path.removeprefix(f"{place}/")
    kind, _, beginning = path.rstrip("/").rpartition("/")
    names = started(store) if among is None else among
    found = [
        name
        for name in names
        if name.startswith(f"{kind}/" if kind else "")
        and name.partition("/")[2].startswith(beginning[:16])
        and beginning
    ]
    if len(found) == 1:
        return found[0]
    several = f"is the beginning of {', '.join(found[:3])}" if found else "is not there"
    raise UserError(
        f"{text!r} {several}; expected KIND/FINGERPRINT of one {what}, or the beginning of its "
        "fingerprint; `opd-stream cache ls` lists them"
    )


def open_artifact(store: Store, name: str) -> Artifact:
    """A sharded artifact by its name, KIND/FINGERPRINT.

    Raises:
        UserError: the store has no such artifact, or it has no shards.
    """
    kind, _, fingerprint = named(store, name).partition("/")
    for sharded in SHARDED:
        if kind == sharded:
            return store.by_fingerprint(sharded, fingerprint)
    raise UserError(
        f"{name!r} is no artifact with shards; expected KIND/FINGERPRINT with one of "
        f"{', '.join(SHARDED)}; `opd-stream cache ls` lists them"
    )


def fidelity_report(artifact: Artifact) -> dict[str, float | str | None]:
    """The size of a scores artifact, and what its codec kept and lost in the committed units."""
    commits = artifact.commits().values()
    whole = sum((commit.fidelity for commit in commits if commit.fidelity), Fidelity())
    size = sum(commit.bytes for commit in commits)
    report = whole.report()
    if "head" in artifact.recipe.inputs:  # the mass of the candidates beside them says nothing
        report = {name: value for name, value in report.items() if "mass" not in name}
        report = {"kept": "hidden states, which give the whole distribution", **report}
    if artifact.recipe.settings.get("codec", {}).get("kind") == "sampled":  # draws, not rounded
        report = {name: value for name, value in report.items() if "error" not in name}
    return {"bytes": size, "bytes_per_token": size / max(1, whole.tokens), **report}


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


def bytes_below(place: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(path.stat().st_size for path in files_below(place))


def files_below(place: Path) -> Iterator[Path]:
    """The files below a folder, links left out; of a file itself."""
    paths = [place] if place.is_file() else place.rglob("*")
    return (path for path in paths if path.is_file() and not path.is_symlink())


def _recipe(folder: Path) -> RecipeRecord:
    return load_record(RecipeRecord, folder / "recipe.json")
