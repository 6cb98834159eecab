"""`lic-dist bench cache`: what a cache costs to build, to store and to read, in tables and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from lic_dist.benchmarks import building, engines, photo_reading, reading
from lic_dist.benchmarks.tables import machine, table
from lic_dist.errors import UsageError

PARTS = ("build", "loader", "size", "memory", "plan", "append", "photos", "engine")


def bench(parts: Sequence[str], images: Path | None, crops: int, quick: bool) -> dict[str, Any]:
    """Run the parts (all of PARTS where none is named), print their tables, return their figures.

    `quick` takes a tenth of everything. Raises UsageError for an unknown part.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"no part '{unknown[0]}' of this benchmark", hint=f"there are {', '.join(PARTS)}")
    tenth = 10 if quick else 1
    console = Console()
    figures: dict[str, Any] = {"machine": machine(), "quick": quick}
    runs: dict[str, Callable[[], Any]] = {
        "build": lambda: building.throughput(images, crops // tenth, 1 if quick else 3),
        "loader": lambda: reading.loading(images, 512 // tenth),
        "size": lambda: reading.size(images, 512 // tenth),
        "memory": lambda: building.memory((1000 // tenth, 10000 // tenth)),
        "plan": lambda: building.planning(1_000_000 // tenth),
        "append": lambda: building.growing(20_000 // tenth, 200 // tenth, 3),
        "photos": lambda: photo_reading.from_a_bucket(1.0, 2 if quick else 20),
        "engine": lambda: engines.compare(*((60, 1, 60) if quick else (120, 3, 400))),
    }
    for part in parts or PARTS:
        figures[part] = runs[part]()
        for one in _TABLES[part](figures[part]):
            console.print(one)
    console.print(f"machine: {figures['machine']}")
    return figures


def _build_tables(figures: dict[str, Any]) -> list[Table]:
    crops = figures["local"][0]["crops"]
    title = f"Building {crops} crops of 256x256, N = 128, M = 192, one encoder of one thread, medians"
    rows = [("bare loop: encode, search", f"{median(figures['bare']):.2f}", "", "", "", "")]
    for engine in ("local", "ray"):
        rounds = figures[engine]
        rate, ratio, busy, idle = (
            median(one[name] for one in rounds) for name in ("crops_per_second", "ratio", "busy", "start_and_end")
        )
        stages = {name: median(one["seconds_a_crop"][name] for one in rounds) for name in rounds[0]["seconds_a_crop"]}
        work = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in stages.items())
        rows.append(
            (
                f"cache build, {engine}",
                f"{rate:.2f}",
                f"{100 * ratio:.1f} %",
                f"{100 * busy:.1f} %",
                f"{idle:.0f}",
                work,
            )
        )
    headings = ("", "crops/s, steady", "of bare", "encoder busy", "s to start and end", "ms a crop")
    return [table(title, headings, rows)]


def _loader_tables(figures: dict[str, Any]) -> list[Table]:
    title = f"Whole shards, one process; a stream decodes each {figures['amplification']:.2f} times an epoch"
    rows = [(name, f"{rate:.0f}") for name, rate in figures["whole_shards"].items()]
    return [table(title, ("", "samples/s"), rows)]


def _size_tables(figures: dict[str, Any]) -> list[Table]:
    rows = [
        (name, f"{one['bytes'] / figures['samples'] / 1000:.1f}", f"{100 * one['bytes'] / one['raw_bytes']:.1f} %")
        for name, one in figures["arrays"].items()
    ]
    ratios = f"group {figures['group_to_entropy_coded']:.3f}, z {figures['z_to_entropy_coded']:.3f} times their"
    tables = [table(f"On disk: {ratios} entropy-coded size", ("", "kB a sample", "of raw"), rows)]
    for array, codecs in figures["codecs"].items():
        rows = [
            (name, f"{100 * one['part_of_raw']:.1f} %", f"{one['samples_per_second']:.0f}")
            for name, one in codecs.items()
        ]
        tables.append(table(f"{array} by codec, in memory", ("", "of raw", "samples/s read"), rows))
    return tables


def _memory_tables(figures: dict[str, Any]) -> list[Table]:
    rows = [(count, f"{one['worker']:.0f}", f"{one['driver']:.0f}") for count, one in figures.items()]
    return [table("Peak MB resident of a build on Ray", ("photos", "heaviest worker", "driver"), rows)]


def _plan_tables(figures: dict[str, Any]) -> list[Table]:
    row = (
        f"{figures['photos']:.0f}",
        f"{figures['seconds']:.1f}",
        f"{figures['bytes_a_photo']:.0f}",
        f"{1000 * figures['seconds_a_shard']:.2f}",
    )
    return [table("A plan", ("photos", "s", "bytes a photo", "ms to lay out a shard"), [row])]


def _append_tables(figures: dict[str, Any]) -> list[Table]:
    title = f"{figures['added']} photos added to {figures['photos']}, {100 * figures['least']:.1f} % of them"
    build = figures["build"]
    rows = [("whole build", f"{build['wall']:.1f}", f"{build['cpu']:.1f}", "", "")]
    for number, one in enumerate(figures["appends"], start=1):
        wall, cpu = (f"{100 * one[clock] / build[clock]:.2f} %" for clock in ("wall", "cpu"))
        rows.append((f"append {number}", f"{one['wall']:.2f}", f"{one['cpu']:.2f}", wall, cpu))
    return [table(title, ("", "s", "s of CPU", "of the build", "of its CPU"), rows)]


def _photo_tables(figures: dict[str, Any]) -> list[Table]:
    title = (
        f"Photos of {figures['megapixels']:g} megapixels read from a folder, and from a bucket that answers after "
        f"{figures['milliseconds']:g} ms"
    )
    names = ("processes", "photos/s, folder", "bucket", "of the folder", "ms of CPU a photo, folder", "bucket")
    rows = [
        (
            count,
            f"{one['folder']:.1f}",
            f"{one['bucket']:.1f}",
            f"{100 * one['ratio']:.0f} %",
            *(f"{milliseconds:.1f}" for milliseconds in one["milliseconds_of_cpu"].values()),
        )
        for count, one in figures["processes"].items()
    ]
    return [table(title, names, rows)]


def _engine_tables(figures: dict[str, Any]) -> list[Table]:
    handed, lost = figures["handing"], figures["losing"]
    rows = [(name, f"{one['start']:.1f}", f"{one['rate']:.1f}", f"{one['mb']:.0f}") for name, one in handed.items()]
    made = [table("Shards of 12.6 MB through three idle stages", ("", "s to the first", "shards/s", "MB"), rows)]
    rows = [
        (name, f"{one['rate_before']:.1f}", f"{one['seconds']:.1f}", f"{one['seconds'] / one['share']:.2f}")
        for name, one in lost.items()
    ]
    names = ("", "units/s before", "s for the other half", "of the survivors' share")
    return [*made, table("Nine of ten CPUs lost halfway", names, rows)]


_TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "build": _build_tables,
    "loader": _loader_tables,
    "size": _size_tables,
    "memory": _memory_tables,
    "plan": _plan_tables,
    "append": _append_tables,
    "photos": _photo_tables,
    "engine": _engine_tables,
}
