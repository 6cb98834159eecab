"""Photos: find, check, decode, cut.

What a photo becomes: RGB of 8 bits a channel, upright by its EXIF orientation. Alpha is dropped, not composited: the
colours below it are what is coded. Grey is repeated, a palette looked up, CMYK converted without a profile (of a JPEG
by Adobe's inverted convention), 16 bits are reduced to 8, of a multi-picture JPEG the first picture is taken. Whatever
has no such reading is set aside with its reason, one of FAULTS.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from lic_dist.errors import LicError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")  # read under any suffix; Pillow's EPS runs Ghostscript
LARGEST = 256_000_000  # pixels; a larger picture is set aside as a decompression bomb
LARGEST_FILE = 2 << 30  # bytes; a larger file is set aside unread
Image.MAX_IMAGE_PIXELS = None  # ours is the limit

EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"})
EIGHT_BITS_GREY = frozenset({"1", "L", "LA"})
SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B"})
ORIENTATION = 0x0112  # EXIF tag
LYING = (5, 6, 7, 8)  # orientations that swap width and height
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIGNATURES = (PNG_SIGNATURE, b"\xff\xd8\xff", b"RIFF", b"GIF8")

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
    "unsupported pixels",
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
        self.args = path, fault  # by which it pickles


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


def decode(data: bytes, name: str = "image", keep_grey: bool = False) -> NDArray[np.uint8]:
    """Decode one photo to RGB: uint8 [H, W, 3], as the module says; with keep_grey a grey one to uint8 [H, W].

    Raises:
        PhotoError: not an image, truncated, animated, larger than LARGEST pixels, or of pixels with no such reading.
    """
    with _opened(data, name) as image:
        image.load()
        if image.mode in SIXTEEN_BITS or image.mode == "I":
            deep = np.asarray(image).astype(np.int64)
            pixels = np.clip((deep * 255 + 32767) // 65535, 0, 255).astype(np.uint8)
        else:
            pixels = np.array(image.convert("L" if image.mode in EIGHT_BITS_GREY else "RGB"))
        if pixels.ndim == 2 and not keep_grey:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        return _upright(pixels, _orientation(image))


def measure(data: bytes, name: str = "image") -> tuple[int, int]:
    """(width, height) of what `decode` makes of a photo, without its full price.

    A JPEG is decoded to an eighth of its size, which still reads every bit of it; a PNG whose chunks are whole by their
    checksums is not decoded; all others are decoded. Only a PNG written with a wrong stream under right checksums
    passes unnoticed, until its crops are read.

    Raises:
        PhotoError: as `decode`.
    """
    with _opened(data, name) as image:
        width, height = image.size
        if image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (1, 1))
            image.load()
        elif image.format != "PNG" or not _whole_png(data):
            image.load()
            width, height = image.size  # a TIFF turns as it is loaded
        return (height, width) if _orientation(image) in LYING else (width, height)


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """An image whose header is sound; whatever goes wrong inside becomes a PhotoError."""
    try:
        if _webp_canvas(data) > LARGEST:
            raise PhotoError(name, "too large")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > LARGEST:
                raise PhotoError(name, "too large")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise PhotoError(name, "animated")
            sixteen = image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG")
            if not sixteen and image.mode not in EIGHT_BITS:
                raise PhotoError(name, "unsupported pixels")
            yield image
    except PhotoError:
        raise
    except UnidentifiedImageError:
        raise PhotoError(name, _unidentified(data)) from None
    except MemoryError:
        raise PhotoError(name, "too large") from None
    except Exception:  # Pillow's readers raise OSError, SyntaxError, TypeError, struct.error ... on damaged files
        raise PhotoError(name, "truncated") from None


def _webp_canvas(data: bytes) -> int:
    """Pixels of the canvas that an extended WebP claims, else 0: Pillow allots it as it opens the file."""
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X":
        return 0
    width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    return width * height


def _unidentified(data: bytes) -> str:
    """The fault of a file that Pillow takes for no image."""
    if data[:4] in (b"II*\0", b"MM\0*"):  # a TIFF, and where its directory of tags begins
        directory = int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big")
        return "unsupported pixels" if directory < len(data) else "truncated"
    return "truncated" if data.startswith(SIGNATURES) else "not an image"


def _whole_png(data: bytes) -> bool:
    """Whether every chunk up to the end mark has its checksum, and none that may turn the photo follows the pixels."""
    view, position, pixels = memoryview(data), len(PNG_SIGNATURE), False
    while position + 12 <= len(data):
        length = int.from_bytes(view[position : position + 4], "big")
        kind = bytes(view[position + 4 : position + 8])
        end = position + 8 + length
        if zlib.crc32(view[position + 4 : end]).to_bytes(4, "big") != view[end : end + 4]:
            return False
        if kind == b"IEND":
            return pixels
        if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return False
        pixels |= kind == b"IDAT"
        position = end + 4
    return False


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none, or none that is known."""
    found = Image.Image.getexif(image).get(ORIENTATION, 1)  # PngImageFile's own would decode the pixels
    return int(found) if found in range(1, 9) else 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn [H, W] or [H, W, 3] by its EXIF orientation."""
    if orientation in LYING:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def read(path: Path, keep_grey: bool = False) -> NDArray[np.uint8]:
    """Decode a file: see `decode`. Raises PhotoError, "unreadable" where the file cannot be read."""
    return decode(contents(path, str(path)), str(path), keep_grey)


def files_digest(folder: Path, names: Sequence[str]) -> str:
    """sha256 over names and contents of a folder's images. Raises PhotoError for one that is none by its header."""
    total = hashlib.sha256()
    for name in names:
        data = contents(folder / name, name)
        measure(data, name)
        total.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
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

    A photo whose bytes are not those of the scan is set aside as "changed", a window that reaches beyond its photo as
    "smaller than a crop"; a faulty sample is left zero.
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
            window = cut(photo, crops[index], size)
            if window.shape == pixels.shape[1:]:
                pixels[index] = window
            else:
                status[index] = FAULTS.index("smaller than a crop")
    return pixels, status
