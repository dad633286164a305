"""Commands that hand results to other programs and people: folders, and the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import RunArgument, app, folder_of_run
from pipeline.console import echo

Public = Annotated[
    bool, typer.Option("--public", help="Everybody may read the repository. Default: private.")
]


@app.command()
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
