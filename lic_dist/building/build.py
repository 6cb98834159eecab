"""Build a store and maintain it: build or resume, add a quantizer from the stored y, repair what is damaged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from lic_dist import config
from lic_dist.building.base_summary import base_summary
from lic_dist.building.calibrate import calibrate
from lic_dist.building.job import (
    Job,
    Workers,
    check_encoder,
    check_group,
    check_retired,
    faults,
    group_identity,
    load_parent,
    open_cache,
    prepare,
    provenance,
    workers_of,
)
from lic_dist.building.latents import in_one_stage
from lic_dist.building.pilot import calibration_samples, existing_record, prepare_record, record_location
from lic_dist.building.reading import Shard, Target, make_reader, make_stored_reader
from lic_dist.building.refined import asked_refinement, check_refined
from lic_dist.building.shards import (
    make_coder,
    make_encoder,
    make_hyper_decoder,
    make_searcher,
    make_stored_coder,
    restore_torch_settings,
)
from lic_dist.building.storage import experiment_storage
from lic_dist.cache import layout, markers, store
from lic_dist.cache.layout import Header
from lic_dist.cache.plan import Geometry, Plan
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.set_aside import set_aside as set_aside_photos
from lic_dist.cache.storage import Storage
from lic_dist.cache.trials import Trials
from lic_dist.cache.verify import Finding, verify_shard
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError, ToleranceError, UsageError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.text import counted


@dataclass(frozen=True)
class BuildReport:
    """The result of a build: samples, those set aside by reason, bits per pixel of the shards that this run wrote.

    `photos` maps the photos set aside to their reasons (of a build, not of a requantization). `excess` is a message
    where more samples were set aside than `images.tolerate` allows, else empty.
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
        """Raise ToleranceError where there is an excess; the store is complete all the same."""
        if self.excess:
            hint = "raise images.tolerate if that is expected; `lic-dist cache faults` names the photos"
            if "changed" in self.faults:
                hint = "photos changed since the scan: `lic-dist cache scan`, then build at another cache.path"
            raise ToleranceError(self.excess, hint=hint)


class _Units(Sequence[Shard]):
    """Shards by number. Each is laid out when it is asked for, because a plan may have millions of samples."""

    def __init__(self, numbers: Sequence[int], plan: Plan | None = None) -> None:
        self.numbers, self.plan = numbers, plan

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Shard:  # type: ignore[override]
        number = self.numbers[index]
        return Shard(number, tuple(self.plan.crops_of(number)) if self.plan else ())


def build(experiment: config.Experiment, strict: bool = False, rebuild: bool = False) -> BuildReport:
    """Build a cache, or what is left of it: scan, plan, pilot, and every unfinished shard.

    Shards that have latents, but not this quantizer's indices, are quantized from the stored y. `strict` stops at the
    first photo that cannot be used. `rebuild` removes an existing store first.

    Raises:
        LicError: the path holds a store of another identity; each differing field is named.
    """
    started = time.monotonic()
    storage = experiment_storage(experiment)
    if layout.read_attributes(storage) is None:
        store.require_usable(storage)
    job = prepare(experiment, strict=strict)
    plan, group, store_y, workers = job.plan, job.quantizer.group, job.store_y, job.workers
    attributes = layout.read_attributes(storage)
    if rebuild and attributes is not None:
        layout.require_cache(storage, attributes)
        record = prepare_record(job, afresh=True)  # before anything is removed, because it may raise
        storage.clear()
    else:
        if attributes is not None:  # refuse another job's store before the pilot
            check_retired(storage, layout.read_header(storage).identity, job.parent)
            store.create(storage, plan, store_y)
        record = prepare_record(job)
    store.create(storage, plan, store_y, provenance())
    identity = group_identity(job.parent, record, plan.geometry)
    store.create_group(storage, group, record.to_json(), identity, provenance())
    Trials.of_group(storage, group).delete()
    without_latents = set(store.pending(storage))
    without_indices = sorted(set(store.pending(storage, group)) - without_latents)
    if without_latents and (line := base_summary(job)):
        print(line, flush=True)
    made = _run(storage, workers, _build_stages(job, (group, record)), _Units(sorted(without_latents), plan), strict)
    again = _requantize_stages(storage, job.parent, workers, group, record)
    made += _run(storage, workers, again, _Units(without_indices), strict)
    _require_whole(storage, group)
    found = faults(job)
    set_aside, asked = sum(found.values()), len(job.photos) * job.images.variations
    excess = ""
    if set_aside > job.images.tolerate * asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.items()))
        excess = f"{storage} is built, but {set_aside} of {counted(asked, 'sample')} were set aside: {reasons}"
    named = set_aside_photos(storage, job.photos) if found else {}
    return replace(_report(storage, made, found, started), excess=excess, photos=named)


def requantize(experiment: config.Experiment) -> BuildReport:
    """Add the experiment's group to its finished store: see `requantize_store`."""
    section = config.need(experiment.quantizer, "quantizer")
    return requantize_store(open_cache(experiment), load_parent(experiment), section, workers_of(experiment))


def requantize_store(
    cache: LatentCache,
    parent: Checkpoint,
    section: config.Quantizer,
    workers: Workers,
    record: QuantizerRecord | None = None,
    share: tuple[int, int] = (0, 1),
) -> BuildReport:
    """Add a group, or what is left of it, to a finished store from its stored y, without encoder or photos.

    The quantizer is `record`, or the record that `cache adapt` left beside the store, or it is calibrated on the
    store's own samples. `parent` (`workers.model` names the same) may be a finetuned model: it must have the store's
    encoder, and the group takes its entropy model. `share` (i, n) does every n-th shard from the i-th on, as one of n
    jobs, and does not wait for the others.

    Raises:
        LicError: another encoder, a group of another identity, or latents that are not all written.
        UsageError: the store does not keep y.
    """
    started = time.monotonic()
    storage, group = cache.storage, section.group
    check_encoder(cache, parent)
    if not cache.header.store_y:
        raise UsageError(f"{storage} does not keep y", hint="build with cache.store_y: true to quantize it again")
    written = len(cache.written())
    if written < cache.num_shards:
        raise LicError(
            f"{storage} has latents of {written} of {counted(cache.num_shards, 'shard')}",
            hint="`lic-dist cache build` goes on where it stopped",
        )
    check_refined(cache, asked_refinement(section, parent.spec.lmbda))
    trials_file = Trials.of_group(storage, group)
    record = record or existing_record(storage, section, parent)
    if record is None:
        samples = calibration_samples(cache, section)
        record = calibrate(parent, section, *samples, batch=cache.header.batch, trials_file=trials_file)
    identity = group_identity(parent, record, cache.header.geometry)
    store.create_group(storage, group, record.to_json(), identity, provenance())
    trials_file.delete()
    mine, jobs = share
    numbers = [number for number in store.pending(storage, group) if number % jobs == mine]
    made = _run(storage, workers, _requantize_stages(storage, parent, workers, group, record), _Units(numbers))
    if jobs == 1:
        _require_whole(storage, group)
    base = store.finished_markers(storage, cache.header)
    return _report(storage, made, markers.fault_counts(base.values()), started)


def repair(experiment: config.Experiment, findings: Sequence[Finding]) -> int:
    """Write again what `verify` found damaged, and nothing else; return the number of shards written.

    Latents are made from the photos. Indices of each group are made from y, by the group's own record and this
    experiment's model.

    Raises:
        LicError: another job's store, a group of another entropy model, or a group whose record is lost or altered and
            has no copy beside the store.
    """
    job = prepare(experiment)
    storage, workers = job.storage, job.workers
    store.create(storage, job.plan, job.store_y)
    header = layout.read_header(storage)
    lost = [finding for finding in findings if not finding.group and finding.shard >= 0]
    for finding in lost:
        _invalidate(storage, header, finding)
    pending = store.pending(storage)
    written = _run(storage, workers, _build_stages(job, None), _Units(pending, job.plan)).shards
    for group in layout.group_folders(storage):
        of_group = [finding for finding in findings if finding.group == group]
        if any(finding.array.endswith("record.json") for finding in of_group):
            _restore_record(job, group)
        record = QuantizerRecord.from_json(storage.get(f"quantized/{group}/record.json").decode())
        identity = (layout.read_group(storage, group) or {}).get("identity")
        identity = identity or group_identity(job.parent, record, header.geometry)
        store.create_group(storage, group, record.to_json(), identity)
        for finding in of_group:
            if finding.shard >= 0:
                _invalidate(storage, header, finding)
        if pending := store.pending(storage, group):
            check_group(LatentCache(storage), job.parent, group)
            stages = _requantize_stages(storage, job.parent, workers, group, record)
            written += _run(storage, workers, stages, _Units(pending)).shards
    return written


def _invalidate(storage: Storage, header: Header, finding: Finding) -> None:
    """Mark a damaged shard as unfinished, unless another job is writing it or has just written it."""
    group = finding.group or None
    key = store.fingerprint_of(storage, header, group)
    marker = markers.read_marker(storage, key, finding.shard)
    if marker is not None and verify_shard(storage, header, group, finding.shard):
        store.invalidate_shard(storage, finding.shard, group)


def _require_whole(storage: Storage, group: str) -> None:
    """Raise LicError where a shard that was just built is missing, because another job has removed it."""
    if left := store.pending(storage, group):  # a group's finished shard implies finished latents
        raise LicError(
            f"{counted(len(left), 'shard')} of {storage} {'is' if len(left) == 1 else 'are'} gone again",
            hint="does another job write here? build again to go on",
        )
    storage.sweep()


def _restore_record(job: Job, group: str) -> None:
    attributes = layout.read_attributes(job.storage, f"quantized/{group}") or {}
    around, key = record_location(job.storage, group)
    if around.entry(key) is not None:
        text = QuantizerRecord.from_json(around.get(key).decode("utf-8", "replace")).to_json()
        if markers.size_and_digest(text.encode())["sha256"] == attributes.get("record_json_sha256"):
            job.storage.put(f"quantized/{group}/record.json", text.encode())
            return
    raise LicError(
        f"the record of group '{group}' of {job.storage} is lost", hint=f"put it at {around}/{key}, or remove the group"
    )


def _build_stages(job: Job, quantizer: tuple[str, QuantizerRecord] | None) -> list[Stage]:
    """Return the stages from photos: read, encode, search and write. Without a quantizer only latents are written."""
    engine, folder = job.workers.engine, str(job.images.path.resolve())
    target = _target(job.storage, quantizer)
    read = Stage("read", partial(make_reader, target, folder, job.images.crop), engine.readers)
    if _is_walked(job.parent, job.plan.geometry):
        return [read, _code_stage(target, job.workers, job.plan.batch)]
    return [
        read,
        _encode_stage(target, job.workers, job.plan.batch),
        Stage("search", partial(make_searcher, target), engine.searchers),
    ]


def _requantize_stages(
    storage: Storage, parent: Checkpoint, workers: Workers, group: str, record: QuantizerRecord
) -> list[Stage]:
    """Return the stages from the store: the hyper-decoder over y, or the encoder over the pixels; then search and
    write.
    """
    engine, target = workers.engine, _target(storage, (group, record))
    header = layout.read_header(target.storage)
    recall = Stage("recall", partial(make_stored_reader, target), engine.readers)
    if _is_walked(parent, header.geometry):
        if not header.store_y:
            return [recall, _code_stage(target, workers, header.batch)]
        coder = partial(make_stored_coder, target, workers.model, header.batch)
        return [Stage("code", coder, engine.encoders, engine.gpus_per_encoder)]
    search = Stage("search", partial(make_searcher, target), engine.searchers)
    if not header.store_y:
        return [recall, _encode_stage(target, workers, header.batch), search]
    hyper_decoder = partial(make_hyper_decoder, target, workers.model, header.batch)
    return [Stage("view", hyper_decoder, engine.encoders, engine.gpus_per_encoder), search]


def _is_walked(parent: Checkpoint, geometry: Geometry) -> bool:
    """Return whether a model's shards are quantized by a walk on the encoder's device: see shards.py."""
    return not in_one_stage(parent.codec, (geometry.y_size,) * 2, (geometry.z_size,) * 2)


def _code_stage(target: Target, workers: Workers, batch: int) -> Stage:
    made = partial(make_coder, target, workers.model, batch, _z_steps(target.storage))
    return Stage("code", made, workers.engine.encoders, workers.engine.gpus_per_encoder)


def _encode_stage(target: Target, workers: Workers, batch: int) -> Stage:
    made = partial(make_encoder, target, workers.model, batch, _z_steps(target.storage))
    return Stage("encode", made, workers.engine.encoders, workers.engine.gpus_per_encoder)


def _z_steps(storage: Storage) -> int:
    """Return the steps of refinement that a store's z has had."""
    return int(layout.read_header(storage).identity.get("refined", {}).get("z_steps", 0))


def _target(storage: Storage, quantizer: tuple[str, QuantizerRecord] | None) -> Target:
    storage = storage.absolute()
    fingerprint = layout.read_header(storage).fingerprint
    return (
        Target(storage, fingerprint, quantizer[0], quantizer[1].to_json())
        if quantizer
        else Target(storage, fingerprint)
    )


@dataclass(frozen=True)
class _RunTotals:
    """What a run has written: shards, and bits and pixels of their good samples."""

    shards: int = 0
    bits: float = 0.0
    pixels: int = 0

    def __add__(self, other: _RunTotals) -> _RunTotals:
        return _RunTotals(self.shards + other.shards, self.bits + other.bits, self.pixels + other.pixels)


def _run(storage: Storage, workers: Workers, stages: list[Stage], units: _Units, strict: bool = False) -> _RunTotals:
    made, set_aside = _RunTotals(), 0
    if not len(units):
        return made
    engine = workers.engine
    header = layout.read_header(storage)
    left = sum(header.count(number) for number in units.numbers)
    title = "building the cache" if stages[0].name == "read" else "quantizing the cache"
    results = run(stages, units, engine=engine.name, address=engine.address, num_cpus=engine.num_cpus)
    bar = Progress(title, header.num_samples, "crop", done=header.num_samples - left)
    with restore_torch_settings(), bar, closing(results):
        for unit, report in results:
            if report is None:  # another job was faster
                bar.advance(header.count(unit.number))
                continue
            made += _RunTotals(1, report.bits, report.pixels)
            set_aside += len(report.faulty)
            told = {"set aside": set_aside} if set_aside else {}
            bar.advance(report.samples, bpp=made.bits / max(made.pixels, 1), **told)
            if strict and report.faulty:
                source, reason = report.faulty[0]
                raise LicError(f"{source}: {reason}", hint="--strict stops here; what is written is kept")
    return made


def _report(storage: Storage, made: _RunTotals, found: dict[str, int], started: float) -> BuildReport:
    header = layout.read_header(storage)
    bpp = made.bits / made.pixels if made.pixels else float("nan")
    seconds = time.monotonic() - started
    return BuildReport(str(storage), header.num_samples, made.shards, header.num_shards, found, bpp, seconds)
