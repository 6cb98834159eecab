"""`lic-dist bench blocks`: files in blocks against whole pictures, with and without mended edges.

`rate` codes every picture whole and in blocks of each side with each model, which is the lambda of a point: BD-rates of
real bytes, heads and checksums included; which part of the bits is of z, of y and of all else; and the squared error by
the distance to the nearest edge of a block, beside that of the whole picture at the same pixels. `speed` codes and
decodes a mosaic of the pictures with one thread and with several, in turns. `memory` is by how much a process grows
that codes a large mosaic, decodes it, and decodes a region of it.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from lic_dist.benchmarks.data import BASE, pictures, sides
from lic_dist.benchmarks.progressive import curve_of, row_of
from lic_dist.benchmarks.tables import machine, table
from lic_dist.benchmarks.whole import mosaic
from lic_dist.building.threads import one_thread
from lic_dist.codec.block_codec import SIDE, BlockCodec, of_bytes
from lic_dist.codec.blocks import Blocks, Layout
from lic_dist.codec.codec import FoundLatents, ImageCodec
from lic_dist.codec.edges import Part
from lic_dist.codec.records import local_record, preferred_quantizer
from lic_dist.data import images
from lic_dist.errors import UsageError
from lic_dist.evaluation.memory import Peak
from lic_dist.evaluation.results import ImageResult
from lic_dist.intervals import change_interval, mean_interval
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.reporting.bd import bd_rate, image_bd_rates

PARTS = ("rate", "speed", "memory")
BANDS = (0, 1, 2, 4, 8, 16, 32)  # pixels from an edge at which bands begin
TIMED = 2.0  # megapixels of the mosaic that is timed
REGION = 512  # pixels a side
WHOLE, PLAIN, MENDED = "whole", "blocks", "blocks, mended"
QUALITIES = ("psnr", "ms-ssim")
Image = NDArray[np.uint8]


def bench(
    names: Sequence[str],
    folder: Path | None,
    of_sides: Sequence[int],
    quantizer: str | None,
    parts: Sequence[str],
    megapixels: float,
    threads: int,
    quick: bool,
) -> dict[str, Any]:
    """Measure the parts, by default all, on the pictures of a folder, by default scikit-image's; print tables.

    `quick` takes two pictures, and mosaics of at most half a megapixel. Raises UsageError for an unknown model or part,
    LicError for a missing folder.
    """
    if unknown := set(parts) - set(PARTS):
        raise UsageError(f"no part '{min(unknown)}' of bench blocks", hint=", ".join(PARTS))
    taken = {path.name: images.read(path) for path in pictures(folder)[: 2 if quick else None]}
    loaded = [checkpoints.load(name) for name in names or (BASE,)]
    figures: dict[str, Any] = {"machine": machine(), "quick": quick, "pictures": len(taken)}
    console, wanted = Console(), parts or PARTS
    if "rate" in wanted:
        figures["rate"] = {side: compared(*measured(loaded, taken, side, quantizer)) for side in of_sides or (SIDE,)}
        for side, found in figures["rate"].items():
            for one in _tables(side, found, len(taken)):
                console.print(one)
    first, record = loaded[0], _record(loaded[0], quantizer)
    codec = BlockCodec(first.model, record, first.boundary, threads=1)
    if "speed" in wanted:
        figures["speed"] = timed(codec, _mosaic(taken, min(TIMED, 0.5) if quick else TIMED), threads, 1 if quick else 3)
        console.print(_speed_table(figures["speed"]))
    if "memory" in wanted:
        figures["memory"] = peaks(codec, _mosaic(taken, 0.5 if quick else megapixels))
        console.print(_memory_table(figures["memory"]))
    return figures


def _mosaic(taken: dict[str, Image], megapixels: float) -> Image:
    return mosaic(list(taken.values()), *sides(megapixels))


def _record(loaded: Checkpoint, quantizer: str | None) -> QuantizerRecord:
    return local_record(loaded, quantizer or preferred_quantizer(loaded))


Measured = tuple[dict[str, list[list[ImageResult]]], list[dict[str, Any]]]


@one_thread()
def measured(loaded: Sequence[Checkpoint], taken: dict[str, Image], side: int, quantizer: str | None) -> Measured:
    """Return the rows of WHOLE, PLAIN and MENDED, of each model the pictures', and of each model bytes by kind, and
    squared errors by band.
    """
    rows: dict[str, list[list[ImageResult]]] = {WHOLE: [], PLAIN: [], MENDED: []}
    details = []
    with Progress(f"blocks of {side}", len(loaded) * len(taken), "picture") as bar:
        for one in loaded:
            record = _record(one, quantizer)
            whole = ImageCodec(one.model, record, threads=1)
            codec = BlockCodec(one.model, record, one.boundary, threads=1)
            for of_models in rows.values():
                of_models.append([])
            kinds = {name: np.zeros(3) for name in (WHOLE, PLAIN)}
            errors = {name: np.zeros(len(BANDS)) for name in rows}
            counts = np.zeros(len(BANDS))
            for name, picture in taken.items():
                found: list[FoundLatents] = []
                alone, encoded = whole.encode(picture), codec.encode(picture, side, found.append)
                data, read = alone.data, of_bytes(encoded.data)
                shown = {WHOLE: whole.decode(data), PLAIN: codec.decode(read, mended=False), MENDED: codec.decode(read)}
                for kind, decoded in shown.items():
                    size = len(data if kind == WHOLE else encoded.data)
                    rows[kind][-1].append(row_of(name, picture, size, decoded))
                    errors[kind] += _by_band(picture, decoded, encoded.head.layout)
                counts += _by_band(picture, None, encoded.head.layout)
                kinds[WHOLE] += _kinds(whole, [alone], len(data))
                kinds[PLAIN] += _kinds(whole, found, len(encoded.data))
                bar.advance()
            bytes_of = {name: dict(zip(("z", "y", "head"), some.tolist(), strict=True)) for name, some in kinds.items()}
            mse = {name: (some / np.maximum(counts, 1)).tolist() for name, some in errors.items()}
            details.append({"model": one.source, "lmbda": one.spec.lmbda, "bytes": bytes_of, "mse": mse})
    return rows, details


def _kinds(codec: ImageCodec, found: Sequence[FoundLatents], size: int) -> NDArray[np.float64]:
    """Return the bytes of z and of y, as tables estimate them, and of all else in a file: heads, states, checks."""
    z = sum(codec.side_bits(one) for one in found) / 8
    y = sum(float(codec.channel_bits(one).sum()) for one in found) / 8
    return np.array([z, y, size - z - y], np.float64)


def _by_band(picture: Image, decoded: Image | None, layout: Layout) -> NDArray[np.float64]:
    """Return the sum of squared errors in each band of pixels by their distance to an edge, or how many values."""
    down, across = (
        np.abs(np.arange(length)[:, None] + 0.5 - np.array([*edges[1:-1], 1e9])).min(1)
        for length, edges in ((layout.height, layout.rows), (layout.width, layout.columns))
    )
    band = np.digitize(np.minimum(down[:, None], across[None]), BANDS) - 1
    values: NDArray[np.float64] = np.full(band.shape, 3.0)
    if decoded is not None:
        error = decoded.astype(np.float64) - picture
        values = np.einsum("ijc,ijc->ij", error, error)
    return np.bincount(band.ravel(), values.ravel(), len(BANDS)).astype(np.float64)


def compared(rows: dict[str, list[list[ImageResult]]], details: list[dict[str, Any]]) -> dict[str, Any]:
    """Return BD-rates of files in blocks against whole ones in percent, where there are four models, and what changes
    at each.
    """
    found: dict[str, Any] = {"models": details}
    places = [one["lmbda"] for one in details]
    curves = {name: curve_of(name, of_models, places) for name, of_models in rows.items()}
    for kind in (PLAIN, MENDED):
        for quality in QUALITIES if len(places) > 3 else ():
            by_image = image_bd_rates(curves[WHOLE], curves[kind], quality=quality)
            if by_image:
                interval = mean_interval(list(by_image.values()))
                found[f"{kind}, {quality}"] = {
                    "bd_rate": bd_rate(curves[WHOLE], curves[kind], quality=quality),
                    "images": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                }
    for number, one in enumerate(details):
        whole, plain, mended = (rows[name][number] for name in (WHOLE, PLAIN, MENDED))
        one["bits"] = vars(change_interval([row.bpp for row in plain], [row.bpp for row in whole]))
        one["bpp"] = statistics.fmean(row.bpp for row in whole)
        for kind, theirs in ((PLAIN, plain), (MENDED, mended)):
            changes = [row.psnr - base.psnr for row, base in zip(theirs, whole, strict=True)]
            losses = [
                [one["lmbda"] * 65025 / 10 ** (row.psnr / 10) + row.bpp for row in some] for some in (theirs, whole)
            ]
            one[kind] = {"psnr": vars(mean_interval(changes)), "L": vars(change_interval(*losses))}
    return found


def timed(codec: BlockCodec, picture: Image, threads: int, rounds: int) -> dict[str, Any]:
    """Return seconds of the clock to encode and decode with one thread and with several, medians of rounds in which
    they take turns, and the median ratio within a round.
    """
    data = codec.encode(picture, SIDE).data  # compiles
    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: codec.encode(picture, SIDE),
        "decode": lambda: codec.decode(of_bytes(data)),
    }
    seconds: dict[str, dict[int, list[float]]] = {name: {1: [], threads: []} for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            for count in sorted(seconds[name], reverse=bool(number % 2)):
                codec.threads = count
                began = time.perf_counter()
                call()
                seconds[name][count].append(time.perf_counter() - began)
    codec.threads = 1
    found: dict[str, Any] = {"pixels": picture.shape[0] * picture.shape[1], "threads": threads, "rounds": rounds}
    for name, by_count in seconds.items():
        ratios = [one / several for one, several in zip(by_count[1], by_count[threads], strict=True)]
        one, several = (statistics.median(by_count[count]) for count in (1, threads))
        found[name] = {"one": one, "several": several, "faster": statistics.median(ratios)}
    return found


def peaks(codec: BlockCodec, picture: Image) -> dict[str, Any]:
    """Return by how many bytes this process grows that encodes a picture, decodes it, and decodes a region of it."""
    small = np.ascontiguousarray(picture[: 2 * SIDE, : 2 * SIDE])
    codec.decode(of_bytes(codec.encode(small, SIDE).data))  # what is loaded and compiled once
    height, width = picture.shape[:2]
    corner = [min(length // 2, length - min(length, REGION)) for length in (height, width)]
    region = Part(*(slice(at, at + min(REGION, length)) for at, length in zip(corner, (height, width), strict=True)))
    found: dict[str, Any] = {"pixels": height * width, "picture": picture.nbytes}
    peak = _fresh_peak()
    data = codec.encode(picture, SIDE).data
    found["encode"] = peak.bytes
    head = Blocks.read(of_bytes(data))
    count, size = codec.count(head, region)
    found |= {"file": len(data), "blocks": head.layout.count, "region": {"blocks": count, "bytes": size}}
    peak, began = _fresh_peak(), time.process_time()
    shown = codec.decode(of_bytes(data), region)
    found["region"] |= {"pixels": shown.shape[0] * shown.shape[1], "peak": peak.bytes}
    found["region"]["seconds"] = time.process_time() - began
    peak, began = _fresh_peak(), time.process_time()
    whole = codec.decode(of_bytes(data))
    found |= {"decode": peak.bytes, "seconds": time.process_time() - began}
    assert np.array_equal(whole[region.rows, region.columns], shown)
    return found


def _fresh_peak() -> Peak:
    """Return a Peak that counts what is taken anew, not what the allocator has kept of earlier work."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return Peak()


def _tables(side: int, found: dict[str, Any], count: int) -> list[Any]:
    made = []
    if f"{PLAIN}, psnr" in found:
        cells = [
            [kind, *(f"{one['images']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]" if one else "" for one in some)]
            for kind in (PLAIN, MENDED)
            for some in [[found.get(f"{kind}, {quality}") for quality in QUALITIES]]
        ]
        title = f"BD-rate in percent against whole pictures, blocks of {side}, {count} pictures"
        made.append(table(title, ("", "PSNR", "MS-SSIM"), cells))
    cells = []
    for one in found["models"]:
        total = sum(one["bytes"][WHOLE].values())
        parts = [100 * (one["bytes"][PLAIN][kind] - one["bytes"][WHOLE][kind]) / total for kind in ("z", "y", "head")]
        change, mended = (one[kind] for kind in (PLAIN, MENDED))
        cells.append(
            [one["model"], f"{one['bits']['mean']:+.2f}", *(f"{part:+.2f}" for part in parts)]
            + [f"{kind['psnr']['mean']:+.3f}" for kind in (change, mended)]
            + [f"{kind['L']['mean']:+.2f}" for kind in (change, mended)]
        )
    columns = ("model", "bits %", "of z", "of y", "of the rest", "PSNR dB", "mended", "L %", "mended")
    made.append(table(f"changes against whole pictures, blocks of {side}, {count} pictures", columns, cells))
    cells = [
        [f"{one['model']}, {kind}", *(f"{value:.2f}" if not math.isnan(value) else "" for value in one["mse"][kind])]
        for one in found["models"]
        for kind in (WHOLE, PLAIN, MENDED)
    ]
    bands = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in zip(BANDS, BANDS[1:], strict=False)]
    made.append(table("squared error by pixels to the nearest edge", ("", *bands, f"{BANDS[-1]}-"), cells))
    return made


def _speed_table(found: dict[str, Any]) -> Any:
    cells = [
        [name, *(f"{found[name][key]:.2f}" for key in ("one", "several")), f"{found[name]['faster']:.2f}"]
        for name in ("encode", "decode")
    ]
    title = f"seconds, {found['pixels'] / 1e6:.1f} megapixels in blocks, medians of {found['rounds']}"
    return table(title, ("", "1 thread", f"{found['threads']} threads", "times as fast"), cells)


def _memory_table(found: dict[str, Any]) -> Any:
    def megabytes(count: int | None) -> str:
        return "" if count is None else f"{count / 1e6:.0f}"

    region = found["region"]
    cells = [
        ["picture", megabytes(found["picture"]), megabytes(found["file"]), f"{found['blocks']}"],
        ["encode", megabytes(found["encode"]), "", ""],
        ["decode", megabytes(found["decode"]), "", ""],
        ["region", megabytes(region["peak"]), f"{region['bytes'] / 1e6:.3f}", f"{region['blocks']}"],
    ]
    title = f"memory that a process grows by, {found['pixels'] / 1e6:.1f} megapixels"
    return table(title, ("", "MB", "MB of file read", "blocks"), cells)
