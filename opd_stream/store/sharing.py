"""A teacher cache as a folder for others: written of a store, and taken into another one.

The folder is a store of the artifacts that its scores are read with, copied as they are, beside
`cache.json` and a card. Whoever takes one in trusts nothing that it says: every digest and every
row is checked before the first byte enters the store, and what an artifact does not name stays out.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from opd_stream.errors import UserError, shortened
from opd_stream.fetching import local_folder
from opd_stream.store.artifact import Artifact, Commit, DamagedUnit, shard_name, summed_counts
from opd_stream.store.files import explained, inside, is_there, verified_bytes
from opd_stream.store.inventory import coverage_of, fidelity_report
from opd_stream.store.recipe import Kind
from opd_stream.store.sealed import Sealed, load_record, publish_record
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import tokenizer_digest
from opd_stream.store.verification import Surroundings, examine

BESIDE: tuple[tuple[str, Kind], ...] = (("head", "heads"), ("basis", "bases"))  # role, kind
WANTED = ("cache.json", "*/recipe.json", "*/manifest.json", "*/units/*.json", "*/units/*.arrow")
ENTRY, CARD = "cache.json", "README.md"


class SharedCache(Sealed):
    """`cache.json`: what a folder of a shared cache holds."""

    NAMED_BY: ClassVar[int] = 1

    format_version: Literal[1] = 1
    scores: str  # KIND/FINGERPRINT
    tokenizer: str | None  # identity of the student's; None: not known
    teacher: str | None = None  # its name, as the giver says it


def parts_of(store: Store, scores: Artifact) -> list[Artifact]:
    """The artifacts that scores are read with, each after those it needs; the scores are last.

    Raises:
        UserError: one is not there, or not complete.
    """
    rollouts = store.scored_rollouts(scores)
    named = scores.recipe.inputs
    others = [store.by_fingerprint(kind, named[role]) for role, kind in BESIDE if role in named]
    found = [rollouts, *others, scores]
    for artifact in found:
        if not artifact.is_complete():
            raise UserError(f"{artifact.name} is not complete; continue the run that makes it")
    return found


def write_cache(store: Store, scores: Artifact, out: Path, *, teacher: str | None = None) -> None:
    """Write scores and what they are read with as a folder; it is there whole or not at all.

    Prompts stay at home, with their texts, answers and fields: rollouts hold their ids. Of them
    goes the recipe alone, which says what tokenizer gave these ids.

    Args:
        store: of the scores.
        scores: a complete artifact.
        out: folder that must not exist yet, or be empty.
        teacher: its name, for the card.

    Raises:
        UserError: the folder has files, or an artifact is not complete.
        DamagedUnit: a shard is not what was committed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; expected a new or empty folder; choose another")
    parts = parts_of(store, scores)
    entry = SharedCache(scores=scores.name, tokenizer=store.tokenizer_of(parts[0]), teacher=teacher)
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            folder = Path(temporary) / "cache"
            folder.mkdir()
            shared = Store(folder)
            shared.mark()
            for artifact in parts:
                _copy(artifact, shared)
            _copy_prompts_recipe(store, parts[0], shared)
            publish_record(folder / ENTRY, entry, is_pretty=True)
            (folder / CARD).write_text(cache_card(store, parts, entry), encoding="utf-8")
            folder.rename(out)


def read_cache(source: Path, store: Store, *, student: Path | None = None) -> Artifact:
    """Take the scores of a shared folder into a store; nothing enters before all of it is checked.

    Args:
        source: folder that `write_cache` wrote, or that claims so.
        store: to fill.
        student: checkpoint that is to train on it; its tokenizer has to be that of the cache.

    Returns:
        The scores.

    Raises:
        UserError: a file is not what its record says, a row breaks a law, something leads out of
            the folder, the tokenizers differ, or the store has other bytes under the same name.
    """
    entry = _entry(source)
    if student is not None:
        _check_tokenizer(entry, student)
    shared = Store(source, remembers=False)
    scores = shared.by_fingerprint("scores", _fingerprint(entry.scores.removeprefix("scores/")))
    for fingerprint in scores.recipe.inputs.values():
        _fingerprint(fingerprint)
    parts = parts_of(shared, scores)
    around = Surroundings.of(shared)
    for artifact in parts:
        _check(shared, artifact, around)
    if (known := shared.tokenizer_of(parts[0])) not in (None, entry.tokenizer):
        raise UserError(
            f"{source / ENTRY} names tokenizer {shortened(str(entry.tokenizer))}, and its prompts "
            f"{shortened(str(known))}; nothing was taken in; do not use this folder"
        )
    for artifact in parts:
        _check_agrees(artifact, store)
    for artifact in parts:
        try:
            _copy(artifact, store)
        except DamagedUnit as error:
            raise UserError(f"{error}; it changed while it was read; pull it again") from error
    _copy_prompts_recipe(shared, parts[0], store)
    return store.by_fingerprint("scores", parts[-1].fingerprint)


def _copy_prompts_recipe(store: Store, rollouts: Artifact, target: Store) -> None:
    """Say of which prompts rollouts are, so that their tokenizer is known where they are read."""
    prompts = store.prompts_of(rollouts)
    if prompts is not None and target.prompts_of(rollouts) is None:
        layout = prompts.layout()
        target.artifact(prompts.recipe).create(rows=layout.rows, rows_per_unit=layout.rows_per_unit)


def _entry(source: Path) -> SharedCache:
    """What the folder says it is, and no link in it.

    Raises:
        UserError: it is no shared cache, or holds a link.
    """
    if not source.is_dir() or not is_there(source / ENTRY):
        raise UserError(
            f"{source} is no shared cache: it has no {ENTRY}; expected a folder that "
            "`opd-stream cache push` wrote"
        )
    link = next((path for path in sorted(source.rglob("*")) if path.is_symlink()), None)
    if link is not None:
        raise UserError(f"{link} is a link; expected files alone; do not use this folder")
    return load_record(SharedCache, source / ENTRY)


def _fingerprint(text: str) -> str:
    """What names an artifact, and leads nowhere else as part of a path."""
    if not re.fullmatch("[0-9a-f]{16,64}", text):
        raise UserError(
            f"the cache names {shortened(text)}; expected a fingerprint; do not use this folder"
        )
    return text


def _check_tokenizer(entry: SharedCache, student: Path) -> None:
    if entry.tokenizer is None:
        raise UserError(
            "the cache does not say which tokenizer its ids are of, as of imported rollouts; ask "
            "who made it, and leave the student out"
        )
    own = tokenizer_digest(local_folder(student, weights=False))
    if entry.tokenizer != own:
        raise UserError(
            f"the cache is of tokenizer {entry.tokenizer[:16]}, and that of {student} is "
            f"{own[:16]}: they give texts other ids; use a student with the cache's tokenizer"
        )


def _check(shared: Store, artifact: Artifact, around: Surroundings) -> None:
    """Refuse an artifact of which a byte or a row is not what it has to be."""
    found = examine(shared, artifact.name, around, deep=True)
    damage = next((each for each in found if each.is_damage), None)
    if damage is not None:
        raise UserError(f"{damage}; nothing was taken in; pull it again, or ask who made it")
    manifest = artifact.manifest()
    listed = [commit.unit for commit in manifest.units]
    if listed != list(artifact.commits()) or len(listed) != len(artifact.units()):
        raise UserError(f"{artifact.name} names other units than it has; nothing was taken in")
    odd = [c.file for c in manifest.units if c.file != shard_name(c.unit, c.sha256)]
    if odd:
        raise UserError(f"{artifact.name} names {odd[0]!r} as a shard; nothing was taken in")
    if manifest.digest is None or any(c.digest is None for c in artifact.commits().values()):
        raise UserError(
            f"{artifact.name} has records without a digest, which cannot be checked; nothing was "
            "taken in; push it from a store of this version"
        )
    if artifact.recipe.kind == "heads":
        from opd_stream.hidden_states import read_head

        try:
            read_head(artifact)
        except Exception as error:  # what a hostile file does to its reader
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UserError(
                f"{artifact.name} is no head ({reason}); nothing was taken in"
            ) from error


def _check_agrees(artifact: Artifact, store: Store) -> None:
    """Refuse what the store has under the same name with other bytes."""
    own = store.artifact(artifact.recipe)
    if not own.is_started():
        return
    known = own.commits()
    if own.layout() == artifact.layout() and all(
        known[unit].sha256 == commit.sha256
        for unit, commit in artifact.commits().items()
        if unit in known
    ):
        return
    raise UserError(
        f"the store has {artifact.name} already, of other bytes or with other units (the same "
        "recipe on another machine); expected none or the same; pull into a store of its own"
    )


def _copy(artifact: Artifact, target: Store) -> None:
    """Copy an artifact, each shard verified as it is read; its manifest comes last."""
    own, layout = target.artifact(artifact.recipe), artifact.layout()
    own.create(rows=layout.rows, rows_per_unit=layout.rows_per_unit)
    for commit in artifact.listed_commits().values():
        if own.has_unit(commit.unit) and own.damage(commit.unit) is None:
            continue
        own.adopt(commit, _shard(artifact, commit))
    own.finish()


def _shard(artifact: Artifact, commit: Commit) -> bytes:
    try:
        return verified_bytes(inside(artifact.folder, commit.file), commit.sha256)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise DamagedUnit(artifact, commit.unit, str(error)) from error


def cache_card(store: Store, parts: list[Artifact], entry: SharedCache) -> str:
    """The text of README.md: what the cache is, what it keeps, and how it is loaded."""
    rollouts, scores = parts[0], parts[-1]
    counts = summed_counts(scores.listed_commits().values())
    settings, inputs = scores.recipe.settings, scores.recipe.inputs
    told = {
        "rollouts": f"{int(counts['rows']):,} rows, {int(counts['completion_tokens']):,} tokens",
        "teacher": entry.teacher or "not named",
        "teacher's identity": inputs.get("teacher", "not known"),
        "student's identity": rollouts.recipe.inputs.get("student", "not known"),
        "tokenizer's identity": entry.tokenizer or "not known",
        "candidates a token (K)": settings.get("top_k", "not known"),
        "codec": yaml.safe_dump(settings.get("codec"), default_flow_style=True).strip(),
        "sampling temperature": rollouts.recipe.settings.get("temperature", "not known"),
        "window": rollouts.recipe.settings.get("window_tokens", "not known"),
    }
    figures: dict[str, object] = dict(fidelity_report(scores))
    coverage = coverage_of(store, scores)
    if coverage is not None:
        figures |= {f"coverage.{name}": value for name, value in coverage.model_dump().items()}
    head = {
        "license": "unknown",  # to be stated by who publishes it
        "tags": ["on-policy-distillation", "distillation", "teacher-scores", "opd-stream"],
        "task_categories": ["text-generation"],
        "configs": [
            {"config_name": kind, "data_files": f"{kind}/*/units/*.arrow"}
            for kind in ("rollouts", "scores")
        ],
    }
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
            "# Teacher scores of student rollouts\n",
            f"`{entry.scores}`: rollouts of a student, and for each of their tokens what a teacher "
            "gives it and its candidates: a cache for on-policy distillation. Token ids, no texts; "
            "the format is `docs/cache-format.md` of opd-stream.\n",
            _table(told),
            "## Fidelity\n",
            _table(
                {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in figures.items()}
            ),
            "## Loading\n",
            "```sh\nopd-stream cache pull STORE THIS_REPOSITORY\n```\n",
            "```python\nfrom opd_stream.store import open_scores\n\n"
            f'rows = open_scores("STORE/{entry.scores}")\n```\n',
            "The folder is a store itself: `open_scores` reads it where it lies.\n",
            "## Licence\n",
            "Not stated yet: the terms of the teacher, the student and the prompts apply.\n",
        ]
    )


def _table(values: Mapping[str, object]) -> str:
    said = {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in values.items()}
    rows = "".join(f"| {name} | {value} |\n" for name, value in said.items())
    return f"| | |\n|---|---|\n{rows}"
