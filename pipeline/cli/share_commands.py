"""Commands that hand results to other programs and people: folders, and the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.cache_commands import ArtifactName, StorePlace, cache, existing_store
from pipeline.cli.options import Panel, RunArgument, command, folder_of_run
from pipeline.console import echo

Public = Annotated[
    bool, typer.Option("--public", help="Everybody may read the repository. Default: private.")
]


@command(Panel.STORE, "export runs/my out/policy", "trainers.md")
def export(
    run_dir: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    policy_version: Annotated[
        int | None, typer.Option(help="R + 1: the policy after round R. Default: the last.")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The LoRA adapter alone. Default: merged weights.")
    ] = False,
    hub_id: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="ID", help="Also upload it there.")
    ] = None,
    public: Public = False,
) -> None:
    """Write a policy as a clean folder with a model card, and push it to the hub."""
    from opd_stream.errors import UserError
    from opd_stream.hub import check_push, push_folder
    from pipeline.export import export_policy

    if hub_id is not None:
        check_push(hub_id)
    elif public:
        raise UserError("--public says who may read a repository; name one with --push-to-hub")
    version = export_policy(folder_of_run(run_dir), out, version=policy_version, adapter=adapter)
    echo(f"policy {version} of {run_dir} in {out}")
    if hub_id is not None:
        try:
            echo(f"pushed to {push_folder(out, hub_id, kind='model', is_public=public)}")
        except UserError as error:
            raise UserError(f"{error}; the folder {out} is whole") from error


@command(Panel.STORE, "push scores/3f0c ORGANISATION/NAME", "trainers.md", name="push", to=cache)
def push_cache(
    location: StorePlace,
    name: ArtifactName,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Hub id ORGANISATION/NAME, or ./FOLDER.")
    ],
    teacher: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the teacher, for the card.")
    ] = None,
    public: Public = False,
) -> None:
    """Share scores with their rollouts: a data set of the hub with a card, or a folder."""
    import tempfile

    from opd_stream.hub import check_push, push_folder
    from opd_stream.store.inventory import open_artifact
    from opd_stream.store.sharing import write_cache

    store = existing_store(location)
    scores = open_artifact(store, name)
    if not _is_on_hub(target):
        write_cache(store, scores, Path(target), teacher=teacher)
        return echo(f"{scores.name} in {target}")
    check_push(target)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cache"
        write_cache(store, scores, folder, teacher=teacher)
        echo(f"pushed to {push_folder(folder, target, kind='dataset', is_public=public)}")


@command(Panel.STORE, "pull ORGANISATION/NAME", "trainers.md", name="pull", to=cache)
def pull_cache(
    location: StorePlace,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Hub id ORGANISATION/NAME, or ./FOLDER.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. Default: the main branch.")
    ] = None,
    student: Annotated[
        Path | None, typer.Option(help="Checkpoint to train: its tokenizer is compared.")
    ] = None,
) -> None:
    """Take shared scores into a store, after every digest and every row was checked."""
    import tempfile

    from opd_stream.errors import UserError
    from opd_stream.hub import pull_folder
    from opd_stream.store import Store
    from opd_stream.store.sharing import WANTED, read_cache

    is_on_hub = _is_on_hub(source)
    if revision is not None and not is_on_hub:
        raise UserError(f"--revision is of a data set of the hub, and {source} is a folder")
    store = Store(location)
    store.check_writable()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(source)
        if is_on_hub:
            folder = Path(temporary)
            pull_folder(source, folder, revision=revision, wanted=WANTED)
        scores = read_cache(folder, store, student=student)
    echo(f"{scores.name}: train on it with replay: {{scores: [{scores.name}]}}")


def _is_on_hub(text: str) -> bool:
    """Whether a text names a repository and no folder.

    Raises:
        UserError: it may be either.
    """
    from opd_stream.errors import UserError
    from opd_stream.hub import has_hub_form

    if not has_hub_form(text):
        return False
    if Path(text).exists():
        raise UserError(f"{text} is a folder here and may be an id of the hub; write ./{text}")
    return True
