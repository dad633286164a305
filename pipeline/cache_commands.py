"""The `cache` commands: each says lines."""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from opd_stream.errors import UserError
from opd_stream.store import inventory
from opd_stream.store.artifact import Artifact, Commit
from opd_stream.store.codecs import codec_of
from opd_stream.store.exchange import Told, export_scores, import_scores
from opd_stream.store.store import Store
from opd_stream.style_bias import StyleSettings
from stages.cross_tokenizer import refuse_aligned
from stages.progress import Progress, Silent
from stages.residual import make_residual

Lines = Iterator[str]
SILENT = Silent()
LONG = ("verify", "export", "import", "residual")  # tell their progress
_ROW = "{:30} {:9} {:>10} {:>9} {:>12} {:>14} {:>8}"


def ls(location: str) -> Lines:
    """One line an artifact."""
    store = _existing(location)
    total = 0
    yield _ROW.format("artifact", "state", "units", "rows", "tokens", "bytes", "B/token")
    for entry in inventory.entries(store):
        yield _ROW.format(
            entry.name,
            "complete" if entry.complete else "partial",
            entry.units,
            f"{entry.rows:,}",
            f"{entry.tokens:,}",
            f"{entry.bytes:,}",
            f"{entry.bytes / entry.tokens:.1f}" if entry.tokens else "",
        )
        total += entry.bytes
    yield f"{total:,} bytes in {location}"


def show(location: str, name: str) -> Lines:
    """Recipe and, for scores, fidelity."""
    store = _existing(location)
    artifact = inventory.open_artifact(store, name)
    yield f"{artifact.name}  {'complete' if artifact.is_complete() else 'not complete'}"
    yield json.dumps(artifact.recipe.as_json(), indent=2)
    if artifact.recipe.kind == "scores":
        for field, value in inventory.fidelity_report(artifact).items():
            text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
            yield f"{field:22} {text}"


def verify(location: str, *, progress: Progress = SILENT) -> Lines:
    """Everything that is not what was written."""
    store = _existing(location)
    found, names = 0, inventory.started(store)
    progress.start("verify", len(names))
    for name in names:
        for problem in inventory.problems_of(store, name):
            found += 1
            yield f"damaged: {problem}"
        progress.advance("verify", 1)
    if found:
        yield f"{found} damaged; the next run that needs one makes it again, alone"
    else:
        yield f"everything in {location} is what was written"


def gc(location: str, delete: bool, hours: float) -> Lines:
    """What nobody reaches, and its removal if asked for."""
    store = _existing(location)
    found = inventory.garbage(store, grace_seconds=3600 * hours)
    size = 0
    for folder in found:
        size += (here := inventory.bytes_below(folder))
        yield f"{'removed' if delete else 'would remove'} {folder} ({here:,} bytes)"
    if delete:
        inventory.collect_garbage(store, found, grace_seconds=3600 * hours)
    yield f"{len(found)} folders, {size:,} bytes" + ("" if delete else "; --delete removes them")


def pin(location: str, name: str) -> Lines:
    """Keep an artifact."""
    inventory.pin(_existing(location), name)
    yield f"pinned {name}"


def unpin(location: str, name: str) -> Lines:
    """Take a pin away."""
    inventory.unpin(_existing(location), name)
    yield f"unpinned {name}"


def export(location: str, name: str, out: Path, form: str, *, progress: Progress = SILENT) -> Lines:
    """Parquet or a `datasets` folder."""
    if form not in ("parquet", "datasets"):
        raise UserError(f"--form is {form!r}; expected parquet or datasets")
    store = _existing(location)
    scores = inventory.open_artifact(store, name)
    refuse_aligned(scores, "another program")
    rows = export_scores(store, scores, out, form=form, told=_told(progress, "export"))
    yield f"{rows:,} rows in {out}"


def import_(
    location: str,
    source: Path,
    codec: str,
    stop_ids: Sequence[int] = (),
    *,
    progress: Progress = SILENT,
) -> Lines:
    """Artifacts of another program's file."""
    try:
        built = codec_of(yaml.safe_load(codec))
    except (ValidationError, yaml.YAMLError) as error:
        reason = textwrap.shorten(" ".join(str(error).split()), 160)
        raise UserError(f"--codec {codec!r} is no codec ({reason}); see docs/config.md") from error
    store = Store(location)
    store.check_writable()
    told = _told(progress, "import")
    scores = import_scores(source, store, built, stop_ids=stop_ids, told=told)
    yield f"{scores.name}: train on it with replay: {{scores: [{scores.name}]}}"


def residual(location: str, name: str, *, progress: Progress = SILENT) -> Lines:
    """Scores without the teacher's style bias."""
    store = _existing(location)
    artifact = inventory.open_artifact(store, name)
    target = make_residual(store, artifact, StyleSettings(), progress)
    yield f"{target.name}: train on it with replay: {{scores: [{target.name}]}}"


def _existing(location: str) -> Store:
    store = Store(location)
    if not store.root.exists():
        raise UserError(f"store {location} does not exist; expected a store of an earlier run")
    return store


def _told(progress: Progress, stage: str) -> Told:
    """Progress of a command that goes through the units of one artifact."""

    def told(artifact: Artifact, commit: Commit | None) -> None:
        if commit is None:
            progress.start(stage, len(artifact.units()))
        else:
            progress.advance(stage, 1, int(commit.counts.get("completion_tokens", 0)))

    return told


COMMANDS: dict[str, Callable[..., Lines]] = {
    "ls": ls,
    "show": show,
    "verify": verify,
    "gc": gc,
    "pin": pin,
    "unpin": unpin,
    "export": export,
    "import": import_,
    "residual": residual,
}
