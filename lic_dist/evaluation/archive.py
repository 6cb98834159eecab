"""Archives of an evaluation: the bitstreams of its points in one zip file, with what decodes and checks them.

    archive.json        the manifest below
    results.json        the result file of these points
    records/<..>.json   the quantizers' records
    checkpoints/<..>    the models, where `evaluate.bitstreams` asks for them
    <point>/<image>.lic the files as `lic-dist decode` takes them; of a classic codec .jpg, .webp, ..

Members are stored, not compressed, and have one date, so that the same bitstreams are the same bytes. An archive from
elsewhere is not trusted: it is read only if its members are those that its manifest names, stored and apart.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lic_dist.data.photo_files import printable
from lic_dist.errors import LicError
from lic_dist.evaluation.results import Point, read_file

MANIFEST, RESULTS = "archive.json", "results.json"
LARGEST_MANIFEST = 1 << 28  # bytes
_DATE = (1980, 1, 1, 0, 0, 0)
_FAULTS = (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, ValueError, RuntimeError)
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stream(_Part):
    """A coded picture: its member, and digests of that and of the pixels of the original and the decoded picture."""

    image: str
    member: str
    sha256: Digest
    original: Digest
    decoded: Digest


class Model(_Part):
    """The checkpoint of a point, as `evaluate` loaded it, and digests of what a decoder computes with."""

    checkpoint: str
    architecture: str | None
    lmbda: float
    options: dict[str, Any]
    entropy: Digest
    decoder: Digest
    member: str = ""

    @property
    def digests(self) -> tuple[str, str]:
        """What tells the model."""
        return self.entropy, self.decoder


class Streams(_Part):
    """The bitstreams of a point, in the order of its images; a classic codec has neither model nor record."""

    model: Model | None
    record: str
    streams: tuple[Stream, ...]


class Manifest(_Part):
    """What an archive says of its members; `points` are those of its result file, in order."""

    format: Literal["lic_dist bitstreams"] = "lic_dist bitstreams"
    version: Literal[1] = 1
    points: tuple[Streams, ...]

    @property
    def members(self) -> Iterator[str]:
        """Every member that it names beside itself; those of several points again."""
        yield RESULTS
        for point in self.points:
            yield from (one.member for one in point.streams)
            yield from filter(None, (point.record, point.model.member if point.model else ""))

    @model_validator(mode="after")
    def _names_each_stream_once(self) -> Self:
        streams = [one.member for point in self.points for one in point.streams]
        if len(set(streams)) != len(streams):
            raise ValueError("a bitstream of two pictures")
        if unsafe := next((one.image for p in self.points for one in p.streams if not _is_inside(one.image)), None):
            raise ValueError(f"a picture outside of its folder: '{printable(unsafe)}'")
        return self


@dataclass(frozen=True)
class Archive:
    """An archive that is open to be read, its manifest and the points of its result file."""

    path: Path
    file: zipfile.ZipFile
    manifest: Manifest
    points: tuple[Point, ...]
    name: str

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Archive]:
        """Open an archive.

        Raises:
            LicError: it cannot be read, is no such archive, or has members that are missing, unknown or not plain.
        """
        try:
            file = zipfile.ZipFile(path)
        except OSError as error:
            raise LicError(f"cannot read {path}: {error.strerror or error}") from None
        except _FAULTS:
            raise LicError(f"{path} is no archive of bitstreams") from None
        with file:
            names = _plain_members(path, file)
            manifest = _manifest(path, file, names)
            if unknown := names - {MANIFEST} - {*manifest.members}:
                raise LicError(f"{path} has a member that its manifest does not name: {printable(min(unknown))}")
            if missing := {*manifest.members} - names:
                raise LicError(f"{path} lacks {printable(min(missing))}")
            yield cls(path, file, manifest, *_results(path, file, manifest))

    def read(self, member: str, sha256: str = "") -> bytes:
        """Return the bytes of a member. Raises LicError where they are altered."""
        data = _read(self.path, self.file, member)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise LicError(f"{self.path} is altered: {printable(member)} has another digest")
        return data


def add(file: zipfile.ZipFile, member: str, data: bytes) -> None:
    """Add a member to an archive that is written."""
    info = zipfile.ZipInfo(member, _DATE)
    info.create_system, info.external_attr = 3, 0o644 << 16
    file.writestr(info, data)


def add_manifest(file: zipfile.ZipFile, manifest: Manifest) -> None:
    """Add the manifest, which comes last."""
    add(file, MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _plain_members(path: Path, file: zipfile.ZipFile) -> set[str]:
    """Return the names of the members: of an archive of ours they are stored, each once, inside the archive's folder.

    Stored members that are no larger together than the file cannot unfold to more than it.
    """
    members = file.infolist()
    names = {one.filename for one in members}
    if len(names) < len(members):
        raise LicError(f"{path} has two members of one name")
    for one in members:
        if not _is_inside(one.filename):
            raise LicError(f"{path} has a member that would lie outside of its folder: {printable(one.filename)}")
        if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1 or one.file_size != one.compress_size:
            raise LicError(f"{path} has a member that is compressed or encrypted: {printable(one.filename)}")
    if sum(one.file_size for one in members) > path.stat().st_size:
        raise LicError(f"{path} has members that lie over each other")
    return names


def _read(path: Path, file: zipfile.ZipFile, member: str) -> bytes:
    try:
        return file.read(member)
    except _FAULTS:
        raise LicError(f"{path} is altered: {printable(member)} cannot be read") from None


def _manifest(path: Path, file: zipfile.ZipFile, names: set[str]) -> Manifest:
    if MANIFEST not in names or file.getinfo(MANIFEST).file_size > LARGEST_MANIFEST:
        raise LicError(f"{path} is no archive of bitstreams: it has no {MANIFEST}")
    try:
        return Manifest.model_validate_json(_read(path, file, MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise LicError(f"{path} has a broken manifest at {printable(where)}: {first['msg'][:200]}") from None


def _results(path: Path, file: zipfile.ZipFile, manifest: Manifest) -> tuple[tuple[Point, ...], str]:
    """Return the points of the result file and its name. Raises LicError where they are not those of the manifest."""
    with TemporaryDirectory() as folder:
        at = Path(folder) / RESULTS
        at.write_bytes(_read(path, file, RESULTS))
        try:
            found = read_file(at)
        except (LicError, RecursionError) as error:
            text = str(error.message if isinstance(error, LicError) else error).replace(f"{at}", RESULTS)
            raise LicError(f"{path} has no result file: {text}") from None
    images = [[row.image for row in point.images] for point in found.points]
    if images != [[one.image for one in point.streams] for point in manifest.points]:
        raise LicError(f"{path}: its result file has other pictures than its manifest")
    return found.points, found.name
