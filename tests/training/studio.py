"""Studio pictures on smooth grounds, and textured ones: two kinds of photos, of which training on one may harm the
other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def studio(seed: int, size: int = 128) -> np.ndarray:
    """A disc on a smooth gradient, uint8 [size, size, 3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    ground = sum(
        slope * axis[..., None] for slope, axis in zip(generator.uniform(-60, 60, (2, 3)), (y, x), strict=True)
    )
    disc = ((y - 0.5) ** 2 + (x - 0.5) ** 2 < generator.uniform(0.02, 0.06))[..., None]
    return np.clip(150 + ground + disc * generator.uniform(-90, 90, 3), 0, 255).astype(np.uint8)


def textured(seed: int, size: int = 128) -> np.ndarray:
    """Noise with some structure, uint8 [size, size, 3]."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 1, (size, size, 3))
    smoothed = sum(np.roll(noise, shift, axis) for shift in (0, 1, 2) for axis in (0, 1))
    return np.clip(128 + 12 * smoothed, 0, 255).astype(np.uint8)


def draw(folder: Path) -> Path:
    """Draw eight textured photos to train on, and held out two of each kind, in folders."""
    for kind, part, seeds in (
        (textured, "train/textured", range(8)),
        (textured, "valid/textured", range(8, 10)),
        (studio, "valid/studio", range(10, 12)),
    ):
        (folder / part).mkdir(parents=True)
        for seed in seeds:
            Image.fromarray(kind(seed)).save(folder / part / f"{seed}.png")
    return folder
