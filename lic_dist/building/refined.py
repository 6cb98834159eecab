"""Refinement in a cache: what an experiment asks for, what a record, a store and a group say of it.

z is refined before the latents are stored, so a store knows its steps. y is refined by each group's own search, from
the stored pixels and y, so that a group depends on the decoder.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lic_dist import config
from lic_dist.building.latents import Inputs, Latents, inputs_of, refined
from lic_dist.cache.reader import LatentCache
from lic_dist.codec.refine import VERSION
from lic_dist.errors import LicError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import decoder_digest, entropy_digest
from lic_dist.models.refine import Refinement, weights_of
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord


def asked_refinement(section: config.Quantizer | None, lmbda: float) -> Refinement:
    """Return the refinement that a quantizer section asks for, at its lambda or else this one, the model's; none
    without a section.
    """
    if section is None:
        return Refinement(0, lmbda)
    lmbda = section.lmbda or lmbda
    return Refinement(section.refine, lmbda, weights_of(section.refine_distortion, lmbda), section.refine_z)


def record_fields(refinement: Refinement) -> dict[str, Any]:
    """Return the fields of a quantizer record that say how latents are refined."""
    if not refinement.steps:
        refinement = Refinement(0, refinement.lmbda)
    return {
        "refine": refinement.steps,
        "refine_distortion": dict(refinement.distortion),
        "refine_z": refinement.z,
    }


def refined_identity(parent: Checkpoint, z_steps: int) -> dict[str, Any]:
    """Return what latents with a refined z depend on in addition; empty where z is not refined."""
    return {"refined": {"z_steps": z_steps, "entropy_sha256": entropy_digest(parent.model)}} if z_steps else {}


def refined_group_identity(parent: Checkpoint, record: QuantizerRecord) -> dict[str, Any]:
    """Return what the indices of a group whose y was refined depend on in addition; empty where it was not."""
    return {"decoder_sha256": decoder_digest(parent.model), "refinement": VERSION} if record.refine else {}


def check_refined(cache: LatentCache, asked: Refinement) -> None:
    """Refuse a cache whose z was refined otherwise than the quantizer asks for, or y before it was stored, as lic_dist
    0.1.0 did. Raises LicError.
    """
    found = cache.identity.get("refined", {})
    if "steps" in found:
        raise LicError(f"{cache.storage} holds y refined by lic_dist 0.1.0", hint="build a new cache")
    if found.get("z_steps", 0) != asked.z_steps:
        raise LicError(
            f"{cache.storage} holds z after {found.get('z_steps', 0)} steps of refinement, the quantizer asks for "
            f"{asked.z_steps}",
            hint="build a new cache, or set quantizer.refine_z to what this one has",
        )


def aimed_inputs(checkpoint: Checkpoint, record: QuantizerRecord, samples: Latents, batch: int) -> Inputs:
    """Return what quantizers take of samples whose y was refined with this record, where it asks for refinement."""
    if not record.refine:
        return inputs_of(checkpoint.model, samples.y, samples.z, batch)
    quantizer, found = Quantizer(record), []
    with Progress("refining", len(samples), "crop") as bar:
        for first in range(0, len(samples), batch):
            part = samples.part(slice(first, first + batch))
            found.append(refined(checkpoint.model, part.pixels, part.y, part.z, quantizer, batch))
            bar.advance(len(part))
    return inputs_of(checkpoint.model, np.concatenate(found), samples.z, batch)
