"""The pilot: the samples that a quantizer is calibrated on, and where its record is found.

Calibration and adaptation of tables are done once, on the plan's first training samples and its first held-out samples.
All later steps use the record unchanged.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lic_dist import config
from lic_dist.building.calibrate import calibrate, settings_of
from lic_dist.building.job import Job
from lic_dist.building.latents import Latents, encode
from lic_dist.building.refined import asked_refinement, record_fields
from lic_dist.building.threads import one_thread
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.plan import differences
from lic_dist.cache.storage import Storage
from lic_dist.cache.trials import Trials
from lic_dist.codec.records import fits
from lic_dist.data import images
from lic_dist.data.photo import Crop
from lic_dist.errors import LicError, UsageError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress
from lic_dist.quantization.kinds import KINDS
from lic_dist.quantization.record import QuantizerRecord


def pilot_latents(job: Job) -> tuple[Latents, Latents]:
    """Encode the pilot (the plan's first training samples) and the first held-out samples in this process.

    Raises:
        LicError: no held-out samples to calibrate on.
    """
    training = job.plan.num_samples - job.plan.num_held_out  # a plan has its training samples first
    wanted: dict[str, range] = {
        "pilot": range(min(training, job.quantizer.pilot)),
        "held-out": range(training, min(job.plan.num_samples, training + job.quantizer.calibration)),
    }
    return _encoded(job, "pilot", wanted["pilot"]), _encoded(job, "held-out", wanted["held-out"])


@one_thread()
def _encoded(job: Job, name: str, numbers: range) -> Latents:
    crops: list[Crop] = [job.plan.crops[number] for number in numbers]
    if not crops:
        raise LicError(f"the plan has no {name} samples to calibrate on", hint="add photos or raise images.held_out")
    pixels, status = images.read_crops(job.source, crops, job.images.crop)
    batch = job.plan.batch
    parts = []
    with Progress(f"encoding {name} crops", len(pixels), "crop") as bar:
        for first in range(0, len(pixels), batch):
            chosen = status[first : first + batch] == 0
            bar.advance(len(chosen))
            if not chosen.any():
                continue
            z_steps = job.refinement.z_steps
            part, overflow = encode(job.parent.model, pixels[first : first + batch][chosen], batch, z_steps)
            parts.append(Latents(part.pixels[~overflow], part.y[~overflow], part.z[~overflow]))
    if not parts:
        raise LicError(f"every {name} photo changed or became unreadable since the scan", hint="`lic-dist cache scan`")
    columns = [np.concatenate([getattr(part, field) for part in parts]) for field in ("pixels", "y", "z")]
    return Latents(*columns)


def calibration_samples(cache: Mixture, section: config.Quantizer) -> tuple[Latents, Latents]:
    """Load the pilot (first training samples) and the first held-out samples of a cache, the same that a build encodes;
    of several stores as many of each as its weight says.

    Raises:
        UsageError: the cache does not keep y.
        LicError: it has no training or no held-out samples.
    """
    if not cache.store_y:
        raise UsageError("calibration needs y, which this cache does not keep", hint="build it with store_y: true")
    parts = []
    for held_out, most in ((False, section.pilot), (True, section.calibration)):
        chosen = cache.first(held_out, most)
        if not len(chosen):
            part, where = "held-out" if held_out else "training", ", ".join(str(one.storage) for one in cache.stores)
            raise LicError(f"{where} has no {part} samples to calibrate on", hint="see images.held_out")
        read = cache.load(("pixels", "latents/y", "latents/z"), chosen)
        parts.append(Latents(read["pixels"], read["latents/y"], read["latents/z"]))
    return parts[0], parts[1]


def prepare_record(job: Job, afresh: bool = False) -> QuantizerRecord:
    """Return the job's quantizer record: the store's own, or `cache adapt`'s beside it, or one calibrated on the pilot.

    `afresh` ignores the store's own. Trials of a calibration stay beside the store until `Trials.delete`.

    Raises:
        LicError: the record found is not what the experiment asks for; each differing field is named.
    """
    found = existing_record(job.storage, job.quantizer, job.parent, afresh)
    trials_file = Trials.of_group(job.storage, job.quantizer.group)
    return found or calibrate(
        job.parent, job.quantizer, *pilot_latents(job), batch=job.plan.batch, trials_file=trials_file
    )


def existing_record(
    storage: Storage, section: config.Quantizer, parent: Checkpoint, afresh: bool = False
) -> QuantizerRecord | None:
    """Return the record in the store's group, or the one that `cache adapt` left beside the store; None without either.

    Raises:
        LicError: it is not what the experiment asks for; each differing field is named.
    """
    around, key = record_location(storage, section.group)
    for where, name in ((storage, f"quantized/{section.group}/record.json"), (around, key)):
        if afresh and where == storage:
            continue
        if where.entry(name) is not None:
            record = QuantizerRecord.from_json(where.get(name).decode("utf-8", "replace"))
            check_record(record, section, parent, f"{where}/{name}")
            return record
    return None


def stored_record(storage: Storage, group: str) -> str:
    """Return the text of the record in the store's group, which `existing_record` prefers; "" without one."""
    key = f"quantized/{group}/record.json"
    return storage.get(key).decode("utf-8", "replace") if storage.entry(key) is not None else ""


def record_location(storage: Storage, group: str) -> tuple[Storage, str]:
    """Return where `cache adapt` leaves the record of a group for its build."""
    return storage.sibling(f".{group}.json")


def check_record(record: QuantizerRecord, section: config.Quantizer, parent: Checkpoint, where: str) -> None:
    """Refuse a record that the quantizer section and the checkpoint do not ask for. Raises LicError; each field is
    named.
    """
    kind = KINDS[section.name]
    expected: dict[str, Any] = {
        "name": section.name,
        "states": section.states if kind.trellis else 1,
        "lmbda": section.lmbda or parent.spec.lmbda,
        "rates": "analytic" if kind.embedded else section.rates,
        "scale_offsets": section.scale_offsets,
        **record_fields(asked_refinement(section, parent.spec.lmbda)),
    }
    if section.step != "auto":
        expected["step"] = section.step
    if section.shift != "auto":
        expected["shift"] = section.shift
    if section.spread not in ("auto", "fitted"):
        expected["spread"] = section.spread
    if kind.strength and (strength := getattr(section, kind.strength)) != "auto":
        expected[kind.strength] = strength
    found = {key: record.notes.get(key) if key == "rates" else getattr(record, key) for key in expected}
    found["fitted levels"], expected["fitted levels"] = "fitted" in record.notes, section.spread == "fitted"
    settings = record.notes.get("settings", {})
    asked = {key: value for key, value in settings_of(section).items() if key in settings}
    lines = differences({**found, **{key: settings[key] for key in asked}}, {**expected, **asked})
    if lines or not fits(record, parent.model):
        why = "; ".join(lines) or "it was made for another prior of z or number of channels"
        raise LicError(f"{where} is another quantizer: {why}", hint="give quantizer.group another name")
