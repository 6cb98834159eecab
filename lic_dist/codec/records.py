"""Choose the quantizer of a bitstream: CompressAI's own tables, a record that the checkpoint carries, or a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lic_dist.codec.rans import BitstreamError
from lic_dist.errors import UsageError
from lic_dist.models.architectures import adapt
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.protocol import CodecModel
from lic_dist.models.stages import only_side
from lic_dist.quantization.rates import CdfTables
from lic_dist.quantization.record import NO_Z, QuantizerRecord

SAME_PRIOR = 16  # of 65536: a prior's tables on another kind of CPU, whose last bits differ, lie closer
OFFSETS = "+offsets"  # behind the name of a quantizer: the same with scale offsets


def coder_tables(entropy_model: Any) -> CdfTables:
    """Return the integer tables of one of CompressAI's entropy models, after `update(force=True)`."""
    return CdfTables(
        entropy_model._quantized_cdf.cpu().numpy().astype(np.int32),
        entropy_model._cdf_length.cpu().numpy().astype(np.int32).reshape(-1),
        entropy_model._offset.cpu().numpy().astype(np.int32).reshape(-1),
    )


def side_tables(codec: CodecModel) -> CdfTables:
    """Return the integer tables of a model's side latent, a row a channel; without one, those of a record that codes
    no z.
    """
    side = only_side(codec)
    return coder_tables(side.prior) if side.channels else NO_Z


def compressai_record(checkpoint: Checkpoint) -> QuantizerRecord:
    """Return SQ as CompressAI codes it: step 1, its Gaussian tables, the next scale level above; or its tables by
    channel.
    """
    codec = checkpoint.codec
    prior = codec.prior
    return QuantizerRecord(
        name="sq",
        step=1.0,
        lmbda=checkpoint.spec.lmbda,
        lambda_scale=1.0,
        weights=np.ones(codec.channels, np.float32),
        level_rule="channel" if prior else "above",
        y_tables=coder_tables(prior.prior if prior else codec.gaussian),
        z_tables=side_tables(codec),
        notes={"rates": "compressai"},
    )


def local_record(checkpoint: Checkpoint, name: str) -> QuantizerRecord:
    """Return `sq` (CompressAI's tables), a record that the checkpoint carries, or the record of a file or folder; with
    OFFSETS behind the name, one that chooses scale offsets for each picture.

    Raises:
        UsageError: none of these, or a record of another prior of z or number of channels.
        LicError: a file that is no record.
    """
    if name.endswith(OFFSETS):
        return with_offsets(local_record(checkpoint, name.removesuffix(OFFSETS)), checkpoint)
    if name in checkpoint.quantizers:
        return QuantizerRecord.from_json(checkpoint.quantizers[name])
    if name == "sq":
        return compressai_record(checkpoint)
    path = Path(name)
    path = path / "record.json" if path.is_dir() else path
    if path.is_file():
        return require_fit(QuantizerRecord.load(path), checkpoint, name)
    raise unknown_quantizer(checkpoint, name)


def with_offsets(record: QuantizerRecord, checkpoint: Checkpoint) -> QuantizerRecord:
    """Return a record that chooses scale offsets for each picture. Raises UsageError where the model has no scales."""
    if record.by_channel:
        raise UsageError(f"{checkpoint.source} has a prior for each channel, no scales that offsets could move")
    return replace(record, scale_offsets=True)


def preferred_quantizer(checkpoint: Checkpoint, progressive: bool = False) -> str:
    """Return the quantizer to encode with where none is named: the carried TCQ with the most states that is for the
    model's lambda, else `sq`. For a progressive file it is the carried cut of bit planes that knows the most, if any.

    Records of the caches that a model was trained from (`...-cached`) are for decoding alone.
    """
    records = {name: QuantizerRecord.from_json(text) for name, text in checkpoint.quantizers.items()}
    carried = {name: one for name, one in records.items() if not name.endswith("-cached")}
    cuts = {name: one.lmbda for name, one in carried.items() if one.kind.embedded}
    if progressive and cuts:
        return max(cuts, key=lambda name: cuts[name])
    lmbda = checkpoint.spec.lmbda
    states = {name: one.states for name, one in carried.items() if (one.name, one.lmbda) == ("tcq", lmbda)}
    return max(states, key=lambda name: states[name], default="sq")


def known_records(checkpoint: Checkpoint) -> dict[str, QuantizerRecord]:
    """Return CompressAI's record and the carried ones by name."""
    carried = {name: QuantizerRecord.from_json(text) for name, text in checkpoint.quantizers.items()}
    return {"sq": compressai_record(checkpoint), **carried}


def record_by_id(checkpoint: Checkpoint, record_id: bytes) -> QuantizerRecord:
    """Return CompressAI's record or a carried one, by the first bytes of its `decoding_digest`, which a file states.

    Raises:
        BitstreamError: the checkpoint carries none of this digest.
    """
    known = known_records(checkpoint)
    for record in known.values():
        if record.decoding_digest.startswith(record_id.hex()):
            return record
    there = ", ".join(f"{name} {record.decoding_digest[: 2 * len(record_id)]}" for name, record in known.items())
    raise BitstreamError(
        f"this file was made with quantizer {record_id.hex()}, which {checkpoint.source} does not carry",
        hint=f"it has {there}; name the file's with --quantizer RECORD",
    )


def unknown_quantizer(checkpoint: Checkpoint, name: str) -> UsageError:
    """Return the error that there is no quantizer of this name, with the names that there are."""
    known = ", ".join(["sq", *checkpoint.quantizers])
    return UsageError(f"no quantizer '{name}' with {checkpoint.source}", hint=f"one of: {known}; or a record.json")


def require_fit(record: QuantizerRecord, checkpoint: Checkpoint, name: str) -> QuantizerRecord:
    """Return the record, if it was made for this checkpoint; its lambda may be another.

    Raises:
        UsageError: it has another prior of z or number of channels.
    """
    if not fits(record, checkpoint.model):
        raise UsageError(
            f"the quantizer {name} was made for another model than {checkpoint.source}",
            hint="calibrate one for it: `lic-dist cache adapt`",
        )
    return record


def fits(record: QuantizerRecord, model: nn.Module) -> bool:
    """Return whether a record was made for this model's prior of z, number of channels and kind of tables of y.

    Coding takes the record's tables. Those made here may differ a little, as the prior's floats depend on the CPU.
    """
    codec = adapt(model)
    z, of_record = side_tables(codec), record.z_tables
    same = all(np.array_equal(getattr(z, name), getattr(of_record, name)) for name in ("size", "offset"))
    near = same and z.cdf.shape == of_record.cdf.shape and np.abs(z.cdf - of_record.cdf).max(initial=0) <= SAME_PRIOR
    return bool(near) and len(record.weights) == codec.channels and record.by_channel == (codec.prior is not None)
