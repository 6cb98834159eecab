"""Refined latents: what an experiment asks for, what a record and a store say of them, and what a store refuses."""

from __future__ import annotations

from typing import Any

from lic_dist import config
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import LicError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import decoder_digest, entropy_digest
from lic_dist.models.refine import Refinement, weights_of


def refinement_of(section: config.Quantizer | None, lmbda: float) -> Refinement:
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


def refined_identity(parent: Checkpoint, refinement: Refinement) -> dict[str, Any]:
    """Return what refined latents depend on in addition; empty where nothing is refined. The distortion is left out
    where it is the MSE, and z where it stays, so that older stores keep their fingerprints.
    """
    if not refinement.steps:
        return {}
    plain = refinement.distortion == {"mse": 1.0}
    return {
        "refined": {
            "steps": refinement.steps,
            "lmbda": refinement.lmbda,
            **({} if plain else {"distortion": dict(refinement.distortion)}),
            **({"z": True} if refinement.z else {}),
            "decoder_sha256": decoder_digest(parent.model),
            "entropy_sha256": entropy_digest(parent.model),
        }
    }


def check_refined(cache: LatentCache, asked: Refinement) -> None:
    """Refuse a cache whose latents were refined otherwise than the quantizer asks for. Raises LicError."""
    found = cache.identity.get("refined", {})
    stored = Refinement(
        found.get("steps", 0), asked.lmbda, found.get("distortion", {"mse": 1.0}), found.get("z", False)
    )
    if record_fields(stored) != record_fields(asked):
        raise LicError(
            f"{cache.storage} holds y after {stored}, the quantizer asks for {asked}",
            hint="build a new cache, or set quantizer.refine and its distortion to what this one has",
        )
