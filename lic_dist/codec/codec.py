"""Images to bytes and back, with any quantizer record.

    image -> pad -> g_a -> y -> h_a -> z -> rANS
                           |           h_s -> means, scales -> search -> k -> rANS -> container

The decoder repeats h_s on the same z and gets the same levels; a checksum of the level planes turns a model that
computes differently on another machine into one clear error. Imports no cache, training or engine.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.codec import rans
from lic_dist.codec.container import Container
from lic_dist.codec.rans import BitstreamError
from lic_dist.errors import LicError
from lic_dist.models.integer import IntegerHyperDecoder
from lic_dist.models.parts import decoder_digest, entropy_digest
from lic_dist.models.stages import Stage, analyse, dequantize_z, run_stages, to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import level_index
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import SCALAR

STRIDE = 64  # of z against pixels


@dataclass(frozen=True)
class Encoded:
    """One coded image: its bytes, the picture its decoder will show, and the rate in bits.

    k and level, [lanes, steps]: the indices and the scale levels that they were coded at.
    coded_bits counts the entropy-coded streams; estimated_bits is the sum of -log2 over the integer tables;
    likelihood_bits the continuous model's (with cells of step 1 about the means; nan for other quantizers).
    """

    data: bytes
    k: NDArray[np.int16]
    level: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]
    coded_bits: int
    estimated_bits: float
    likelihood_bits: float

    @property
    def container_bits(self) -> int:
        """Bits of header and checks around the streams."""
        return 8 * len(self.data) - self.coded_bits


def padding(height: int, width: int) -> tuple[int, int, int, int]:
    """CompressAI's centred padding to multiples of 64: (left, right, top, bottom)."""
    tall, wide = -height % STRIDE, -width % STRIDE
    return wide // 2, wide - wide // 2, tall // 2, tall - tall // 2


class ImageCodec:
    """A model in eval mode and a quantizer record, ready to code RGB images of any size.

    `integer`: encode with h_s in integers (models/integer.py), so that the file decodes on any machine. A decoder does
    as the file says.

    Raises:
        LicError: the record has another number of channels than the model.
    """

    def __init__(self, model: nn.Module, record: QuantizerRecord, integer: bool = False) -> None:
        if len(record.weights) != model.M:
            raise LicError(f"the quantizer has {len(record.weights)} channels, the model {model.M}")
        self.model, self.record, self.quantizer, self.integer = model, record, Quantizer(record), integer
        self.device = next(model.parameters()).device
        networks = hashlib.sha256(f"{entropy_digest(model)} {decoder_digest(model)}".encode()).digest()
        self.model_id, self.record_id = networks[:4], bytes.fromhex(record.digest)[:4]

    @torch.no_grad()
    def encode(self, image: NDArray[np.uint8]) -> Encoded:
        """Code an image, uint8 [H, W, 3].

        Raises:
            LicError: latents that are not finite, or too large to code.
        """
        height, width = image.shape[:2]
        left, right, top, bottom = padding(height, width)
        x = to_input(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None], self.device)
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        y, z = analyse(self.model, x)
        if int(z.abs().max()) > 32767 or not bool(torch.isfinite(y).all()):
            raise LicError("the encoder's latents overflow", hint="is this the checkpoint of a trained model?")
        z_lanes = z[0].reshape(z.shape[1], -1).cpu().numpy().astype(np.int16)
        z_rows = _channel_rows(z_lanes.shape)
        z_tables, y_tables = self.record.z_tables, self.record.y_tables
        estimated = float(z_tables.bits(z_lanes, z_rows).sum())
        likelihood = self._z_likelihood_bits(z)
        streams: list[bytes] = []
        indices: list[NDArray[np.int16]] = []
        level_planes: list[NDArray[np.uint8]] = []
        planes = 0

        def serve(stage: Stage) -> Tensor:
            nonlocal estimated, likelihood, planes
            level = level_index(stage.to_lanes(stage.scales), self.record.level_rule)
            k = self.quantizer.quantize(stage.to_lanes(y.float() - stage.means), level)
            rows = self.quantizer.rows(k, level)
            streams.append(rans.encode(k, rows, y_tables))
            indices.append(k)
            level_planes.append(level)
            planes = zlib.crc32(level.tobytes(), planes)
            estimated += float(y_tables.bits(k, rows).sum())
            y_hat = stage.means + stage.from_lanes(self.quantizer.dequantize(k))
            likelihood += self._y_likelihood_bits(y_hat, stage)
            return y_hat

        y_hat = self._serve(z, self.integer, serve)
        z_stream, y_stream = rans.encode(z_lanes, z_rows, z_tables), b"".join(streams)
        container = Container(
            height, width, self.model_id, self.record_id, planes, z_stream, y_stream, integer=self.integer
        )
        return Encoded(
            container.pack(),
            np.concatenate(indices),
            np.concatenate(level_planes),
            self._picture(y_hat, height, width),
            8 * (len(z_stream) + len(y_stream)),
            estimated,
            likelihood if self.record.name == "sq" and self.record.step == 1 else math.nan,
        )

    @torch.no_grad()
    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The picture of a bitstream: uint8 [H, W, 3].

        Raises:
            BitstreamError: cut, altered, of another model or quantizer, or decoded on a machine that computes the
                scales differently.
        """
        return self.decode_with_indices(data)[0]

    @torch.no_grad()
    def decode_with_indices(self, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        """As `decode`, with the decoded indices k, int16 [lanes, steps]."""
        held = Container.unpack(data)
        if held.model != self.model_id:
            raise BitstreamError("this file was made with another model", hint="give the checkpoint it was made with")
        if held.record != self.record_id:
            raise BitstreamError(
                "this file was made with another quantizer", hint="give the quantizer it was made with"
            )
        left, right, top, bottom = padding(held.height, held.width)
        high, wide = (held.height + top + bottom) // STRIDE, (held.width + left + right) // STRIDE
        channels = self.record.z_tables.cdf.shape[0]
        z_rows = _channel_rows((channels, high * wide))
        z_lanes = rans.decode(held.z, z_rows, self.record.z_tables, SCALAR)
        z = torch.from_numpy(z_lanes.astype(np.int32)).reshape(1, channels, high, wide).to(self.device)
        indices: list[NDArray[np.int16]] = []

        def serve(stage: Stage) -> Tensor:
            level = level_index(stage.to_lanes(stage.scales), self.record.level_rule)
            if zlib.crc32(level.tobytes()) != held.planes:
                raise BitstreamError(
                    "this machine computes other scales than the encoder's",
                    hint="decode with the encoder's backend, or encode with --deterministic",
                )
            k = rans.decode(held.y, level, self.record.y_tables, self.quantizer.trellis)
            indices.append(k)
            return stage.means + stage.from_lanes(self.quantizer.dequantize(k))

        y_hat = self._serve(z, held.integer, serve)
        return self._picture(y_hat, held.height, held.width), np.concatenate(indices)

    def _serve(self, z: Tensor, integer: bool, serve: Callable[[Stage], Tensor]) -> Tensor:
        if integer:
            return serve(self._integer_h_s(z))
        return run_stages(self.model, dequantize_z(self.model, z), serve)

    @cached_property
    def _integer_h_s(self) -> IntegerHyperDecoder:
        return IntegerHyperDecoder(self.model)

    def _picture(self, y_hat: Tensor, height: int, width: int) -> NDArray[np.uint8]:
        left, _, top, _ = padding(height, width)
        x_hat = self.model.g_s(y_hat)[0, :, top : top + height, left : left + width]  # type: ignore[operator]
        eight_bit = x_hat.clamp(0, 1).mul(255).round().to(torch.uint8)
        return np.ascontiguousarray(eight_bit.permute(1, 2, 0).cpu().numpy())

    def _z_likelihood_bits(self, z: Tensor) -> float:
        model: Any = self.model
        _, likelihood = model.entropy_bottleneck(dequantize_z(model, z), training=False)
        return float(-likelihood.double().log2().sum())

    def _y_likelihood_bits(self, y_hat: Tensor, stage: Stage) -> float:
        model: Any = self.model
        gaussian = model.gaussian_conditional
        likelihood = gaussian.likelihood_lower_bound(gaussian._likelihood(y_hat, stage.scales, stage.means))
        return float(-likelihood.double().log2().sum())


def _channel_rows(shape: tuple[int, ...]) -> NDArray[np.int32]:
    return np.ascontiguousarray(np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None], shape))
