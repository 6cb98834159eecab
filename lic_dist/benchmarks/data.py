"""The data on which quantizers are measured: latents of a real model, a Gaussian, and a mixture of Gaussians."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist import config
from lic_dist.building.calibrate import channel_weights
from lic_dist.building.latents import encode, quantizer_input
from lic_dist.data import images
from lic_dist.data.photo_files import find
from lic_dist.errors import LicError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.quantization.adaptation import gaussian_record
from lic_dist.quantization.rates import level_index
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import Trellis

BASE = "base-0.013"
PICTURES = ("astronaut.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "rocket.jpg")
MOST_PICTURES = 12
HEIGHT, WIDTH = 384, 512  # of the window cut from the centre of a picture
SIGMAS = (0.11, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 2.5, 4.0, 8.0)
SHARES = (0.45, 0.1, 0.08, 0.08, 0.07, 0.06, 0.05, 0.04, 0.035, 0.02, 0.015)
LMBDA = 0.013


@dataclass(frozen=True)
class LatentSamples:
    """Residuals r float32 and scale levels uint8, [lanes, steps]; weights S_c float32 [M] of their channels."""

    r: NDArray[np.float32]
    level: NDArray[np.integer[Any]]
    weights: NDArray[np.float32]

    def repeated(self, times: int) -> LatentSamples:
        """Return the same lanes several times over."""
        return LatentSamples(np.tile(self.r, (times, 1)), np.tile(self.level, (times, 1)), self.weights)

    def cut(self, steps: int) -> LatentSamples:
        """Return lanes of `steps` steps: each lane cut into pieces, the remainder left out."""
        count = self.r.shape[1] // steps
        pieces = [slice(first * steps, (first + 1) * steps) for first in range(count)]
        channels = len(self.weights)

        def regrouped(values: NDArray[np.generic]) -> NDArray[np.generic]:
            parts = np.stack([values[:, piece].reshape(-1, channels, steps) for piece in pieces], axis=1)
            return np.ascontiguousarray(parts.reshape(-1, steps))

        return LatentSamples(regrouped(self.r), regrouped(self.level), self.weights)  # type: ignore[arg-type]


def label(name: str, machine: Trellis) -> str:
    """Return the name that a table shows."""
    return machine.name if name == "tcq" else name


def record_at_price(
    name: str, machine: Trellis, step: float, price: float, weights: NDArray[np.float32] | None = None
) -> QuantizerRecord:
    """Return an analytic record whose bit costs `price` squared steps, on average over the channels of `weights`."""
    shares = np.ones(1) if weights is None else weights / weights.mean()
    scaled = shares * 3 / (LMBDA * 255**2 * step**2 * price)
    return gaussian_record(name, step, scaled, LMBDA, trellis=machine, rounding=0.35 if name == "deadzone" else 0.5)


def photographs() -> Path:
    """Return the folder of the photographs that scikit-image ships."""
    import skimage

    return Path(skimage.__file__).parent / "data"


def sides(megapixels: float) -> tuple[int, int]:
    """Return height and width of a picture of so many megapixels, three to two."""
    height = round((megapixels * 1e6 * 2 / 3) ** 0.5)
    return height, round(megapixels * 1e6 / height)


def pictures(folder: Path | None) -> list[Path]:
    """Return all pictures of a folder, or PICTURES of scikit-image's."""
    return [photographs() / name for name in PICTURES] if folder is None else [folder / n for n in find(folder)]


def real_latents(folder: Path | None) -> LatentSamples:
    """Return latents of the shipped model on photographs: scikit-image's, or the first twelve of a folder.

    Raises:
        LicError: no picture of the folder is as large as the window.
    """
    windows: list[NDArray[np.uint8]] = []
    for path in pictures(folder):
        if len(windows) == MOST_PICTURES:
            break
        picture = images.read(path)
        top, left = (picture.shape[0] - HEIGHT) // 2, (picture.shape[1] - WIDTH) // 2
        if min(top, left) >= 0:
            windows.append(picture[top : top + HEIGHT, left : left + WIDTH].transpose(2, 0, 1))
    if not windows:
        raise LicError(
            f"{folder or photographs()} has no picture of {WIDTH}x{HEIGHT} pixels or more", hint="give another folder"
        )
    base = checkpoints.load(BASE)
    latents, _ = encode(base.model, np.stack(windows), 1)
    inputs = quantizer_input(base.model, latents.y, latents.z, 1)
    weights, _ = channel_weights(base, config.Quantizer(), inputs, latents)
    return LatentSamples(inputs.residual, inputs.level, weights)


def gaussian(lanes: int, steps: int, sigma: float = 1.0, seed: int = 0) -> LatentSamples:
    """Return independent samples of one sigma, scaled to exactly that power, with one channel of weight 1."""
    drawn = np.random.default_rng(seed).standard_normal((lanes, steps))
    r = sigma * drawn / np.sqrt(np.square(drawn).mean())
    level = np.full((lanes, steps), int(level_index(np.float32(sigma))), np.uint8)
    return LatentSamples(r.astype(np.float32), level, np.ones(1, np.float32))


def mixture(lanes: int, steps: int, seed: int = 0) -> tuple[LatentSamples, NDArray[np.float32]]:
    """Return a mixture of Gaussians with many small sigmas, as latents have, and the sigma of each sample."""
    generator = np.random.default_rng(seed)
    sigma = generator.choice(SIGMAS, (lanes, steps), p=SHARES).astype(np.float32)
    r = (sigma * generator.standard_normal(sigma.shape)).astype(np.float32)
    return LatentSamples(r, level_index(sigma), np.ones(1, np.float32)), sigma
