"""What a source of photos does: a folder, a bucket, a web server, a set of archives or tables.

A source has *files*. In most each file is a photo. In archives and tables a file holds several: then a photo has a
*place*, a text that its source reads it by, and nothing else does. Names and places are of a scan; that a photo is
still the one that was scanned, its digest says.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from lic_dist.data.photo_files import PhotoFiles

Stamp = tuple[int, int]
"""Size of a file in bytes, and its version: a time in ns, or 63 bits of an etag's digest; zeros where there is none."""


@dataclass(frozen=True)
class Packed:
    """A photo in a file of several: the path it is known by, its place, and its bytes; or why they are not there."""

    path: str
    place: str
    data: bytes = b""
    fault: str = ""


class PhotoSource(ABC):
    """Photos by name. Picklable: workers read by it, on other machines too.

    `where` is what it is called in messages. `packed`: whether a file holds several photos. `in_flight` reads at once
    are of use; 1 where no read waits for a network.
    """

    where: str
    packed: bool = False
    in_flight: int = 1

    @abstractmethod
    def search(self) -> PhotoFiles:
        """Find the files: photos, or files of photos, and what is passed over. Raises LicError where there is none."""

    @abstractmethod
    def stamp(self, name: str) -> Stamp:
        """Return size and version of a file."""

    @abstractmethod
    def read(self, name: str, place: str = "") -> tuple[bytes, Stamp]:
        """Return the bytes of a photo, and the stamp of what was read; zeros of a photo with a place.

        Raises:
            PhotoError: there is no such photo any more, or it is too large.
            LicError: the source cannot be reached; the photo may be there.
        """

    def walk(self, name: str, passed_over: Counter[str]) -> Iterator[Packed]:
        """Yield the photos of a file of several, from front to back; count by kind what is none.

        Raises:
            PhotoError: the file ends early, or is no such file.
        """
        raise NotImplementedError(f"{self.where}: a file is one photo")

    def absolute(self) -> PhotoSource:
        """Return the same source, independent of the working directory."""
        return self


def version_of(*marks: object) -> int:
    """Return 63 bits that stand for a version, which is told by texts and numbers."""
    digest = hashlib.sha256("/".join(map(str, marks)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
