"""`lic-dist push`: checkpoints, records and cards to a repository on Hugging Face."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lic_dist.text import counted


def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made where there is none.")],
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH[=NAME]...", help="Files; folders of trainings; stores, of which the records go."),
    ],
    kind: Annotated[Literal["model", "dataset"], typer.Option("--type", help="Of the repository.")] = "model",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Push from lic_dist",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and do nothing.")] = False,
) -> None:
    """Push checkpoints, records and cards to Hugging Face in one commit; the token is that of HF_TOKEN."""
    from lic_dist.app.publishing import files_of
    from lic_dist.app.publishing import push as run

    files = files_of(paths)
    for name, path in files.items():
        typer.echo(f"{path.stat().st_size / 1e6:10.3f} MB  {name}  ({path})")
    if dry_run:
        typer.echo(f"{counted(len(files), 'file')} would go to {repository} ({kind}); nothing is sent")
        return
    typer.echo(run(repository, files, kind, private, message))
