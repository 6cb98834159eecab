"""Photos as bytes, of every format, and how some of them go wrong."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.Image import Transpose

from lic_dist.data import images
from lic_dist.data.metadata import PNG_SIGNATURE
from tests.conftest import picture

HEIGHT, WIDTH = 40, 60
RGB = picture(1, HEIGHT, WIDTH)
GREY = np.repeat(RGB[:, :, :1], 3, 2)
ALPHA = np.dstack([RGB, np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)])
DEEP = RGB.astype(np.uint16) * 257 + np.random.default_rng(0).integers(-100, 101, RGB.shape)
DEEP = DEEP.clip(0, 65535).astype(np.uint16)  # 16 bits whose nearest 8 are not always the upper 8
INKS = np.dstack([255 - picture(2, HEIGHT, WIDTH), picture(3, HEIGHT, WIDTH)[:, :, 0] // 2])  # CMYK, 255 is full ink
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def encoded(array: np.ndarray, kind: str, **options: object) -> bytes:
    return saved(Image.fromarray(array), kind, **options)


def inked(inks: np.ndarray, kind: str, **options: object) -> bytes:
    """uint8 [H, W, 4] as a CMYK file."""
    return saved(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes()), kind, **options)


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(picture(seed, HEIGHT, WIDTH)) for seed in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, after: bytes = b"") -> bytes:
    """A PNG of raw rows, each with its filter byte; `after`: chunks between the pixels and the end."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return PNG_SIGNATURE + header + pixels + after + chunk(b"IEND", b"")


def rows_of(array: np.ndarray) -> bytes:
    """uint8 or uint16 [H, W, C] as the rows of a PNG, without a filter."""
    return b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)


def tiff(array: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def oriented(kind: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    return encoded(RGB, kind, exif=exif, **options)


def turned(orientation: int, pixels: np.ndarray = RGB) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).transpose(TURNS[orientation])) if orientation in TURNS else pixels


def printed(inks: np.ndarray) -> np.ndarray:
    """RGB of CMYK inks on white paper, without a profile."""
    white = 255.0 - inks
    return white[:, :, :3] * white[:, :, 3:] / 255


def ycck() -> bytes:
    """A CMYK JPEG as Photoshop writes it: inverted, the first three channels as YCbCr, Adobe's transform 2."""
    stored = np.asarray(Image.fromarray(255 - RGB).convert("YCbCr"))
    inks = np.dstack([255 - stored, np.zeros((HEIGHT, WIDTH), np.uint8)])
    data = bytearray(inked(inks, "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def two_pictures() -> bytes:
    other = Image.fromarray(picture(5, HEIGHT, WIDTH))
    return encoded(RGB, "MPO", save_all=True, append_images=[other], quality=100, subsampling=0)


def behind(data: bytes, position: int, more: bytes) -> bytes:
    return data[:position] + more + data[position:]


def segment(marker: int, data: bytes) -> bytes:
    """An APPn or other segment of a JPEG."""
    return struct.pack(">BBH", 255, marker, len(data) + 2) + data


def exif(*tags: tuple[int, object]) -> Image.Exif:
    made = Image.Exif()
    for tag, value in tags:
        made[tag] = value
    return made


def tagged(data: bytes, tag: int, kind: int, count: int, value: bytes) -> bytes:
    """A small-endian TIFF with one more entry, its directory moved to the end."""
    start = struct.unpack("<I", data[4:8])[0]
    (entries,) = struct.unpack("<H", data[start : start + 2])
    rows = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * entries, 12)]
    rows = sorted([*rows, struct.pack("<HHI", tag, kind, count) + value], key=lambda row: struct.unpack("<H", row[:2]))
    directory = struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory


def frame(marker: int, at: int = 0, value: int = 0) -> bytes:
    """A JPEG whose frame header has another marker, and another byte at a place behind it."""
    data = bytearray(JPEG)
    start = data.index(b"\xff\xc0")
    data[start + 1] = marker
    if at:
        data[start + at] = value
    return bytes(data)


def psd(depth: int = 8, resources: bytes = b"", layers: bytes = b"") -> bytes:
    """A Photoshop file of a flattened picture, and what may lie before it."""
    header = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, HEIGHT, WIDTH, depth, 3)
    parts = b"".join(struct.pack(">I", len(part)) + part for part in (b"", resources, layers))
    return header + parts + b"\0\0" + np.ascontiguousarray(RGB.transpose(2, 0, 1)).tobytes()


def webp_tail() -> bytes:
    return encoded(RGB, "WEBP", lossless=True, exact=True, exif=exif((271, "a maker")), xmp=b"<x>" * 50)


def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return encoded(RGB, "HEIF", quality=-1, chroma=444, exif=exif((271, "a maker")))


def claims(kind: str) -> bytes:
    """A small file that claims a huge picture."""
    if kind == "ICO":  # which says nothing of the picture within
        data = claims("PNG")
        return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(data), 22) + data
    if kind == "PNG":
        return png(100_000, 100_000, 8, 2, b"\0" * 100)
    if kind == "JPEG":
        data = bytearray(encoded(RGB, "JPEG"))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 65500, 65500)
        return bytes(data)
    if kind == "GIF":
        data = bytearray(encoded(RGB, "GIF"))
        data[6:10] = struct.pack("<HH", 65535, 65535)
        return bytes(data)
    if kind == "WEBP":
        size = struct.pack("<I", 65534)[:3]
        frame = bytes(6) + 2 * struct.pack("<I", 15)[:3] + bytes(4) + encoded(RGB[:16, :16], "WEBP")[12:]
        parts = ((b"VP8X", b"\2\0\0\0" + 2 * size), (b"ANIM", bytes(6)), (b"ANMF", frame))
        body = b"".join(name + struct.pack("<I", len(data)) + data for name, data in parts)
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    data = bytearray(encoded(RGB, "TIFF"))
    for tag in (256, 257):
        at = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
        data[at : at + 4] = struct.pack("<I", 1 << 20)
    return bytes(data)


PALETTE = Image.fromarray(RGB).quantize(16)
COLOURS = np.asarray(PALETTE.convert("RGB"))
FINE = {"quality": 100, "subsampling": 0}
PNG, TIFF, JPEG = encoded(RGB, "PNG"), encoded(RGB, "TIFF"), encoded(RGB, "JPEG", **FINE)
LONG = zlib.compress(b"a" * 3_000_000)
TURN = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6" + bytes(6)
WRONG_SUM = chunk(b"tEXt", b"k\0text")[:-1] + b"\0"
WEBP = encoded(RGB, "WEBP", lossless=True, exact=True)
AVIF = encoded(RGB, "AVIF", quality=100, subsampling="4:4:4", exif=exif((271, "a maker")))
