"""A cache job: the experiment's model, photos and plan, and the identities by which stores are compared.

A job depends on the experiment and the photos alone. Every command computes it alike, and the store's identity says
whether it was built by the same job.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lic_dist import config
from lic_dist.building.grown import Changes, Known, changes_of, known_photos
from lic_dist.building.refined import asked_refinement, refined_group_identity, refined_identity
from lic_dist.building.storage import experiment_photos, experiment_storage
from lic_dist.building.threads import one_thread
from lic_dist.cache import growth, layout
from lic_dist.cache.layout import Header
from lic_dist.cache.markers import Marker, fault_counts
from lic_dist.cache.plan import Geometry, Plan, canonical_json, differences
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.set_aside import MANIFEST, read_manifest
from lic_dist.cache.storage import Storage
from lic_dist.data.crops import Crops, plan_crops, require_held_out
from lic_dist.data.manifest import Manifest, scan
from lic_dist.data.photo import least_side
from lic_dist.data.source import PhotoSource
from lic_dist.errors import LicError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint, ModelSource
from lic_dist.models.parts import encoder_digest, entropy_digest
from lic_dist.models.protocol import Elements
from lic_dist.models.refine import Refinement, require_refinement
from lic_dist.models.retired import remedy, retired
from lic_dist.models.stages import only_side
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.text import counted
from lic_dist.version import __version__


@dataclass(frozen=True)
class Workers:
    """How many workers process shards, on which engine and model, and the quantizer section, which says
    how z is refined.

    `model` names a checkpoint by its absolute path, or a shipped one.
    """

    engine: config.Engine
    model: ModelSource
    quantizer: config.Quantizer | None  # a repair needs none


@dataclass(frozen=True)
class Job:
    """What a cache build works on, resolved once from its experiment, which the functions below do not see.

    `plan` is that of the store, if there is one. Of one that has grown, or whose photos are others now, `known` are the
    photos of its instalments, and `changes` is what has become of them since.
    """

    storage: Storage
    parent: Checkpoint
    source: PhotoSource
    photos: Manifest
    plan: Plan
    images: config.Images
    store_y: bool
    workers: Workers
    known: tuple[Known, ...] = ()
    changes: Changes | None = None

    @property
    def quantizer(self) -> config.Quantizer:
        return config.need(self.workers.quantizer, "quantizer")

    @property
    def refinement(self) -> Refinement:
        return asked_refinement(self.workers.quantizer, self.parent.spec.lmbda)

    def plan_of(self, photos: Manifest) -> Crops:
        """Return the samples of photos by the job's rule."""
        return _plan_by(self.images, photos)

    def require_unchanged(self) -> None:
        """Refuse a folder of other photos than the store's. Raises LicError, which counts them."""
        if self.changes:
            raise LicError(
                f"{self.storage} holds a cache of other photos: since then {self.changes}",
                hint="`lic-dist cache append` takes up what was added (--mask: and masks what is gone); or give "
                "another cache.path",
            )


def workers_of(experiment: config.Experiment) -> Workers:
    """Return the experiment's workers."""
    section = config.need(experiment.model, "model")
    path = checkpoints.absolute(section.checkpoint)
    model = ModelSource(path, section.architecture, section.lmbda, section.options)
    return Workers(experiment.engine, model, experiment.quantizer)


def open_cache(experiment: config.Experiment) -> LatentCache:
    """Open the experiment's store for reading. Raises LicError where there is none."""
    section = config.need(experiment.cache, "cache")
    return LatentCache.open(section.path, section.options, section.pipeline)


@one_thread()
def load_parent(experiment: config.Experiment) -> Checkpoint:
    """Load the experiment's base model; its lambda is the quantizer's, where that has its own."""
    section = config.need(experiment.model, "model")
    loaded = checkpoints.load(section.checkpoint, section.architecture, section.lmbda, section.options)
    said = section.model_dump(include={"architecture", "N", "M", "lmbda", "options"})
    checkpoints.check_agrees(loaded.spec, **said)
    if experiment.quantizer and experiment.quantizer.lmbda:
        return checkpoints.at_lambda(loaded, experiment.quantizer.lmbda)
    return loaded


def last_scan(experiment: config.Experiment) -> Manifest | None:
    """Return the manifest that the last scan has left beside the experiment's store; None where there was none.

    Raises:
        LicError: it is damaged, or of another version.
    """
    storage = experiment_storage(experiment)
    around, key = storage.sibling(MANIFEST)
    try:
        return read_manifest(storage)
    except LicError as error:
        hint = "`lic-dist cache scan --afresh` writes it anew"
        raise LicError(f"{around}/{key}: {error.message}", hint=hint) from None


def manifest_of(
    experiment: config.Experiment, source: PhotoSource, known: Manifest | None, strict: bool = False
) -> Manifest:
    """Return the manifest of the experiment's photos, which `source` has, and keep it beside the store.

    Photos that `known`, the last scan's, lists with the same size and time are not read again. A scan that was killed
    resumes. `strict` stops at the first photo that cannot be used.
    """
    around, key = experiment_storage(experiment).sibling(MANIFEST)

    def save(manifest: Manifest) -> None:
        around.make()
        around.put(key, manifest.to_bytes())

    return scan(source, known, save, strict=strict)


def prepare(experiment: config.Experiment, strict: bool = False, afresh: bool = False) -> Job:
    """Load the model, scan the photos and lay out the plan: that of the store, where there is one by the same rule,
    unless `afresh`.

    Raises:
        LicError: no photos, none large enough, or a checkpoint that does not load.
        UsageError: no photos in the subfolder that is to be held out.
    """
    section, cache = config.need(experiment.images, "images"), config.need(experiment.cache, "cache")
    parent, workers = load_parent(experiment), workers_of(experiment)
    refinement = asked_refinement(workers.quantizer, parent.spec.lmbda)
    if refinement.steps:
        require_refinement(parent.codec, refinement.z)
    source = experiment_photos(experiment)
    before = last_scan(experiment)
    photos = manifest_of(experiment, source, before, strict)
    require_held_out(photos, section.held_out)
    geometry = geometry_of(parent, section.crop)
    identity = {
        "format": layout.FORMAT,  # of snapshot 0, whatever the store has grown to
        "model": model_identity(parent),
        "precision": "float32",
        "images": {
            "manifest_sha256": photos.digest,
            "crop": section.crop,
            "variations": section.variations,
            "seed": section.seed,
            "held_out": section.held_out,
            **({"squares": True} if section.squares else {}),
        },
        "shard": cache.shard,
        "batch": cache.batch,
        "store_y": cache.store_y,
        **refined_identity(parent, refinement.z_steps),
    }
    storage = experiment_storage(experiment)
    plan_of = partial(_plan_by, section)
    header = None if afresh else _grown_header(storage, identity)
    known = known_photos(storage, header, before, photos, plan_of) if header else []
    crops, *later = [crops.located(photos) for _, crops in known] or [plan_of(photos)]
    if not crops:
        side = least_side(section.crop, section.squares)
        raise LicError(f"no photo in {section.path} is as large as a crop of {side}", hint="set images.crop")
    plan = Plan(crops, geometry, cache.shard, cache.batch, header.identity if header else identity, tuple(later))
    changes = changes_of(storage, header, known, photos) if header else None
    return Job(storage, parent, source.absolute(), photos, plan, section, cache.store_y, workers, tuple(known), changes)


def _plan_by(images: config.Images, photos: Manifest) -> Crops:
    """Return the samples of photos by the rule of an images section."""
    return plan_crops(photos, images.crop, images.variations, images.seed, images.held_out, images.squares)


def _grown_header(storage: Storage, identity: Mapping[str, Any]) -> Header | None:
    """Return the header of a store of this identity but for its photos, where it has grown or they differ; else None,
    as where there is no store, or another.
    """
    growth.restore_root(storage)
    if layout.read_attributes(storage) is None:
        return None
    header = layout.read_header(storage)
    built_of = header.identity.get("images", {}).get("manifest_sha256")
    same_photos = len(header.chain) == 1 and built_of == identity["images"]["manifest_sha256"]
    rule = {**identity, "images": {**identity["images"], "manifest_sha256": built_of}}
    return None if same_photos or differences(header.identity, rule) else header


def geometry_of(parent: Checkpoint, crop: int) -> Geometry:
    """Return the shapes of a store's arrays for crops of this side in pixels.

    Raises:
        UsageError: crops that the model does not take.
    """
    codec = parent.codec
    side, strides = only_side(codec), codec.strides
    codec.require_crop("images.crop", crop)
    return Geometry(crop, codec.channels, crop // strides.y, side.channels, crop // strides.side)


def faults(job: Job, finished: Mapping[int, Marker]) -> dict[str, int]:
    """Return the number of samples set aside by reason: those of finished shards, and of photos that the plan left
    out.
    """
    counts = fault_counts(finished.values())
    for reason, count in job.photos.set_aside(least_side(job.images.crop, job.images.squares)).items():
        counts[reason] = counts.get(reason, 0) + count * job.images.variations
    return counts


def model_identity(parent: Checkpoint) -> dict[str, Any]:
    """Return what cached latents depend on in a model."""
    spec = parent.spec
    return {
        "architecture": spec.architecture,
        "N": spec.N,
        "M": spec.M,
        "encoder_sha256": encoder_digest(parent.model),
        **({"options": spec.options} if spec.options else {}),
    }


def group_identity(parent: Checkpoint, record: QuantizerRecord, geometry: Geometry) -> dict[str, Any]:
    """Return what cached indices depend on in addition to the latents; the layout where y has several stages."""
    stages = parent.codec.layout(geometry.y_size, geometry.y_size)
    layout_key = {"layout_sha256": layout_digest(stages, geometry.y_channels)} if len(stages) > 1 else {}
    refined = refined_group_identity(parent, record)
    return {"record_sha256": record.digest, "entropy_sha256": entropy_digest(parent.model), **layout_key, **refined}


def layout_digest(stages: Sequence[Elements], channels: int) -> str:
    """Return the sha256 of which elements of y each stage covers, in what lanes: a line of canonical JSON a stage."""
    total = hashlib.sha256()
    for one in stages:
        positions = None if one.positions is None else one.positions.tolist()
        covered = {"along": one.along, "channels": list(range(channels))[one.channels], "positions": positions}
        total.update(f"{canonical_json(covered)}\n".encode())
    return total.hexdigest()


def check_retired(storage: Storage, identity: Mapping[str, Any], parent: Checkpoint) -> None:
    """Refuse a cache of a model that is no longer shipped, unless the parent has its encoder. Raises LicError."""
    encoder = identity["model"]["encoder_sha256"]
    if (name := retired(encoder)) and encoder != encoder_digest(parent.model):
        raise LicError(
            f"{storage} holds latents of the {name} of lic_dist 0.1.0", hint=f"{remedy(name)}; or build a new cache"
        )


def check_encoder(cache: LatentCache, parent: Checkpoint) -> None:
    """Refuse a cache of another encoder. Raises LicError, which names each differing field."""
    check_retired(cache.storage, cache.identity, parent)
    found = differences({"model": cache.identity["model"]}, {"model": model_identity(parent)})
    if found:
        raise LicError(f"{cache.storage} holds latents of another model: {'; '.join(found)}", hint="build a new cache")


def check_group(cache: LatentCache, parent: Checkpoint, group: str, grows: bool = False) -> None:
    """Refuse a group of another quantizer record or entropy model, or one that `grows` of another version of
    refinement. Raises LicError, which names each differing field.
    """
    record = QuantizerRecord.from_json(cache.record_json(group))
    expected = group_identity(parent, record, cache.header.geometry)
    identity = cache.group_attributes(group)["identity"]
    if not grows:
        expected.pop("refinement", None)
    known = (*expected, "layout_sha256")
    found = differences({key: identity[key] for key in known if key in identity}, expected)
    if found:
        raise LicError(f"group '{group}' of {cache.storage} does not fit: {'; '.join(found)}", hint="build a new group")


def check_cache(cache: LatentCache, parent: Checkpoint, group: str) -> None:
    """Refuse a cache of another encoder, or a group of another entropy model; each differing field is named.

    Raises:
        LicError: they differ, the cache has no such group, or not all of its shards are written.
    """
    check_encoder(cache, parent)
    check_group(cache, parent, group)
    for part, shards in (("latents", cache.written()), (f"group '{group}'", cache.written(group))):
        if len(shards) < cache.num_shards:
            raise LicError(
                f"{part} of {cache.storage}: {len(shards)} of {counted(cache.num_shards, 'shard')} are written",
                hint="`lic-dist cache build` goes on where it stopped"
                + ("; finetune.snapshot takes an older snapshot" if cache.header.snapshot else ""),
            )


def provenance() -> dict[str, Any]:
    """Return where and with what a store is made; it is stored beside the identity and never compared."""
    import platform
    import sys
    from importlib.metadata import version

    packages = ("torch", "compressai", "numpy", "numba", "zarr", "ray")
    return {
        "lic_dist": __version__,
        "commit": _commit(),
        "packages": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "argv": [_masked(word) for word in sys.argv],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _masked(word: str) -> str:
    """Return an argument with the value of an object store's option removed, since it may be a key."""
    return word.split("=")[0] + "=..." if ".options" in word else word


def _commit() -> str | None:
    """Return the git commit of a source checkout; None for an installed package."""
    import subprocess
    from pathlib import Path

    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return told.stdout.strip() or None
