"""Photos: find, check, decode, cut."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lic_dist.errors import LicError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
LARGEST = 256_000_000  # pixels; a larger picture is set aside as a decompression bomb
LARGEST_FILE = 2 << 30  # bytes; a larger file is set aside unread
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
    "name is not UTF-8",
)
"""Reasons why a photo or sample is set aside; a sample's `status` is the index into this tuple, 0 is good.

Stores keep the index: only append.
"""


@dataclass(frozen=True)
class Photo:
    """One row of the manifest: a file below the scanned folder.

    `digest` is the sha256 of the file in hex, empty where it was not read; width and height in pixels, after EXIF
    orientation, 0 where there is a fault; `bytes` and `mtime_ns` are the file's own.
    """

    path: str
    digest: str
    width: int
    height: int
    bytes: int = 0
    mtime_ns: int = 0
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


def walk(folder: Path) -> list[str]:
    """Relative posix paths of all photos below the folder, as `os.fsdecode` gives them, sorted as `readable` shows.

    Links to folders are followed once, so that a loop ends. A folder that cannot be listed stands for its photos.

    Raises:
        LicError: no such folder, or no photo in it.
    """
    if not folder.is_dir():
        raise LicError(f"no such folder of images: {folder}", hint="give the folder that holds the photos")
    found: list[str] = []
    seen: set[tuple[int, int]] = set()

    def unlisted(error: OSError) -> None:
        found.append(os.path.relpath(error.filename, folder))

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unlisted):
        try:
            status = os.stat(parent)
        except OSError as error:
            unlisted(error)
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()  # which of two links to a folder comes first must not depend on the disk
        base = os.path.relpath(parent, folder)
        prefix = "" if base == "." else f"{base}/"
        found += [prefix + name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES]
    if not found:
        raise LicError(f"no photos in {folder}", hint=f"looked for {' '.join(sorted(SUFFIXES))}, in subfolders too")
    return sorted(found, key=readable)


def readable(name: str) -> str:
    """A path that can be recorded: one that is not UTF-8 is escaped, and then opens no file."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find(folder: Path) -> list[str]:
    """`walk`, with readable paths only."""
    return [readable(name) for name in walk(folder)]


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


def measure(data: bytes, name: str = "image") -> tuple[int, int]:
    """(width, height) of what `decode` makes of a photo. Raises PhotoError as `decode`."""
    height, width, _ = decode(data, name).shape
    return width, height


def read(path: Path) -> NDArray[np.uint8]:
    """Decode a file: see `decode`. Raises PhotoError, "unreadable" where the file cannot be read."""
    return decode(contents(path, str(path)), str(path))


def files_digest(folder: Path, names: Sequence[str]) -> str:
    """sha256 over the names and contents of a folder's files. Raises PhotoError for one that cannot be read."""
    total = hashlib.sha256()
    for name in names:
        total.update(f"{name} {hashlib.sha256(contents(folder / name, name)).hexdigest()}\n".encode())
    return total.hexdigest()


def contents(path: Path, name: str) -> bytes:
    """All of a file. Raises PhotoError: "unreadable", or "too large" above LARGEST_FILE bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise PhotoError(name, "unreadable")
        if status.st_size > LARGEST_FILE:
            raise PhotoError(name, "too large")
        return path.read_bytes()
    except OSError:
        raise PhotoError(name, "unreadable") from None


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
            data = contents(folder / source, source)
            if hashlib.sha256(data).hexdigest() != crops[indices[0]].digest:
                raise PhotoError(source, "changed")
            photo = decode(data, source)
        except PhotoError as error:
            status[indices] = FAULTS.index(error.fault)
            continue
        for index in indices:
            pixels[index] = cut(photo, crops[index], size)
    return pixels, status
