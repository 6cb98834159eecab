"""Every kind of photo is converted rightly or recorded with its reason, by the scan and by the crops alike."""

from __future__ import annotations

import hashlib
import io
import random
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Transpose

from lic_dist.data import images
from lic_dist.data.crops import plan_crops
from lic_dist.data.manifest import scan
from lic_dist.data.metadata import PNG_SIGNATURE
from lic_dist.data.photo import FAULTS, Crop, PhotoError
from lic_dist.errors import LicError

from .conftest import picture

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


class Kind(NamedTuple):
    """A file, and what it becomes: pixels within a bound of every value, or the fault."""

    suffix: str
    data: bytes
    pixels: np.ndarray | None
    fault: str = ""
    bound: float = 0


def right(suffix: str, data: bytes, pixels: np.ndarray, bound: float = 0) -> Kind:
    return Kind(suffix, data, pixels, bound=bound)


def wrong(suffix: str, data: bytes, fault: str) -> Kind:
    return Kind(suffix, data, None, fault)


PALETTE = Image.fromarray(RGB).quantize(16)
COLOURS = np.asarray(PALETTE.convert("RGB"))
FINE = {"quality": 100, "subsampling": 0}
PNG, TIFF, JPEG = encoded(RGB, "PNG"), encoded(RGB, "TIFF"), encoded(RGB, "JPEG", **FINE)
LONG = zlib.compress(b"a" * 3_000_000)
TURN = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6" + bytes(6)
WRONG_SUM = chunk(b"tEXt", b"k\0text")[:-1] + b"\0"
WEBP = encoded(RGB, "WEBP", lossless=True, exact=True)
AVIF = encoded(RGB, "AVIF", quality=100, subsampling="4:4:4", exif=exif((271, "a maker")))
META = {  # damaged metadata, or too much of it, beside whole pixels
    "zTXt of 3 MB": right("png", behind(PNG, 33, chunk(b"zTXt", b"k\0\0" + LONG)), RGB),
    "zTXt of 3 MB after the pixels": right("png", behind(PNG, len(PNG) - 12, chunk(b"zTXt", b"k\0\0" + LONG)), RGB),
    "80 MB of text": right(
        "png", behind(PNG, 33, 27 * chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 999_999)) * 3), RGB
    ),
    "XMP of 3 MB": right("png", behind(PNG, 33, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)), RGB),
    "long text and a turn": right(
        "png", behind(PNG, 33, chunk(b"zTXt", b"k\0\0" + LONG) + chunk(b"eXIf", TURN)), turned(6)
    ),
    "profile of 3 MB": right("png", behind(PNG, 33, chunk(b"iCCP", b"k\0\0" + LONG)), RGB),
    "text with a wrong checksum": right("png", behind(PNG, 33, WRONG_SUM), RGB),
    "text with a wrong length": right("png", behind(PNG, 33, b"\0\0\1" + chunk(b"tEXt", b"k\0text")[3:]), RGB),
    "text cut after the pixels": right(
        "png", behind(PNG, len(PNG) - 12, chunk(b"tEXt", b"k\0" + b"a" * 99))[:-60], RGB
    ),
    "eXIf of noise": right("png", behind(PNG, 33, chunk(b"eXIf", b"noise")), RGB),
    "eXIf with a wrong checksum": right("png", behind(PNG, 33, chunk(b"eXIf", TURN)[:-1] + b"\0"), RGB),
    **{
        f"short {name}": right("png", behind(PNG, 33, chunk(name.encode(), b"\1")), RGB)
        for name in ("pHYs", "gAMA", "cHRM", "tRNS", "acTL", "fcTL", "tIME", "sBIT", "bKGD", "hIST")
    },
    "empty sRGB": right("png", behind(PNG, 33, chunk(b"sRGB", b"")), RGB),
    **{
        f"jpeg {name}": right("jpg", behind(JPEG, 2, segment(marker, data)), RGB, 6)
        for name, marker, data in (
            ("exif of noise", 0xE1, b"Exif\0\0noise"),
            ("exif cut", 0xE1, b"Exif\0\0" + TURN[:14]),
            ("exif beyond", 0xE1, b"Exif\0\0MM\0*" + b"\xff" * 4),
            ("short profile", 0xE2, b"ICC_PROFILE\0"),
            ("bad index of pictures", 0xE2, b"MPF\0noise"),
            ("short JFIF", 0xE0, b"JFIF"),
            ("short Adobe", 0xEE, b"Adobe"),
            ("bad Photoshop", 0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\xff\xff"),
            ("empty APP5", 0xE5, b""),
        )
    },  # fmt: skip
    "jpeg comment of a wrong length": right("jpg", behind(JPEG, 2, b"\xff\xfe\1\xff" + bytes(99)), RGB, 6),
    "jpeg preview of a wrong length": right(
        "jpg", behind(JPEG, 2, b"\xff\xe1\0\x20" + encoded(RGB[:16, :16], "JPEG") + bytes(9)), RGB, 6
    ),
    "webp cut in its XMP": right("webp", webp_tail()[:-60], RGB),
    "webp exif of noise": right("webp", webp_tail().replace(b"MM\0*", b"zzzz"), RGB),
    "webp profile of a wrong length": right(
        "webp",
        encoded(RGB, "WEBP", lossless=True, exact=True, icc_profile=bytes(99)).replace(b"ICCP\x63", b"ICCP\xff"),
        RGB,
    ),
    "webp that claims too much": right("webp", (w := WEBP)[:4] + struct.pack("<I", len(w) + 50) + w[8:], RGB),
    "webp that claims too little": right("webp", w[:4] + struct.pack("<I", 50) + w[8:], RGB),
    **{
        f"tiff {name}": right("tif", tagged(TIFF, *entry), RGB)
        for name, entry in {
            "profile beyond": (34675, 7, 5000, b"\0\0\0\x40"),
            "exif beyond": (34665, 4, 1, b"\0\0\0\x40"),
            "XMP of noise": (700, 2, 4, b"\xff\xfe\xfd\0"),
            "a turn in words": (274, 2, 4, b"abc\0"),
            "resolution by zero": (282, 5, 1, bytes(4)),
            "an unknown type": (40000, 99, 1, bytes(4)),
            "a huge count": (34675, 7, 2**32 - 1, b"\x08\0\0\0"),
        }.items()
    },  # fmt: skip
    "tiff whose second page is cut": right("tif", animation("TIFF")[:-3000], picture(0, HEIGHT, WIDTH)),
    "avif exif of noise": right("avif", AVIF.replace(b"MM\0*", b"zzzz"), RGB, 12),
    "jpeg 2000 with a strange box": right(
        "jp2", behind(encoded(RGB, "JPEG2000"), 32, struct.pack(">I4s", 24, b"uuid") + bytes(16)), RGB
    ),
    "psd of noisy resources": right("psd", psd(resources=b"noise!!!"), RGB),
    "psd of noisy layers": right("psd", psd(layers=b"\xff" * 40), RGB),
}
GREY16 = DEEP[:, :, :1] / 257
FORMATS = {
    "bmp": right("bmp", encoded(RGB, "BMP"), RGB),
    "ppm": right("ppm", encoded(RGB, "PPM"), RGB),
    "grey pgm": right("pgm", encoded(RGB[:, :, 0], "PPM"), GREY),
    "16-bit grey pgm": right(
        "pgm",
        b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + DEEP[:, :, 0].astype(">u2").tobytes(),
        np.repeat(GREY16, 3, 2),
        0.51,
    ),
    "tga": right("TGA", encoded(RGB, "TGA"), RGB),
    "tga with alpha": right("tga", encoded(ALPHA, "TGA"), RGB),
    "jpeg 2000": right("jp2", encoded(RGB, "JPEG2000"), RGB),
    "jpeg 2000 named jpg": right("jpg", encoded(RGB, "JPEG2000"), RGB),
    "avif": right("avif", AVIF, RGB, 12),
    "avif turned": right(
        "avif", encoded(RGB, "AVIF", quality=100, subsampling="4:4:4", exif=exif((274, 6))), turned(6), 12
    ),
    "jfif": right("jfif", JPEG, RGB, 6),
    "mpo": right("mpo", two_pictures(), RGB, 6),
    "gif": right("gif", saved(PALETTE, "GIF", comment=b"a comment" * 40), COLOURS),
    "qoi": right("qoi", encoded(RGB, "QOI"), RGB),
    "sgi": right("rgb", encoded(RGB, "SGI"), RGB),
    "pcx": right("pcx", encoded(RGB, "PCX"), RGB),
    "dds": right("dds", encoded(RGB, "DDS"), RGB),
    "psd": right("psd", psd(), RGB),
    "12-bit jpeg": wrong("jpg", frame(0xC0, 4, 12), "unsupported pixels"),
    "two-channel jpeg": wrong("jpg", frame(0xC0, 9, 2), "unsupported pixels"),
    "lossless jpeg": wrong("jpg", frame(0xC3), "unsupported coding"),
    "jpeg-ls": wrong("jpg", frame(0xF7), "unsupported coding"),
    "jpeg xl named jpg": wrong("jpg", b"\xff\x0a" + bytes(99), "unsupported coding"),
    "16-bit psd": wrong("psd", psd(depth=16), "unsupported pixels"),
    "float pfm": wrong("pfm", saved(Image.fromarray(GREY[:, :, 0].astype(np.float32)), "PPM"), "unsupported pixels"),
    "tiff of an unknown coding": wrong(
        "tif",
        TIFF.replace(struct.pack("<HHI", 259, 3, 1) + b"\1", struct.pack("<HHI", 259, 3, 1) + b"\x47"),
        "unsupported coding",
    ),
    "film named jpg": wrong("jpg", b"\0\0\0\x18ftypisom\0\0\0\0isomavc1" + bytes(50), "not an image"),
    "animated avif": wrong("avif", animation("AVIF"), "animated"),
    "half an avif": wrong("avif", AVIF[:-200], "truncated"),
    "half a jpeg 2000": wrong("jp2", encoded(RGB, "JPEG2000")[:-900], "truncated"),
    "half a ppm": wrong("ppm", encoded(RGB, "PPM")[:-900], "truncated"),
    "half a tga": wrong("tga", encoded(RGB, "TGA")[:-900], "truncated"),
    "half a gif": wrong("gif", saved(PALETTE, "GIF")[:-300], "truncated"),
    "garbled jpeg": wrong("jpg", JPEG[:900] + b"\xff\xc4\0\x20" * 50 + JPEG[1100:], "damaged"),
    "text named tga": wrong("tga", b"no picture at all" * 9, "not an image"),
    "git-lfs pointer": wrong(
        "png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "not an image"
    ),
}
KINDS = {
    **META,
    **FORMATS,
    "png": right("png", PNG, RGB),
    "png of raw rows": right("png", png(WIDTH, HEIGHT, 8, 2, rows_of(RGB)), RGB),
    "jpeg": right("jpg", encoded(RGB, "JPEG", **FINE), RGB, 6),
    "progressive jpeg": right("JPEG", encoded(RGB, "JPEG", progressive=True, **FINE), RGB, 6),
    "webp": right("webp", encoded(RGB, "WEBP", lossless=True, exact=True), RGB),
    "tiff": right("tif", encoded(RGB, "TIFF"), RGB),
    "lzw tiff": right("tiff", encoded(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "png named jpg": right("jpg", encoded(RGB, "PNG"), RGB),
    "bmp named png": right("png", encoded(RGB, "BMP"), RGB),
    "grey png": right("png", encoded(RGB[:, :, 0], "PNG"), GREY),
    "grey jpeg": right("jpg", encoded(RGB[:, :, 0], "JPEG", **FINE), GREY, 3),
    "grey and alpha": right("png", encoded(ALPHA[:, :, [0, 3]], "PNG"), GREY),
    "rgb and alpha": right("png", encoded(ALPHA, "PNG"), RGB),
    "webp with alpha": right("webp", encoded(ALPHA, "WEBP", lossless=True, exact=True), RGB),
    "tiff with alpha": right("tif", encoded(ALPHA, "TIFF"), RGB),
    "one bit": right("png", encoded(GREY[:, :, 0] > 99, "PNG"), (GREY > 99) * np.uint8(255)),
    "palette": right("png", saved(PALETTE, "PNG"), COLOURS),
    "palette, one colour clear": right("png", saved(PALETTE, "PNG", transparency=3), COLOURS),
    "palette, colours half clear": right("png", saved(PALETTE, "PNG", transparency=bytes(range(16))), COLOURS),
    "rgb, one colour clear": right("png", encoded(RGB, "PNG", transparency=(9, 9, 9)), RGB),
    "gif named png": right("png", saved(PALETTE, "GIF"), COLOURS),
    "16-bit grey png": right("png", encoded(DEEP[:, :, 0], "PNG"), np.repeat(DEEP[:, :, :1] / 257, 3, 2), 0.51),
    "16-bit grey tiff": right("tif", tiff(DEEP[:, :, 0]), np.repeat(DEEP[:, :, :1] / 257, 3, 2), 0.51),
    "16-bit grey big-endian tiff": right(
        "tif", tiff(DEEP[:, :, 0], byteorder=">"), np.repeat(DEEP[:, :, :1] / 257, 3, 2), 0.51
    ),
    "16-bit rgb png": right("png", png(WIDTH, HEIGHT, 16, 2, rows_of(DEEP)), DEEP >> 8),
    "16-bit rgb tiff": right("tif", tiff(DEEP, photometric="rgb"), DEEP >> 8),
    "cmyk jpeg": right("jpg", inked(INKS, "JPEG", **FINE), printed(INKS), 8),
    "ycck jpeg": right("jpg", ycck(), RGB, 8),
    "cmyk tiff": right("tif", inked(INKS, "TIFF"), printed(INKS), 1),
    "two pictures in a jpeg": right("jpg", two_pictures(), RGB, 6),
    "eXIf after the pixels": right(
        "png",
        png(WIDTH, HEIGHT, 8, 2, rows_of(RGB), chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6" + bytes(6))),
        turned(6),
    ),
    "no end mark": right("png", encoded(RGB, "PNG")[:-12], RGB),
    "no bytes": wrong("png", b"", "not an image"),
    "text": wrong("jpg", b"this is no picture at all, whatever its name says", "not an image"),
    "postscript": wrong("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
    "half a png": wrong("png", encoded(RGB, "PNG")[:-900], "truncated"),
    "half a jpeg": wrong("jpg", encoded(RGB, "JPEG")[:-300], "truncated"),
    "half a progressive jpeg": wrong("jpg", encoded(RGB, "JPEG", progressive=True)[:-300], "truncated"),
    "half a webp": wrong("webp", encoded(RGB, "WEBP", lossless=True)[:-900], "truncated"),
    "half a lossy webp": wrong("webp", encoded(RGB, "WEBP")[:-300], "truncated"),
    "half a tiff": wrong("tif", encoded(RGB, "TIFF")[:-900], "truncated"),
    "half an lzw tiff": wrong("tif", encoded(RGB, "TIFF", compression="tiff_lzw")[:-900], "truncated"),
    "animated webp": wrong("webp", animation("WEBP"), "animated"),
    "animated png": wrong("png", animation("PNG"), "animated"),
    "animated gif named png": wrong("png", animation("GIF"), "animated"),
    "tiff of pages": right("tif", animation("TIFF"), picture(0, HEIGHT, WIDTH)),
    "float tiff": wrong("tif", tiff(RGB[:, :, 0].astype(np.float32)), "unsupported pixels"),
    "32-bit tiff": wrong("tif", tiff(RGB[:, :, 0].astype("<i4")), "unsupported pixels"),
    "float rgb tiff": wrong("tif", tiff(RGB.astype(np.float32), photometric="rgb"), "unsupported pixels"),
    **{f"{kind} bomb": wrong("png", claims(kind), "too large") for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")},
    "ICO bomb": wrong("ico", claims("ICO"), "too large"),
    **{f"png turned {turn}": right("png", oriented("PNG", turn), turned(turn)) for turn in range(10)},
    **{f"tiff turned {turn}": right("tif", oriented("TIFF", turn), turned(turn)) for turn in range(1, 9)},
    **{f"jpeg turned {turn}": right("jpg", oriented("JPEG", turn, **FINE), turned(turn), 6) for turn in range(1, 9)},
    **{
        f"webp turned {turn}": right("webp", oriented("WEBP", turn, lossless=True, exact=True), turned(turn))
        for turn in range(1, 9)
    },
}


def outcome(examine: Callable[..., tuple[int, int]], data: bytes, suffix: str = "png") -> tuple[int, int] | str:
    try:
        return examine(data, f"x.{suffix}")
    except PhotoError as error:
        return error.fault


def decoded_size(data: bytes, name: str) -> tuple[int, int]:
    height, width, _ = images.decode(data, name).shape
    return width, height


@pytest.mark.parametrize("name", KINDS)
def test_a_photo_is_converted_or_recorded(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    (tmp_path / f"x.{kind.suffix}").write_bytes(kind.data)
    Image.fromarray(RGB).save(tmp_path / "good.png")
    row = next(photo for photo in scan(tmp_path) if photo.path != "good.png")
    crop = Crop(row.path, hashlib.sha256(kind.data).hexdigest(), 3, 4, False, False)
    (window,), (status,) = images.read_crops(tmp_path, [crop], 32)
    assert (row.fault, FAULTS[status], row.digest) == (kind.fault, kind.fault, crop.digest)
    if kind.pixels is None:
        assert (row.width, row.height) == (0, 0) and not window.any()
        return
    assert (row.height, row.width) == kind.pixels.shape[:2]
    pixels = images.read(tmp_path / row.path)
    assert pixels.dtype == np.uint8 and pixels.shape == kind.pixels.shape
    assert np.abs(pixels - kind.pixels.astype(float)).max() <= kind.bound
    assert np.array_equal(window, pixels[3:35, 4:36].transpose(2, 0, 1))
    kept = images.read(tmp_path / row.path, keep_grey=True)
    assert (kept.ndim == 2) == ("grey" in name or name == "one bit")
    assert np.array_equal(np.repeat(kept[:, :, None], 3, 2) if kept.ndim == 2 else kept, pixels)


@pytest.mark.parametrize("name", KINDS)
def test_the_cheap_look_sees_what_decoding_sees(name: str) -> None:
    suffix, data = KINDS[name][:2]
    assert outcome(images.measure, data, suffix) == outcome(decoded_size, data, suffix)
    for cut in random.Random(name).sample(range(len(data)), min(len(data), 25)):
        assert outcome(images.measure, data[:cut], suffix) == outcome(decoded_size, data[:cut], suffix)


@given(st.sampled_from([name for name in KINDS if "bomb" not in name]), st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_damage_never_crashes_and_the_cheap_look_sees_it_too(name: str, seed: int, count: int) -> None:
    generator, data, suffix = np.random.default_rng(seed), bytearray(KINDS[name].data), KINDS[name].suffix
    for position in generator.integers(0, len(data), count) if data else ():
        data[position] = generator.integers(256)
    found = outcome(images.measure, bytes(data), suffix)
    assert found == outcome(decoded_size, bytes(data), suffix)
    assert not isinstance(found, str) or found in FAULTS


@pytest.fixture()
def little_memory() -> Iterator[None]:
    """No more than 200 MB of address space on top of what the process has; the smallest bomb claims 4 GB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "ICO"])
def test_a_bomb_is_refused_by_its_header(kind: str, little_memory: None) -> None:
    for look in (images.measure, decoded_size):
        assert outcome(look, claims(kind), kind.lower()) == "too large"


def test_what_a_reader_says_of_metadata_is_not_shown(tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS.values()):
        (tmp_path / f"{number}.{kind.suffix}").write_bytes(kind.data)
    script = """
import pathlib, sys
from lic_dist.data import images
for path in pathlib.Path(sys.argv[1]).iterdir():
    try:
        images.read(path)
    except images.PhotoError:
        pass
"""
    ended = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert (ended.stderr, ended.returncode) == ("", 0)


def test_heic_is_read_with_pillow_heif_and_named_without(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    for one in (data, data.replace(b"MM\0*", b"zzzz")):
        for name in ("x.heic", "x.jpg"):
            assert np.abs(images.decode(one, name) - RGB.astype(float)).max() <= 12
    assert outcome(images.measure, data[:-300]) == outcome(decoded_size, data[:-300]) == "truncated"
    monkeypatch.setattr(images, "reads_heif", lambda: False)
    assert outcome(images.measure, data) == outcome(decoded_size, data) == "HEIC: needs pillow-heif"


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(images.LARGEST_FILE + 1)  # a hole: takes no room
    Image.fromarray(RGB).save(tmp_path / "y.png")
    assert [photo.fault for photo in scan(tmp_path)] == ["too large", ""]


def test_a_png_that_lies_under_right_checksums_is_found_by_its_crops(tmp_path: Path) -> None:
    data = png(WIDTH, HEIGHT, 8, 2, rows_of(RGB)[:-500])
    (tmp_path / "x.png").write_bytes(data)
    crops = plan_crops(scan(tmp_path), 32, 1, 0, 0.0)
    assert [FAULTS[code] for code in images.read_crops(tmp_path, crops, 32)[1]] == ["damaged"]


def test_a_photo_smaller_than_a_crop_gives_none(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "small.png")
    Image.fromarray(picture(2, 64, 64)).save(tmp_path / "large.png")
    scanned = scan(tmp_path)
    assert [crop.source for crop in plan_crops(scanned, 64, 2, 0, 0.0)] == ["large.png"] * 2
    crops = [Crop(photo.path, photo.digest, 0, 0, False, False) for photo in scanned]
    read, status = images.read_crops(tmp_path, crops, 64)
    assert [FAULTS[code] for code in status] == ["", "smaller than a crop"] and not read[1].any()


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    for name in ("x.png", "none.png", "n" * 300):
        with pytest.raises(LicError, match="unreadable"):
            images.read(tmp_path / name)
        crop = Crop(name, "", 0, 0, False, False)
        assert FAULTS[images.read_crops(tmp_path, [crop], 32)[1][0]] == "unreadable"


def test_read_crops_cuts_flips_and_notices_a_changed_photo(tmp_path: Path) -> None:
    pixels = picture(9, 80, 90)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(picture(10, 80, 90)).save(tmp_path / "b.png")
    crops = plan_crops(scan(tmp_path), 64, 4, 0, 0.0)
    Image.fromarray(picture(11, 80, 90)).save(tmp_path / "b.png")
    read, status = images.read_crops(tmp_path, crops, 64)
    for crop, window, code in zip(crops, read, status, strict=True):
        if crop.source == "b.png":
            assert FAULTS[code] == "changed" and not window.any()
            continue
        expected = pixels[crop.crop_y : crop.crop_y + 64, crop.crop_x : crop.crop_x + 64]
        expected = expected[:, ::-1] if crop.flip else expected
        assert code == 0 and np.array_equal(window, expected.transpose(2, 0, 1))
