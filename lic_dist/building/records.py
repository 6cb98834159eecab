"""Where the quantizer records of a checkpoint come from: CompressAI's own tables, the checkpoint itself, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lic_dist.cache.place import place_of
from lic_dist.errors import UsageError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.adaptation import gaussian_record
from lic_dist.quantization.rates import CdfTables
from lic_dist.quantization.record import SEARCHED, QuantizerRecord
from lic_dist.quantization.trellis import SCALAR, trellis


def coder_tables(entropy_model: Any) -> CdfTables:
    """The integer tables of one of CompressAI's entropy models, after `update(force=True)`."""
    return CdfTables(
        entropy_model._quantized_cdf.cpu().numpy().astype(np.int32),
        entropy_model._cdf_length.cpu().numpy().astype(np.int32).reshape(-1),
        entropy_model._offset.cpu().numpy().astype(np.int32).reshape(-1),
    )


def compressai_record(checkpoint: Checkpoint) -> QuantizerRecord:
    """SQ as CompressAI codes it: step 1, its Gaussian tables, the scale level next above."""
    model: Any = checkpoint.model
    return QuantizerRecord(
        name="sq",
        step=1.0,
        lmbda=checkpoint.spec.lmbda,
        lambda_scale=1.0,
        weights=np.ones(checkpoint.spec.M, np.float32),
        level_rule="above",
        y_tables=coder_tables(model.gaussian_conditional),
        z_tables=coder_tables(model.entropy_bottleneck),
        notes={"rates": "compressai"},
    )


def analytic_record(
    checkpoint: Checkpoint, name: str, states: int, step: float, strength: float, weights: np.ndarray
) -> QuantizerRecord:
    """A quantizer for this checkpoint with the Gaussian's own rates: what adaptation starts from.

    `strength` is g of rdoq and tcq, the rounding offset xi of deadzone.
    """
    return gaussian_record(
        name,
        step,
        weights,
        checkpoint.spec.lmbda,
        lambda_scale=strength if name in SEARCHED else 1.0,
        trellis=trellis(states) if name == "tcq" else SCALAR,
        rounding=strength if name == "deadzone" else 0.5,
        z_tables=coder_tables(checkpoint.model.entropy_bottleneck),
    )


def named_record(checkpoint: Checkpoint, name: str) -> QuantizerRecord:
    """`sq` (CompressAI's tables), a record that the checkpoint carries, or a record's file.

    Raises:
        UsageError: none of these, or a record of another prior of z, number of channels or lambda.
    """
    if name in checkpoint.quantizers:
        return QuantizerRecord.from_json(checkpoint.quantizers[name])
    if name == "sq":
        return compressai_record(checkpoint)
    text = _text(name)
    if text is not None:
        record = QuantizerRecord.from_json(text)
        if not fits(record, checkpoint.model) or record.lmbda != checkpoint.spec.lmbda:
            raise UsageError(
                f"the quantizer {name} was made for another model than {checkpoint.source}",
                hint="calibrate one for it: `lic-dist cache adapt`",
            )
        return record
    known = ", ".join(["sq", *checkpoint.quantizers])
    raise UsageError(f"no quantizer '{name}' with {checkpoint.source}", hint=f"one of: {known}; or a record.json")


def _text(name: str) -> str | None:
    """The text of a record's file, or of the record of a group in a store, by path or URL; None where there is none."""
    place, _, key = name.rstrip("/").rpartition("/")
    try:
        if "://" in name:
            suffix = "" if key.endswith(".json") else "/record.json"
            return place_of(place).get(f"{key}{suffix}").decode("utf-8", "replace")
        path = Path(name)
        return (path / "record.json" if path.is_dir() else path).read_text("utf-8", "replace")
    except FileNotFoundError:
        return None


def fits(record: QuantizerRecord, model: nn.Module) -> bool:
    """Whether a record was made for this model's prior of z and number of channels."""
    z = coder_tables(model.entropy_bottleneck)
    same = all(np.array_equal(getattr(z, name), getattr(record.z_tables, name)) for name in ("cdf", "size", "offset"))
    return same and len(record.weights) == model.M
