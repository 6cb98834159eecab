"""Every kind of photo: the file, and the pixels or the fault that it must become."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from lic_dist.data import images
from lic_dist.data.photo import PhotoError
from tests.conftest import picture
from tests.data.files import (
    ALPHA,
    AVIF,
    COLOURS,
    DEEP,
    FINE,
    GREY,
    HEIGHT,
    INKS,
    JPEG,
    LONG,
    PALETTE,
    PNG,
    RGB,
    TIFF,
    TURN,
    WEBP,
    WIDTH,
    WRONG_SUM,
    animation,
    behind,
    chunk,
    claims,
    encoded,
    exif,
    frame,
    inked,
    oriented,
    png,
    printed,
    psd,
    rows_of,
    saved,
    segment,
    tagged,
    tiff,
    turned,
    two_pictures,
    webp_tail,
    ycck,
)


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
