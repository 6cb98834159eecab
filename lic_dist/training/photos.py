"""Random crops of photos for base training: a pure function of (seed, sample number)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lic_dist.data import images
from lic_dist.data.photo import Photo
from lic_dist.data.source import PhotoSource
from lic_dist.errors import LicError
from lic_dist.training.shared_memory import shortage

IN_MEMORY = 4 << 30  # bytes of decoded photos that are kept in memory; above it each crop decodes its photo


PROCESSES = 2  # that decode photos


class RandomCrops(Dataset[Tensor]):
    """Sample n is a random crop of a random photo: uint8 [3, crop, crop], the same for equal (seed, n).

    Photos are drawn in proportion to their area, so that all pixels are equally likely. `halved` has each photo a
    second time at half its size, where a crop fits.
    """

    def __init__(self, source: PhotoSource, photos: list[Photo], crop: int, seed: int, halved: bool = False) -> None:
        drawn = [
            (photo, part)
            for part in ((1, 2) if halved else (1,))
            for photo in photos
            if min(photo.width, photo.height) // part >= crop
        ]
        self.photos, self.parts = [photo for photo, _ in drawn], [part for _, part in drawn]
        if not self.photos:
            raise LicError(f"no photo in {source.where} is as large as a crop of {crop}", hint="set a smaller crop")
        self.photo_source, self.crop, self.seed = source, crop, seed
        areas = np.array([(photo.width // part) * (photo.height // part) for photo, part in drawn], float)
        self.chances = np.cumsum(areas) / areas.sum()
        self.decoded: list[NDArray[np.uint8]] | None = None
        if 3 * areas.sum() <= IN_MEMORY:
            self.decoded = [self._read(index) for index in range(len(drawn))]

    def __len__(self) -> int:
        return 2**62

    def source(self, number: int) -> str:
        """Return the photo that a sample is taken from."""
        return str(self.photos[self._index(np.random.default_rng((self.seed, number)))].path)

    def _read(self, index: int) -> NDArray[np.uint8]:
        """Return a photo, uint8 [height, width, 3], at its part of its size."""
        pixels, part = _decoded(self.photo_source, self.photos[index]), self.parts[index]
        if part == 1:
            return pixels
        size = pixels.shape[1] // part, pixels.shape[0] // part
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

    def _index(self, generator: np.random.Generator) -> int:
        return int(np.searchsorted(self.chances, generator.random(), side="right"))

    def __getitem__(self, number: int) -> Tensor:
        generator = np.random.default_rng((self.seed, number))
        index = self._index(generator)
        photo = self.decoded[index] if self.decoded else self._read(index)
        y = int(generator.integers(photo.shape[0] - self.crop + 1))
        x = int(generator.integers(photo.shape[1] - self.crop + 1))
        window = photo[y : y + self.crop, x : x + self.crop]
        if generator.random() < 0.5:
            window = window[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(window.transpose(2, 0, 1)))


class _BatchSampler:
    """The sample numbers of this rank's part of each global batch, from a step on."""

    def __init__(self, first: int, steps: int, batch: int, share: slice) -> None:
        self.first, self.steps, self.batch, self.share = first, steps, batch, share

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            yield list(range(step * self.batch, (step + 1) * self.batch))[self.share]

    def __len__(self) -> int:
        return self.steps - self.first


def batches(crops: RandomCrops, first: int, steps: int, batch: int, share: slice) -> DataLoader[Tensor]:
    """Return a loader of uint8 [b, 3, crop, crop] for steps first..steps-1.

    Loader processes decode where memory does not hold all photos. This process does where shared memory is too small
    for them.
    """
    share_bytes = 3 * crops.crop**2 * len(range(batch)[share])
    workers = 0 if crops.decoded or shortage(share_bytes, PROCESSES) else PROCESSES
    sampler = _BatchSampler(first, steps, batch, share)
    return DataLoader(
        crops,
        batch_sampler=sampler,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )


def centre_crops(source: PhotoSource, photos: list[Photo], crop: int, most: int) -> Tensor:
    """Return one centred crop of each photo that is large enough, at most `most`: uint8 [n, 3, crop, crop]."""
    chosen = [photo for photo in photos if min(photo.width, photo.height) >= crop][:most]
    windows = []
    for photo in chosen:
        pixels = _decoded(source, photo)
        y, x = (photo.height - crop) // 2, (photo.width - crop) // 2
        windows.append(pixels[y : y + crop, x : x + crop].transpose(2, 0, 1))
    return torch.from_numpy(np.stack(windows)) if windows else torch.empty(0, 3, crop, crop, dtype=torch.uint8)


def _decoded(source: PhotoSource, photo: Photo) -> NDArray[np.uint8]:
    """Return a photo of a source: uint8 [height, width, 3]."""
    return images.decode(source.read(photo.path, photo.place)[0], photo.path)
