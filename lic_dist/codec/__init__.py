"""The bitstream: container, rANS coding, images to bytes and back.

from lic_dist.codec import open_codec

codec = open_codec("base-small", "tcq8")
data = codec.encode(image).data  # image uint8 [H, W, 3] or [H, W]
image = codec.decode(data)
image = open_decoder(data, "base-small").decode(data)  # with the quantizer that the file states

codec = open_codec("base-0.013", "tcq8", progressive=True)  # of its files every prefix decodes (docs/progressive.md)

Files in blocks, of which regions decode, have a codec of their own: block_codec.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lic_dist.codec.codec import ImageCodec


def open_codec(
    model: str,
    quantizer: str = "sq",
    architecture: str | None = None,
    lmbda: float | None = None,
    integer: bool = False,
    progressive: bool = False,
) -> ImageCodec:
    """Return the codec of a checkpoint and one of its quantizers, on the CPU.

    `model` is a checkpoint's path or a name of `lic-dist models`. `quantizer` is `sq`, a name that the checkpoint
    carries, or a record's file or folder. `architecture` and `lmbda` are for a checkpoint that does not state them;
    `integer` is ImageCodec's. With `progressive` it is a ProgressiveCodec, which takes S_c and the tables of z of the
    quantizer.

    Raises:
        UsageError: there is no such checkpoint or quantizer, or they do not go together.
        LicError: a file that is no checkpoint, or no record.
    """
    from lic_dist.codec.codec import ImageCodec
    from lic_dist.codec.records import local_record
    from lic_dist.models import checkpoint

    loaded = checkpoint.load(str(model), architecture, lmbda)
    checkpoint.check_agrees(loaded.spec, architecture=architecture, lmbda=lmbda)
    kind = ImageCodec
    if progressive:
        from lic_dist.codec.progressive import ProgressiveCodec as kind
    return kind(loaded.model, local_record(loaded, str(quantizer)), integer)


def open_decoder(data: bytes, model: str, architecture: str | None = None, lmbda: float | None = None) -> ImageCodec:
    """Return the codec that decodes a file's bytes: a checkpoint, with the one of its quantizers that the file states.
    Of a progressive file it is a ProgressiveCodec, and the bytes may be a prefix.

    Raises:
        UsageError: there is no such checkpoint.
        BitstreamError: no bitstream, or one of another model or of a quantizer that the checkpoint does not carry.
        LicError: a file that is no checkpoint.
    """
    from lic_dist.codec.blocks import is_in_blocks
    from lic_dist.codec.codec import ImageCodec, model_id, require_model
    from lic_dist.codec.container import Container
    from lic_dist.codec.progressive import ProgressiveCodec, record_of
    from lic_dist.codec.rans import BitstreamError
    from lic_dist.codec.records import record_by_id
    from lic_dist.codec.units import Progressive, is_progressive
    from lic_dist.models import checkpoint
    from lic_dist.models.names import split_pack

    if is_in_blocks(data):
        raise BitstreamError("this file is in blocks", hint="lic_dist.codec.block_codec.open_block_decoder reads it")
    container = Progressive.unpack(data) if is_progressive(data) else Container.unpack(data)
    loaded = checkpoint.load(str(model), architecture, lmbda)
    checkpoint.check_agrees(loaded.spec, architecture=architecture, lmbda=lmbda)
    (base, pack), own = split_pack(str(model)), model_id(loaded.model)
    if pack and own != container.model == model_id(checkpoint.load(base, architecture, lmbda).model):
        raise BitstreamError(f"this file was made without the pack {pack}", hint=f"leave it out: {base} alone")
    require_model(container.model, own)
    if isinstance(container, Progressive):
        return ProgressiveCodec(loaded.model, record_of(loaded, container.record))
    return ImageCodec(loaded.model, record_by_id(loaded, container.record))
