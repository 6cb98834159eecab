"""Files of which each is a photo."""

from __future__ import annotations

from lic_dist.data.photo_files import PhotoFiles
from lic_dist.data.source import PhotoSource, Stamp
from lic_dist.data.sources.files import Files


class PlainPhotos(PhotoSource):
    """All photos below a root; a place is the path of a photo that lies elsewhere by now."""

    def __init__(self, files: Files) -> None:
        self.files, self.where, self.in_flight = files, files.where, files.in_flight

    def search(self) -> PhotoFiles:
        return self.files.photos()

    def stamp(self, name: str) -> Stamp:
        return self.files.stamp(name)

    def read(self, name: str, place: str = "") -> tuple[bytes, Stamp]:
        return self.files.read(place or name)

    def absolute(self) -> PhotoSource:
        return PlainPhotos(self.files.absolute())
