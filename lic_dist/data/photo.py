"""A photo, a sample, and the reasons why one is set aside, for all rooms. Loads no library."""

from __future__ import annotations

from dataclasses import dataclass

from lic_dist.data.photo_files import printable
from lic_dist.errors import LicError

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
    "damaged",
    "unsupported coding",
    "HEIC: needs pillow-heif",
    "no bytes",
    "its name comes again",
    "not an archive",
    "not a table",
)
"""Reasons why a photo or sample is set aside; a sample's `status` is the index into this tuple, 0 is good.

Stores keep the index: only append.
"""


SQUARE = 2  # crops a side of a square of neighbours


def least_side(crop: int, squares: bool) -> int:
    """Return the side in pixels that a photo needs at least for crops of a side, alone or in squares."""
    return SQUARE * crop if squares else crop


@dataclass(frozen=True)
class Photo:
    """One row of the manifest: a file below the scanned folder.

    `digest` is the sha256 of the file in hex, empty where it was not read; width and height in pixels, after EXIF
    orientation, 0 where there is a fault; `bytes` and `mtime_ns` are the file's own, or what stands for its version.
    `place` is where the source reads a photo that is no file of its own; the row of an archive or table itself, which
    has a fault, has `@` and its name there.
    """

    path: str
    digest: str
    width: int
    height: int
    bytes: int = 0
    mtime_ns: int = 0
    fault: str = ""
    place: str = ""


@dataclass(frozen=True)
class Crop:
    """One sample: a window of a photo, mirrored or not, in the training or the held-out part. `place` is the photo's,
    or its path where that is another than `source` by now.
    """

    source: str
    digest: str
    crop_y: int
    crop_x: int
    flip: bool
    held_out: bool
    place: str = ""


class PhotoError(LicError):
    """A photo that cannot be used; `fault` is one of FAULTS."""

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(f"{printable(path)}: {fault}")
        self.fault = fault
        self.args = path, fault  # pickle passes these to __init__
