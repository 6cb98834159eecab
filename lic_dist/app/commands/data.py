"""`lic-dist data`: sets of pictures by name, where they are had, and whether a folder holds one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated

import typer

from lic_dist.app.commands.options import JsonFile, write_json
from lic_dist.errors import LicError
from lic_dist.text import counted

SHOWN = 5  # names of a fault, of more their number


def data(
    name: Annotated[str | None, typer.Argument(help="A set's name; without one all are listed.")] = None,
    folder: Annotated[str | None, typer.Argument(help="Where it lies, to be checked: a folder, or s3://...")] = None,
    out: JsonFile = None,
) -> None:
    """Tell where a set of pictures is had, and check a folder's: what is missing, altered or surplus; fetches nothing.

    The exit code is 1 where the folder does not hold just this set.
    """
    from lic_dist.data.named_sets import check, described, named_set, named_sets
    from lic_dist.data.sources.opening import open_source

    if name is None or folder is None:
        for one in [named_set(name)] if name else named_sets().values():
            typer.echo(described(one))
            typer.echo("".join(f"  {place}\n" for place in one.where), nl=False)
        return
    wanted = named_set(name)
    found = check(wanted, open_source(folder).absolute())
    for what, names in (
        ("missing", found.missing),
        ("altered", [f"{picture} ({why})" for picture, why in found.altered.items()]),
        ("surplus", found.surplus),
        ("under another name", [f"{picture} is {known}" for picture, known in found.renamed.items()]),
    ):
        if names:
            typer.echo(f"{what}: {_some(names)}")
    if found.beyond:
        typer.echo(f"{abs(found.beyond)} {'too many' if found.beyond > 0 else 'too few'} of {wanted.count}")
    write_json(out, {"set": wanted.name, "folder": folder, "count": wanted.count, **asdict(found)})
    if found.faults:
        raise LicError(f"{folder} is not {wanted.name}: {found.faults}", hint=f"it is had at {wanted.where[0]}")
    typer.echo(f"{folder}: all {counted(wanted.count, 'picture')} of {wanted.name}, by {wanted.known_by}")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
