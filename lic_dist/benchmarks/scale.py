"""`lic-dist bench scale`: what grows with the size of a picture, the number of photos, of shards and of searchers.

Photos exist by plan alone (planned.py): their manifest is made up, and no file is read. So a scan that finds all photos
unchanged is timed without its look at the disk. The shards of the store are links to the objects of one, whose arrays
are small: what is timed is looking after shards. An epoch of training is its order of samples, without reading them.

Seconds are CPU time of this process, which other work on the machine disturbs little, but those of searchers, which are
of the clock on the wall; the table has medians. Every call warms up once at the smallest size. A size is left out where
a call would take longer than the limit, were it quadratic; the table shows how far it came.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lic_dist.benchmarks import data, planned
from lic_dist.benchmarks.growth import STEP, Cost, cost, exponent
from lic_dist.benchmarks.speed import record
from lic_dist.benchmarks.tables import machine
from lic_dist.building.threads import one_thread
from lic_dist.cache import store
from lic_dist.cache.inspect import inspect
from lic_dist.cache.mixing import Shares, shuffled
from lic_dist.cache.order import Order
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import open_codec
from lic_dist.data import images
from lic_dist.data.manifest import Manifest
from lic_dist.data.rows import Rows
from lic_dist.errors import UsageError
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.trellis import ECM8
from lic_dist.training.sources import not_held_out, sources_of

PARTS = ("megapixels", "photos", "shards", "searchers")
DECADES = {"photos": ((3, 6), (3, 5)), "shards": ((1.5, 3.5), (1, 2.5))}  # first and last power of ten; and when fast
LIMIT, LIMIT_FAST = 300.0, 10.0  # seconds that a call may be foreseen to take
FIRST = "astronaut.png"  # scikit-image's, mirrored to whatever size is asked for
QUANTIZER = "tcq8"

Work = Mapping[str, Callable[[], Any]]
Scene = Callable[[float], Any]  # of a size: a context of the work to be timed there


def bench(parts: Sequence[str], model: str | None, largest: float, rounds: int, fast: bool) -> dict[str, Any]:
    """Run the parts (all of PARTS where none is named), print their table, return their figures.

    `largest` is in megapixels. `fast` takes small sizes. Raises UsageError for an unknown part or model.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"no part '{unknown[0]}' of this benchmark", hint=f"there are {', '.join(PARTS)}")
    limit = LIMIT_FAST if fast else LIMIT
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as folder:
        scenes: dict[str, Callable[[], Scene]] = {
            "megapixels": lambda: _pictures(model or data.BASE),
            "photos": lambda: _photos,
            "shards": lambda: _shards(Path(folder)),
            "searchers": lambda: _searchers(fast),
        }
        for part in parts or PARTS:
            rows += measured(part, sizes_of(part, largest, fast), scenes[part](), rounds, limit)
    console, figures = Console(), {"machine": machine(), "fast": fast, "rows": rows}
    console.print(_table(rows))
    for row in rows:
        if row["word"]:
            console.print(f"{row['what']}: {row['word']} in {row['of']}, exponent {row['exponent']['a']:.2f}")
    if fast:
        console.print("few and small sizes: these exponents are rough")
    load = figures["load"] = os.getloadavg()
    console.print(f"machine: {figures['machine']}; load averages {', '.join(f'{one:.1f}' for one in load)}")
    return figures


def sizes_of(part: str, largest: float, fast: bool) -> list[float]:
    """Return the sizes of a part, ascending."""
    if part == "megapixels":
        every = [0.1, 0.2, 0.4, 0.8] if fast else [0.1, 0.25, 0.5, 1, 2, 4, 6]
        return [one for one in every if one < largest] + [largest] * (not fast)
    if part == "searchers":
        return [float(count) for count in range(1, 1 + (os.cpu_count() or 1))]
    first, last = DECADES[part][fast]
    return [float(round(10**one)) for one in np.arange(first, last + 0.1, 0.5)]


@one_thread()
def measured(part: str, sizes: Sequence[float], scene: Scene, rounds: int, limit: float) -> list[dict[str, Any]]:
    """Return a row for each call of a part's scene: the sizes that it came to, its seconds and bytes, their exponents.

    A call is left out from the size on at which it would take longer than `limit` seconds, were it quadratic.
    """
    found: dict[str, dict[float, Cost]] = {}
    with Progress(f"measuring {part}", len(sizes), "size") as bar:
        for number, size in enumerate(sizes):
            with scene(size) as work:
                for what, call in work.items():
                    costs = found.setdefault(what, {})
                    if number and not _affordable(costs, sizes[number - 1], size, limit):
                        continue
                    if not number:
                        call()
                    costs[size] = cost(call, rounds, time.perf_counter if part == "searchers" else time.process_time)
            bar.advance()
    return [_row(what, part, costs) for what, costs in found.items()]


def _affordable(costs: Mapping[float, Cost], before: float, size: float, limit: float) -> bool:
    return before in costs and median(costs[before].seconds) * (size / before) ** 2 <= limit


def _row(what: str, part: str, costs: Mapping[float, Cost]) -> dict[str, Any]:
    grown = exponent({size: one.seconds for size, one in costs.items()})
    of_bytes = exponent({size: [one.bytes] for size, one in costs.items() if one.bytes > STEP})
    return {
        "what": what,
        "of": part,
        "sizes": list(costs),
        "seconds": [median(one.seconds) for one in costs.values()],
        "bytes": [one.bytes for one in costs.values()],
        "exponent": asdict(grown) if grown else None,
        "bytes_exponent": asdict(of_bytes) if of_bytes else None,
        "shown": (str(grown or ""), str(of_bytes or "")),
        "word": grown.word if grown else "",
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    title = "Cost over size, t = c + b n^a; memory beyond what was there before"
    table = Table(title=title, show_lines=True)
    for name in ("", "size", "s", "MB", "a of s", "a of MB"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        of_seconds, of_bytes = row["shown"]
        table.add_row(
            f"{row['what']}\nover {row['of']}",
            "\n".join(f"{size:,g}" for size in row["sizes"]),
            "\n".join(f"{one:.4g}" for one in row["seconds"]),
            "\n".join("< 1" if one <= STEP else f"{one / 1e6:.0f}" for one in row["bytes"]),
            f"{of_seconds}\n{row['word']}".rstrip(),
            of_bytes,
        )
    return table


def _pictures(model: str) -> Scene:
    codec = open_codec(model, QUANTIZER)
    first = images.read(data.photographs() / FIRST)

    @contextmanager
    def scene(megapixels: float) -> Iterator[Work]:
        height, width = data.sides(megapixels)
        edges = [(0, max(0, wanted - there)) for wanted, there in zip((height, width), first.shape[:2], strict=True)]
        picture = np.pad(first, (*edges, (0, 0)), mode="symmetric")[:height, :width]
        coded = codec.encode(picture).data
        yield {"encode a picture": lambda: codec.encode(picture), "decode a picture": lambda: codec.decode(coded)}

    return scene


@contextmanager
def _photos(count: float) -> Iterator[Work]:
    """What building and training do for so many photos before, or without, reading one."""
    made = Manifest.of(planned.photos(int(count)))
    file, names = made.to_bytes(), made.table["path"].to_pylist()
    stamps = np.stack([made.column("bytes"), made.column("mtime_ns")], axis=1)
    plan = planned.plan(made)
    part = np.arange(plan.num_samples - plan.num_held_out)
    grown = planned.after_an_append(made)
    order = Order(part, planned.SHARD, planned.BATCH)
    steps = len(part) // planned.BATCH

    def scan_again() -> Manifest:
        rows = Rows(names, made.table)
        rows.take_over(stamps)
        return Manifest(rows.so_far())

    def whose_faults() -> Any:
        fresh = Manifest(made.table)
        return fresh.set_aside(planned.CROP), fresh.reasons(planned.CROP), fresh.duplicates

    def streamed() -> int:
        schedule, served = order.schedule(range(order.streams)), 0
        while served < len(part):
            served += len(next(schedule).samples)
        return served

    yield {
        "write the manifest": made.to_bytes,
        "read the manifest": lambda: Manifest.from_bytes(file),
        "scan again, none changed": scan_again,
        "plan": lambda: planned.plan(Manifest(made.table)),
        "name faults, duplicates": whose_faults,
        "plan an append of 1 %": grown,
        "lay out every shard": lambda: [len(plan.crops_of(shard)) for shard in range(plan.num_shards)],
        "order an epoch, streamed": streamed,
        "order an epoch, in RAM": lambda: [
            shuffled([len(part)], Shares([1]), 0, step * planned.BATCH, (step + 1) * planned.BATCH)
            for step in range(steps)
        ],
    }


def _shards(folder: Path) -> Scene:
    @contextmanager
    def scene(count: float) -> Iterator[Work]:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            path = Path(name) / "a.zarr"
            again = planned.build(path, int(count))
            yield {
                "open a store": lambda: LatentCache.open(path).groups,
                "list missing shards": lambda: (store.pending(path), store.pending(path, planned.GROUP)),
                "cache inspect": lambda: inspect(path),
                "numbers of usable samples": lambda: LatentCache.open(path).indices(held_out=False),
                "sources of photos": lambda: (
                    sources_of(LatentCache.open(path), planned.GROUP),
                    not_held_out(LatentCache.open(path)),
                ),
                "write a shard again": again,
            }

    return scene


def _searchers(fast: bool) -> Scene:
    samples = data.gaussian(192, 8192 if fast else 16384)
    quantizer = Quantizer(record("tcq", ECM8, 0.49, 0.6, samples))
    samples = samples.repeated(4)

    @contextmanager
    def scene(threads: float) -> Iterator[Work]:
        yield {"TCQ-8 of equal work": lambda: quantizer.quantize(samples.r, samples.level, threads=int(threads))}

    return scene
