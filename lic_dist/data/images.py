"""Check photos, decode them, and cut crops out of them.

A photo becomes RGB of 8 bits a channel, turned upright by its EXIF orientation. Alpha is dropped without compositing:
the colours below it are coded. Grey is repeated over the channels, a palette is looked up, CMYK is converted without a
profile (a JPEG's by Adobe's inverted convention), and 16 bits are reduced to 8. Of a multi-picture JPEG the first
picture is taken, of a TIFF the first page, of a layered file the flattened picture. A picture whose pixels decode is
never lost to metadata that is damaged or beyond a reader's bounds. A file that cannot be read like this is set aside
with its reason, one of FAULTS.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from lic_dist.data import metadata
from lic_dist.data.ahead import prefetch
from lic_dist.data.photo import FAULTS, Crop, PhotoError
from lic_dist.data.photo_files import UNSIGNED_SUFFIXES, printable, reads_heif, tell
from lic_dist.data.source import PhotoSource, Stamp
from lic_dist.errors import LicError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "QOI", "PSD", "DDS", "SUN", "ICNS")
"""Pillow's formats that are read under any suffix. Its EPS runs Ghostscript, its FITS unpacks without a bound."""
LARGEST = 256_000_000  # pixels; a larger picture is set aside as a decompression bomb
LARGEST_FILE = 2 << 30  # bytes; a larger file is set aside unread
Image.MAX_IMAGE_PIXELS = LARGEST // 2  # Pillow refuses twice as many, also in pictures within pictures, such as icons
warnings.filterwarnings("ignore", module=r"PIL\.")  # its warnings about a photo's metadata are of no use

EIGHT_BITS = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"})
EIGHT_BITS_GREY = frozenset({"1", "L", "LA"})
SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B"})
ORIENTATION = 0x0112  # EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
DEEP_GREY = ("PNG", "PPM")  # formats whose mode "I" is grey of 16 bits
UNSUPPORTED = re.compile("unsupported|not supported|notimplemented|unknown|cannot handle|not available", re.I)
MOVING = ("PNG", "GIF", "WEBP", "AVIF")  # formats whose further frames are an animation

Result = TypeVar("Result")


def decode(data: bytes, name: str = "image", keep_grey: bool = False) -> NDArray[np.uint8]:
    """Decode one photo to RGB uint8 [H, W, 3], as the module's text says; with `keep_grey` a grey photo to uint8 [H,
    W].

    The content tells the format. The suffix of `name` tells it for formats whose first bytes prove nothing (TGA, PCX
    ...).

    Raises:
        PhotoError: not an image, truncated, damaged, animated, larger than LARGEST pixels, or of unsupported pixels.
    """

    def pixels_of(image: Image.Image, _: bytes) -> NDArray[np.uint8]:
        image.load()
        if image.mode in SIXTEEN_BITS or image.mode == "I":
            deep = np.asarray(image).astype(np.int64)
            pixels = np.clip((deep * 255 + 32767) // 65535, 0, 255).astype(np.uint8)
        else:
            pixels = np.array(image.convert("L" if image.mode in EIGHT_BITS_GREY else "RGB"))
        if pixels.ndim == 2 and not keep_grey:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        return _upright(pixels, _orientation(image))

    return _open_image(data, name, pixels_of)


def measure(data: bytes, name: str = "image") -> tuple[int, int]:
    """Return the (width, height) that `decode` would give for a photo, at a lower cost.

    A JPEG is decoded at an eighth of its size, which still reads every bit of it. A PNG whose chunks all have their
    checksums is not decoded. All other formats are decoded. The one fault that passes unnoticed until the crops are
    read is a PNG with a wrong stream under right checksums.

    Raises:
        PhotoError: as `decode`.
    """

    def size_of(image: Image.Image, data: bytes) -> tuple[int, int]:
        width, height = image.size
        if image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (1, 1))
            image.load()
        elif image.format != "PNG" or not metadata.is_whole_png(data):
            image.load()
            width, height = image.size  # loading a TIFF turns it
        return (height, width) if _orientation(image) in SIDEWAYS else (width, height)

    return _open_image(data, name, size_of)


def _open_image(data: bytes, name: str, act: Callable[[Image.Image, bytes], Result]) -> Result:
    """Call `act` on an opened photo and its bytes; retry with less metadata where a reader fails.

    Raises:
        PhotoError: the header is refused, or no attempt succeeds.
    """
    if _webp_canvas(data) > LARGEST:
        raise PhotoError(name, "too large")
    formats = (*FORMATS, *UNSIGNED_SUFFIXES.get(os.path.splitext(name)[1].lower(), "").split())
    if metadata.is_heif(data):
        formats = _heif_formats(name)
    fault = ""
    for attempt in chain((data,), metadata.without_metadata(data)):
        if fault and attempt == data:
            continue
        try:
            with Image.open(io.BytesIO(attempt), formats=formats) as image:
                _require_readable(image, name)
                return act(image, attempt)
        except PhotoError:
            raise
        except (MemoryError, Image.DecompressionBombError):
            raise PhotoError(name, "too large") from None
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, TypeError ... on damaged files
            fault = _fault(data, error)
    raise PhotoError(name, fault)


def _heif_formats(name: str) -> tuple[str, ...]:
    if not reads_heif():
        raise PhotoError(name, "HEIC: needs pillow-heif")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ("HEIF",)


def _require_readable(image: Image.Image, name: str) -> None:
    """Refuse an image that would take too much memory to decode, or that is no still photo. Raises PhotoError."""
    if image.width * image.height > LARGEST:
        raise PhotoError(name, "too large")
    if image.format in MOVING and getattr(image, "n_frames", 1) > 1:
        raise PhotoError(name, "animated")
    sixteen = image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in DEEP_GREY)
    if not sixteen and image.mode not in EIGHT_BITS:
        raise PhotoError(name, "unsupported pixels")


def _fault(data: bytes, error: Exception) -> str:
    """Return the fault of a file whose reader raised `error`; the bytes decide, as readers raise different errors."""
    unsupported = metadata.unsupported(data, isinstance(error, UnidentifiedImageError))
    if not unsupported and UNSUPPORTED.search(f"{type(error).__name__} {error}"):
        return "unsupported coding"
    return unsupported or ("truncated" if metadata.ends_early(data) else "damaged")


def _webp_canvas(data: bytes) -> int:
    """Return the canvas size in pixels that an extended WebP claims, else 0. Pillow allocates it at once."""
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X":
        return 0
    width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    return width * height


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        found = Image.Image.getexif(image).get(ORIENTATION, 1)  # PngImageFile.getexif would decode the pixels
    except Exception:  # damaged EXIF: Pillow raises SyntaxError, struct.error, ...
        return 1
    return int(found) if found in range(1, 9) else 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn [H, W] or [H, W, 3] by its EXIF orientation."""
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def read(path: Path | str, keep_grey: bool = False) -> NDArray[np.uint8]:
    """Decode a file as `decode` does. Raises PhotoError, "unreadable" where the file cannot be read."""
    return decode(contents(Path(path), str(path)), str(path), keep_grey)


def picture(source: PhotoSource, name: str) -> NDArray[np.uint8]:
    """Decode a photo of a source as `decode` does. Raises PhotoError, "unreadable" where it cannot be read."""
    return decode(source.read(name)[0], name)


def pixel_digest(pixels: NDArray[np.uint8]) -> str:
    """Return the sha256 in hex of a picture [H, W, 3]: of `WxH`, a line feed, and the RGB bytes row by row."""
    height, width = pixels.shape[:2]
    return hashlib.sha256(f"{width}x{height}\n".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def files_digest(source: PhotoSource, names: Sequence[str]) -> str:
    """Return the sha256 over names and contents of a source's images; name duplicates on standard error.

    Raises:
        LicError: some images cannot be read; the first of them are named with their reasons.
    """
    total, seen, faults = hashlib.sha256(), dict[str, str](), []
    for name in names:
        try:
            data = source.read(name)[0]
            measure(data, name)
        except PhotoError as error:
            faults.append(error.message)
            continue
        digest = hashlib.sha256(data).hexdigest()
        if (first := seen.setdefault(digest, name)) != name:
            tell(f"{source.where}: {printable(name)} is a duplicate of {printable(first)}; both are measured")
        total.update(f"{name} {digest}\n".encode())
    if faults:
        named = "; ".join(faults[:5]) + " ..." * (len(faults) > 5)
        raise LicError(f"{len(faults)} of {len(names)} images cannot be used: {named}", hint="mend or remove them")
    return total.hexdigest()


def contents(path: Path, name: str) -> bytes:
    """Return all bytes of a file. Raises PhotoError: "unreadable", or "too large" above LARGEST_FILE bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            raise PhotoError(name, "unreadable")
        if status.st_size > LARGEST_FILE:
            raise PhotoError(name, "too large")
        return path.read_bytes()
    except OSError:
        raise PhotoError(name, "unreadable") from None


def stamp(file: Path | str) -> Stamp:
    """Return (size in bytes, modification time in ns) of a file; zeros where there is no regular file."""
    try:
        status = os.stat(file)
    except OSError:
        return 0, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, 0)


def cut(pixels: NDArray[np.uint8], crop: Crop, size: int) -> NDArray[np.uint8]:
    """Return the crop's window of a decoded photo: uint8 [3, size, size]."""
    window = pixels[crop.crop_y : crop.crop_y + size, crop.crop_x : crop.crop_x + size]
    if crop.flip:
        window = window[:, ::-1]
    return np.ascontiguousarray(window.transpose(2, 0, 1))


def middle(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return the middle of a picture [H, W, 3], at most `height` x `width`."""
    top, left = (max(0, length - most) // 2 for length, most in zip(pixels.shape, (height, width), strict=False))
    return pixels[top : top + height, left : left + width]


def read_crops(source: PhotoSource, crops: Sequence[Crop], size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the pixels of samples, uint8 [n, 3, size, size], and their status, uint8 [n], an index into FAULTS.

    A photo whose bytes differ from the scan's gets the status "changed", a window that reaches beyond its photo
    "smaller than a crop". The pixels of a faulty sample are zero. Photos are read in the order of their places, and of
    a source in a network some at once, while others are decoded.

    Raises:
        LicError: the source cannot be reached.
    """
    pixels = np.zeros((len(crops), 3, size, size), np.uint8)
    status = np.zeros(len(crops), np.uint8)
    by_photo: dict[tuple[str, str, str], list[int]] = {}
    for index, crop in enumerate(crops):
        by_photo.setdefault((crop.place, crop.source, crop.digest), []).append(index)
    indices_of = [by_photo[photo] for photo in sorted(by_photo, key=lambda photo: photo[0])]
    photos = [crops[indices[0]] for indices in indices_of]
    for indices, data in zip(indices_of, _read_ahead(source, photos), strict=True):
        crop = crops[indices[0]]
        try:
            if isinstance(data, PhotoError):
                raise data
            if hashlib.sha256(data).hexdigest() != crop.digest:
                raise PhotoError(crop.source, "changed")
            photo = decode(data, crop.source)
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


def _read_ahead(source: PhotoSource, photos: Sequence[Crop]) -> Iterator[bytes | PhotoError]:
    """Yield the bytes of photos in order, or why they cannot be read."""

    def read(photo: Crop) -> bytes | PhotoError:
        try:
            return source.read(photo.source, photo.place)[0]
        except PhotoError as error:
            return error

    if source.in_flight == 1 or len(photos) == 1:
        yield from map(read, photos)
        return
    with ThreadPoolExecutor(source.in_flight) as pool:
        yield from prefetch(pool, read, photos, source.in_flight)
