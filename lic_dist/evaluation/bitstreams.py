"""The bitstreams that an evaluation keeps: in a folder while it runs, a file for each row, and then in one archive.

A file of the folder lies there before its row is in the journal, so that a killed run has all bitstreams of its rows.
It is a line with two digests, and the bytes. What was packed before is read from the archive.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from lic_dist.building.records import named_record
from lic_dist.data import images
from lic_dist.errors import LicError
from lic_dist.evaluation.anchors import AnchorJob
from lic_dist.evaluation.archive import RESULTS, Archive, Manifest, Model, Stream, Streams, add, add_manifest
from lic_dist.evaluation.classic import CODECS
from lic_dist.evaluation.jobs import AnyJob, distinct_file_names, file_safe
from lic_dist.evaluation.journal import Key, beside
from lic_dist.evaluation.results import ImageResult, Point, write_points, write_whole
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.names import SUFFIX, label, split_pack
from lic_dist.models.parts import decoder_digest, entropy_digest
from lic_dist.text import counted

ABOUT = "about.json"
_HEAD = 2 * 64 + 2  # bytes of the line before a bitstream
_SUFFIXES = {"JPEG": ".jpg", "WEBP": ".webp", "AVIF": ".avif", "JPEG2000": ".j2k", "JXL": ".jxl", "BPG": ".bpg"}


@dataclass(frozen=True)
class Bitstream:
    """A coded picture: the bytes of its file, and digests of the pixels of the original and the decoded picture."""

    data: bytes
    original: str
    decoded: str

    @classmethod
    def of(cls, data: bytes, original: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> Bitstream:
        """Return that of two pictures, uint8 [H, W, 3]."""
        return cls(data, images.pixel_digest(original), images.pixel_digest(decoded))


class _About(BaseModel):
    """What the bitstreams of a learned codec's point are decoded with; `at` is the path of the checkpoint."""

    model: Model
    at: str
    record: str


class Bitstreams:
    """The bitstreams of a result file by key and image; `checkpoints` packs the models' files with them."""

    def __init__(self, out: Path, checkpoints: bool = False) -> None:
        """Raises LicError where its archive is broken."""
        self.out, self.checkpoints = out, checkpoints
        self.folder, self.path = beside(out, ".bitstreams"), beside(out, ".bitstreams.zip")
        self._packed: dict[Key, Streams] = {}
        self._sizes: dict[tuple[Key, str], int] = {}
        if not self.path.exists():
            return
        try:
            with Archive.open(self.path) as archive:
                for point, streams in zip(archive.points, archive.manifest.points, strict=True):
                    self._packed[Key.of(point)] = streams
                    sizes = {one.image: archive.file.getinfo(one.member).file_size for one in streams.streams}
                    self._sizes |= {(Key.of(point), image): size for image, size in sizes.items()}
        except LicError as error:
            raise LicError(error.message, hint="remove it: its pictures are coded again") from None

    def begin(self, key: Key, job: AnyJob) -> None:
        """Note what the bitstreams of a job are decoded with, where the archive does not have it."""
        at = self._at(key) / ABOUT
        packed = self._packed.get(key)
        known = packed is not None and packed.model is not None and (packed.model.member or not self.checkpoints)
        if isinstance(job, AnchorJob) or known or at.exists():
            return
        loaded = job.load()
        model = Model(
            checkpoint=job.checkpoint,
            architecture=job.architecture,
            lmbda=job.lmbda,
            options=job.options,
            entropy=entropy_digest(loaded.model),
            decoder=decoder_digest(loaded.model),
        )
        about = _About(model=model, at=job.model_at, record=named_record(loaded, job.record_at).to_json())
        write_whole(at, about.model_dump_json().encode())

    def add(self, key: Key, image: str, bitstream: Bitstream) -> None:
        """Write a bitstream; it is in the folder when this returns. Raises LicError where it cannot be written."""
        line = f"{bitstream.original} {bitstream.decoded}\n".encode()
        write_whole(self._at(key, image), line + bitstream.data)

    def has(self, key: Key, row: ImageResult) -> bool:
        """Return whether the bitstream of a row is kept: one of its size."""
        try:
            size = self._at(key, row.image).stat().st_size - _HEAD
        except FileNotFoundError:
            size = self._sizes.get((key, row.image), -1)
        return size == row.file_size

    def has_all(self, point: Point) -> bool:
        """Return whether all bitstreams of a point are kept."""
        return all(self.has(Key.of(point), row) for row in point.images)

    def pack(self, name: str, points: Sequence[Point], waiting: Set[Key]) -> None:
        """Write the archive of all points whose bitstreams are kept, and print a line; then drop them from the folder.

        Those of the keys in `waiting`, which have no point yet, stay there.

        Raises:
            LicError: it cannot be written, or a checkpoint that is to be packed is not where it was.
        """
        whole = [point for point in points if self.has_all(point)]
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            with ExitStack() as files:
                before = files.enter_context(Archive.open(self.path)) if self.path.exists() else None
                _Writer(self, before, files.enter_context(zipfile.ZipFile(temporary, "w"))).write(name, whole)
            temporary.replace(self.path)
        except OSError as error:
            raise LicError(f"cannot write {self.path}: {error.strerror or error}") from None
        finally:
            temporary.unlink(missing_ok=True)
        kept = {self._at(key) for key in waiting}
        for one in self.folder.iterdir() if self.folder.exists() else ():
            if one not in kept:
                shutil.rmtree(one)
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        said = f"{counted(sum(len(point.images) for point in whole), 'bitstream')} of {counted(len(whole), 'point')}"
        if left := len(points) - len(whole):
            said += f", of {left} none were kept"
        print(f"{self.path}: {said}; {self.path.stat().st_size / 1e6:.1f} MB", flush=True)

    def about(self, key: Key) -> _About | None:
        """Return what `begin` noted of a key; None where it did not. Raises LicError for a broken file."""
        path = self._at(key) / ABOUT
        try:
            return _About.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise LicError(f"{path} is broken", hint=f"remove {self.folder}: its pictures are coded again") from None

    def read(self, key: Key, image: str, before: Archive | None) -> Bitstream:
        """Return a bitstream that is kept, of the folder or of the archive that was written before."""
        try:
            head, data = self._at(key, image).read_bytes().split(b"\n", 1)
            return Bitstream(data, *head.decode().split(" "))
        except FileNotFoundError:
            (stream,) = (one for one in self._packed[key].streams if one.image == image)
            data = before.read(stream.member, stream.sha256) if before else b""
            return Bitstream(data, stream.original, stream.decoded)

    def packed(self, key: Key) -> Streams:
        """Return what the archive has of a key."""
        return self._packed[key]

    def _at(self, key: Key, image: str = "") -> Path:
        """Return the folder of a key, or the path of one of its bitstreams."""
        named = [f"{key.quantizer} {key.record} {key.model} {key.pictures}", *([image] if image else [])]
        return self.folder.joinpath(*(hashlib.sha256(one.encode()).hexdigest()[:32] for one in named))


class _Writer:
    """Writes an archive: the members of each point, and what several have in common once."""

    def __init__(self, kept: Bitstreams, before: Archive | None, file: zipfile.ZipFile) -> None:
        self.kept, self.before, self.file = kept, before, file
        self.members: set[str] = set()

    def write(self, name: str, points: Sequence[Point]) -> None:
        """Write all of it; `name` is that of the result file."""
        folders = distinct_file_names(list(map(_folder, points)))
        parts = [self._point(point, folder) for point, folder in zip(points, folders, strict=True)]
        with TemporaryDirectory() as temporary:
            at = Path(temporary) / RESULTS
            write_points(at, name, [replace(point, shown={}) for point in points])
            self._add(RESULTS, at.read_bytes())
        add_manifest(self.file, Manifest(points=tuple(parts)))

    def _add(self, member: str, data: bytes) -> str:
        """Add a member, unless it was added; return its name."""
        if member not in self.members:
            add(self.file, member, data)
            self.members.add(member)
        return member

    def _point(self, point: Point, folder: str) -> Streams:
        key, learned = Key.of(point), point.lmbda is not None
        suffix = ".lic" if learned else _SUFFIXES[CODECS[point.quantizer].format.name]
        streams = []
        for row, safe in zip(point.images, distinct_file_names([row.image for row in point.images]), strict=True):
            one = self.kept.read(key, row.image, self.before)
            member = self._add(f"{folder}/{safe}{suffix}", one.data)
            digest = hashlib.sha256(one.data).hexdigest()
            streams.append(
                Stream(image=row.image, member=member, sha256=digest, original=one.original, decoded=one.decoded)
            )
        model, record = self._model(point, key) if learned else (None, "")
        return Streams(model=model, record=record, streams=tuple(streams))

    def _model(self, point: Point, key: Key) -> tuple[Model, str]:
        """Add record and, if asked for, the checkpoint of a point; return the model and the record's member."""
        if about := self.kept.about(key):
            model, record = about.model, about.record.encode()
        else:
            streams = self.kept.packed(key)
            assert self.before is not None and streams.model is not None
            model, record = streams.model, self.before.read(streams.record)
        member = ""
        if self.kept.checkpoints:
            named = f"{file_safe(label(model.checkpoint))}-{model.entropy[:8]}-{model.decoder[:8]}{SUFFIX}"
            member = f"checkpoints/{named}"
            if member not in self.members:
                held = self.before.read(model.member) if self.before is not None and model.member else None
                self._add(member, held or _file_of(about.at if about else model.checkpoint))
        return model.model_copy(update={"member": member}), self._add(f"records/{point.record[:16]}.json", record)


def _file_of(checkpoint: str) -> bytes:
    """Return the file of a checkpoint; with packs, one of the merged model."""
    if not split_pack(checkpoint)[1]:
        return checkpoints.locate(checkpoint).read_bytes()
    with TemporaryDirectory() as folder:
        merged = Path(folder) / f"merged{SUFFIX}"
        checkpoints.save(checkpoints.load(checkpoint), merged)
        return merged.read_bytes()


def _folder(point: Point) -> str:
    """Return what the folder of a point is called: by its model, or its codec."""
    named = (label(point.checkpoint), point.quantizer)
    return "-".join(named if point.lmbda is not None else named[::-1])
