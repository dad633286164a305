"""Commands on a store: `opd-stream cache …`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import Panel, command, console, default_store
from pipeline.console import TerminalProgress, echo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opd_stream.store import Store
    from opd_stream.store.exchange import AsIds, UnitReport
    from opd_stream.store.inventory import Entry
    from pipeline.tables import ResultTable

cache = typer.Typer(help="Look at a store, verify it, free it, share it.", no_args_is_help=True)
StorePlace = Annotated[
    str,
    typer.Argument(
        metavar="STORE",
        help="Folder or s3://BUCKET/PATH. Default: store, else that of the latest run.",
        default_factory=default_store,
        show_default=False,
    ),
]
ArtifactName = Annotated[
    str, typer.Argument(metavar="NAME", help="KIND/FINGERPRINT, or its beginning.")
]
_COLUMNS = ("artifact", "state", "units", "rows", "tokens", "bytes", "B/token", "age", "run")
_DROPS = ("rows", "units", "B/token", "tokens", "run", "age", "state")


@command(Panel.STORE, "ls", "store.md", name="ls", to=cache)
def list_artifacts(
    location: StorePlace,
    kind: Annotated[str | None, typer.Option(help="Only these: scores, policies, …")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List the artifacts of a store: kind, state, size, age, and the runs that reach each."""
    from dataclasses import asdict

    from opd_stream.errors import UserError
    from opd_stream.store.inventory import entries
    from opd_stream.store.recipe import KINDS

    if kind is not None and kind not in KINDS:
        raise UserError(f"--kind is {kind!r}; expected one of {', '.join(KINDS)}")
    found = [each for each in entries(existing_store(location)) if kind in (None, each.kind)]
    total = sum(each.bytes for each in found)
    if as_json:
        artifacts = [{**asdict(each), "kind": each.kind, "state": each.state} for each in found]
        return typer.echo(json.dumps({"store": location, "bytes": total, "artifacts": artifacts}))
    console().print(_table_of(found))
    echo(f"{total:,} bytes in {location}")


def _table_of(found: "Sequence[Entry]") -> "ResultTable":
    import time

    from pipeline.console import age_text
    from pipeline.tables import result_table

    table = result_table(_COLUMNS, left=("artifact", "state", "run"), drops=_DROPS)
    for each in found:
        runs = [Path(run).name for run in each.runs]
        table.add_row(
            each.name,
            each.state,
            "" if each.units is None else f"{each.units[0]} of {each.units[1]}",
            f"{each.rows:,}",
            f"{each.tokens:,}",
            f"{each.bytes:,}",
            f"{each.bytes / each.tokens:.1f}" if each.tokens else "",
            age_text(time.time() - each.changed_at),
            ", ".join(runs[:1]) + (f" +{len(runs) - 1}" if len(runs) > 1 else ""),
        )
    return table


@command(Panel.STORE, "show scores/3f0c", "store.md", to=cache)
def show(location: StorePlace, name: ArtifactName) -> None:
    """Recipe, size and fidelity of an artifact."""
    from opd_stream.coverage import coverage_text, is_low
    from opd_stream.store.artifact import summed_counts
    from opd_stream.store.inventory import coverage_of, fidelity_report, open_artifact

    store = existing_store(location)
    artifact = open_artifact(store, name)
    echo(f"{artifact.name}  {'complete' if artifact.is_complete() else 'not complete'}")
    typer.echo(json.dumps(artifact.recipe.as_json(), indent=2))
    counts = summed_counts(artifact.listed_commits().values())
    rollouts = artifact.recipe.inputs.get("rollouts", "")
    if artifact.recipe.kind == "scores" and f"rollouts/{rollouts[:16]}" in store.there():
        counted = store.by_fingerprint("rollouts", rollouts).listed_commits().values()
        counts = {**counts, **summed_counts(counted)}
    if (context := counts.get("context_tokens")) is not None:
        own = int(counts.get("completion_tokens", 0))
        echo(f"trajectories: {own:,} tokens of the student, {int(context):,} of others between")
        if artifact.recipe.kind == "scores":
            echo("tokens and bytes_per_token below are of both")
    if artifact.recipe.kind == "scores":
        echo(f"{'codec':22} {json.dumps(artifact.recipe.settings.get('codec'))}")
        for field, value in fidelity_report(artifact).items():
            text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
            echo(f"{field:22} {text}")
        found = coverage_of(store, artifact)
        for field, value in found.model_dump().items() if found else ():
            echo(f"{f'coverage.{field}':22} {value if value is None else f'{value:.6g}'}")
        if found is not None and is_low(found):
            echo(f"warning: the candidates {coverage_text(found)}")


@command(Panel.STORE, "verify store --repair", "store.md", to=cache)
def verify(
    location: StorePlace,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take out what is damaged: its run makes it again.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also check the values, whoever wrote them.")
    ] = False,
) -> None:
    """Read everything and say what is damaged; exit code 1 if anything is."""
    from opd_stream.store import verification

    store, damaged, notes, left = existing_store(location), 0, 0, 0
    names, around = verification.names(store), verification.Surroundings.of(store)
    with TerminalProgress() as progress:
        progress.start("verify", len(names))
        for name in names:
            found = verification.examine(store, name, around, deep=deep)
            for finding in found:
                damaged, notes = damaged + finding.is_damage, notes + (not finding.is_damage)
                progress.result(f"{'damaged' if finding.is_damage else 'note'}: {finding}")
            if repair and any(finding.is_damage for finding in found):
                for finding in verification.repair(store, name, around, deep=deep):
                    left += 1
                    progress.result(f"left: {finding}")
            progress.advance("verify", 1)
    if damaged and repair:
        echo(
            f"{damaged} damaged, {max(damaged - left, 0)} of them taken out or written again, "
            f"{left} left; call the run that made them: it makes the rest again"
        )
    elif damaged:
        echo(
            f"{damaged} damaged; the next run that needs one makes it again, alone; --repair takes "
            "them out, so that any call of the run that made them does"
        )
    if damaged:
        raise typer.Exit(1)
    unless = f", as far as it can be checked; notes: {notes}" if notes else ""
    echo(f"everything in {location} is what was written{unless}")


@command(Panel.STORE, "gc store --delete", "store.md", to=cache)
def gc(
    location: StorePlace,
    delete: Annotated[bool, typer.Option("--delete", help="Do it. Default: only say.")] = False,
    hours: Annotated[float, typer.Option(help="Leave what is younger.")] = 24.0,
    run_days: Annotated[
        float,
        typer.Option(help="A run whose folder is away counts until nobody went on for so long."),
    ] = 30.0,
) -> None:
    """Free what no run and no pin reaches."""
    from opd_stream.errors import UserError
    from opd_stream.store.garbage import garbage, gone_runs, remove_garbage
    from opd_stream.store.inventory import bytes_below

    if not (0 <= hours < math.inf and 0 <= run_days < math.inf):
        raise UserError(
            f"--hours is {hours:g} and --run-days {run_days:g}; expected numbers from 0 on; give "
            "other ones"
        )
    store, run_seconds = existing_store(location), 24 * 3600 * run_days
    if not store.is_marked():
        raise UserError(
            f"{location} has no store.json, which every run writes to its store; expected a store; "
            "name another folder, or continue a run on this one"
        )
    found = garbage(store, grace_seconds=3600 * hours, run_seconds=run_seconds, warn=echo)
    names, size, count = {f"{path.parent.name}/{path.name}" for path in found}, 0, 0
    for run in gone_runs(store, run_seconds=run_seconds):
        if not names.isdisjoint(run.artifacts):
            echo(f"run {run.id} is gone: {run.folder} on {run.host}, {run_days:g} days old")
    for path in found:
        path_bytes = bytes_below(path)
        try:
            if delete:
                remove_garbage(path)
        except (OSError, UserError) as error:
            echo(f"left {path}: {error}")
            continue
        size, count = size + path_bytes, count + 1
        echo(f"{'removed' if delete else 'would remove'} {path} ({path_bytes:,} bytes)")
    end = "" if delete else "; --delete removes them"
    echo(f"{count} paths, {size:,} bytes{end}")


@command(Panel.STORE, "pin scores/3f0c", "store.md", to=cache)
def pin(location: StorePlace, name: ArtifactName) -> None:
    """Keep an artifact whatever the runs do."""
    from opd_stream.store import garbage

    echo(f"pinned {garbage.pin(existing_store(location), name)}")


@command(Panel.STORE, "unpin scores/3f0c", "store.md", to=cache)
def unpin(location: StorePlace, name: ArtifactName) -> None:
    """Take a pin away."""
    from opd_stream.store import garbage

    echo(f"unpinned {garbage.unpin(existing_store(location), name)}")


@command(Panel.STORE, "export scores/3f0c out/scores", "trainers.md", name="export", to=cache)
def export_artifact(
    location: StorePlace,
    name: ArtifactName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    form: Annotated[str, typer.Option(help="parquet or datasets.")] = "parquet",
) -> None:
    """Write a scores artifact with its rollouts for other programs."""
    from opd_stream.errors import UserError
    from opd_stream.store.exchange import export_scores
    from opd_stream.store.inventory import open_artifact
    from stages.cross_tokenizer import refuse_aligned

    if form not in ("parquet", "datasets"):
        raise UserError(f"--form is {form!r}; expected parquet or datasets")
    store = existing_store(location)
    scores = open_artifact(store, name)
    refuse_aligned(scores, "another program")
    with TerminalProgress() as progress:
        after_unit = _bar(progress, "export")
        rows = export_scores(store, scores, out, form=form, after_unit=after_unit)
    echo(f"{rows:,} rows in {out}")


@command(Panel.STORE, "residual scores/3f0c", "objectives.md", name="residual", to=cache)
def residual(location: StorePlace, name: ArtifactName) -> None:
    """Make scores without the teacher's style bias, from the cache alone (Lightning OPD 2.0)."""
    from opd_stream.store.inventory import open_artifact
    from opd_stream.style_bias import StyleSettings
    from stages.residual import make_residual

    store = existing_store(location)
    with TerminalProgress() as progress:
        target = make_residual(store, open_artifact(store, name), StyleSettings(), progress)
    echo(f"{target.name}: train on it with replay: {{scores: [{target.name}]}}")


@command(Panel.STORE, "import rows.jsonl --stop-id 1", "cache-format.md", name="import", to=cache)
def import_artifact(
    location: StorePlace,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help=".jsonl, .jsonl.zst, .parquet")],
    codec: Annotated[str, typer.Option(help="As scores.codec in a config.")] = "{kind: exact}",
    stop_id: Annotated[
        list[int] | None,
        typer.Option(help="A terminator; in the order of teacher_forced_logprobs' columns."),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(min=1, help="Ids of the student's model: rows with others are refused."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder whose tokenizer makes ids of rows with messages."),
    ] = None,
    template: Annotated[
        str, typer.Option(help="Of messages, as prompts.template in a config.")
    ] = "{kind: chat}",
) -> None:
    """Make artifacts of rollouts and scores that another program wrote."""
    from pydantic import ValidationError

    from opd_stream.errors import UserError, shortened
    from opd_stream.store import Store
    from opd_stream.store.codecs import codec_of
    from opd_stream.store.exchange import import_scores
    from opd_stream.yaml_text import parse_yaml

    try:
        settings = codec_of(parse_yaml(codec))
    except ValueError as error:
        is_field = isinstance(error, ValidationError)
        reason = error.errors()[0]["msg"] if is_field else str(error)[:160]
        raise UserError(
            f"--codec {shortened(codec)} is no codec ({reason}); see docs/config.md"
        ) from error
    wrong = [each for each in stop_id or () if each < 0 or each >= (vocabulary or 2**31)]
    if wrong or len({*(stop_id or ())}) < len(stop_id or ()):
        raise UserError(
            f"--stop-id is {', '.join(map(str, stop_id or ()))}; expected different ids of the "
            "student's vocabulary; give each once"
        )
    store = Store(location)
    store.check_writable()
    with TerminalProgress() as progress:
        after_unit = _bar(progress, "import")
        scores = import_scores(
            source,
            store,
            settings,
            stop_ids=stop_id or (),
            vocabulary=vocabulary,
            as_ids=None if tokenizer is None else _conversations(tokenizer, template),
            after_unit=after_unit,
        )
    echo(f"{scores.name}: train on it with replay: {{scores: [{scores.name}]}}")


def _conversations(folder: Path, template: str) -> "AsIds":
    """What makes ids of messages under a folder's tokenizer and a template."""
    from pydantic import ValidationError

    from opd_stream.errors import UserError, shortened
    from opd_stream.rendering import ChatTemplate
    from opd_stream.store.tokenizer_folder import open_tokenizer
    from opd_stream.trajectories import TrajectoryReader
    from opd_stream.yaml_text import parse_yaml

    if not folder.is_dir():
        raise UserError(f"--tokenizer {folder} is no folder; expected a checkpoint's; check it")
    try:
        settings = ChatTemplate.model_validate(parse_yaml(template))
    except ValueError as error:
        is_field = isinstance(error, ValidationError)
        reason = error.errors()[0]["msg"] if is_field else str(error)[:160]
        raise UserError(
            f"--template {shortened(template)} is no chat template ({reason}); see docs/config.md"
        ) from error
    return TrajectoryReader(settings, open_tokenizer(folder)).row


def existing_store(location: str) -> "Store":
    """The store of an earlier run.

    Raises:
        UserError: there is none.
    """
    from opd_stream.errors import UserError, shortened
    from opd_stream.section import path_flaw
    from opd_stream.store import Store
    from opd_stream.store.files import is_folder, is_remote
    from opd_stream.store.recipe import KINDS
    from opd_stream.store.store import MARKER

    if (flaw := path_flaw(location)) is not None:
        raise UserError(f"the store is {shortened(location)}; {flaw}; name a folder")
    store = Store(location)
    if not store.root.exists():
        raise UserError(f"store {location} does not exist; expected a store of an earlier run")
    if not is_remote(store.root) and not is_folder(store.root):
        raise UserError(f"store {location} is a file; expected the folder of a store")
    if not any((store.root / name).exists() for name in (MARKER, *KINDS, "runs")):
        raise UserError(
            f"{location} is no store: it has none of {', '.join(KINDS)}, runs; expected the "
            "folder of an earlier run's `store`"
        )
    return store


def _bar(progress: TerminalProgress, stage: str) -> "UnitReport":
    """Progress through the units of one artifact."""

    def after_unit(done: int, total: int, tokens: int) -> None:
        if done:
            progress.advance(stage, 1, tokens)
        else:
            progress.start(stage, total)

    return after_unit
