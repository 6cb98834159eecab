"""Code pictures in blocks that decode alone, side by side, and only as far as a region needs them.

    blocks of the picture, each alone -> z and y in one stream (one_stream.py) -> container (blocks.py)
    container -> blocks, each alone -> edges mended (edges.py)

After "Learned block-based hybrid image compression" (Wu et al. 2022), without its prediction of blocks from their
neighbours, for which they would have to wait. Nothing that is coded or decoded depends on threads, and a region has the
pixels that are at its place in the whole decoded picture.

    codec = open_block_codec("base-0.013")
    data = codec.encode(image, 256).data
    part = codec.decode(of_bytes(data), Part(slice(0, 100), slice(900, 1200)))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist import remote
from lic_dist.codec.blocks import UNIT, Block, Blocks, Layout, Read
from lic_dist.codec.codec import FoundLatents, model_id, require_model
from lic_dist.codec.edges import Part, mend, needed
from lic_dist.codec.heads import LARGEST_SIDE, check_sides
from lic_dist.codec.one_stream import OneStreamCodec
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.records import local_record, preferred_quantizer, record_by_id
from lic_dist.codec.strips import Pool
from lic_dist.errors import LicError, UsageError
from lic_dist.models import boundary as boundaries
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.integer import IntegerNet
from lic_dist.quantization.record import QuantizerRecord

SIDE = 256  # pixels
_BEGIN = 1 << 12  # bytes of a file at a URL that are read at once: most heads
_REACHABLE = "is the file there, and does its server answer to ranges?"


@dataclass(frozen=True)
class EncodedBlocks:
    """One coded image: the bytes of its file, and its head."""

    data: bytes
    head: Blocks


class BlockCodec:
    """A model in eval mode and a quantizer record, ready to code images in blocks; `integer` is ImageCodec's.

    `boundary` is what the model's checkpoint carries of a boundary network: files state it, and it mends edges where
    they do. `threads` of the CPU, by default as many as torch has, code blocks side by side. `advance` is called for
    each block.

    Raises:
        LicError: as ImageCodec; a boundary network of another version.
    """

    def __init__(
        self,
        model: nn.Module,
        record: QuantizerRecord,
        boundary: Mapping[str, Tensor] | None = None,
        integer: bool = False,
        threads: int | None = None,
    ) -> None:
        self.alone = OneStreamCodec(model, record, integer, threads=1)
        self.threads = threads or torch.get_num_threads()
        self.advance: Callable[[], None] = lambda: None
        self._carried = dict(boundary or {})
        self.boundary_id = boundaries.boundary_id(self._carried) if self._carried else b""

    @cached_property
    def _network(self) -> IntegerNet:
        return boundaries.loaded(self._carried).exact()

    def require_side(self, side: int) -> None:
        """Raise UsageError for a side in pixels that is no multiple of the model's strides."""
        unit = max(UNIT, self.alone.grid(1, 1).pixel)
        if side < 1 or side % unit or side > LARGEST_SIDE:
            least = max(1, round(side / unit)) * unit
            raise UsageError(
                f"blocks of {side} pixels do not fit this model", hint=f"a multiple of {unit}, such as {least}"
            )

    def encode(
        self,
        image: NDArray[np.uint8],
        side: int = SIDE,
        tell: Callable[[FoundLatents], None] = lambda found: None,
    ) -> EncodedBlocks:
        """Code an image, uint8 [H, W, 3] or [H, W], in blocks of a side in pixels; `tell` is given what was found for
        each, in their order.

        Raises:
            UsageError: a side that is no multiple of the model's strides.
            LicError, ValueError: as `ImageCodec.encode`.
        """
        self.require_side(side)
        height, width = image.shape[:2]
        check_sides(height, width)
        layout = Layout(height, width, side)

        def coded(number: int) -> tuple[FoundLatents, Block]:
            return self.alone.encode_block(np.ascontiguousarray(image[layout.place(number)]))

        made, offsets = [], set()
        with Pool(self.threads) as pool:
            for number, (found, block) in enumerate(pool.map(coded, range(layout.count))):
                tell(found)
                made.append(block.pack())
                if block.offsets:
                    offsets.add(number)
                self.advance()
        identities, sizes = (self.alone.model_id, self.alone.record_id), tuple(map(len, made))
        flags = image.ndim == 2, self.alone.integer
        head = Blocks(height, width, *identities, side, sizes, *flags, self.boundary_id, frozenset(offsets))
        return EncodedBlocks(b"".join([head.pack(), *made]), head)

    def decode(self, read: Read, region: Part | None = None, mended: bool = True) -> NDArray[np.uint8]:
        """Decode a file, or a region of it, from the blocks alone that it needs: uint8 [h, w, 3], or [h, w] of grey.

        Without `mended` the edges of blocks stay as they were decoded, whatever the file asks for.

        Raises:
            BitstreamError: altered, of another model, quantizer or boundary network, or decoded on a machine that
                computes other scales; cut where it is read, or, of a whole picture, with bytes left over.
            UsageError: a region that is not in the picture.
        """
        head = Blocks.read(read)
        self.alone.require(head.model, head.record)
        mends = mended and bool(head.boundary) and head.layout.count > 1
        if mends and head.boundary != self.boundary_id:
            raise BitstreamError(
                "the edges of this file's blocks are for a boundary network that the checkpoint does not carry",
                hint="give the checkpoint it was made with; --no-boundary leaves the edges as they are",
            )
        whole = Part(slice(0, head.height), slice(0, head.width))
        wanted = whole if region is None else checked(region, head)
        if region is None and read(head.begins[-1], 1):
            raise BitstreamError("this bitstream in blocks has bytes left over")
        numbers, at = needed(head.layout, wanted, mends)
        picture = np.zeros((*at.shape, *head.shape[2:]), np.uint8)

        def decode(number: int) -> None:
            block = Part(*head.layout.place(number))
            shown = Part(_common(block.rows, at.rows), _common(block.columns, at.columns))
            decoded = self.alone.decode_block(head.block(read, number), head.grey, head.integer)
            picture[shown.within(at)] = decoded[shown.within(block)]

        with Pool(self.threads) as pool:
            for _ in pool.map(decode, numbers):
                self.advance()
            if mends:
                mend(picture, at, head.layout, wanted, self._network, pool)
        return picture if wanted == at else picture[wanted.within(at)].copy()

    def count(self, head: Blocks, region: Part | None = None, mended: bool = True) -> tuple[int, int]:
        """Return how many blocks a region, or the whole picture, is decoded from, and their bytes with the head's."""
        wanted = Part(slice(0, head.height), slice(0, head.width)) if region is None else checked(region, head)
        numbers, _ = needed(head.layout, wanted, mended and bool(head.boundary))
        return len(numbers), head.begins[0] + sum(head.sizes[number] for number in numbers)


def _common(one: slice, other: slice) -> slice:
    return slice(max(one.start, other.start), min(one.stop, other.stop))


def checked(region: Part, head: Blocks) -> Part:
    """Return a region of a picture. Raises UsageError where it is empty, or not in the picture."""
    rows, columns = region.rows, region.columns
    if not (0 <= rows.start < rows.stop <= head.height and 0 <= columns.start < columns.stop <= head.width):
        height, width = region.shape
        raise UsageError(
            f"the region {columns.start},{rows.start},{width},{height} is not in the picture",
            hint=f"x,y,w,h in pixels, within {head.width}x{head.height}",
        )
    return region


def open_block_codec(
    model: str,
    quantizer: str | None = None,
    architecture: str | None = None,
    lmbda: float | None = None,
    integer: bool = False,
    boundary: bool = True,
) -> BlockCodec:
    """Return the codec of a checkpoint and one of its quantizers, by default `preferred_quantizer`, on the CPU; see
    `open_codec`. Its files state the boundary network that the checkpoint carries, if `boundary`.
    """
    loaded = checkpoints.load(str(model), architecture, lmbda)
    checkpoints.check_agrees(loaded.spec, architecture=architecture, lmbda=lmbda)
    record = local_record(loaded, quantizer or preferred_quantizer(loaded))
    return BlockCodec(loaded.model, record, loaded.boundary if boundary else None, integer)


def open_block_decoder(
    read: Read,
    model: str,
    quantizer: str | None = None,
    architecture: str | None = None,
    lmbda: float | None = None,
) -> BlockCodec:
    """Return the codec that decodes a file in blocks, with the quantizer that it states; see `open_decoder`."""
    head = Blocks.read(read)
    loaded = checkpoints.load(str(model), architecture, lmbda)
    checkpoints.check_agrees(loaded.spec, architecture=architecture, lmbda=lmbda)
    require_model(head.model, model_id(loaded.model))
    record = record_by_id(loaded, head.record) if quantizer is None else local_record(loaded, quantizer)
    return BlockCodec(loaded.model, record, loaded.boundary)


def of_bytes(data: bytes) -> Read:
    """Return what reads a file whose bytes are in memory."""
    return lambda first, size: data[first : first + size]


@contextmanager
def reading(place: str) -> Iterator[Read]:
    """Open a file, by its path or its URL, of which only parts are read. Raises LicError where it cannot be read."""
    if "://" in place:
        yield _of_url(place)
        return
    path = Path(place)
    if path.exists() and not path.is_file():
        raise LicError(f"cannot read {place}: it is not a plain file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise LicError(f"cannot read {place}: {error.strerror}") from None
    with file:
        length = os.fstat(file.fileno()).st_size
        yield lambda first, size: os.pread(file.fileno(), max(0, min(size, length - first)), first)


def _of_url(url: str) -> Read:
    folder, _, name = url.rpartition("/")
    try:
        length = remote.request(folder, (), lambda obstore, store: int(obstore.head(store, name)["size"]), _REACHABLE)
    except FileNotFoundError:
        raise LicError(f"cannot read {url}: there is no such file") from None

    def fetched(first: int, size: int) -> bytes:
        size = min(size, length - first)
        if size <= 0:
            return b""
        return remote.request(
            folder,
            (),
            lambda obstore, store: bytes(obstore.get_range(store, name, start=first, length=size)),
            _REACHABLE,
        )

    begin = fetched(0, _BEGIN)
    return lambda first, size: begin[first : first + size] if first + size <= _BEGIN else fetched(first, size)
