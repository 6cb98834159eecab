"""The manifest: what a scan knows of each photo, in columns, so that a million photos are one table.

A scan reads each photo once, in parallel, and records why a photo cannot be used. Rows of an earlier manifest are
reused, without reading the file, for good photos of the same path, size and modification time: a scan that was stopped,
or that finds some new photos, reads only what is left. A photo that was set aside is read again, since it may have been
mended, or its reader installed. A photo that was replaced by one of equal size and time is noticed by its digest when
its crops are read. Of a file that holds several photos all rows are reused or none, but of those set aside.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lic_dist.data import images, photo_files
from lic_dist.data.ahead import prefetch
from lic_dist.data.photo import Photo, PhotoError
from lic_dist.data.photo_files import PhotoFiles, printable
from lic_dist.data.rows import PLACED, ROWS, SCHEMA, PackedRows, Rows, numbers, photos_of, table_of, without_fault
from lic_dist.data.source import Packed, PhotoSource, Stamp, version_of
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError
from lic_dist.progress import Progress

SAVE_SECONDS, SAVE_SHARE = 30.0, 0.05  # between two saves of an unfinished scan; most of its time that saving takes
STAMPED = 256  # files that one thread stats at once
NEAR = 20e-6  # seconds to stat a file, below which it lies on a disk of this machine
AHEAD = 8  # photos that each thread reads ahead

READ = "read"  # stands for the fault of a photo that is to be read again

SCAN_AGAIN = "`lic-dist cache scan` makes it anew"


class Manifest:
    """The photos of a folder, sorted by path: a table with one row a photo; indexing and iteration give Photo."""

    def __init__(self, table: pa.Table) -> None:
        """Take a table of SCHEMA."""
        self.table = table

    @classmethod
    def of(cls, photos: Iterable[Photo]) -> Manifest:
        """Return a manifest of these photos, in this order."""
        return cls(table_of(list(photos)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return the manifest that `to_bytes` wrote.

        Raises:
            LicError: not a manifest, a damaged one, or one of another version.
        """
        try:
            # in this thread: Arrow's threads may outlive the interpreter and abort the process
            with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
                table = file.read(use_threads=False)
            table.validate(full=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise LicError("this is no manifest of photos, or a damaged one", hint=SCAN_AGAIN) from error
        if not any(table.schema.equals(known, check_metadata=True) for known in (SCHEMA, PLACED)):
            raise LicError("this manifest of photos is of another version", hint=SCAN_AGAIN)
        return cls(table)

    def to_bytes(self) -> bytes:
        """Return the manifest as a Parquet file."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, compression="zstd", use_dictionary=["fault"], write_page_checksum=True)
        return bytes(sink.getvalue().to_pybytes())

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Photo:
        if not -len(self) <= row < len(self):
            raise IndexError(f"photo {row} of {len(self)}")
        return Photo(*(column[row % len(self)].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[Photo]:
        yield from photos_of(self.table)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and bool(self.table.equals(other.table))

    def column(self, name: str) -> NDArray[Any]:
        """Return one of width, height (int32), bytes, mtime_ns (int64): [photos]."""
        return numbers(self.table[name])

    @cached_property
    def usable(self) -> NDArray[np.bool_]:
        """Mask of the photos without a fault: bool [photos]."""
        return without_fault(self.table)

    @property
    def faults(self) -> Counter[str]:
        """Number of photos that are set aside, by reason."""
        counts = self.table["fault"].value_counts().to_pylist()
        return Counter({row["values"]: row["counts"] for row in counts if row["values"]})

    @cached_property
    def duplicates(self) -> dict[str, str]:
        """Usable photos whose bytes an earlier photo has, which is used instead: {path: path of the earlier photo}."""
        table = self.table.filter(self.usable)
        copies = table["digest"].combine_chunks().dictionary_encode().indices.to_numpy()
        if not len(copies) or copies.max() == len(copies) - 1:
            return {}
        _, firsts, which = np.unique(copies, return_index=True, return_inverse=True)
        rows = np.flatnonzero(firsts[which] != np.arange(len(copies)))
        paths, originals = (table["path"].take(pa.array(one)).to_pylist() for one in (rows, firsts[which[rows]]))
        return dict(zip(paths, originals, strict=True))

    def set_aside(self, crop: int) -> Counter[str]:
        """Return `faults` with the photos added that are smaller than a crop of this size."""
        small = self.usable & (np.minimum(self.column("width"), self.column("height")) < crop)
        return self.faults + Counter({"smaller than a crop": int(small.sum())})

    def reasons(self, crop: int) -> dict[str, str]:
        """Return why each photo is set aside, by its path: `set_aside` with names."""
        small = np.minimum(self.column("width"), self.column("height")) < crop
        photos = (self[row] for row in np.flatnonzero(~self.usable | small).tolist())
        return {
            photo.path: photo.fault or f"{photo.width}x{photo.height}, smaller than a crop of {crop}"
            for photo in photos
        }

    @cached_property
    def digest(self) -> str:
        """sha256 over the paths and digests of the usable photos: what the crops depend on."""
        table = self.table.filter(self.usable)
        import pyarrow.compute as pc  # takes longer to load than all the rest

        lines = pc.binary_join_element_wise(table["digest"], table["path"], pa.scalar(" ", pa.large_string()))
        lines = lines.take(pc.sort_indices(lines))
        total = hashlib.sha256()
        for first in range(0, len(lines), ROWS):
            text = "\n".join(lines.slice(first, ROWS).to_pylist())
            total.update(f"{chr(10) if first else ''}{text}".encode())
        return total.hexdigest()


def scan(
    where: PhotoSource | Path | str,
    known: Manifest | None = None,
    save: Callable[[Manifest], None] | None = None,
    threads: int | None = None,
    strict: bool = False,
) -> Manifest:
    """Scan a source of photos, or what `open_source` takes; each photo that `known` does not have is read once, in
    parallel.

    Standard error says what it holds besides photos, and how many photos are duplicates. `save` is called with the
    manifest so far from time to time, and at the end with the whole one if it differs from `known`. Memory: a few
    hundred bytes a photo, and one photo a thread, two of archives and tables (two threads a core, at most 16, or as
    many as reads at once are of use). `strict` stops at the first photo with a fault.

    Raises:
        LicError: no such source, an empty one, one that cannot be reached, or one without a usable photo; with
            `strict`, a photo that has a fault.
    """
    source = open_source(where)
    found = source.search()
    names, table = found.names, (known or Manifest.of([])).table
    rows: Rows | PackedRows = PackedRows(names, table) if source.packed else Rows(names, table)
    workers = threads or min(16, 2 * (os.cpu_count() or 1))
    if not source.packed:
        found.tell()
        workers = max(workers, source.in_flight)
    with ThreadPoolExecutor(workers) as pool:
        stamps = found.stamps
        if stamps is None and (source.packed or known is not None):
            stamps = _stamps(pool, source, names)
        if known is not None and stamps is not None:
            rows.take_over(stamps)
        if strict:
            _refuse_faulty(source, Manifest(rows.so_far()))
        to_read = _packed(source, rows, stamps, found) if isinstance(rows, PackedRows) else _plain(rows, stamps)
        with Progress("scanning photos", len(names), "file" if source.packed else "photo", done=rows.done) as bar:
            started, due, size = time.monotonic(), time.monotonic() + SAVE_SECONDS, 0
            examined = prefetch(pool, partial(_examine, source), to_read, (2 if source.packed else AHEAD) * workers)
            with closing(examined):
                for photo in examined:
                    done = rows.done
                    rows.add(photo)
                    if strict and photo.fault:
                        _refuse_faulty(source, Manifest.of([photo]))
                    size += photo.bytes
                    now = time.monotonic()
                    bar.advance(rows.done - done, **{"MB/s": size / 1e6 / max(now - started, 1e-9)})
                    if save is not None and now >= due:
                        save(Manifest(rows.so_far()))
                        ended = time.monotonic()
                        due = ended + max(SAVE_SECONDS, (ended - now) / SAVE_SHARE)
            bar.advance(len(names) - rows.done)
    manifest = Manifest(rows.all())
    if source.packed:
        found.tell(len(manifest))
    if not manifest.usable.any():
        hint = manifest[0].fault if len(manifest) else found.describe() and f"passed over {found.describe()}"
        raise LicError(f"none of the {len(manifest)} photos in {source.where} can be used", hint=hint)
    if manifest.duplicates:
        photo_files.tell(f"{source.where}: {_duplicates(manifest)}")
    if save is not None and manifest != known:
        save(manifest)
    return manifest


@dataclass(frozen=True)
class _Unread:
    """What is to be examined: a file, with its stamp if that is known; or a photo in one, with the file's version."""

    name: str
    stamp: Stamp | None = None
    version: int = 0
    packed: Packed | None = None


def _plain(rows: Rows, stamps: NDArray[np.int64] | None) -> Iterator[_Unread]:
    for row in rows.fresh.tolist():
        yield _Unread(rows.names[row], None if stamps is None else tuple(stamps[row].tolist()))


def _packed(
    source: PhotoSource, rows: PackedRows, stamps: NDArray[np.int64] | None, found: PhotoFiles
) -> Iterator[_Unread]:
    """Yield the photos of files, the files in order; of one that ends early, or is none, a row of its own at last."""
    assert stamps is not None
    for photo in rows.again:
        yield _Unread(photo.path, version=photo.mtime_ns, packed=Packed(photo.path, photo.place, fault=READ))
    for row in rows.fresh.tolist():
        name, version = rows.names[row], version_of(*stamps[row].tolist())
        try:
            for one in source.walk(name, found.passed_over):
                yield _Unread(name, version=version, packed=one)
        except PhotoError as error:
            itself = Packed(photo_files.readable(name), f"@{name}", fault=error.fault)
            yield _Unread(name, version=version, packed=itself)


def _duplicates(manifest: Manifest) -> str:
    copies = manifest.duplicates
    path, original = map(printable, next(iter(copies.items())))
    what = "are duplicates" if len(copies) > 1 else "is a duplicate"
    return f"{len(copies)} of the photos {what}, as {path} of {original}"


def _refuse_faulty(source: PhotoSource, manifest: Manifest) -> None:
    """Raise LicError for the first photo with a fault, if there is one."""
    for row in np.flatnonzero(~manifest.usable)[:1].tolist():
        photo = manifest[row]
        where = f"{source.where}/{printable(photo.path)}"
        raise LicError(f"{where}: {photo.fault}", hint="mend or remove it, or scan without --strict")


def _examine(source: PhotoSource, unread: _Unread) -> Photo:
    """Read one photo, unless its bytes are there, and return its row, with the fault if it has one."""
    if unread.packed is None:
        return _examine_file(source, unread.name, unread.stamp)
    one, data, digest, width, height, fault = unread.packed, unread.packed.data, "", 0, 0, ""
    try:
        if one.fault not in ("", READ):
            raise PhotoError(one.path, one.fault)
        data = source.read(one.path, one.place)[0] if one.fault == READ else data
        digest = hashlib.sha256(data).hexdigest()
        width, height = images.measure(data, one.path)
    except PhotoError as error:
        fault = error.fault
    return Photo(one.path, digest, width, height, len(data), unread.version, fault, one.place)


def _examine_file(source: PhotoSource, name: str, stamp: Stamp | None) -> Photo:
    path, digest = photo_files.readable(name), ""
    stamp = stamp or source.stamp(name)
    try:
        if path != name:
            raise PhotoError(path, "name is not UTF-8")
        data, after = source.read(name)
        digest = hashlib.sha256(data).hexdigest()
        if after != stamp or len(data) != stamp[0]:
            raise PhotoError(path, "changed")
        width, height = images.measure(data, path)
    except PhotoError as error:
        return Photo(path, digest, 0, 0, *stamp, error.fault)
    return Photo(path, digest, width, height, *stamp)


def _stamps(pool: ThreadPoolExecutor, source: PhotoSource, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the stamp of every file: int64 [names, 2]. Threads hide what a network takes; a disk is faster without."""
    stamps, most = np.zeros((len(names), 2), np.int64), 1
    if source.in_flight == 1:
        started, most = time.monotonic(), STAMPED
        some = [source.stamp(name) for name in names[:STAMPED]]
        if time.monotonic() - started < NEAR * len(some):
            rest = map(source.stamp, names[STAMPED:])
            return np.fromiter(chain.from_iterable(chain(some, rest)), np.int64, 2 * len(names)).reshape(-1, 2)
    parts = (names[first : first + most] for first in range(0, len(names), most))
    done = 0
    with Progress("looking for changed photos", len(names), "file") as bar:
        for part in prefetch(pool, lambda part: [source.stamp(name) for name in part], parts, 64):
            stamps[done : done + len(part)] = part
            done += len(part)
            bar.advance(len(part))
    return stamps
