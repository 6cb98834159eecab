"""`lic-dist cache card` and `cache export`: what a store is shown, or handed on, as."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lic_dist.app.commands.options import JsonFile, Overrides, Target, the_store, write_json
from lic_dist.errors import UsageError
from lic_dist.text import counted


def card(
    target: Target,
    overrides: Overrides = None,
    test: Annotated[str | None, typer.Option(help="Where test pictures lie: photos that look like one.")] = None,
    licence: Annotated[
        list[str] | None, typer.Option(help="Of the photos, as Hugging Face names it (cc0-1.0); repeatable.")
    ] = None,
    near: Annotated[int | None, typer.Option(min=0, help="Bits of 256 that pictures alike differ in at most.")] = None,
    file: Annotated[Path | None, typer.Option("--out", help="The card's file; default: it is printed.")] = None,
) -> None:
    """Write a dataset card: counts, folders, model, quantizers, licences, near-duplicates, leaks of test pictures.

    Photos that look alike are looked for where the photos are at hand: with an experiment's YAML.
    """
    from lic_dist.building.card import card as write
    from lic_dist.building.card import find_alike
    from lic_dist.building.storage import experiment_photos
    from lic_dist.cache.reader import LatentCache
    from lic_dist.data.likeness import NEAR
    from lic_dist.data.sources.opening import open_source

    storage, experiment = the_store(target, overrides, "a card")
    cache, alike = LatentCache.open(storage), None
    bits = NEAR if near is None else near
    if experiment is not None and experiment.images is not None:
        alike = find_alike(cache, experiment_photos(experiment), open_source(test) if test else None, bits)
    elif test is not None:
        raise UsageError("--test compares photos, which a store has not", hint="give the experiment's YAML")
    text = write(cache, licence or (), alike, experiment.name if experiment else "", bits)
    if file is None:
        typer.echo(text, nl=False)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    found = f"{counted(len(alike.duplicates), 'near-duplicate pair')}" if alike else "photos not compared"
    leaks = f", {counted(len(alike.leaks), 'leak')}" if alike and alike.tested is not None else ""
    typer.echo(f"{file}: {counted(cache.num_samples, 'sample')}, {found}{leaks}")


def export(
    target: Target,
    icechunk: Annotated[
        str, typer.Option(metavar="FOLDER", help="The Icechunk repository, or s3://...; made where there is none.")
    ],
    overrides: Overrides = None,
    snapshot: Annotated[
        str | None, typer.Option(help="Number or name of the snapshot; default: the newest that is complete.")
    ] = None,
    out: JsonFile = None,
) -> None:
    """Export a snapshot to an Icechunk repository, in one commit; later snapshots go into the same one."""
    from dataclasses import asdict

    from lic_dist.cache.icechunk_export import export as run

    storage, _ = the_store(target, overrides, "a repository")
    done = run(storage, icechunk, snapshot)
    typer.echo(
        f"{icechunk}: snapshot {done.snapshot}, commit {done.commit}, groups: {', '.join(done.groups) or 'none'}; "
        f"{done.written} of {counted(done.objects, 'object')} written now"
    )
    write_json(out, asdict(done))
