"""Tell photos from the other files of a folder, which are counted by kind, with a way to have them read.

A photo is a file with the suffix of a still picture that Pillow reads. Hidden and system files and folders never count,
whatever their suffix: AppleDouble files (`._x.png`), `.ipynb_checkpoints`, `__MACOSX`, thumbnails of file managers.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lic_dist.errors import LicError
from lic_dist.text import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIGNED = """
.png .apng .jpg .jpeg .jpe .jfif .mpo .webp .tif .tiff .gif .bmp .avif .avifs .jp2 .j2k .jpc .jpf .jpx .j2c
.pbm .pgm .ppm .pnm .pfm .qoi .psd .dds .ras .icns
"""
SIGNED_SUFFIXES = frozenset(_SIGNED.split())
"""Suffixes of formats that are known by their first bytes, and then read under any other suffix too."""

UNSIGNED_SUFFIXES = {
    ".tga": "TGA", ".icb": "TGA", ".vda": "TGA", ".vst": "TGA", ".pcx": "PCX", ".dcx": "DCX", ".dib": "DIB",
    ".sgi": "SGI", ".rgb": "SGI", ".rgba": "SGI", ".bw": "SGI", ".ico": "ICO", ".cur": "CUR", ".xbm": "XBM",
    ".xpm": "XPM", ".im": "IM", ".msp": "MSP", ".pxr": "PIXAR", ".pcd": "PCD", ".gbr": "GBR", ".blp": "BLP",
    ".ftc": "FTEX", ".ftu": "FTEX",
}  # fmt: skip
"""Suffixes, and Pillow's format, of files whose first bytes prove little: read as such under their suffix alone."""

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})  # read where pillow-heif is installed
SYSTEM_NAMES = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found"}
    | {"system volume information", "__pycache__"}
)
HIDDEN = "hidden or system"

_WAYS = {
    "pip install pillow-heif": ".heic .heif .hif",
    "camera raw, develop it to PNG or TIFF": """.cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .dng .orf .rw2 .raf .pef .srw
        .raw .3fr .iiq .x3f .rwl .erf .mrw .kdc""",
    "convert it to PNG": """
        .jxl .jxr .jls .bpg .hdr .exr .fit .fits .xcf .kra .svg .svgz .eps .ps .ai .pdf .wmf .emf""",
    "a film": ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .flc .fli .3gp .mts",
    "unpack it": ".zip .gz .tgz .bz2 .xz .7z .rar",
    "to read photos in them give *.tar, or **/*.tar, as the path": ".tar",
    "to read photos in them give *.parquet, or **/*.parquet, as the path": ".parquet",
    "to read photos in them give *.arrow, or **/*.arrow, as the path": ".arrow",
}
HINTS = {suffix: way for way, suffixes in _WAYS.items() for suffix in suffixes.split()}
NAMED_KINDS = 8  # most kinds of passed-over files named in a line


@dataclass(frozen=True)
class PhotoFiles:
    """The files below a folder, or in another source of photos.

    `names` are the photos' relative posix paths, as `os.fsdecode` gives them, sorted by `readable`. `passed_over`
    counts all other files by kind: a suffix in lower case, "without a suffix", or HIDDEN (a hidden folder counts once).
    `stamps` int64 [names, 2], where the listing has them: see source.py.
    """

    folder: Path | str
    names: list[str]
    passed_over: Counter[str] = field(default_factory=Counter)
    stamps: NDArray[Any] | None = None

    def describe(self) -> str:
        """Return one line of what is passed over, readable kinds first; empty where nothing is."""
        kinds = sorted(self.passed_over.items(), key=lambda kind: (kind[0] not in HINTS, -kind[1], kind[0]))
        parts = [f"{count} {kind}{f' ({HINTS[kind]})' if kind in HINTS else ''}" for kind, count in kinds[:NAMED_KINDS]]
        if rest := sum(count for _, count in kinds[NAMED_KINDS:]):
            parts.append(f"{rest} others")
        return ", ".join(parts)

    def tell(self, photos: int | None = None) -> None:
        """Print once a process, on standard error, what is passed over beside `photos`; None: as many as names."""
        if +self.passed_over:
            count = len(self.names) if photos is None else photos
            tell(f"{self.folder}: {counted(count, 'photo')}; passed over {self.describe()}")


@cache
def tell(line: str) -> None:
    """Print a line on standard error, once a process."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun's ranks only the first prints
        print(line, file=sys.stderr)


def search(folder: Path) -> PhotoFiles:
    """Find all photos below a folder, and what is passed over.

    Links to folders are followed once, so that a loop ends. A folder that cannot be listed is recorded in place of its
    photos.

    Raises:
        LicError: no such folder, or no photo in it.
    """
    if not folder.is_dir():
        what = f"{folder} is no folder" if folder.exists() else f"no such folder of images: {folder}"
        raise LicError(what, hint="give the folder that holds the photos")
    found = PhotoFiles(folder, [])
    seen: set[tuple[int, int]] = set()

    def unlisted(error: OSError) -> None:
        found.names.append(os.path.relpath(error.filename, folder))

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
        visible = sorted(name for name in folders if not is_hidden(name))
        found.passed_over[HIDDEN] += len(folders) - len(visible)
        folders[:] = visible  # sorted: which of two links to a folder comes first must not depend on the disk
        base = os.path.relpath(parent, folder)
        prefix = "" if base == "." else f"{base}/"
        for name in files:
            if kind := kind_passed_over(name):
                found.passed_over[kind] += 1
            else:
                found.names.append(prefix + name)
    if not found.names:
        raise no_photos(found)
    found.names.sort(key=None if all(map(str.isascii, found.names)) else readable)
    return PhotoFiles(folder, found.names, +found.passed_over)


def no_photos(found: PhotoFiles) -> LicError:
    """Return the error of a search that has found no photo."""
    passed_over = found.describe()
    looked = f"looked for {' '.join(sorted(SIGNED_SUFFIXES)[:8])} ..., in subfolders too"
    return LicError(f"no photos in {found.folder}", hint=f"passed over {passed_over}" if passed_over else looked)


def is_hidden(name: str) -> bool:
    """Return whether this name is that of a hidden or system file or folder, which is no photo and holds none."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def kind_passed_over(path: str) -> str:
    """Return the kind under which a file that is no photo is counted, by its path, else ""."""
    if any(map(is_hidden, path.split("/"))):
        return HIDDEN
    _, dot, end = path.rpartition("/")[2].rpartition(".")
    suffix = dot + end.lower() if dot else ""
    if suffix in SIGNED_SUFFIXES or suffix in UNSIGNED_SUFFIXES or (suffix in HEIF_SUFFIXES and reads_heif()):
        return ""
    return readable(suffix) or "without a suffix"


@cache
def reads_heif() -> bool:
    """Return whether pillow-heif is installed."""
    return find_spec("pillow_heif") is not None


def readable(name: str) -> str:
    """Return a path that can be recorded: a name that is not UTF-8 is escaped, and then opens no file."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def printable(name: str) -> str:
    """Return a path for a terminal, with characters escaped that would break the line."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in name)


def find(folder: Path) -> list[str]:
    """Return the photos' names below a folder, as `readable` shows them."""
    return [readable(name) for name in search(folder).names]
