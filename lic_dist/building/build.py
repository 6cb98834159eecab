"""Building a store and looking after it: build or go on, add a quantizer from stored y, repair what is damaged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from lic_dist import config
from lic_dist.building.base_line import base_line
from lic_dist.building.calibrate import calibrate
from lic_dist.building.job import (
    Job,
    Workers,
    check_encoder,
    check_group,
    check_refined,
    faults,
    group_identity,
    load_parent,
    open_cache,
    prepare,
    provenance,
    workers_of,
)
from lic_dist.building.pilot import adapt, calibration_samples, found_record, record_beside
from lic_dist.building.shards import (
    Shard,
    Target,
    make_encoder,
    make_reader,
    make_searcher,
    make_stored_reader,
    make_viewer,
    undisturbed,
)
from lic_dist.building.store_place import place
from lic_dist.cache import layout, markers, store
from lic_dist.cache.layout import Header
from lic_dist.cache.place import Place
from lic_dist.cache.plan import Plan
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.set_aside import set_aside as set_aside_photos
from lic_dist.cache.trials import Trials
from lic_dist.cache.verify import Finding, verify_shard
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError, ToleranceError, UsageError
from lic_dist.progress import Progress
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.text import counted


@dataclass(frozen=True)
class BuildReport:
    """A finished build: samples in all, those set aside by reason, bits per pixel of the shards built now.

    `photos` names the photos set aside with their reasons (of a build, not of a requantization); `excess` says so where
    more samples were set aside than `images.tolerate` allows.
    """

    path: str
    samples: int
    shards_built: int
    shards: int
    faults: dict[str, int]
    bpp: float
    seconds: float
    excess: str = ""
    photos: dict[str, str] = field(default_factory=dict)

    def require_tolerated(self) -> None:
        """Raises ToleranceError where there is an excess: the store is whole all the same."""
        if self.excess:
            hint = "raise images.tolerate if that is expected; `lic-dist cache faults` names the photos"
            if "changed" in self.faults:
                hint = "photos changed since the scan: `lic-dist cache scan`, then build at another cache.path"
            raise ToleranceError(self.excess, hint=hint)


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
    """
    started = time.monotonic()
    there = place(experiment)
    if layout.read_attributes(there) is None:
        store.require_usable(there)
    job = prepare(experiment, strict=strict)
    plan, group, store_y, workers = job.plan, job.quantizer.group, job.store_y, job.workers
    attributes = layout.read_attributes(there)
    if rebuild and attributes is not None:
        layout.require_ours(there, attributes)
        record = adapt(job, afresh=True)  # before anything is removed: it may be refused
        there.clear()
    else:
        if attributes is not None:  # refuse another job's store before the pilot
            store.create(there, plan, store_y)
        record = adapt(job)
    store.create(there, plan, store_y, provenance())
    store.create_group(there, group, record.to_json(), group_identity(job.parent, record), provenance())
    Trials.beside(there, group).forget()
    without_latents = set(store.pending(there))
    without_indices = sorted(set(store.pending(there, group)) - without_latents)
    if without_latents and (line := base_line(job)):
        print(line, flush=True)
    made = _run(there, workers, _encoding(job, (group, record)), _Units(sorted(without_latents), plan), strict)
    made += _run(there, workers, _requantizing(there, workers, group, record), _Units(without_indices), strict)
    _require_whole(there, group)
    found = faults(job)
    set_aside, asked = sum(found.values()), len(job.photos) * job.images.variations
    excess = ""
    if set_aside > job.images.tolerate * asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.items()))
        excess = f"{there} is built, but {set_aside} of {counted(asked, 'sample')} were set aside: {reasons}"
    named = set_aside_photos(there, job.photos) if found else {}
    return replace(_report(there, made, found, started), excess=excess, photos=named)


def requantize(
    experiment: config.Experiment, record: QuantizerRecord | None = None, share: tuple[int, int] = (0, 1)
) -> BuildReport:
    """Add a group, or what is left of it, to a finished store from its stored y: no encoder runs, no photo is read.

    The quantizer is `record`, else calibrated on the store's own samples unless `cache adapt` left one beside it. The
    model may be a finetuned one: its encoder must be the store's, its entropy model is the group's. `share` (i, n) is
    the i-th of n jobs that do it together: every n-th shard; what the others do is then not waited for.

    Raises:
        LicError: another encoder, a group of another identity, or latents that are not all written.
        UsageError: the store does not keep y.
    """
    started = time.monotonic()
    section = config.need(experiment.quantizer, "quantizer")
    cache, parent, workers = open_cache(experiment), load_parent(experiment), workers_of(experiment)
    check_encoder(cache, parent)
    if not cache.header.store_y:
        raise UsageError(f"{cache.place} does not keep y", hint="build with cache.store_y: true to quantize it again")
    written = len(cache.written())
    if written < cache.num_shards:
        raise LicError(
            f"{cache.place} has latents of {written} of {counted(cache.num_shards, 'shard')}",
            hint="`lic-dist cache build` goes on where it stopped",
        )
    check_refined(cache, section.refine)
    record, kept = record or found_record(cache.place, section, parent), Trials.beside(cache.place, section.group)
    if record is None:
        record = calibrate(parent, section, *calibration_samples(cache, section), batch=cache.header.batch, kept=kept)
    store.create_group(cache.place, section.group, record.to_json(), group_identity(parent, record), provenance())
    kept.forget()
    mine, jobs = share
    numbers = [number for number in store.pending(cache.place, section.group) if number % jobs == mine]
    made = _run(cache.place, workers, _requantizing(cache.place, workers, section.group, record), _Units(numbers))
    if jobs == 1:
        _require_whole(cache.place, section.group)
    base = store.finished(cache.place, cache.header)
    return _report(cache.place, made, markers.fault_counts(base.values()), started)


def repair(experiment: config.Experiment, findings: Sequence[Finding]) -> int:
    """Write again what `verify` found damaged, and nothing else; returns the number of shards written.

    Latents come from the photos, indices of every group from y with the group's own record and this experiment's model.

    Raises:
        LicError: another job's store, a group of another entropy model, or a group whose record is lost or altered and
        not to be had beside the store.
    """
    job = prepare(experiment)
    there, workers = job.place, job.workers
    store.create(there, job.plan, job.store_y)
    header = layout.read_header(there)
    lost = [finding for finding in findings if not finding.group and finding.shard >= 0]
    for finding in lost:
        _forget(there, header, finding)
    pending = store.pending(there)
    written = _run(there, workers, _encoding(job, None), _Units(pending, job.plan)).shards
    for group in layout.group_folders(there):
        of_group = [finding for finding in findings if finding.group == group]
        if any(finding.array.endswith("record.json") for finding in of_group):
            _put_record_back(job, group)
        record = QuantizerRecord.from_json(there.get(f"quantized/{group}/record.json").decode())
        identity = (layout.read_group(there, group) or {}).get("identity") or group_identity(job.parent, record)
        store.create_group(there, group, record.to_json(), identity)
        for finding in of_group:
            if finding.shard >= 0:
                _forget(there, header, finding)
        if pending := store.pending(there, group):
            check_group(LatentCache(there), job.parent, group)
            written += _run(there, workers, _requantizing(there, workers, group, record), _Units(pending)).shards
    return written


def _forget(there: Place, header: Header, finding: Finding) -> None:
    """Have a damaged shard written again, unless it is being written just now, or was."""
    group = finding.group or None
    key = store.fingerprint_of(there, header, group)
    marker = markers.read_marker(there, key, finding.shard)
    if marker is not None and verify_shard(there, header, group, finding.shard):
        store.forget(there, finding.shard, group)


def _require_whole(there: Place, group: str) -> None:
    """What was built is there, all of it. Raises LicError where another job has taken it away meanwhile."""
    if left := store.pending(there, group):  # a group's shard is done only over latents that are
        raise LicError(
            f"{counted(len(left), 'shard')} of {there} {'is' if len(left) == 1 else 'are'} gone again",
            hint="does another job write here? build again to go on",
        )
    there.sweep()


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
    engine, folder = job.workers.engine, str(job.images.path.resolve())
    target = _target(job.place, quantizer)
    return [
        Stage("read", partial(make_reader, target, folder, job.images.crop), engine.readers),
        _encoder(job.workers, job.plan.batch),
        Stage("search", partial(make_searcher, target), engine.searchers),
    ]


def _requantizing(there: Place, workers: Workers, group: str, record: QuantizerRecord) -> list[Stage]:
    """From what is stored: the hyper-decoder over y, or the encoder over the pixels; then search and write."""
    engine, target = workers.engine, _target(there, (group, record))
    header = layout.read_header(target.place)
    viewer = partial(make_viewer, target, *workers.model, header.batch)
    search = Stage("search", partial(make_searcher, target), engine.searchers)
    if header.store_y:
        return [Stage("view", viewer, engine.encoders, engine.gpus_per_encoder), search]
    recall = Stage("recall", partial(make_stored_reader, target), engine.readers)
    return [recall, _encoder(workers, header.batch), search]


def _encoder(workers: Workers, batch: int) -> Stage:
    made = partial(make_encoder, *workers.model, batch, workers.refine)
    return Stage("encode", made, workers.engine.encoders, workers.engine.gpus_per_encoder)


def _target(there: Place, quantizer: tuple[str, QuantizerRecord] | None) -> Target:
    there = there.absolute()
    fingerprint = layout.read_header(there).fingerprint
    return Target(there, fingerprint, quantizer[0], quantizer[1].to_json()) if quantizer else Target(there, fingerprint)


@dataclass(frozen=True)
class _Made:
    """What a run has written: shards, bits and pixels of their good samples."""

    shards: int = 0
    bits: float = 0.0
    pixels: int = 0

    def __add__(self, other: _Made) -> _Made:
        return _Made(self.shards + other.shards, self.bits + other.bits, self.pixels + other.pixels)


def _run(there: Place, workers: Workers, stages: list[Stage], units: _Units, strict: bool = False) -> _Made:
    made, set_aside = _Made(), 0
    if not len(units):
        return made
    engine = workers.engine
    header = layout.read_header(there)
    left = sum(header.count(number) for number in units.numbers)
    title = "building the cache" if stages[0].name == "read" else "quantizing the cache"
    results = run(stages, units, engine=engine.name, address=engine.address, num_cpus=engine.num_cpus)
    bar = Progress(title, header.num_samples, "crop", done=header.num_samples - left)
    with undisturbed(), bar, closing(results):
        for unit, report in results:
            if report is None:  # another job was faster
                bar.advance(header.count(unit.number))
                continue
            made += _Made(1, report.bits, report.pixels)
            set_aside += len(report.faulty)
            told = {"set aside": set_aside} if set_aside else {}
            bar.advance(report.samples, bpp=made.bits / max(made.pixels, 1), **told)
            if strict and report.faulty:
                source, reason = report.faulty[0]
                raise LicError(f"{source}: {reason}", hint="--strict stops here; what is written is kept")
    return made


def _report(there: Place, made: _Made, found: dict[str, int], started: float) -> BuildReport:
    header = layout.read_header(there)
    bpp = made.bits / made.pixels if made.pixels else float("nan")
    seconds = time.monotonic() - started
    return BuildReport(str(there), header.num_samples, made.shards, header.num_shards, found, bpp, seconds)
