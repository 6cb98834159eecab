"""Photos in tar archives: plain sets, and WebDataset's, whose other members are passed over. Nothing is unpacked."""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator

from lic_dist.data import images, photo_files
from lic_dist.data.photo import PhotoError
from lic_dist.data.source import Packed
from lic_dist.data.sources.packed import PackedPhotos


class TarPhotos(PackedPhotos):
    """Photos in tar archives without compression."""

    def walk(self, name: str, passed_over: Counter[str]) -> Iterator[Packed]:
        yield from self.walked(name, self._walk(name, passed_over))

    def _walk(self, name: str, passed_over: Counter[str]) -> Iterator[Packed]:
        with self.files.open(name) as file:
            try:
                tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # `file` is closed
            except tarfile.TarError:
                raise PhotoError(name, "not an archive") from None
            while (member := _next(tar, name)) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                path = photo_files.readable(posixpath.normpath(member.name).lstrip("/"))
                kind = "links and the like" if member.issparse() or not member.isreg() else ""
                if kind := kind or photo_files.kind_passed_over(path):
                    passed_over[kind] += not member.isdir()
                    continue
                offset, size = member.offset_data, member.size
                if size > images.LARGEST_FILE:
                    yield Packed(self.path_of(name, path), f"{offset}+{size}@{name}", fault="too large")
                    continue
                file.seek(offset)
                data = file.read(size)
                if len(data) < size:
                    raise PhotoError(name, "truncated")
                yield self.packed_range(name, path, offset, data)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes what is no header for the end
                raise PhotoError(name, "truncated")


def _next(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except tarfile.TarError:
        raise PhotoError(name, "truncated") from None
