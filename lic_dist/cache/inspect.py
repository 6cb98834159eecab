"""Report as plain JSON what a store holds and how far it is, from its markers and one listing, also during a build."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.cache import growth, layout, markers, store
from lic_dist.cache.markers import Marker
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.set_aside import photo_lines, read_manifest, set_aside
from lic_dist.cache.storage import Storage
from lic_dist.cache.storages import open_storage
from lic_dist.cache.trials import running_calibrations
from lic_dist.data.photo import FAULTS
from lic_dist.errors import LicError
from lic_dist.text import clock, counted

HISTOGRAM_SHARDS = 256  # a store with more shards uses evenly spaced ones
BINS = 24
NAMED_PHOTOS = 10  # photos set aside that a terminal shows
PAUSE = 60.0  # seconds; a gap between two shards that exceeds this and 20 times the median separates two runs


def inspect(path: Path | str | Storage, options: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Report a store's progress with rate and ETA, bytes, rates and distortions with histograms, faults and identity.

    Bits per pixel are sums over the good samples of the written shards. `distortion` is the mean over samples of the
    squared error that the sensitivities predict (summed over pixels and colours, of values in [0, 1]). Of a store with
    many shards the histograms use evenly spaced ones; `histogram_samples` is the number of samples in them.

    `calibrating` maps each group whose quantizer is being calibrated to its trial. Before the first group exists there
    is no store yet, and the report holds only this and the path. `set_aside` maps the photos left out to their reasons.

    Raises:
        LicError: no store there, or another kind of Zarr group.
    """
    there = open_storage(path, options).absolute()
    at_work = running_calibrations(there)
    if at_work and layout.read_attributes(there) is None:
        return {"path": str(there), "calibrating": at_work}
    header, storage = layout.read_header(there), there
    cache = LatentCache(storage, header=header)  # an instalment that is being written too
    listing = storage.listing()
    base = store.finished_markers(storage, header, None, listing)
    cache.take_as_written(base)
    faults = markers.fault_counts(base.values())
    written = sum(marker.samples for marker in base.values())
    report: dict[str, Any] = {
        "path": str(storage),
        "format": (layout.read_attributes(storage) or {}).get("format"),
        "calibrating": at_work,
        "fingerprint": cache.fingerprint,
        "num_samples": header.num_samples,
        "held_out": header.num_held_out,
        "num_shards": header.num_shards,
        "shard": header.shard,
        "batch": header.batch,
        "geometry": asdict(header.geometry),
        "snapshots": [asdict(one) for one in header.chain],
        "snapshot_names": growth.snapshot_names(storage),
        "masked": len(cache.masked),
        **_progress(cache, None, base, listing),
        "usable": written - sum(faults.values()),
        "unwritten": header.num_samples - written,
        "faults": {name: faults.get(name, 0) for name in FAULTS if name},
        "set_aside": _set_aside(storage, base),
        "groups": {},
        "arrays": {},
        "bytes": sum(entry.bytes for entry in listing.values()),
        "identity": cache.identity,
        "provenance": header.provenance,
    }
    for group in cache.groups:
        done = store.finished_markers(storage, header, group, listing)
        cache.take_as_written(done, group)
        report["groups"][group] = {
            **cache.group_attributes(group),
            **_progress(cache, group, done, listing),
            **_rates(cache, group, done),
        }
    for spec in [spec for group in (None, *cache.groups) for spec in layout.arrays_of(header, group)]:
        objects = [entry.bytes for key, entry in listing.items() if key.startswith(f"{spec.name}/c/")]
        samples = min(len(objects) * header.shard, header.num_samples)
        report["arrays"][spec.name] = {"bytes": sum(objects), "raw_bytes": samples * spec.sample_bytes}
    return report


def _set_aside(storage: Storage, finished: Mapping[int, Marker]) -> dict[str, str]:
    try:
        photos = read_manifest(storage)
    except LicError:  # an unreadable manifest does not concern the store
        photos = None
    return set_aside(storage, photos, finished=finished)


def _progress(
    cache: LatentCache, group: str | None, done: Mapping[int, Marker], listing: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the shards written, the seconds of work, and the pace of the run that wrote the last shards."""
    key = cache._fingerprint_of(group)
    times = sorted(listing[name].modified for shard in done if (name := markers.marker_key(key, shard)) in listing)
    left = cache.num_samples - sum(marker.samples for marker in done.values())
    return {
        "shards_written": len(done),
        "seconds": sum(sum(marker.seconds.values()) for marker in done.values()),
        **pace(times, time.time(), left, cache.header.shard),
    }


def pace(times: list[float], now: float, left: int, shard: int) -> dict[str, Any]:
    """Return samples a second and ETA of the latest run, and how long ago it wrote, from the times of its markers.

    `times` ascend, in seconds; `left` samples are to be written, `shard` samples a shard. A run ends where nothing was
    written for long. `eta_seconds` is None where nothing is left, too little is known, or the run has stopped.
    """
    nothing = {
        "samples_per_second": None,
        "eta_seconds": None,
        "idle_seconds": max(0.0, now - times[-1]) if times else None,
    }
    if len(times) < 2:
        return nothing
    gaps = np.diff(times)
    limit = max(PAUSE, 20 * median(gaps.tolist()))
    run = times[int(np.flatnonzero(gaps > limit)[-1]) + 1 :] if (gaps > limit).any() else times
    if len(run) < 2 or run[-1] <= run[0]:
        return nothing
    rate = shard * (len(run) - 1) / (run[-1] - run[0])
    idle = max(0.0, now - run[-1])
    eta = max(0.0, left / rate - idle) if left and idle <= limit else None
    return {"samples_per_second": rate, "eta_seconds": eta, "idle_seconds": idle}


def _rates(cache: LatentCache, group: str, done: Mapping[int, Marker]) -> dict[str, Any]:
    good = sum(marker.samples - marker.faulty for marker in done.values())
    pixels = good * cache.geometry.crop**2
    report: dict[str, Any] = {"bits_per_pixel": None, "distortion": None, "histogram_samples": 0}
    if not good:
        return report
    report["bits_per_pixel"] = sum(marker.bits or 0.0 for marker in done.values()) / pixels
    report["distortion"] = sum(marker.distortion or 0.0 for marker in done.values()) / good
    chosen = [shard for shard in done if done[shard].samples > done[shard].faulty][:: -(-len(done) // HISTOGRAM_SHARDS)]
    names = (f"quantized/{group}/bits", f"quantized/{group}/distortion", "samples/status")
    bits, distortion, status = (cache.column(name, chosen) for name in names)
    bits, distortion = bits[status == 0], distortion[status == 0]
    report["histogram_samples"] = len(bits)
    report["bits_per_pixel_histogram"] = _histogram(bits / cache.geometry.crop**2)
    report["distortion_histogram"] = _histogram(distortion)
    return report


def _histogram(values: NDArray[np.float32]) -> dict[str, Any]:
    counts, edges = np.histogram(values, BINS)
    quantiles = np.quantile(values, (0.05, 0.5, 0.95))
    return {"counts": counts.tolist(), "edges": edges.tolist(), "quantiles": quantiles.tolist()}


def describe(report: Mapping[str, Any]) -> list[str]:
    """Return the report in lines for a terminal."""

    def progress(part: Mapping[str, Any]) -> str:
        text = f"{part['shards_written']} of {counted(report['num_shards'], 'shard')}"
        if part["shards_written"] < report["num_shards"]:
            if part["eta_seconds"] is not None:
                text += f", {part['samples_per_second']:.3g} samples/s, ETA {clock(part['eta_seconds'])}"
            elif part["idle_seconds"] is not None:
                text += f", nothing written for {clock(part['idle_seconds'])}"
            if part is not report and report["shards_written"] == report["num_shards"]:
                text += ", not readable at this snapshot yet"
        return text

    def bars(histogram: Mapping[str, Any]) -> str:
        counts = histogram["counts"]
        marks = " ▁▂▃▄▅▆▇█"
        shape = "".join(marks[-(-8 * count // max(counts))] for count in counts)
        low, middle, high = histogram["quantiles"]
        edges = histogram["edges"]
        return f"{edges[0]:9.4g} |{shape}| {edges[-1]:<9.4g} 5 % {low:.4g}, median {middle:.4g}, 95 % {high:.4g}"

    at_work = [f"group {name}: {_trial(one)}" for name, one in report["calibrating"].items()]
    if "num_samples" not in report:
        return [f"{report['path']}: no store yet", *at_work]

    crop, identity, provenance = report["geometry"]["crop"], report["identity"], report["provenance"]
    faults = ", ".join(f"{count} {name}" for name, count in report["faults"].items() if count)
    lines = [
        f"{report['path']}: {counted(report['num_samples'], 'sample')} of {crop}x{crop}, "
        f"fingerprint {report['fingerprint'][:12]}",
        f"latents: {progress(report)}; {report['usable']} usable" + (f"; set aside: {faults}" if faults else ""),
    ]
    if len(report["snapshots"]) > 1:
        last = report["snapshots"][-1]
        state = "" if last["complete"] else ", unfinished: `lic-dist cache append` goes on with it"
        masked = f", {report['masked']} masked" if report["masked"] else ""
        lines.append(f"snapshot {len(report['snapshots']) - 1}, {last['digest'][:12]}{masked}{state}")
    lines += [f"  set aside: {line}" for line in photo_lines(report["set_aside"], NAMED_PHOTOS)]
    for name, group in report["groups"].items():
        lines.append(f"group {name}: {progress(group)}")
        if group["bits_per_pixel"] is not None:
            lines.append(f"  {group['bits_per_pixel']:.4f} bpp, distortion {group['distortion']:.4g} a sample")
            lines.append(f"  bpp        {bars(group['bits_per_pixel_histogram'])}")
            lines.append(f"  distortion {bars(group['distortion_histogram'])}")
    lines += at_work
    lines.append(f"{report['bytes'] / 1e6:.1f} MB on disk:")
    for name, size in report["arrays"].items():
        if not name.startswith("samples/") and size["raw_bytes"]:
            ratio = size["bytes"] / size["raw_bytes"]
            lines.append(f"  {name:<28} {size['bytes'] / 1e6:10.2f} MB, {100 * ratio:5.1f} % of its raw bytes")
    lines.append(f"identity: {_flat(identity)}")
    if provenance:
        kept = {key: provenance[key] for key in ("time", "host", "device", "lic_dist") if key in provenance}
        lines.append(f"made: {_flat(kept)}")
    return lines


def _trial(calibration: Mapping[str, Any]) -> str:
    least, idle = calibration["L"], calibration["idle_seconds"]
    text = f"calibrating, trial {calibration['trial']} of {calibration['expected']}"
    text += "" if least is None else f", L {least:.4f} so far"
    return text if idle <= PAUSE else f"{text}, nothing written for {clock(idle)}"


def _flat(record: Mapping[str, Any]) -> str:
    parts = []
    for key, value in record.items():
        text = f"({_flat(value)})" if isinstance(value, Mapping) else str(value)
        parts.append(f"{key} {text[:12] if len(text) == 64 else text}")
    return ", ".join(parts)
