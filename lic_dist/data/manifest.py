"""The manifest: what a scan knows of each photo, in columns, so that a million photos are one table.

A scan reads each photo once, in parallel, and records why a photo cannot be used. Rows of an earlier manifest are
reused, without reading the file, for good photos of the same path, size and modification time: a scan that was stopped,
or that finds some new photos, reads only what is left. A photo that was set aside is read again, since it may have been
mended, or its reader installed. A photo that was replaced by one of equal size and time is noticed by its digest when
its crops are read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lic_dist.data import images, photo_files
from lic_dist.data.photo import Photo, PhotoError
from lic_dist.data.photo_files import printable
from lic_dist.errors import LicError
from lic_dist.progress import Progress

SCHEMA = pa.schema(
    {
        "path": pa.large_string(),
        "digest": pa.large_string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "mtime_ns": pa.int64(),
        "fault": pa.large_string(),
    },
    metadata={"lic_dist.data.manifest": "2"},
)
ROWS = 4096  # photos held as objects at a time, before they become a table
SAVE_SECONDS, SAVE_SHARE = 30.0, 0.05  # between two saves of an unfinished scan; most of its time that saving takes
STAMPED = 256  # files that one thread stats at once
AHEAD = 8  # photos that each thread reads ahead

SCAN_AGAIN = "`lic-dist cache scan` makes it anew"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Manifest:
    """The photos of a folder, sorted by path: a table with one row a photo; indexing and iteration give Photo."""

    def __init__(self, table: pa.Table) -> None:
        """Take a table of SCHEMA."""
        self.table = table

    @classmethod
    def of(cls, photos: Iterable[Photo]) -> Manifest:
        """Return a manifest of these photos, in this order."""
        return cls(_table(list(photos)))

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
        if not table.schema.equals(SCHEMA, check_metadata=True):
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
        for batch in self.table.to_batches(max_chunksize=ROWS):
            yield from map(Photo, *(column.to_pylist() for column in batch.columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and bool(self.table.equals(other.table))

    def column(self, name: str) -> NDArray[Any]:
        """Return one of width, height (int32), bytes, mtime_ns (int64): [photos]."""
        return _numbers(self.table[name])

    @cached_property
    def usable(self) -> NDArray[np.bool_]:
        """Mask of the photos without a fault: bool [photos]."""
        faults = self.table["fault"].combine_chunks()
        ends = np.frombuffer(faults.buffers()[1], np.int64)[faults.offset :][: len(faults) + 1]
        return np.diff(ends) == 0

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
    folder: Path,
    known: Manifest | None = None,
    save: Callable[[Manifest], None] | None = None,
    threads: int | None = None,
    strict: bool = False,
) -> Manifest:
    """Scan a folder; each photo that `known` does not have is read once, in parallel.

    Standard error says what the folder holds besides photos, and how many photos are duplicates. `save` is called with
    the manifest so far from time to time, and at the end with the whole one if it differs from `known`. Memory: a few
    hundred bytes a photo, and one photo a thread (two threads a core, at most 16). `strict` stops at the first photo
    with a fault.

    Raises:
        LicError: no such folder, an empty one, or one without a usable photo; with `strict`, a photo that has a fault.
    """
    found = photo_files.search(folder)
    found.tell()
    names = found.names
    rows = Rows(names, known or Manifest.of([]))
    workers = threads or min(16, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        if known is not None:
            rows.take_over(_stamps(pool, folder, names))
        if strict:
            _refuse_faulty(folder, rows.so_far())
        fresh = rows.fresh.tolist()
        with Progress("scanning photos", len(names), "photo", done=len(names) - len(fresh)) as bar:
            started, due, size = time.monotonic(), time.monotonic() + SAVE_SECONDS, 0
            examined = _prefetch(pool, partial(_examine, folder), (names[row] for row in fresh), AHEAD * workers)
            with closing(examined):
                for photo in examined:
                    rows.add(photo)
                    if strict and photo.fault:
                        _refuse_faulty(folder, Manifest.of([photo]))
                    size += photo.bytes
                    now = time.monotonic()
                    bar.advance(1, **{"MB/s": size / 1e6 / max(now - started, 1e-9)})
                    if save is not None and now >= due:
                        save(rows.so_far())
                        ended = time.monotonic()
                        due = ended + max(SAVE_SECONDS, (ended - now) / SAVE_SHARE)
    manifest = rows.so_far()
    if not manifest.usable.any():
        raise LicError(f"none of the {len(manifest)} photos in {folder} can be used", hint=manifest[0].fault)
    if manifest.duplicates:
        photo_files.tell(f"{folder}: {_duplicates(manifest)}")
    if save is not None and manifest != known:
        save(manifest)
    return manifest


class Rows:
    """The growing manifest: rows reused from a known one and rows read now, in the order of `names`."""

    def __init__(self, names: Sequence[str], known: Manifest) -> None:
        self.names, self.known = names, known
        self.fresh = np.arange(len(names))  # rows that are to be read
        self.kept = np.empty(0, np.int64)  # rows that are known
        self.kept_table = SCHEMA.empty_table()
        self.tables: list[pa.Table] = []
        self.photos: list[Photo] = []

    def take_over(self, stamps: NDArray[np.int64]) -> None:
        """Reuse the rows of the known manifest whose size and time are unchanged; `stamps` int64 [names, 2]."""
        paths = pa.array([photo_files.readable(name) for name in self.names], pa.large_string())
        import pyarrow.compute as pc

        found = pc.index_in(paths, value_set=self.known.table["path"].combine_chunks())
        rows = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        same = rows >= 0
        for values, expected in (
            (self.known.usable, np.ones(len(rows), np.bool_)),
            (self.known.column("bytes"), stamps[:, 0]),
            (self.known.column("mtime_ns"), stamps[:, 1]),
        ):
            same[same] = values[rows[same]] == expected[same]
        self.kept, self.fresh = np.flatnonzero(same), np.flatnonzero(~same)
        self.kept_table = self.known.table.take(rows[same])

    def add(self, photo: Photo) -> None:
        self.photos.append(photo)
        if len(self.photos) == ROWS:
            self._pack()

    def so_far(self) -> Manifest:
        self._pack()
        new = pa.concat_tables([SCHEMA.empty_table(), *self.tables])
        rows = np.concatenate([self.kept, self.fresh[: new.num_rows]])
        return Manifest(pa.concat_tables([self.kept_table, new]).take(np.argsort(rows, kind="stable")))

    def _pack(self) -> None:
        if self.photos:
            self.tables.append(_table(self.photos))
            self.photos = []


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a column without nulls as an array, avoiding `to_numpy`, which loads pandas."""
    return np.from_dlpack(column.combine_chunks())


def _table(photos: Sequence[Photo]) -> pa.Table:
    return pa.table({name: [getattr(photo, name) for photo in photos] for name in SCHEMA.names}, schema=SCHEMA)


def _duplicates(manifest: Manifest) -> str:
    copies = manifest.duplicates
    path, original = map(printable, next(iter(copies.items())))
    what = "are duplicates" if len(copies) > 1 else "is a duplicate"
    return f"{len(copies)} of the photos {what}, as {path} of {original}"


def _refuse_faulty(folder: Path, manifest: Manifest) -> None:
    """Raise LicError for the first photo with a fault, if there is one."""
    for row in np.flatnonzero(~manifest.usable)[:1].tolist():
        photo = manifest[row]
        raise LicError(f"{folder / photo.path}: {photo.fault}", hint="mend or remove it, or scan without --strict")


def _examine(folder: Path, name: str) -> Photo:
    """Read one photo and return its row, with the fault if it has one."""
    path, file, digest = photo_files.readable(name), folder / name, ""
    stamp = _stamp(file)
    try:
        if path != name:
            raise PhotoError(path, "name is not UTF-8")
        data = images.contents(file, path)
        digest = hashlib.sha256(data).hexdigest()
        if _stamp(file) != stamp or len(data) != stamp[0]:
            raise PhotoError(path, "changed")
        width, height = images.measure(data, path)
    except PhotoError as error:
        return Photo(path, digest, 0, 0, *stamp, error.fault)
    return Photo(path, digest, width, height, *stamp)


def _stamp(file: Path) -> tuple[int, int]:
    """Return (size in bytes, modification time in ns) of a file; zeros where there is no regular file."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, 0)


def _stamps(pool: ThreadPoolExecutor, folder: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """Return `_stamp` of every photo: int64 [names, 2]."""
    stamps = np.zeros((len(names), 2), np.int64)
    parts = (names[first : first + STAMPED] for first in range(0, len(names), STAMPED))
    done = 0
    with Progress("looking for changed photos", len(names), "photo") as bar:
        for part in _prefetch(pool, lambda part: [_stamp(folder / name) for name in part], parts, 64):
            stamps[done : done + len(part)] = part
            done += len(part)
            bar.advance(len(part))
    return stamps


def _prefetch(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Generator[Result, None, None]:
    """Yield `work` of each item in order, with at most `depth` items begun ahead."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
