"""Code images to bytes and back, with any quantizer record.

    image -> pad -> g_a -> y -> h_a -> z -> rANS
                           |           h_s -> means, scales -> search -> k -> rANS -> container

The decoder repeats h_s on the same z and gets the same levels. A checksum of the level planes detects a model that
computes differently on another machine, and gives one clear error. Large images go through the networks in tiles.
Imports no cache, training or engine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.codec import rans, walk
from lic_dist.codec.container import OVERHEAD, Container
from lic_dist.codec.heads import check_sides
from lic_dist.codec.offsets import pack as pack_offsets
from lic_dist.codec.offsets import unpack as unpack_offsets
from lic_dist.codec.pixels import to_pixels, window
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.refine import refine, refinement_of
from lic_dist.codec.strips import Pool
from lic_dist.codec.tiles import Grid, analyse, answer, run_in_tiles, strip_edges, synthesise
from lic_dist.errors import LicError
from lic_dist.models.architectures import adapt
from lic_dist.models.integer import IntegerNet, exact_z_hat
from lic_dist.models.parts import decoder_digest, entropy_digest
from lic_dist.models.protocol import TRANSFORMS, Run, Sides
from lic_dist.models.refine import refine_z
from lic_dist.models.retired import remedy, retired
from lic_dist.models.stages import known_stage, only_side
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import SCALAR


@dataclass(frozen=True)
class FoundLatents:
    """What an encoder finds for an image.

    shape is the image's; z int16 [Nz, positions]; level (see `walk.levels`) and k int16 [M, h*w]; y_hat float32 [1, M,
    h, w]; offsets as a file has them, no bytes where it has none.
    """

    shape: tuple[int, ...]
    z: NDArray[np.int16]
    level: NDArray[np.integer[Any]]
    k: NDArray[np.int16]
    y_hat: Tensor
    offsets: bytes


@dataclass(frozen=True)
class EncodedImage(FoundLatents):
    """One coded image: the bytes of its file, and what the encoder knew when it wrote them."""

    data: bytes

    @property
    def coded_bits(self) -> int:
        """Bits of the two entropy-coded streams, scale offsets among them."""
        return 8 * (len(self.data) - OVERHEAD)

    @property
    def container_bits(self) -> int:
        """Bits of header and checksum around the streams."""
        return 8 * OVERHEAD


@dataclass(frozen=True)
class DecodedLatents:
    """The latents of a bitstream; the fields are those of `FoundLatents`."""

    shape: tuple[int, ...]
    k: NDArray[np.int16]
    y_hat: Tensor


def padding(height: int, width: int, multiple: int = 64) -> tuple[int, int, int, int]:
    """Return CompressAI's centred padding to multiples of pixels: (left, right, top, bottom)."""
    tall, wide = -height % multiple, -width % multiple
    return wide // 2, wide - wide // 2, tall // 2, tall - tall // 2


def model_id(model: nn.Module) -> bytes:
    """Return the four bytes by which a file identifies its model: of the entropy model and the decoder."""
    return hashlib.sha256(f"{entropy_digest(model)} {decoder_digest(model)}".encode()).digest()[:4]


def require_model(stated: bytes, expected: bytes) -> None:
    """Raise BitstreamError where a file states another model than the one of this `model_id`."""
    if stated == expected:
        return
    if name := retired(stated.hex()):
        raise BitstreamError(f"this file was made with the {name} of lic_dist 0.1.0", hint=remedy(name))
    raise BitstreamError(
        "this file was made with another model",
        hint="give the checkpoint it was made with, and its --pack if it had one",
    )


class ImageCodec:
    """A model in eval mode and a quantizer record, ready to code images of any size, RGB or grey.

    `integer` encodes with the entropy model in integers (models/integer.py), so that the file decodes on any machine; a
    decoder follows the file's flag. `threads` of the CPU, by default as many as torch has, share out rows, tiles and
    lanes; bytes and pixels do not depend on them. `advance` is called for each part that g_a reads or g_s has made.

    Raises:
        LicError: the record has another number of channels than the model, or its family does not support `integer`.
    """

    progressive = False

    def __init__(
        self, model: nn.Module, record: QuantizerRecord, integer: bool = False, threads: int | None = None
    ) -> None:
        self._codec = adapt(model)
        self._side, channels = only_side(self._codec), self._codec.channels
        if len(record.weights) != channels:
            raise LicError(f"the quantizer has {len(record.weights)} channels, the model {channels}")
        of_y, of_model = (("scale", "channel")[one] for one in (record.by_channel, self._codec.prior is not None))
        if of_y != of_model:
            raise LicError(f"the quantizer's tables of y are by {of_y}, the model's by {of_model}")
        if record.kind.embedded and not self.progressive:
            raise LicError("an embedded quantizer is of progressive files", hint="encode --progressive")
        if self._side.channels and record.z_tables.rows != self._side.channels:
            raise LicError(f"the quantizer has {record.z_tables.rows} channels of z, the model {self._side.channels}")
        if integer:
            self._codec.require("deterministic")
        self.model, self.record, self.quantizer, self.integer = model, record, Quantizer(record), integer
        self.device = next(model.parameters()).device
        self.threads = threads or torch.get_num_threads()
        self.advance: Callable[[], None] = lambda: None
        self.model_id, self.record_id = model_id(model), bytes.fromhex(record.decoding_digest)[:4]

    @torch.no_grad()
    def encode(self, image: NDArray[np.uint8]) -> EncodedImage:
        """Code an image, uint8 [H, W, 3], or a grey one, [H, W].

        Raises:
            LicError: an image larger than the format holds, latents that are not finite, or too large to code.
            ValueError: an array of another type or shape.
        """
        found, planes = self.search(image)
        z, rows = found.z, [(plane.k, self.quantizer.rows(plane.k, plane.level)) for plane in planes]
        z_stream = rans.encode(z, channel_rows(z.shape), self.record.z_tables) if z.size else b""
        y_stream, interleaved = rans.encode_by_size(rows, self.record.y_tables)
        checksum = walk.planes_checksum(planes)
        flags = image.ndim == 2, self.integer, bool(found.offsets), interleaved
        (height, width), identities = image.shape[:2], (self.model_id, self.record_id)
        container = Container(height, width, *identities, checksum, z_stream, found.offsets + y_stream, *flags)
        return EncodedImage(**vars(found), data=container.pack())

    @torch.no_grad()
    def search(self, image: NDArray[np.uint8]) -> tuple[FoundLatents, list[walk.Plane]]:
        """Return what is coded of an image, see `encode`, and the planes of y in the order of coding."""
        with Pool(self.threads) as pool:
            return self._search(image, pool)

    def _search(self, image: NDArray[np.uint8], pool: Pool) -> tuple[FoundLatents, list[walk.Plane]]:
        record, refinement = self.record, refinement_of(self.record)
        height, width = image.shape[:2]
        pixels = partial(self._window, image)
        grid, y, z_lanes = self._latents(image, pool, refinement.z_steps)
        sides_hat, run = self._sides_hat(z_lanes, grid, self.integer), self._run(grid, self.integer, pool)
        again = refinement.steps or record.scale_offsets
        known = known_stage(self._codec, sides_hat, grid.latents, run) if again else None
        search = partial(walk.search, self._codec, sides_hat, run=run, threads=pool.threads, errors=False, known=known)
        if refinement.steps:
            left, _, top, _ = self._padding(height, width)
            inside = slice(top, top + height), slice(left, left + width)
            decoder = partial(answer, self._codec, grid, pixels, inside, refinement)
            y = refine(self._codec, sides_hat, y, self.quantizer, decoder, refinement, run, pool.threads, known)
        coded = search(y, self.quantizer)
        offsets = b""
        if record.scale_offsets and (chosen := walk.best_offsets(self._codec, self.quantizer, coded)).any():
            offsets = pack_offsets(chosen)
            coded = search(y, self.quantizer, offsets=chosen)
        k, level = (one[0].flatten(1).cpu().numpy() for one in (coded.k, coded.level))
        return FoundLatents(image.shape, z_lanes, level, k, coded.y_hat, offsets), coded.planes()

    def _latents(
        self, image: NDArray[np.uint8], pool: Pool, z_steps: int = 0
    ) -> tuple[Grid, Tensor, NDArray[np.int16]]:
        """Return the tiles of an image, its y float32 [1, M, h, w], and z int16 [Nz, positions], which `z_steps` move;
        see `encode`.
        """
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ValueError(f"an image is uint8 [H, W, 3] or [H, W], not {image.dtype} {image.shape}")
        height, width = image.shape[:2]
        check_sides(height, width)
        grid = self.grid(height, width)
        y, z = analyse(self._codec, grid, partial(self._window, image), pool)
        y = y.float()
        _require_finite(y, z)
        if z_steps:
            z = refine_z(self._codec, y, z_steps)
            _require_finite(y, z)
        return grid, y, z[0].flatten(1).cpu().numpy().astype(np.int16)

    @torch.no_grad()
    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """Decode a bitstream to the shape of the encoder's image: uint8 [H, W, 3], or [H, W] of a grey one.

        Raises:
            BitstreamError: cut, altered, of another model or quantizer, or decoded on a machine that computes other
                scales.
        """
        return self.picture(self.decode_latents(data))

    @torch.no_grad()
    def decode_latents(self, data: bytes) -> DecodedLatents:
        """Return the result of entropy decoding, before g_s. Raises BitstreamError: see `decode`."""
        container = Container.unpack(data)
        self.require(container.model, container.record)
        shape = (container.height, container.width) if container.grey else (container.height, container.width, 3)
        z = self._decode_z(container.z, self.grid(*shape[:2]))
        offsets, stream = None, container.y
        if container.offsets:
            offsets, stream = unpack_offsets(stream, self._codec.channels)
        decoder = rans.Decoder(stream, container.interleaved)
        reader = walk.LevelsFirst(decoder, container.planes, self.quantizer)
        return self.read(shape, z, reader, offsets, container.integer)

    def require(self, model: bytes, record: bytes) -> None:
        """Raise BitstreamError where a file states another model or quantizer than these."""
        require_model(model, self.model_id)
        if record != self.record_id:
            raise BitstreamError(
                "this file was made with another quantizer", hint="give the quantizer it was made with"
            )

    @torch.no_grad()
    def read(
        self,
        shape: tuple[int, ...],
        z_lanes: NDArray[np.int16],
        reader: walk.Reader,
        offsets: NDArray[np.int8] | None,
        integer: bool,
    ) -> DecodedLatents:
        """Return the latents of a picture of a shape and z int16 [Nz, positions], with y as it is read; see `decode`.

        Raises:
            BitstreamError: of the reader.
        """
        grid = self.grid(*shape[:2])
        sides_hat = self._sides_hat(z_lanes, grid, integer)
        with Pool(self.threads) as pool:
            run = self._run(grid, integer, pool)
            k, y_hat = walk.decode(self._codec, sides_hat, grid.latents, reader, self.quantizer, run, offsets)
        return DecodedLatents(shape, k[0].flatten(1).numpy(), y_hat)

    def picture(self, latents: FoundLatents | DecodedLatents) -> NDArray[np.uint8]:
        """Return g_s of y_hat in the image's shape: the decoded picture or, for an encoder's latents, the expected
        one.
        """
        return self._picture(latents.y_hat, latents.shape)

    def estimated_bits(self, encoded: FoundLatents) -> float:
        """Return the sum of -log2 over the integer tables, for z and y, and the bits of scale offsets."""
        return self.side_bits(encoded) + float(self.channel_bits(encoded).sum())

    def side_bits(self, encoded: FoundLatents) -> float:
        """Return the part of z and of scale offsets in `estimated_bits`."""
        of_z = self.record.z_tables.bits(encoded.z, channel_rows(encoded.z.shape))
        return float(of_z.sum()) + 8 * len(encoded.offsets)

    def channel_bits(self, encoded: FoundLatents) -> NDArray[np.float64]:
        """Return the part of each channel of y in `estimated_bits`, [M]."""
        whole = encoded.y_hat.shape
        k, level = (torch.from_numpy(one).reshape(whole) for one in (encoded.k, encoded.level))
        bits: NDArray[np.float64] = walk.channel_bits(self._codec, self.quantizer, k, level)[0]
        return bits

    @torch.no_grad()
    def likelihood_bits(self, encoded: FoundLatents) -> float:
        """Return the sum of -log2 of the continuous model's likelihoods, with cells of step 1 about the means.

        nan for quantizers with other cells.
        """
        if not self.record.is_unit_sq:
            return math.nan
        grid = self.grid(*encoded.shape[:2])
        sides_hat = self._sides_hat(encoded.z, grid, self.integer)
        k = torch.from_numpy(encoded.k).reshape(encoded.y_hat.shape).to(self.device)
        with Pool(self.threads) as pool:
            run = self._run(grid, self.integer, pool)
            of_y = walk.likelihood_bits(self._codec, sides_hat, k, self.quantizer, run)
        of_z = self._side.likelihood(self._side.dequantize(self._z_tensor(encoded.z, grid)))
        return of_y - float(of_z.double().log2().sum())

    def _decode_z(self, stream: bytes, grid: Grid) -> NDArray[np.int16]:
        rows = self.z_rows(grid)
        if rows.size:
            return rans.decode(stream, rows, self.record.z_tables, SCALAR)
        if stream:
            raise BitstreamError("this file holds a side latent, and its model has none")
        return np.empty(rows.shape, np.int16)

    def z_rows(self, grid: Grid) -> NDArray[np.int32]:
        """Return the rows of z's tables, int32 [Nz, positions], for a picture of these tiles."""
        return channel_rows((self._side.channels, grid.high * grid.wide * grid.side**2))

    def _z_tensor(self, z_lanes: NDArray[np.int16], grid: Grid) -> Tensor:
        shape = 1, len(z_lanes), grid.side * grid.high, grid.side * grid.wide
        return torch.from_numpy(z_lanes.astype(np.int32)).reshape(shape).to(self.device)

    def _sides_hat(self, z_lanes: NDArray[np.int16], grid: Grid, integer: bool) -> Sides:
        """Return z_hat of z int16 [Nz, positions], as the networks in integers or the model's own take it."""
        z = self._z_tensor(z_lanes, grid)
        return (exact_z_hat(self._side, z) if integer else self._side.dequantize(z),)

    def _run(self, grid: Grid, integer: bool, pool: Pool) -> Run:
        """Return the `run` of `CodecModel.walk` for an image."""
        nets = self._integer_nets if integer and not self._codec.exact else self._codec.nets
        return run_in_tiles(self._codec, grid, nets.__getitem__, pool)

    @cached_property
    def _integer_nets(self) -> dict[str, IntegerNet]:
        return {name: IntegerNet(net) for name, net in self._codec.nets.items() if name not in TRANSFORMS}

    def grid(self, height: int, width: int) -> Grid:
        """Return the tiles of a picture of this size in pixels."""
        return Grid.of(height, width, self._codec.strides)

    def part_count(self, height: int, width: int, encoding: bool) -> int:
        """Return how often `advance` is called for a picture of this size in pixels."""
        grid, record = self.grid(height, width), self.record
        reads = grid.pixel if encoding else grid.latent
        strips = len(strip_edges(self._codec, grid, "g_a" if encoding else "g_s", reads)) - 1
        passes = record.refine + 1 if encoding and record.refine else 0  # the last one tells what it ended with
        return strips + (passes and passes * len(list(grid.tiles(self._codec, "g_s", grid.latent, grid.pixel))))

    def _padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        return padding(height, width, self._codec.strides.multiple)

    def _window(self, image: NDArray[np.uint8], rows: slice, columns: slice) -> Tensor:
        """Return a window of the padded image as g_a reads it: float32 [1, 3, ., .]."""
        self.advance()
        left, _, top, _ = self._padding(*image.shape[:2])
        return window(image, rows, columns, (top, left), self.device)

    @torch.no_grad()
    def _picture(self, y_hat: Tensor, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return g_s of y_hat in 8 bits, cropped to the image; a grey image is the mean of the colours, rounded
        once.
        """
        height, width = shape[:2]
        left, right, top, bottom = self._padding(height, width)
        padded = np.empty((height + top + bottom, width + left + right, *shape[2:]), np.uint8)
        with Pool(self.threads) as pool:
            for rows, x_hat in synthesise(self._codec, self.grid(height, width), y_hat, pool):
                if not to_pixels(x_hat[0], padded[rows]):
                    hint = "is this the checkpoint of a trained model?"
                    raise LicError("the decoder's picture is not finite", hint)
                self.advance()
        return np.ascontiguousarray(padded[top : top + height, left : left + width])


def _require_finite(y: Tensor, z: Tensor) -> None:
    if bool((z.abs() > 32767).any()) or not bool(torch.isfinite(y.sum()) or torch.isfinite(y).all()):
        raise LicError("the encoder's latents overflow", hint="is this the checkpoint of a trained model?")


def channel_rows(shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Return the rows of z's tables for z of a shape [Nz, positions]: of each element its channel."""
    return np.ascontiguousarray(np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None], shape))
