"""Building a store and looking after it: build or go on, add a quantizer from stored y, repair what is damaged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lic_dist import config
from lic_dist.building.calibrate import calibrate
from lic_dist.building.job import (
    Job,
    check_encoder,
    check_group,
    faults,
    group_identity,
    load_parent,
    open_cache,
    place,
    prepare,
    provenance,
)
from lic_dist.building.pilot import adapt, calibration_samples, found_record, record_beside
from lic_dist.building.shards import Shard, ShardReport, make_encoder, make_reader, make_searcher, make_viewer
from lic_dist.cache import layout, markers, store
from lic_dist.cache.plan import Plan
from lic_dist.cache.verify import Finding
from lic_dist.engine.stages import Stage, run
from lic_dist.errors import LicError, ToleranceError, UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.progress import Progress
from lic_dist.quantization.record import QuantizerRecord


@dataclass(frozen=True)
class BuildReport:
    """A finished build: samples in all, those set aside by reason, bits per pixel of the shards built now."""

    path: str
    samples: int
    shards_built: int
    shards: int
    faults: dict[str, int]
    bpp: float
    seconds: float


class _Units(Sequence[Shard]):
    """The shards of these numbers, each laid out when it is asked for: a plan may have millions of samples."""

    def __init__(self, numbers: Sequence[int], plan: Plan | None = None) -> None:
        self.numbers, self.plan = numbers, plan

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Shard:  # type: ignore[override]
        number = self.numbers[index]
        return Shard(number, tuple(self.plan.crops_of(number)) if self.plan else ())


def build(experiment: config.Experiment, strict: bool = False, rebuild: bool = False) -> BuildReport:
    """Build a cache, or what is left of it: scan, plan, pilot, every shard without a verified marker.

    Shards whose latents are there, but not this quantizer's indices, are quantized from the stored y. `strict` stops
    at the first photo that cannot be used. `rebuild` removes the store that is there first.

    Raises:
        LicError: the path holds a store of another identity; each differing field is named.
        ToleranceError: the store is whole, but more samples were set aside than `images.tolerate` allows.
    """
    started = time.monotonic()
    job = prepare(experiment, strict=strict)
    there, plan, group = job.place, job.plan, job.quantizer.group
    if layout.read_attributes(there) is not None:
        if rebuild:
            layout.read_header(there)
            there.clear()
        else:  # refuse another job's store before the pilot; leave none behind where the pilot fails
            store.create(there, plan, job.cache.store_y)
    record = adapt(job)
    store.create(there, plan, job.cache.store_y, provenance())
    store.create_group(there, group, record.to_json(), group_identity(job.parent, record), provenance())
    without_latents = set(store.pending(there))
    without_indices = set(store.pending(there, group))
    if not job.cache.store_y:
        without_latents |= without_indices
    reports = _run(job.experiment, _encoding(job, (group, record)), _Units(sorted(without_latents), plan), strict)
    left = sorted(without_indices - without_latents)
    reports += _run(job.experiment, _requantizing(job.experiment, group, record), _Units(left), strict)
    return _report(job, reports, started)


def requantize(experiment: config.Experiment) -> BuildReport:
    """Add a group, or what is left of it, to a finished store from its stored y: no encoder runs, no photo is read.

    The quantizer is calibrated on the store's own samples unless `cache adapt` left a record beside it. The model may
    be a finetuned one: its encoder must be the store's, its entropy model is the group's.

    Raises:
        LicError: another encoder, a group of another identity, or latents that are not all written.
        UsageError: the store does not keep y.
    """
    started = time.monotonic()
    section = config.need(experiment.quantizer, "quantizer")
    cache, parent = open_cache(experiment), load_parent(experiment)
    check_encoder(cache, parent)
    if not cache.header.store_y:
        raise UsageError(f"{cache.place} does not keep y", hint="build with cache.store_y: true to quantize it again")
    written = len(cache.written())
    if written < cache.num_shards:
        raise LicError(
            f"{cache.place} has latents of {written} of {cache.num_shards} shards",
            hint="`lic-dist cache build` goes on where it stopped",
        )
    record = found_record(cache.place, section, parent)
    if record is None:
        record = calibrate(parent, section, *calibration_samples(cache, section), batch=cache.header.batch)
    store.create_group(cache.place, section.group, record.to_json(), group_identity(parent, record), provenance())
    numbers = store.pending(cache.place, section.group)
    reports = _run(experiment, _requantizing(experiment, section.group, record), _Units(numbers))
    return BuildReport(
        str(cache.place),
        cache.num_samples,
        len(reports),
        cache.num_shards,
        cache.fault_counts(),
        _bpp(reports),
        time.monotonic() - started,
    )


def repair(experiment: config.Experiment, findings: Sequence[Finding]) -> int:
    """Write again what `verify` found damaged, and nothing else; returns the number of shards written.

    Latents come from the photos, indices of every group from y with the group's own record and this experiment's model.

    Raises:
        LicError: another job's store, a group of another entropy model, or a group whose record is lost or altered and
        not to be had beside the store.
    """
    job = prepare(experiment)
    there = job.place
    store.create(there, job.plan, job.cache.store_y)
    lost = sorted({finding.shard for finding in findings if not finding.group and finding.shard >= 0})
    key = layout.read_header(there).fingerprint
    before = {shard: _digest_of_y(markers.read_marker(there, key, shard)) for shard in lost}
    for shard in lost:
        store.forget(there, shard)
    written = len(_run(experiment, _encoding(job, None), _Units(lost, job.plan)))
    after = {shard: _digest_of_y(markers.read_marker(there, key, shard)) for shard in lost}
    changed = {shard for shard in lost if before[shard] is None or after[shard] != before[shard]}
    for group in layout.group_names(there):
        if any(finding.group == group and finding.array.endswith("record.json") for finding in findings):
            _put_record_back(job, group)
        cache = open_cache(experiment)
        text = cache.record_json(group)
        store.create_group(there, group, text, cache.group_attributes(group)["identity"])
        damaged = {finding.shard for finding in findings if finding.group == group and finding.shard >= 0} | changed
        if damaged:
            check_group(cache, job.parent, group)
            for shard in damaged:
                store.forget(there, shard, group)
            record = QuantizerRecord.from_json(text)
            if job.cache.store_y:
                written += len(_run(experiment, _requantizing(experiment, group, record), _Units(sorted(damaged))))
            else:
                written += len(_run(experiment, _encoding(job, (group, record)), _Units(sorted(damaged), job.plan)))
    return written


def _digest_of_y(marker: markers.Marker | None) -> str | None:
    """What a group's indices were made from: the sha256 of the shard's y."""
    if marker is None:
        return None
    return next((entry["sha256"] for key, entry in marker.objects.items() if key.startswith("latents/y/")), None)


def _put_record_back(job: Job, group: str) -> None:
    attributes = layout.read_attributes(job.place, f"quantized/{group}") or {}
    around, key = record_beside(job.place, group)
    if around.entry(key) is not None:
        text = QuantizerRecord.from_json(around.get(key).decode("utf-8", "replace")).to_json()
        if markers.describe(text.encode())["sha256"] == attributes.get("record_json_sha256"):
            job.place.put(f"quantized/{group}/record.json", text.encode())
            return
    raise LicError(
        f"the record of group '{group}' of {job.place} is lost", hint=f"put it at {around}/{key}, or remove the group"
    )


def _encoding(job: Job, quantizer: tuple[str, QuantizerRecord] | None) -> list[Stage]:
    """From photos: read, encode, search and write; without a quantizer the latents alone."""
    engine, folder = job.experiment.engine, str(job.images.path.resolve())
    encoder = partial(make_encoder, *_model(job.experiment), job.plan.batch)
    return [
        Stage("read", partial(make_reader, folder, job.images.crop), engine.readers),
        Stage("encode", encoder, engine.encoders, engine.gpus_per_encoder),
        Stage("search", _searcher(job.experiment, job.plan.fingerprint, quantizer), engine.searchers),
    ]


def _requantizing(experiment: config.Experiment, group: str, record: QuantizerRecord) -> list[Stage]:
    """From stored latents: the hyper-decoder, then search and write."""
    engine = experiment.engine
    there = place(experiment).absolute()
    header = layout.read_header(there)
    viewer = partial(make_viewer, there, *_model(experiment), header.batch)
    return [
        Stage("view", viewer, engine.encoders, engine.gpus_per_encoder),
        Stage("search", _searcher(experiment, header.fingerprint, (group, record)), engine.searchers),
    ]


def _model(experiment: config.Experiment) -> tuple[str, str | None, float | None]:
    section = config.need(experiment.model, "model")
    return checkpoints.absolute(section.checkpoint), section.architecture, section.lmbda


def _searcher(
    experiment: config.Experiment, fingerprint: str, quantizer: tuple[str, QuantizerRecord] | None
) -> Callable[[], Callable[..., ShardReport]]:
    named = (quantizer[0], quantizer[1].to_json()) if quantizer else None
    return partial(make_searcher, place(experiment).absolute(), fingerprint, named)


def _run(experiment: config.Experiment, stages: list[Stage], units: _Units, strict: bool = False) -> list[ShardReport]:
    if not len(units):
        return []
    engine = experiment.engine
    header = layout.read_header(place(experiment))
    left = sum(header.count(number) for number in units.numbers)
    title = {"read": "building the cache", "view": "quantizing the cache"}[stages[0].name]
    reports: list[ShardReport] = []
    bits = pixels = faulty = 0.0
    with Progress(title, header.num_samples, "crop", done=header.num_samples - left) as bar:
        for _, report in run(stages, units, engine=engine.name, address=engine.address, num_cpus=engine.num_cpus):
            reports.append(report)
            bits, pixels, faulty = bits + report.bits, pixels + report.pixels, faulty + len(report.faulty)
            bar.advance(report.samples, bpp=bits / max(pixels, 1), **({"set aside": faulty} if faulty else {}))
            if strict and report.faulty:
                source, reason = report.faulty[0]
                raise LicError(f"{source}: {reason}", hint="--strict stops here; what is written is kept")
    return reports


def _bpp(reports: Sequence[ShardReport]) -> float:
    pixels = sum(report.pixels for report in reports)
    return sum(report.bits for report in reports) / pixels if pixels else float("nan")


def _report(job: Job, reports: Sequence[ShardReport], started: float) -> BuildReport:
    found = faults(job)
    set_aside, asked = sum(found.values()), len(job.photos) * job.images.variations
    if set_aside > job.images.tolerate * asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.items()))
        raise ToleranceError(
            f"{job.place} is built, but {set_aside} of {asked} samples were set aside: {reasons}",
            hint="photos changed since the scan: `lic-dist cache scan`, then build at another cache.path"
            if "changed" in found
            else "raise images.tolerate if that is expected",
        )
    seconds = time.monotonic() - started
    shards = len({report.number for report in reports})
    return BuildReport(str(job.place), job.plan.num_samples, shards, job.plan.num_shards, found, _bpp(reports), seconds)
