"""`lic-dist cache ...`: build, inspect, verify and repair the latent cache."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lic_dist.app.commands import exports
from lic_dist.app.commands.options import (
    ConfigFile,
    EngineName,
    JsonFile,
    Overrides,
    Strict,
    Target,
    experiments,
    first_of_each_store,
    stores_of,
    write_json,
)
from lic_dist.errors import LicError, UsageError
from lic_dist.text import counted

if TYPE_CHECKING:
    from lic_dist.building.build import BuildReport
    from lic_dist.config import Experiment, Images

NAMED_PHOTOS = 20  # how many of the photos set aside a command names

app = typer.Typer(help="Build and look after the latent cache.", no_args_is_help=True)


@app.command("scan")
def scan(
    config: ConfigFile,
    overrides: Overrides = None,
    strict: Strict = False,
    afresh: Annotated[bool, typer.Option("--afresh", help="Read the photos again that are known already.")] = False,
) -> None:
    """Read every photo once and write the manifest beside the store; goes on where a scan was stopped."""
    from lic_dist.building.job import last_scan, manifest_of
    from lic_dist.building.storage import experiment_photos

    for experiment in experiments(config, overrides, section="cache"):
        known = None if afresh else last_scan(experiment)
        photos = manifest_of(experiment, experiment_photos(experiment), known, strict)
        faulty = sum(photos.faults.values())
        _name_photos(photos.reasons(0))
        typer.echo(f"{counted(len(photos) - faulty, 'photo')}, {faulty} set aside{_reasons(photos.faults)}")


@app.command("plan")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", min=0, help="Of one machine such as this; prints the build's.")
    ] = None,
    out: JsonFile = None,
) -> None:
    """Print samples, shards, bytes, free space and an estimate of the time; builds nothing."""
    from dataclasses import asdict

    from lic_dist.building.base_summary import base_summary
    from lic_dist.building.estimate import describe, estimate, price
    from lic_dist.building.job import prepare

    estimates = []
    for experiment in experiments(config, overrides, section="cache"):
        job = prepare(experiment)
        found = estimate(job)
        estimates.append({**asdict(found), "machine_hours": found.machine_hours})
        typer.echo("\n".join([*describe(found), base_summary(job)]).rstrip())
        if price_per_hour is not None:
            typer.echo(price(found, price_per_hour))
            estimates[-1]["price"] = found.machine_hours * price_per_hour
        if job.changes:
            typer.echo(f"this is what the store was built of; since then {job.changes}: `lic-dist cache append`")
    write_json(out, estimates)


@app.command("adapt")
def prepare_record(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="The record's file; default: beside the store.")] = None,
    overrides: Overrides = None,
) -> None:
    """Calibrate step and strength and adapt the tables on the pilot; write the quantizer record and its curve."""
    from lic_dist.building.calibrate import describe
    from lic_dist.building.job import prepare
    from lic_dist.building.picture import calibration_plot
    from lic_dist.building.pilot import prepare_record as run
    from lic_dist.building.pilot import record_location
    from lic_dist.cache.folder import Folder
    from lic_dist.cache.trials import Trials

    chosen = experiments(config, overrides, section="cache")
    if out is not None and len(chosen) > 1:
        raise UsageError("--out names one file, the sweep has several records", hint="leave it out: each has its own")
    for experiment in chosen:
        job = prepare(experiment)
        record = run(job)
        around, key = record_location(job.storage, job.quantizer.group)
        plot = Path(out or key).with_suffix(".png")
        if out is not None:
            record.save(out)
        else:
            around.make()
            around.put(key, record.to_json().encode())
            plot = around.root / plot if isinstance(around, Folder) else plot
        Trials.of_group(job.storage, job.quantizer.group).delete()
        calibration_plot(record.notes, plot, job.quantizer.group)
        typer.echo("\n".join([*describe(record), f"{out or f'{around}/{key}'}, {plot}"]))


@app.command("build")
def build(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: EngineName = None,
    strict: Strict = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Remove the store that is there first; asks.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Take up photos that were added since.")] = False,
    out: JsonFile = None,
) -> None:
    """Build the cache, or what is left of it: scan, plan, pilot and every shard without a marker."""
    from lic_dist.building.build import build as run

    if rebuild and append:
        raise UsageError("--rebuild starts anew, --append does not", hint="give one of them")
    chosen = experiments(config, overrides, engine, "cache")
    firsts = first_of_each_store(chosen)  # the others add groups to the stores that these create
    if rebuild and not yes:
        for experiment in firsts:
            _ask_to_remove(experiment)
    reports = [run(experiment, strict, rebuild and experiment in firsts, append) for experiment in chosen]
    write_json(out, [_show_build(report) for report in reports])
    for report in reports:
        report.require_tolerated()


@app.command("append")
def append(
    config: ConfigFile,
    overrides: Overrides = None,
    engine: EngineName = None,
    strict: Strict = False,
    mask: Annotated[
        bool, typer.Option("--mask", help="Leave out the samples of photos that vanished or changed.")
    ] = False,
    out: JsonFile = None,
) -> None:
    """Take up the photos that were added since: new shards of latents and of every group, a new snapshot."""
    from lic_dist.building.build import build as run
    from lic_dist.building.job import open_cache

    chosen = experiments(config, overrides, engine, "cache")
    for experiment in first_of_each_store(chosen):
        open_cache(experiment)  # there is one
    reports = [run(experiment, strict, append=True, mask=mask) for experiment in chosen]
    write_json(out, [_show_build(report) for report in reports])
    for report in reports:
        report.require_tolerated()


@app.command("requantize")
def requantize(
    config: ConfigFile, overrides: Overrides = None, engine: EngineName = None, out: JsonFile = None
) -> None:
    """Add a quantizer's group from the stored y: other states, step, lambda, tables or entropy model; no photo is read.

    For example --set quantizer.states=4 --set quantizer.group=tcq4, or --set model.checkpoint=runs/finetuned.
    """
    from lic_dist.building.build import requantize as run

    chosen = experiments(config, overrides, engine, "cache")
    write_json(out, [_show_build(run(experiment)) for experiment in chosen])


def _show_build(report: BuildReport) -> dict[str, Any]:
    from dataclasses import asdict

    if report.faults:
        typer.secho(f"warning: samples set aside{_reasons(report.faults)}", fg="yellow", err=True)
        _name_photos(report.photos)
    rate = f", {report.bpp:.4f} bpp" if report.shards_built else ""
    typer.echo(
        f"{report.path}: {counted(report.samples, 'sample')}, "
        f"{report.shards_built} of {counted(report.shards, 'shard')} built now{rate}, {report.seconds:.0f} s"
        + (f", snapshot {report.snapshot}" if report.snapshot else "")
    )
    return asdict(report)


def _name_photos(photos: Mapping[str, str]) -> None:
    """Print the first NAMED_PHOTOS photos set aside, with their reasons, on standard error."""
    from lic_dist.cache.set_aside import photo_lines

    for line in photo_lines(photos, NAMED_PHOTOS):
        typer.echo(f"set aside: {line}", err=True)


def _reasons(faults: Mapping[str, int]) -> str:
    """Return the counts by reason, as in ": 2 corrupt, 1 too small"; empty where there are none."""
    return ": " + ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items())) if faults else ""


def _ask_to_remove(experiment: Experiment) -> None:
    """Ask whether an experiment's store, if there is one, may be removed; exit with code 1 if not.

    Raises:
        UsageError: there is no terminal to ask on.
    """
    from lic_dist.building.storage import experiment_storage
    from lic_dist.cache.layout import group_folders, read_attributes

    storage = experiment_storage(experiment)
    if read_attributes(storage) is None:
        return
    size = sum(entry.bytes for entry in storage.listing().values())
    groups = ", ".join(group_folders(storage)) or "none"
    typer.echo(f"{storage}: {size / 1e6:.1f} MB, groups: {groups}")
    if not sys.stdin.isatty():
        raise UsageError("--rebuild removes this store", hint="say --yes where nobody can be asked")
    if not typer.confirm("Remove it and build anew?"):
        raise typer.Exit(1)


@app.command("inspect")
def inspect(
    target: Target,
    overrides: Overrides = None,
    plot: Annotated[Path | None, typer.Option(help="Draw rates, distortions and sizes to this PNG file.")] = None,
    out: JsonFile = None,
) -> None:
    """Show progress with rate and ETA, sizes, rates and distortions, identity and provenance of a store."""
    from lic_dist.cache.inspect import describe
    from lic_dist.cache.inspect import inspect as look

    reports = [look(storage) for storage, _ in stores_of(target, overrides)]
    for report in reports:
        typer.echo("\n".join(describe(report)))
        if plot is not None:
            _plot(report, plot)
    write_json(out, reports[0] if len(reports) == 1 else reports)


def _plot(report: dict[str, Any], file: Path) -> None:
    from lic_dist.cache.picture import cache_plot

    if "num_samples" in report:
        cache_plot(report, file)
    else:
        typer.echo(f"{file} is not drawn: there is no store yet", err=True)


@app.command("faults")
def faults(target: Target, overrides: Overrides = None, out: JsonFile = None) -> None:
    """Name every photo that is set aside, with its reason, every duplicate, and what is no photo in the folder."""
    from lic_dist.building.storage import experiment_photos
    from lic_dist.cache.layout import read_attributes
    from lic_dist.cache.set_aside import photo_lines, read_manifest, set_aside
    from lic_dist.data.photo import least_side

    figures = []
    for storage, experiment in stores_of(target, overrides):
        photos = read_manifest(storage)
        section = experiment.images if experiment else None
        if photos is None and read_attributes(storage) is None:
            raise LicError(f"nothing is known yet of the photos of {storage}", hint="`lic-dist cache scan` reads them")
        found = set_aside(storage, photos, least_side(section.crop, section.squares) if section else None)
        duplicates = photos.duplicates if photos else {}
        listing = experiment_photos(experiment).search() if experiment and _is_folder(section) else None
        for line in [
            *photo_lines(found),
            *photo_lines({name: f"the same as {first}" for name, first in duplicates.items()}),
        ]:
            typer.echo(line)
        passed_over = listing.describe() if listing else ""
        typer.echo(
            f"{storage}: {counted(len(found), 'photo')} set aside{_reasons(Counter(map(_kind, found.values())))}; "
            f"{counted(len(duplicates), 'duplicate')}" + (f"; passed over {passed_over}" if passed_over else "")
        )
        kinds = dict(listing.passed_over) if listing else {}
        figures.append({"path": str(storage), "set_aside": found, "duplicates": duplicates, "passed_over": kinds})
    write_json(out, figures[0] if len(figures) == 1 else figures)


def _is_folder(section: Images | None) -> bool:
    return section is not None and isinstance(section.path, Path) and section.path.is_dir()


def _kind(reason: str) -> str:
    """Return a reason without the photo's size that it may begin with, so that equal reasons count together."""
    return reason.rpartition(", ")[2]


app.command("card")(exports.card)


@app.command("verify")
def verify(
    target: Target,
    overrides: Overrides = None,
    repair: Annotated[bool, typer.Option("--repair", help="Write again just what is damaged; needs the YAML.")] = False,
    out: JsonFile = None,
) -> None:
    """Read everything again; name each shard and array that is missing, zero, torn or altered."""
    from dataclasses import asdict

    from lic_dist.building.build import repair as mend
    from lic_dist.cache.verify import verify as check

    figures, left = [], 0
    for storage, experiment in stores_of(target, overrides):
        findings = check(storage)
        unwritten = [found for found in findings if found.what == "missing" and found.array.startswith("_progress/")]
        for finding in findings:
            if finding not in unwritten:
                shard = f"shard {finding.shard}: " if finding.shard >= 0 else ""
                typer.echo(f"{shard}{finding.array}: {finding.what}")
        if unwritten:
            typer.echo(
                f"not written yet, or without a marker: {counted(len(unwritten), 'shard')}; `cache build` goes on"
            )
        if findings and repair:
            if experiment is None:
                raise UsageError("--repair needs to know how the store is built", hint="give the experiment's YAML")
            typer.echo(f"{storage}: {counted(mend(experiment, findings), 'shard')} written again")
            findings = check(storage)
        left += len(findings)
        figures.append({"path": str(storage), "findings": [asdict(finding) for finding in findings]})
        typer.echo(f"{storage}: {counted(len(findings), 'fault') if findings else 'whole'}")
    write_json(out, figures)
    if left:
        raise LicError(
            f"{counted(left, 'fault')} in {target}", hint="`lic-dist cache verify CONFIG --repair` mends them"
        )


@app.command("snapshot")
def snapshot(
    target: Target,
    name: Annotated[str, typer.Argument(help="The name; a name stays for ever.")],
    overrides: Overrides = None,
    number: Annotated[
        str | None, typer.Option("--of", help="The snapshot's number; default: the newest that is complete.")
    ] = None,
) -> None:
    """Name a snapshot of a store, by which finetune.snapshot and readers find it."""
    from lic_dist.cache.growth import name_snapshot

    for storage, _ in stores_of(target, overrides):
        typer.echo(f"{storage}: snapshot {name_snapshot(storage, name, number)} is '{name}'")


@app.command("log")
def log(target: Target, overrides: Overrides = None, out: JsonFile = None) -> None:
    """List the snapshots of a store, newest last: samples, masked ones, names, groups that can be read there."""
    from lic_dist.cache.history import describe, history

    reports = [history(storage) for storage, _ in stores_of(target, overrides)]
    for report in reports:
        typer.echo("\n".join(describe(report)))
    write_json(out, reports[0] if len(reports) == 1 else reports)


app.command("export")(exports.export)


@app.command("diff")
def diff(
    target: Target,
    first: Annotated[str, typer.Argument(metavar="A", help="Number or name of a snapshot.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Number or name of a later one.")],
    overrides: Overrides = None,
    out: JsonFile = None,
) -> None:
    """Tell what a snapshot has that an earlier one has not: photos, masked samples, groups."""
    from lic_dist.cache.history import describe_difference, difference

    reports = [difference(storage, first, second) for storage, _ in stores_of(target, overrides)]
    for report in reports:
        typer.echo("\n".join(describe_difference(report, NAMED_PHOTOS)))
    write_json(out, reports[0] if len(reports) == 1 else reports)
