"""Commands on a store: `opd-stream cache …`."""

from pathlib import Path
from typing import Annotated

import typer

cache = typer.Typer(help="Look at a store, verify it, free it, share it.", no_args_is_help=True)
StorePlace = Annotated[str, typer.Argument(metavar="STORE", help="Folder or s3://BUCKET/PATH.")]
ArtifactName = Annotated[str, typer.Argument(metavar="NAME", help="KIND/FINGERPRINT.")]


@cache.command("ls")
def cache_ls(store: StorePlace) -> None:
    """List the artifacts of a store."""
    _lines("ls", store)


@cache.command("show")
def cache_show(store: StorePlace, name: ArtifactName) -> None:
    """Recipe, size and fidelity of an artifact."""
    _lines("show", store, name)


@cache.command("verify")
def cache_verify(store: StorePlace) -> None:
    """Read everything and say what is damaged; exit code 1 if anything is."""
    if not _lines("verify", store):
        raise typer.Exit(1)


@cache.command("gc")
def cache_gc(
    store: StorePlace,
    delete: Annotated[bool, typer.Option("--delete", help="Do it. Default: only say.")] = False,
    hours: Annotated[float, typer.Option(help="Leave what is younger.")] = 24.0,
) -> None:
    """Free what no run and no pin reaches."""
    _lines("gc", store, delete, hours)


@cache.command("pin")
def cache_pin(store: StorePlace, name: ArtifactName) -> None:
    """Keep an artifact whatever the runs do."""
    _lines("pin", store, name)


@cache.command("unpin")
def cache_unpin(store: StorePlace, name: ArtifactName) -> None:
    """Take a pin away."""
    _lines("unpin", store, name)


@cache.command("export")
def cache_export(
    store: StorePlace,
    name: ArtifactName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    form: Annotated[str, typer.Option(help="parquet or datasets.")] = "parquet",
) -> None:
    """Write a scores artifact with its rollouts for other programs."""
    _lines("export", store, name, out, form)


@cache.command("residual")
def cache_residual(store: StorePlace, name: ArtifactName) -> None:
    """Make scores without the teacher's style bias, from the cache alone (Lightning OPD 2.0)."""
    _lines("residual", store, name)


@cache.command("import")
def cache_import(
    store: StorePlace,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help=".jsonl, .jsonl.zst, .parquet")],
    codec: Annotated[str, typer.Option(help="As scores.codec in a config.")] = "{kind: exact}",
    stop_id: Annotated[
        list[int] | None,
        typer.Option(help="A terminator; in the order of teacher_forced_logprobs' columns."),
    ] = None,
) -> None:
    """Make artifacts of rollouts and scores that another program wrote."""
    _lines("import", store, source, codec, stop_id or [])


def _lines(command: str, store: str, *arguments: object) -> bool:
    """Print what a cache command says; returns whether all is well."""
    from pipeline.cache_commands import COMMANDS, LONG
    from pipeline.console import TerminalProgress

    all_is_well = True
    with TerminalProgress() as progress:
        told = {"progress": progress} if command in LONG else {}
        for line in COMMANDS[command](store, *arguments, **told):
            all_is_well = all_is_well and not line.startswith("damaged")
            progress.result(line)
    return all_is_well
