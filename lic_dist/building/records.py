"""The quantizer records that calibration starts from, and records that lie in an object store."""

from __future__ import annotations

from typing import Any

import numpy as np

from lic_dist.cache.storages import open_storage
from lic_dist.codec.records import OFFSETS, local_record, require_fit, side_tables, unknown_quantizer, with_offsets
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.adaptation import factorized_record, gaussian_record
from lic_dist.quantization.kinds import KINDS
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import SCALAR, trellis


def analytic_record(
    checkpoint: Checkpoint, name: str, states: int, step: float, strength: float, weights: np.ndarray
) -> QuantizerRecord:
    """Return a quantizer for this checkpoint with the rates of the Gaussian itself, or of the factorized prior of y,
    from which adaptation starts.

    `strength` is what the kind calls so (quantization/kinds.py); it is not read where there is none.
    """
    kind, codec = KINDS[name], checkpoint.codec
    machine = trellis(states) if kind.trellis else SCALAR
    how: dict[str, Any] = {"trellis": machine, **({kind.strength: strength} if kind.strength else {})}
    if codec.prior is not None:
        return factorized_record(name, step, weights, checkpoint.spec.lmbda, codec.prior.cdf, **how)
    return gaussian_record(name, step, weights, checkpoint.spec.lmbda, z_tables=side_tables(codec), **how)


def named_record(checkpoint: Checkpoint, name: str) -> QuantizerRecord:
    """Return a record as `local_record` does, or by the URL of a record or of its group in a store. Raises as that
    does.
    """
    if "://" not in name or name in checkpoint.quantizers:
        return local_record(checkpoint, name)
    if name.endswith(OFFSETS):
        return with_offsets(named_record(checkpoint, name.removesuffix(OFFSETS)), checkpoint)
    storage, _, key = name.rstrip("/").rpartition("/")
    try:
        text = (
            open_storage(storage).get(key if key.endswith(".json") else f"{key}/record.json").decode("utf-8", "replace")
        )
    except FileNotFoundError:
        raise unknown_quantizer(checkpoint, name) from None
    return require_fit(QuantizerRecord.from_json(text), checkpoint, name)
