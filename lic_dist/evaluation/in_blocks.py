"""Measure files in blocks: rates of their real bytes, and the latents of all blocks together.

The size of each block in a file's head, and its checksum, are the price of blocks: they count as rate. Only what a file
has once is container.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lic_dist.codec.block_codec import BlockCodec, of_bytes
from lic_dist.codec.blocks import Blocks
from lic_dist.codec.codec import FoundLatents
from lic_dist.codec.rans import BitstreamError
from lic_dist.evaluation.memory import Peak
from lic_dist.evaluation.metrics import distortion
from lic_dist.evaluation.results import ImageResult, counts_of
from lic_dist.models.boundary import boundary_id
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import model_digest


@dataclass(frozen=True)
class SidedCodec:
    """A codec of files in blocks of one side in pixels."""

    codec: BlockCodec
    side: int


@dataclass(frozen=True)
class MeasuredBlocks:
    """A coded image: figures, the decoded picture uint8 [H, W, 3], the file, the bits of each channel of y, float64
    [M], and `results.counts_of` k.
    """

    result: ImageResult
    picture: NDArray[np.uint8]
    data: bytes
    bits: NDArray[np.float64]
    counts: NDArray[np.int64]


def digest_with_boundary(loaded: Checkpoint) -> str:
    """Return the digest of a checkpoint's tensors, of which those of its boundary network count."""
    digest = model_digest(loaded.model)
    if not loaded.boundary:
        return digest
    return hashlib.sha256(f"{digest} {boundary_id(loaded.boundary).hex()}".encode()).hexdigest()


def rates(head: Blocks, size: int) -> dict[str, float]:
    """Return `bpp` and `container_bpp` of a file in blocks of so many bytes."""
    pixels, container = head.height * head.width, head.once
    return {"bpp": 8 * (size - container) / pixels, "container_bpp": 8 * container / pixels}


def measure_blocks(codec: SidedCodec, image: NDArray[np.uint8], name: str, metrics: Sequence[str]) -> MeasuredBlocks:
    """Encode, decode and measure one image, uint8 [H, W, 3]; PSNR always, and these metrics.

    Every block holds a checksum of its levels and indices, by which the decoder knows that it has the encoder's.

    Raises:
        LicError: latents that cannot be coded.
        BitstreamError: the decoded latents differ from the encoder's.
    """
    found: list[FoundLatents] = []
    memory, started = Peak(), time.perf_counter()
    encoded = codec.codec.encode(image, codec.side, found.append)
    middle, encode_bytes = time.perf_counter(), memory.bytes
    memory, resumed = Peak(), time.perf_counter()
    try:
        decoded = codec.codec.decode(of_bytes(encoded.data))
    except BitstreamError as error:
        raise BitstreamError(f"{name}: {error.message}", hint=str(error.hint)) from None
    ended, decode_bytes = time.perf_counter(), memory.bytes
    alone, pixels = codec.codec.alone, image.shape[0] * image.shape[1]
    rate, bits = rates(encoded.head, len(encoded.data)), np.sum([alone.channel_bits(one) for one in found], axis=0)
    result = ImageResult(
        image=name,
        height=image.shape[0],
        width=image.shape[1],
        bpp=rate["bpp"],
        container_bpp=rate["container_bpp"],
        **distortion(metrics, image, decoded),
        estimated_bpp=(sum(map(alone.side_bits, found)) + float(bits.sum())) / pixels,
        likelihood_bpp=sum(map(alone.likelihood_bits, found)) / pixels,
        encode_seconds=middle - started,
        decode_seconds=ended - resumed,
        encode_bytes=encode_bytes,
        decode_bytes=decode_bytes,
    )
    counts = np.sum([counts_of(one.k) for one in found], axis=0)
    return MeasuredBlocks(result, decoded, encoded.data, bits, counts)
