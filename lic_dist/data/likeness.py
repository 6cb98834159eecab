"""Pictures that look alike, found by a difference hash: 256 bits of a picture, near for near-duplicates.

A picture is reduced to 17x16 grey values; each bit says whether a value is less than its right neighbour's. Other
sizes, strengths of JPEG and small changes of brightness move few bits; mirrored, turned or cropped pictures are not
found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lic_dist.data import images
from lic_dist.data.ahead import prefetch
from lic_dist.data.photo import PhotoError
from lic_dist.data.source import Packed, PhotoSource
from lic_dist.progress import Progress

SIDE = 16
BITS = SIDE * SIDE
NEAR = 24  # bits that near-duplicates differ in at most; of 218 pictures no two others differed in fewer than 47
ROWS = 1024  # pictures that are compared with all others at once


def difference_hash(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the bits of a picture, uint8 [H, W] or [H, W, 3]: bool [BITS]."""
    grey = Image.fromarray(pixels).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, np.int16)
    return (values[:, :-1] < values[:, 1:]).ravel()


def hashes(source: PhotoSource, wanted: Collection[str], threads: int = 2) -> tuple[list[str], NDArray[np.bool_]]:
    """Return the names of those of the wanted photos of a source that can be read, and their bits: bool [n, BITS]."""

    def of(photo: Packed) -> tuple[str, NDArray[np.bool_] | None]:
        try:
            data = photo.data if source.packed else source.read(photo.path)[0]
            return photo.path, difference_hash(images.decode(data, photo.path, keep_grey=True))
        except PhotoError:
            return photo.path, None

    found: dict[str, NDArray[np.bool_]] = {}
    workers = max(threads, source.in_flight)
    with ThreadPoolExecutor(workers) as pool, Progress("hashing photos", len(wanted), "photo") as bar:
        for name, bits in prefetch(pool, of, _photos(source, wanted), 2 * workers):
            bar.advance()
            if bits is not None:
                found[name] = bits
    return list(found), np.array(list(found.values()), np.bool_).reshape(len(found), BITS)


def _photos(source: PhotoSource, wanted: Collection[str]) -> Iterator[Packed]:
    """Yield the wanted photos, without their bytes where each can be read alone."""
    if not source.packed:
        yield from (Packed(name, "") for name in wanted)
    else:
        for file in source.search().names:
            yield from (photo for photo in source.walk(file, Counter()) if photo.path in wanted)


def near_pairs(
    first: NDArray[np.bool_], second: NDArray[np.bool_] | None = None, near: int = NEAR
) -> list[tuple[int, int, int]]:
    """Return (row, row, differing bits) of pairs that differ in at most `near` bits, the nearest first: within one set
    of pictures, or between two.
    """
    others = first if second is None else second
    left, right = (bits.astype(np.float32) * 2 - 1 for bits in (first, others))
    found = []
    for start in range(0, len(left), ROWS):
        distances = (BITS - left[start : start + ROWS] @ right.T) / 2
        for row, column in np.argwhere(distances <= near).tolist():
            if second is not None or start + row < column:
                found.append((int(distances[row, column]), start + row, column))
    return [(row, column, distance) for distance, row, column in sorted(found)]
