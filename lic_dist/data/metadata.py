"""Strip metadata from picture files, and tell why a file without readable pixels is refused.

Readers refuse a file for damaged or oversized text, profiles or EXIF although its pixels are whole. What is written
here keeps the bytes that the pixels are coded in, and as little else as possible.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PNG_ORIENTATION_KEYS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keys of text that may hold an orientation
JPEG_COLOURS = {0xE0: 14, 0xEE: 12}  # APP0 (JFIF) and APP14 (Adobe) describe the channels, in so many bytes
WEBP_CHUNKS = (
    b"",
    b"VP8 ",
    b"VP8L",
    b"ALPH",
    b"VP8X",
    b"EXIF",
    b"XMP ",
    b"ICCP",
    b"ANIM",
    b"ANMF",
)  # "": the end of the file
TIFF_PIXELS = frozenset(
    (256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339)
    + (347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532)
)  # tags that pixels depend on
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_CODINGS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32946, 34676, 34677, 34925, 50000, 50001})
UNSUPPORTED_JPEG = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7})  # lossless, differential, JPEG-LS
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
SIGNATURES = (
    PNG_SIGNATURE, b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"8BPS\0\1", JP2_SIGNATURE,
    b"\xff\x4f\xff\x51", b"qoif", b"DDS ", b"\x59\xa6\x6a\x95", b"icns",
)  # fmt: skip
UNSUPPORTED_SIGNATURES = (
    b"\xff\x0a",
    b"\0\0\0\x0cJXL \r\n\x87\n",
    b"BPG\xfb",
    b"II\xbc\x01",
)  # JPEG XL twice, BPG, JPEG XR


def without_metadata(data: bytes) -> Iterator[bytes]:
    """Yield the same picture with ever less metadata, if its format is known; the first ones keep its orientation."""
    if data.startswith(PNG_SIGNATURE):
        yield _strip_png(data, orientation=True)
        yield _strip_png(data, orientation=False)
    elif data.startswith(b"\xff\xd8\xff"):
        yield _strip_jpeg(data, exif=True)
        yield _strip_jpeg(data, exif=False)
    elif _is_webp(data):
        yield _strip_webp(data)
    elif data[:4] in (b"II*\0", b"MM\0*"):
        yield _strip_tiff(data)
    elif data.startswith(JP2_SIGNATURE):
        boxes = [data[start:end] for kind, start, end in _boxes(data) if kind in (b"jP  ", b"ftyp", b"jp2h", b"jp2c")]
        yield b"".join(boxes)
    elif data.startswith(b"8BPS"):
        yield _strip_psd(data)
    elif _brands(data):
        yield _strip_media(data)


def is_heif(data: bytes) -> bool:
    """Return whether the first bytes are HEIF's. An AVIF may name the same brands and does not count."""
    brands = _brands(data)
    return bool(brands & HEIF_BRANDS) and not brands & AVIF_BRANDS


def unsupported(data: bytes, unknown: bool = True) -> str:
    """Return why no reader reads a file: "unsupported pixels", "unsupported coding", "not an image"; "" where it is
    broken.

    `unknown` says that no reader recognised it; otherwise one of them failed.
    """
    if data.startswith(UNSUPPORTED_SIGNATURES):
        return "unsupported coding"
    if data.startswith(b"\xff\xd8\xff"):
        return _unsupported_jpeg(data)
    if not unknown:
        return ""
    if data[:4] in (b"II*\0", b"MM\0*"):
        codings = [_tiff_values(data, entry) for entry in _tiff_entries(data) if entry[0] == 259]
        if codings and not TIFF_CODINGS.issuperset(codings[0]):
            return "unsupported coding"
        return "unsupported pixels" if _tiff_directory(data) < len(data) else ""
    if data.startswith(b"8BPS\0\1") and len(data) > 26:
        return "unsupported pixels"
    if data.startswith(SIGNATURES) or _is_webp(data) or _brands(data) & (HEIF_BRANDS | AVIF_BRANDS):
        return ""
    return "not an image"


def ends_early(data: bytes) -> bool:
    """Return whether an undecodable file lacks its end, as far as its format shows; else it is damaged inside."""
    if data.startswith(PNG_SIGNATURE):
        chunks = list(_png_chunks(data))
        return not chunks or (chunks[-1][0] != b"IEND" and chunks[-1][2] >= len(data))
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in data[max(0, data.rfind(b"\xff\xda")) :]
    if _is_webp(data):
        return len(data) < 8 + int.from_bytes(data[4:8].ljust(4, b"\xff"), "little")
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff_end(data) > len(data)
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    if _brands(data) or data.startswith(JP2_SIGNATURE):
        return max((end for _, _, end in _boxes(data)), default=len(data) + 1) > len(data)
    return True


def _png_chunks(data: bytes, mend: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of every chunk; the last may end beyond the file.

    With `mend`, a chunk of damaged length ends where the next sound chunk that pixels depend on is found by its name.
    """
    position = len(PNG_SIGNATURE)
    while position < len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 12 + length
        if len(kind) == 4 and not kind.isalpha() and not mend:
            return
        yield kind, position, end
        if kind == b"IEND":
            return
        if mend and kind not in PNG_PIXELS and not (_is_sound(data, position, end) or _is_chunk_at(data, end)):
            found = (data.find(name, position + 8) - 4 for name in PNG_PIXELS)
            end = min((at for at in found if at > position and _is_chunk_at(data, at)), default=end)
        position = end


def _is_chunk_at(data: bytes, start: int) -> bool:
    """Return whether a PNG chunk with a right checksum begins at `start`."""
    return _is_sound(data, start, start + 12 + int.from_bytes(data[start : start + 4], "big"))


def _is_sound(data: bytes, start: int, end: int) -> bool:
    """Return whether the checksum of a PNG chunk is right."""
    return end <= len(data) and zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def is_whole_png(data: bytes) -> bool:
    """Return whether every chunk up to the end mark has its checksum, and nothing after the pixels turns the photo."""
    pixels = False
    for kind, start, end in _png_chunks(data):
        if not _is_sound(data, start, end) or (pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")):
            return False
        if kind == b"IEND":
            return pixels
        pixels |= kind == b"IDAT"
    return False


def _strip_png(data: bytes, orientation: bool) -> bytes:
    kept = [PNG_SIGNATURE]
    for kind, start, end in _png_chunks(data, mend=True):
        turning = kind == b"eXIf" or (
            kind in (b"iTXt", b"tEXt", b"zTXt") and data[start + 8 : start + 48].startswith(PNG_ORIENTATION_KEYS)
        )
        moving = kind == b"acTL" and end - start == 20
        if kind in PNG_PIXELS or ((moving or (turning and orientation)) and _is_sound(data, start, end)):
            kept.append(data[start:end])
    return b"".join(kept)


def _jpeg_segments(data: bytes, position: int = 2, mend: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of every segment up to the first scan, which extends to the end of the file.

    With `mend`, what follows metadata of damaged length is found by its size: see `_jpeg_picture`.
    """
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA:
            yield marker, position, len(data)
            return
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if mend and _is_jpeg_metadata(marker) and data[end : end + 1] != b"\xff":
            end = _jpeg_picture(data, position)
        yield marker, position, end
        position = end


def _is_jpeg_metadata(marker: int) -> bool:
    return 0xE0 <= marker <= 0xEF or marker == 0xFE


def _jpeg_picture(data: bytes, position: int) -> int:
    """Return where the headers of the largest picture after a position begin (the first of equals): previews are
    smaller.
    """
    largest, at = 0, data.find(b"\xff\xdb\0", position)
    found = len(data)
    while at >= 0:
        segments = list(_jpeg_segments(data, at))
        if segments and segments[-1][0] == 0xDA:
            sides = [data[start + 5 : start + 9] for marker, start, _ in segments if marker in (0xC0, 0xC1, 0xC2)]
            area = sum(int.from_bytes(one[:2], "big") * int.from_bytes(one[2:], "big") for one in sides)
            if area > largest:
                largest, found = area, at
        at = data.find(b"\xff\xdb\0", at + 1)
    return found


def _strip_jpeg(data: bytes, exif: bool) -> bytes:
    kept = [data[:2]]
    for marker, start, end in _jpeg_segments(data, mend=True):
        is_exif = exif and marker == 0xE1 and data[start + 4 : start + 10] == b"Exif\0\0"
        telling = end - start - 4 >= JPEG_COLOURS.get(marker, len(data))
        if is_exif or telling or not _is_jpeg_metadata(marker):
            kept.append(data[start:end])
    return b"".join(kept)


def _unsupported_jpeg(data: bytes) -> str:
    for marker, start, _ in _jpeg_segments(data):
        if marker in UNSUPPORTED_JPEG:
            return "unsupported coding"
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(data) > start + 9:
            bits, channels = data[start + 4], data[start + 9]
            return "" if bits == 8 and channels in (1, 3, 4) else "unsupported pixels"
    return ""


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and b"WEBP".startswith(data[8:12])


def _strip_webp(data: bytes) -> bytes:
    """Return pixels and alpha alone; the data unchanged where a chunk of pixels is cut or there are frames."""
    kept, position = [b""], 12
    while position + 8 <= len(data):
        kind, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + 8 + size + size % 2
        pixels = kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH")
        if kind in (b"ANIM", b"ANMF") or (pixels and end > len(data) + 1):
            return data
        if not pixels and data[end : end + 4] not in WEBP_CHUNKS:  # a wrong length: the next chunk is found by its name
            found = (data.find(name, position + 8) for name in WEBP_CHUNKS[1:4])
            end = min((at for at in found if at >= 0), default=end)
        if kind == b"VP8X":
            flags = data[position + 8] & ~0b101100  # neither profile nor EXIF nor XMP
            kept.append(data[position : position + 8] + bytes([flags]) + data[position + 9 : end])
        elif pixels:
            kept.append(data[position:end].ljust(end - position, b"\0"))
        position = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _byte_order(data: bytes) -> str:
    return "<" if data[:1] == b"I" else ">"


def _tiff_directory(data: bytes) -> int:
    """Return where the first directory of tags begins."""
    return int(struct.unpack(_byte_order(data) + "I", data[4:8].ljust(4, b"\xff"))[0])


def _tiff_entries(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Return (tag, type, count, the twelve bytes) of every entry in the first directory of a classic TIFF."""
    order, start = _byte_order(data), _tiff_directory(data)
    (count,) = struct.unpack(order + "H", data[start : start + 2].ljust(2, b"\0"))
    rows = (data[at : at + 12] for at in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12))
    return [(*struct.unpack(order + "HHI", row[:8]), row) for row in rows]


def _tiff_values(data: bytes, entry: tuple[int, int, int, bytes]) -> tuple[int, ...]:
    """Return the integers of an entry; none where they lie beyond the file."""
    _, kind, count, row = entry
    size = TIFF_SIZES.get(kind, 0) * count
    order, code = _byte_order(data), {1: "B", 3: "H", 4: "I"}.get(kind)
    start = struct.unpack(order + "I", row[8:])[0]
    stored = row[8 : 8 + size] if size <= 4 else data[start : start + size]
    return struct.unpack(f"{order}{count}{code}", stored) if code and len(stored) == size else ()


def _tiff_end(data: bytes) -> int:
    """Return where the last strip or tile of a TIFF's first page ends; beyond the file where its tags do."""
    entries = {entry[0]: entry for entry in _tiff_entries(data)}
    for starts, sizes in ((273, 279), (324, 325)):
        if starts in entries and sizes in entries:
            found = zip(_tiff_values(data, entries[starts]), _tiff_values(data, entries[sizes]), strict=False)
            return max((start + size for start, size in found), default=len(data) + 1)
    return len(data) + 1


def _strip_tiff(data: bytes) -> bytes:
    """Return the bytes with a new directory appended: the first page's, with only the tags that pixels depend on."""
    rows = [row for tag, _, _, row in _tiff_entries(data) if tag in TIFF_PIXELS]
    order, padded = _byte_order(data), data + b"\0" * (len(data) % 2)
    directory = struct.pack(order + "H", len(rows)) + b"".join(rows) + bytes(4)
    return padded[:4] + struct.pack(order + "I", len(padded)) + padded[8:] + directory


def _brands(data: bytes) -> set[bytes]:
    """Return the brands that an ISO media file names, HEIF and AVIF among them."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[at : at + 4] for at in (8, *range(16, end, 4))} - {b""}


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of the outermost boxes of an ISO media file or JPEG 2000; the last may end beyond it."""
    position = 0
    while position + 8 <= len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        end = position + size if size else len(data)
        yield kind, position, end
        position = max(end, position + 8)


def _strip_media(data: bytes) -> bytes:
    """Return the same bytes with the EXIF item renamed in the item catalogue; the picture's own rotation stays."""
    for kind, start, end in _boxes(data):
        if kind == b"meta":
            return data[:start] + data[start:end].replace(b"\0\0Exif", b"\0\0skip") + data[end:]
    return data


def _strip_psd(data: bytes) -> bytes:
    """Return header, palette and flattened picture, without resources and layers."""
    kept, position = [data[:26]], 26
    for keep in (True, False, False):
        end = position + 4 + int.from_bytes(data[position : position + 4], "big")
        kept.append(data[position:end] if keep else bytes(4))
        position = end
    return b"".join([*kept, data[position:]])
