"""Photos: find, check, decode; the manifest; deterministic crops.

A scan reads each photo once and records path, digest, size and, where it cannot be used, the reason. Crops are pure
functions of (seed, photo digest, variation), and photos are held out by digest: the order of a folder, the number
of workers and the names of files change nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lic_dist.errors import LicError
from lic_dist.progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
LARGEST = 256_000_000  # pixels; a larger picture is set aside as a decompression bomb
Image.MAX_IMAGE_PIXELS = None  # ours is the limit

FAULTS = (
    "",
    "unreadable",
    "not an image",
    "truncated",
    "animated",
    "too large",
    "smaller than a crop",
    "changed",
    "latents overflow",
)
"""Reasons why a photo or sample is set aside; a sample's `status` is the index into this tuple, 0 is good."""


@dataclass(frozen=True)
class Photo:
    """One row of the manifest: a file below the scanned folder. Sizes are after EXIF orientation."""

    path: str
    digest: str
    width: int
    height: int
    fault: str = ""


@dataclass(frozen=True)
class Crop:
    """One sample: a window of a photo, mirrored or not, in the training or the held-out part."""

    source: str
    digest: str
    crop_y: int
    crop_x: int
    flip: bool
    held_out: bool


class PhotoError(LicError):
    """A photo that cannot be used; `fault` is one of FAULTS."""

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(f"{path}: {fault}")
        self.fault = fault


def find(folder: Path) -> list[str]:
    """Relative posix paths of all photos below the folder, sorted; links to folders are followed once.

    Raises:
        LicError: no such folder, or no photo in it.
    """
    if not folder.is_dir():
        raise LicError(f"no such folder of images: {folder}", hint="give the folder that holds the photos")
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        stat = os.stat(parent)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        base = Path(parent).relative_to(folder)
        found += [(base / name).as_posix() for name in files if Path(name).suffix.lower() in SUFFIXES]
    if not found:
        raise LicError(f"no photos in {folder}", hint=f"looked for {' '.join(sorted(SUFFIXES))}, in subfolders too")
    # A name that is not UTF-8 cannot be recorded as it is: escaped, it opens no file, and is counted as unreadable.
    return sorted(os.fsencode(path).decode("utf-8", "backslashreplace") for path in found)


def decode(data: bytes, name: str = "image") -> NDArray[np.uint8]:
    """Decode one photo to RGB: uint8 [H, W, 3], EXIF orientation applied, alpha dropped, 16 bit reduced to 8.

    Raises:
        PhotoError: not an image, truncated, animated, or larger than LARGEST pixels.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST:
                raise PhotoError(name, "too large")
            if getattr(image, "n_frames", 1) > 1:
                raise PhotoError(name, "animated")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or upright.mode == "I":
                grey = np.asarray(upright).astype(np.int64)
                pixels = np.clip((grey * 255 + 32767) // 65535, 0, 255).astype(np.uint8)
                return np.repeat(pixels[:, :, None], 3, axis=2)
            return np.array(upright.convert("RGB"))
    except PhotoError:
        raise
    except UnidentifiedImageError:
        raise PhotoError(name, "not an image") from None
    except Exception:  # Pillow's readers raise OSError, SyntaxError, TypeError, struct.error ... on damaged files
        raise PhotoError(name, "truncated") from None


def read(path: Path) -> NDArray[np.uint8]:
    """Decode a file: see `decode`. Raises PhotoError, "unreadable" where the file cannot be read."""
    return decode(_bytes(path, str(path)), str(path))


def files_digest(folder: Path, names: Sequence[str]) -> str:
    """sha256 over the names and contents of a folder's files. Raises PhotoError for one that cannot be read."""
    total = hashlib.sha256()
    for name in names:
        total.update(f"{name} {hashlib.sha256(_bytes(folder / name, name)).hexdigest()}\n".encode())
    return total.hexdigest()


def _bytes(path: Path, name: str) -> bytes:
    if not path.is_file():  # a pipe would be waited for
        raise PhotoError(name, "unreadable")
    try:
        return path.read_bytes()
    except OSError:
        raise PhotoError(name, "unreadable") from None


def _examine(folder: Path, path: str) -> Photo:
    digest = ""
    try:
        data = _bytes(folder / path, path)
        digest = hashlib.sha256(data).hexdigest()
        pixels = decode(data, path)
    except PhotoError as error:
        return Photo(path, digest, 0, 0, error.fault)
    return Photo(path, digest, pixels.shape[1], pixels.shape[0])


def scan(folder: Path, threads: int | None = None) -> list[Photo]:
    """The manifest of a folder: every photo read and decoded once, in parallel, in the order of `find`.

    Raises:
        LicError: no such folder, an empty one, or not one usable photo in it.
    """
    paths = find(folder)
    photos = []
    with (
        ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool,
        Progress("scanning photos", total=len(paths), unit="photo") as bar,
    ):
        for photo in pool.map(lambda path: _examine(folder, path), paths):
            photos.append(photo)
            bar.advance()
    if not any(photo.fault == "" for photo in photos):
        raise LicError(f"none of the {len(photos)} photos in {folder} can be used", hint=photos[0].fault)
    return photos


def manifest_digest(photos: Iterable[Photo]) -> str:
    """sha256 over the paths and digests of the usable photos: what the crops depend on."""
    lines = sorted(f"{photo.digest} {photo.path}" for photo in photos if not photo.fault)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_manifest(photos: Sequence[Photo], path: Path) -> None:
    """Write the manifest as Parquet, one row a photo, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist([asdict(photo) for photo in photos]), temporary)
    temporary.replace(path)


def read_manifest(path: Path) -> list[Photo]:
    """Read what `write_manifest` wrote."""
    import pyarrow.parquet as pq

    return [Photo(**row) for row in pq.read_table(path).to_pylist()]


def uniform(*key: object) -> float:
    """A number in [0, 1) that is a pure function of the key (53 bits of sha256)."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def is_held_out(photo: Photo, held_out: float | str) -> bool:
    """Whether a photo belongs to the held-out part.

    A fraction chooses by the photo's digest alone, so that it is held out in every folder and job; a name holds out
    the photos of that subfolder.
    """
    if isinstance(held_out, str):
        return photo.path.startswith(f"{held_out.rstrip('/')}/")
    return uniform("held out", photo.digest) < held_out


def plan_crops(photos: Iterable[Photo], crop: int, variations: int, seed: int, held_out: float | str) -> list[Crop]:
    """The samples of a manifest: `variations` crops of each usable photo that is large enough.

    Training samples come first, in an order shuffled by the seed, then the held-out ones: any first part of either
    is a fair sample of it. Copies of one photo (equal digests) count once.
    """
    usable = (photo for photo in photos if not photo.fault and min(photo.width, photo.height) >= crop)
    unique: dict[str, Photo] = {}
    for photo in usable:
        unique.setdefault(photo.digest, photo)
    keyed = []
    for photo in unique.values():
        for variation in range(variations):
            key = (seed, photo.digest, variation)
            sample = Crop(
                photo.path,
                photo.digest,
                int(uniform("y", *key) * (photo.height - crop + 1)),
                int(uniform("x", *key) * (photo.width - crop + 1)),
                uniform("flip", *key) < 0.5,
                is_held_out(photo, held_out),
            )
            keyed.append((sample.held_out, uniform("order", *key), sample))
    keyed.sort(key=lambda row: row[:2])
    return [sample for _, _, sample in keyed]


def cut(pixels: NDArray[np.uint8], crop: Crop, size: int) -> NDArray[np.uint8]:
    """The crop's window of a decoded photo: uint8 [3, size, size]."""
    window = pixels[crop.crop_y : crop.crop_y + size, crop.crop_x : crop.crop_x + size]
    if crop.flip:
        window = window[:, ::-1]
    return np.ascontiguousarray(window.transpose(2, 0, 1))


def read_crops(folder: Path, crops: Sequence[Crop], size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the samples' pixels: uint8 [n, 3, size, size] and their status, uint8 [n], an index into FAULTS.

    A photo whose bytes are not those of the scan is set aside as "changed"; a faulty sample is left zero.
    """
    pixels = np.zeros((len(crops), 3, size, size), np.uint8)
    status = np.zeros(len(crops), np.uint8)
    by_source: dict[str, list[int]] = {}
    for index, crop in enumerate(crops):
        by_source.setdefault(crop.source, []).append(index)
    for source, indices in by_source.items():
        try:
            data = _bytes(folder / source, source)
            if hashlib.sha256(data).hexdigest() != crops[indices[0]].digest:
                raise PhotoError(source, "changed")
            photo = decode(data, source)
        except PhotoError as error:
            status[indices] = FAULTS.index(error.fault)
            continue
        for index in indices:
            pixels[index] = cut(photo, crops[index], size)
    return pixels, status
