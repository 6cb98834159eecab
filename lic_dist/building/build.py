"""Build a store and maintain it: build or resume, append, add a quantizer from the stored y, repair what is damaged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lic_dist import config
from lic_dist.building.base_summary import base_summary
from lic_dist.building.calibrate import calibrate
from lic_dist.building.grown import photos_of
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
from lic_dist.building.pilot import (
    calibration_samples,
    existing_record,
    prepare_record,
    record_location,
    stored_record,
)
from lic_dist.building.refined import asked_refinement, check_refined
from lic_dist.building.storage import experiment_storage
from lic_dist.building.work import RunTotals, Units, build_stages, requantize_stages, run_units
from lic_dist.cache import growth, layout, markers, store
from lic_dist.cache.layout import Header
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.set_aside import set_aside as set_aside_photos
from lic_dist.cache.storage import Storage
from lic_dist.cache.trials import Trials
from lic_dist.cache.verify import Finding, verify_shard
from lic_dist.errors import LicError, ToleranceError, UsageError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.text import counted


@dataclass(frozen=True)
class BuildReport:
    """The result of a build: samples, those set aside by reason, bits per pixel of the shards that this run wrote.

    `photos` maps the photos set aside to their reasons (of a build, not of a requantization). `excess` is a message
    where more samples were set aside than `images.tolerate` allows, else empty. `snapshot` is the store's newest.
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
    snapshot: int = 0

    def require_tolerated(self) -> None:
        """Raise ToleranceError where there is an excess; the store is complete all the same."""
        if self.excess:
            hint = "raise images.tolerate if that is expected; `lic-dist cache faults` names the photos"
            if "changed" in self.faults:
                hint = "photos changed since the scan: `lic-dist cache scan`, then build at another cache.path"
            raise ToleranceError(self.excess, hint=hint)


def build(
    experiment: config.Experiment,
    strict: bool = False,
    rebuild: bool = False,
    append: bool = False,
    mask: bool = False,
) -> BuildReport:
    """Build a cache, or what is left of it: scan, plan, pilot, and every unfinished shard.

    Shards that have latents, but not this quantizer's indices, are quantized from the stored y. `strict` stops at the
    first photo that cannot be used. `rebuild` removes an existing store first; one that has lost its root, and is of
    this plan by its shards, is completed instead. `append` takes up the photos that were added since: an instalment of
    new shards, for which the other groups are made too, by the records that they have. `mask` masks the samples of
    photos that are gone.

    Raises:
        LicError: the path holds a store of another identity, each differing field is named; or, without `append`, of
            other photos.
    """
    started = time.monotonic()
    storage = experiment_storage(experiment)
    growth.restore_root(storage)
    if layout.read_attributes(storage) is None:
        store.require_usable(storage)
    elif not rebuild:
        growth.adopt(storage)
    job = prepare(experiment, strict=strict, afresh=rebuild)
    plan, group, store_y = job.plan, job.quantizer.group, job.store_y
    attributes = layout.read_attributes(storage)
    if rebuild and attributes is not None:
        layout.require_cache(storage, attributes)
        record = prepare_record(job, afresh=True)  # before anything is removed, because it may raise
        storage.clear()
    else:
        if attributes is not None:  # refuse another job's store before the pilot
            check_retired(storage, layout.read_header(storage).identity, job.parent)
            store.create(storage, plan, store_y)
            if not append:
                job.require_unchanged()
        record = prepare_record(job)
    made_by, record_json = provenance(), stored_record(storage, group) or record.to_json()
    store.create(storage, plan, store_y, made_by)
    store.create_group(storage, group, record_json, group_identity(job.parent, record, plan.geometry), made_by)
    Trials.of_group(storage, group).delete()
    made, since = RunTotals(), 0
    header, changes = layout.read_header(storage), job.changes
    unfinished = not header.chain[-1].complete
    grows = changes is not None and append and bool(len(changes.added) or (mask and len(changes.gone)))
    if unfinished and grows:
        print(f"{growth.unfinished(storage, header.chain)}: finishing it first", flush=True)
    if unfinished or not grows:
        made += _write(job, record_json, strict)
    if changes:
        left_in = len(changes.gone) and not mask
        hint = ["samples of photos that are gone stay in use: --mask leaves them out"] if left_in else []
        print(f"{storage}: {changes}", *changes.lines(), *hint, sep="\n", flush=True)
    if grows:
        job, since = _grow(job, mask)
        made += _write(job, record_json, strict, since)
    finished = store.finished_markers(storage, layout.read_header(storage), since=since)
    found = faults(job, finished)
    set_aside, asked = sum(found.values()), len(job.photos) * job.images.variations
    excess = ""
    if set_aside > job.images.tolerate * asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.items()))
        excess = f"{storage} is built, but {set_aside} of {counted(asked, 'sample')} were set aside: {reasons}"
    named = set_aside_photos(storage, job.photos, finished=finished) if found else {}
    return replace(_report(storage, made, found, started), excess=excess, photos=named)


def _grow(job: Job, mask: bool) -> tuple[Job, int]:
    """Declare what was added, and with `mask` what is gone, as the next instalment; return the job with its samples,
    and its first shard.
    """
    changes, storage = job.changes, job.storage
    assert changes is not None
    header = layout.read_header(storage)
    if left := store.pending(storage, since=header.num_shards):
        raise LicError(
            f"{storage} has lost {counted(len(left), 'shard')}", hint="`lic-dist cache verify CONFIG --repair` first"
        )
    if len(header.chain) == 1:
        growth.upgrade(storage, photos_of(*job.known[0]))
    crops = job.plan_of(changes.added)
    growth.declare(storage, photos_of(changes.added, crops), changes.gone if mask else np.arange(0))
    return replace(job, plan=replace(job.plan, later=(*job.plan.later, crops))), header.num_shards


def _write(job: Job, record_json: str, strict: bool, since: int = 0) -> RunTotals:
    """Write every unfinished shard of the base and of the job's group (see `store.pending`), and of a store that grows
    those of its other groups, as far as they are of this model; then the instalment is complete.
    """
    storage, group, workers = job.storage, job.quantizer.group, job.workers
    header = layout.read_header(storage)
    store.put_documents(storage, layout.arrays_of(header, group), header)
    without_latents = set(store.pending(storage, since=since))
    without_indices = sorted(set(store.pending(storage, group, since=since)) - without_latents)
    if without_latents and not since and (line := base_summary(job)):
        print(line, flush=True)
    made = RunTotals()
    if without_latents:
        stages = build_stages(job, (group, record_json))
        made += run_units(storage, workers, stages, Units(sorted(without_latents), job.plan), strict)
    if without_indices:
        stages = requantize_stages(storage, job.parent, workers, group, record_json)
        made += run_units(storage, workers, stages, Units(without_indices), strict)
    _require_whole(storage, group, since=since)
    if len(header.chain) > 1:
        for name in layout.group_names(storage):
            if name != group and (left := store.pending(storage, name, since=since)):
                _follow(job, name, left)
        growth.finish(storage)
    return made


def _follow(job: Job, group: str, shards: list[int]) -> None:
    """Make a group's missing shards by its own record; one of another model is named instead."""
    storage = job.storage
    cache = LatentCache(storage, header=layout.read_header(storage))
    try:
        check_group(cache, job.parent, group, grows=True)
    except LicError as error:
        print(f"{error.message}: it does not follow; `lic-dist cache requantize` with its model and record does")
        return
    text = cache.record_json(group)
    store.create_group(storage, group, text, cache.group_attributes(group)["identity"])
    stages = requantize_stages(storage, job.parent, job.workers, group, text)
    run_units(storage, job.workers, stages, Units(shards))


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
        samples = calibration_samples(Mixture([cache]), section)
        record = calibrate(parent, section, *samples, batch=cache.header.batch, trials_file=trials_file)
    identity = group_identity(parent, record, cache.header.geometry)
    record_json = record.to_json()
    store.create_group(storage, group, record_json, identity, provenance())
    trials_file.delete()
    mine, jobs = share
    numbers = [number for number in store.pending(storage, group, cache.header) if number % jobs == mine]
    made = run_units(storage, workers, requantize_stages(storage, parent, workers, group, record_json), Units(numbers))
    if jobs == 1:
        _require_whole(storage, group, cache.header)
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
    if job.changes is not None and len(job.changes.gone):
        job.require_unchanged()
    header = layout.read_header(storage)
    lost = [finding for finding in findings if not finding.group and finding.shard >= 0]
    for finding in lost:
        _invalidate(storage, header, finding)
    pending = store.pending(storage)
    written = run_units(storage, workers, build_stages(job, None), Units(pending, job.plan)).shards
    for group in layout.group_folders(storage):
        if layout.read_group(storage, group) is None and not storage.names(f"quantized/{group}/k/c"):
            continue  # its job was killed while it made the group, and says of which model it is when it goes on
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
            check_group(LatentCache(storage), job.parent, group, grows=True)
            stages = requantize_stages(storage, job.parent, workers, group, record.to_json())
            written += run_units(storage, workers, stages, Units(pending)).shards
    return written


def _invalidate(storage: Storage, header: Header, finding: Finding) -> None:
    """Mark a damaged shard as unfinished, unless another job is writing it or has just written it."""
    group = finding.group or None
    key = store.fingerprint_of(storage, header, group)
    marker = markers.read_marker(storage, key, finding.shard)
    if marker is not None and verify_shard(storage, header, group, finding.shard):
        store.invalidate_shard(storage, finding.shard, group)


def _require_whole(storage: Storage, group: str, header: Header | None = None, since: int = 0) -> None:
    """Raise LicError where a shard that was just built is missing, because another job has removed it."""
    if left := store.pending(storage, group, header, since):  # a group's finished shard implies finished latents
        raise LicError(
            f"{counted(len(left), 'shard')} of {storage} {'is' if len(left) == 1 else 'are'} gone again",
            hint="does another job write here? build again to go on",
        )
    storage.sweep(since)


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


def _report(storage: Storage, made: RunTotals, found: dict[str, int], started: float) -> BuildReport:
    header = layout.read_header(storage)
    bpp = made.bits / made.pixels if made.pixels else float("nan")
    seconds = time.monotonic() - started
    size = header.num_samples, made.shards, header.num_shards
    return BuildReport(str(storage), *size, found, bpp, seconds, snapshot=header.complete.snapshot)
