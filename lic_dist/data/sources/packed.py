"""Files of which each holds several photos, read one by one by their bytes' place in the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lic_dist.data import images
from lic_dist.data.photo import PhotoError
from lic_dist.data.photo_files import PhotoFiles
from lic_dist.data.source import Packed, PhotoSource, Stamp
from lic_dist.data.sources.files import Files
from lic_dist.errors import LicError

_RANGE = re.compile(r"(\d+)\+(\d+)@(.*)", re.DOTALL)


class PackedPhotos(PhotoSource):
    """Photos in the files that a pattern names. A photo's path is its name in its file, behind the file's path unless
    the pattern is just one file.

    A place is `OFFSET+LENGTH@FILE`, in bytes.
    """

    packed = True

    def __init__(self, files: Files, pattern: str) -> None:
        self.files, self.pattern, self.in_flight = files, pattern, files.in_flight
        self.where = f"{files.where}/{pattern}"
        self.single = not re.search(r"[*?]", pattern)

    def search(self) -> PhotoFiles:
        names = self.files.matching(self.pattern)
        if not names:
            hint = "is the name right?" if self.single else "* stands for any name in a folder, **/ for any folders"
            raise LicError(f"no file {self.where}", hint=hint)
        return PhotoFiles(self.where, names)

    def stamp(self, name: str) -> Stamp:
        return self.files.stamp(name)

    def read(self, name: str, place: str = "") -> tuple[bytes, Stamp]:
        found = _RANGE.fullmatch(place)
        if found is None:
            raise PhotoError(name, "unreadable")
        offset, length = int(found[1]), int(found[2])
        if length > images.LARGEST_FILE:
            raise PhotoError(name, "too large")
        data = self.files.part(found[3], offset, length)
        if len(data) != length:
            raise PhotoError(name, "changed")  # the file is shorter than it was
        return data, (0, 0)

    def absolute(self) -> PhotoSource:
        return type(self)(self.files.absolute(), self.pattern)

    def path_of(self, file: str, name: str) -> str:
        """Return the path of a photo by its file and its name there."""
        return name if self.single else f"{file}/{name}"

    def packed_range(self, file: str, name: str, offset: int, data: bytes) -> Packed:
        """Return a photo whose bytes begin at an offset of a file."""
        return Packed(self.path_of(file, name), f"{offset}+{len(data)}@{file}", data)

    def walked(self, file: str, photos: Iterator[Any]) -> Iterator[Any]:
        """Yield from an iterator; what its reader raises on a damaged file becomes a PhotoError of the file."""
        try:
            yield from photos
        except (PhotoError, LicError, GeneratorExit):
            raise
        except Exception:  # ReadError, ArrowInvalid, OSError, struct.error, UnicodeDecodeError ...
            raise PhotoError(file, "damaged") from None
